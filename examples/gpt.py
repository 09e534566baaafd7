"""A GPT in plain PyTorch with FlashMHF in place of its MLP, trained on the text of Python's standard library.

python examples/gpt.py                  # FlashMHF; a minute or less on two CPU cores
python examples/gpt.py --ffn swiglu     # the same model with a SwiGLU of as many parameters
"""

import argparse
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from flashmhf import FlashMHF
from flashmhf.layers import SwiGLU


class Block(nn.Module):
    def __init__(self, width: int, heads: int, ffn: str) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        d_ff = 4 * width
        self.ffn = SwiGLU(width, d_ff, init="scaled") if ffn == "swiglu" else FlashMHF.like_swiglu(width, d_ff)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2).chunk(3, dim=1)
        attended = nnf.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.ffn(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, context: int, ffn: str) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, ffn) for _ in range(layers)))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def read_bytes(size: int) -> Tensor:
    """The beginning of the standard library, as bytes."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = b"".join(file.read_bytes() for file in files)[:size]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def sample_batch(data: Tensor, batch: int, context: int) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(data) - context - 1, (batch, 1))
    blocks = data[starts + torch.arange(context + 1)]
    return blocks[:, :-1], blocks[:, 1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ffn", choices=("flashmhf", "swiglu"), default="flashmhf")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--context", type=int, default=128)
    options = parser.parse_args()

    torch.manual_seed(0)
    data = read_bytes(400_000)
    training, validation = data[:-40_000], data[-40_000:]
    model = GPT(options.width, layers=2, heads=2, context=options.context, ffn=options.ffn)
    print(f"{options.ffn}: {sum(p.numel() for p in model.parameters()):,} parameters")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=options.steps, pct_start=0.1)
    start = time.perf_counter()
    for step in range(1, options.steps + 1):
        tokens, targets = sample_batch(training, 8, options.context)
        loss = nnf.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == options.steps:
            print(f"step {step}: {loss:.3f} nats/byte, {time.perf_counter() - start:.1f} s")
    with torch.no_grad():
        tokens, targets = sample_batch(validation, 64, options.context)
        print(f"validation: {nnf.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()):.3f} nats/byte")


if __name__ == "__main__":
    main()
