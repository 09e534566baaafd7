"""FlashMHF in place of the MLPs of a small Llama: replaced, trained a few steps, saved and loaded.

python examples/replace_ffn.py --output-dir replaced
"""

import argparse
import tempfile

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from flashmhf import replace_ffn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", help="Default: a temporary folder.")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))
    before = model.num_parameters()
    replace_ffn(model, num_heads=2)  # all layers; layers=[1] would replace the second one only
    print(f"{before:,} parameters before, {model.num_parameters():,} after")
    print(model.model.layers[0].mlp)

    tokens = torch.frombuffer(
        bytearray(b"the quick brown fox jumps over the lazy dog. " * 20), dtype=torch.uint8
    ).long()
    blocks = tokens[:896].view(14, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(1, options.steps + 1):
        loss = model(input_ids=blocks, labels=blocks).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == options.steps:
            print(f"step {step}: {loss:.3f} nats/byte")

    folder = options.output_dir or tempfile.mkdtemp()
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()  # any process that has imported flashmhf can do this
    with torch.no_grad():
        difference = (loaded(blocks[:1]).logits - model.eval()(blocks[:1]).logits).abs().max()
    print(f"saved to {folder} and loaded: logits differ by {difference:g}")


if __name__ == "__main__":
    main()
