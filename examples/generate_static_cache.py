"""Generation with a static KV cache and torch.compile: one graph for the prompt, one that every new token replays.

python examples/generate_static_cache.py               # untrained; compares with generation without either
python examples/generate_static_cache.py --model run --prompt "Once upon a time"
"""

import argparse
import time

import torch
from transformers import AutoTokenizer

from flashmhf.models import FlashMHFConfig, FlashMHFForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="A trained model's folder. Default: a small one with random weights.")
    parser.add_argument("--prompt", default="def main(")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--compile-backend", default="inductor", help="Of torch.compile: inductor, eager, ...")
    options = parser.parse_args()

    torch.manual_seed(0)
    if options.model is None:
        sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256}
        config = FlashMHFConfig(**sizes, num_ffn_heads=2, num_subnetworks=4, intermediate_size=768, init="scaled")
        model = FlashMHFForCausalLM(config)
        tokens = torch.tensor([list(options.prompt.encode())])
    else:
        model = FlashMHFForCausalLM.from_pretrained(options.model)
        tokens = AutoTokenizer.from_pretrained(options.model)(options.prompt, return_tensors="pt")["input_ids"]
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    tokens = tokens.to(model.device)

    common = {
        "max_new_tokens": options.max_new_tokens,
        "min_new_tokens": options.max_new_tokens,
        "do_sample": False,
        "attention_mask": torch.ones_like(tokens),
        "pad_token_id": 0,
    }
    expected, elapsed = timed(model, tokens, common)
    print(f"dynamic cache: {options.max_new_tokens / elapsed:.0f} tokens/s")

    model.forward = torch.compile(model.forward, fullgraph=True, backend=options.compile_backend)
    static = {**common, "cache_implementation": "static", "disable_compile": True}  # compiled here, not by generate
    _, elapsed = timed(model, tokens, static)
    print(f"compilation and first generation: {elapsed:.1f} s")
    out, elapsed = timed(model, tokens, static)
    print(f"static cache, compiled: {options.max_new_tokens / elapsed:.0f} tokens/s")
    same = int((out == expected).all(0).cumprod(0).sum()) - tokens.shape[1]
    print(f"the first {same} of {options.max_new_tokens} new tokens agree")


def timed(model: FlashMHFForCausalLM, tokens: torch.Tensor, options: dict) -> tuple[torch.Tensor, float]:
    start = time.perf_counter()
    out = model.generate(tokens, **options)
    return out, time.perf_counter() - start


if __name__ == "__main__":
    main()
