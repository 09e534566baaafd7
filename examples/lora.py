"""LoRA with PEFT: adapters on a layer's projections, which are modules, and on K, U and V, which are parameters.

python examples/lora.py        # needs pip install 'flashmhf[lora]'
"""

import argparse
import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from flashmhf.models import FlashMHFConfig, FlashMHFForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", help="Default: a temporary folder.")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256}
    ffn = {"num_ffn_heads": 2, "num_subnetworks": 4, "intermediate_size": 768, "q_norm": True, "init": "scaled"}
    base = FlashMHFForCausalLM(FlashMHFConfig(**sizes, **ffn))  # in practice: from_pretrained

    lora = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["in_proj", "out_proj"],
        target_parameters=["mlp.k", "mlp.u", "mlp.v"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, lora)
    model.print_trainable_parameters()

    text = bytearray(b"She sells seashells by the seashore. " * 30)
    blocks = torch.frombuffer(text, dtype=torch.uint8).long()[:1024].view(16, 64)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for step in range(1, options.steps + 1):
        loss = model(input_ids=blocks, labels=blocks).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == options.steps:
            print(f"step {step}: {loss:.3f} nats/byte")

    folder = options.output_dir or tempfile.mkdtemp()
    model.save_pretrained(folder)  # the adapters only
    torch.manual_seed(0)
    fresh = FlashMHFForCausalLM(FlashMHFConfig(**sizes, **ffn))
    loaded = PeftModel.from_pretrained(fresh, folder).eval()
    with torch.no_grad():
        difference = (loaded(blocks[:1]).logits - model.eval()(blocks[:1]).logits).abs().max()
        merged = loaded.merge_and_unload()
        merged_difference = (merged(blocks[:1]).logits - model(blocks[:1]).logits).abs().max()
    print(f"adapters saved to {folder}; logits differ by {difference:.1e} loaded, {merged_difference:.1e} merged")


if __name__ == "__main__":
    main()
