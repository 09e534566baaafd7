"""transformers' Trainer with a FlashMHF model and no other part of this package.

`flashmhf train` does more: exact resume, verified checkpoints, Muon, throughput. This is for programs that have a
Trainer already.

python examples/trainer.py --output-dir run
"""

import argparse
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

import flashmhf  # noqa: F401  (the Auto classes of transformers then know the model)
from flashmhf.models import FlashMHFConfig, FlashMHFForCausalLM

CONTEXT = 128


def blocks_of(file: Path) -> Dataset:
    """A file's bytes in blocks; labels are the inputs, which the model shifts."""
    tokens = list(file.read_bytes())
    starts = range(0, len(tokens) - CONTEXT, CONTEXT)
    blocks = [tokens[start : start + CONTEXT] for start in starts]
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", help="Default: a temporary folder.")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256}
    ffn = {"num_ffn_heads": 2, "num_subnetworks": 4, "intermediate_size": 768, "q_norm": True, "init": "scaled"}
    model = FlashMHFForCausalLM(FlashMHFConfig(**sizes, **ffn, max_position_embeddings=CONTEXT))

    data = blocks_of(Path(argparse.__file__)).train_test_split(test_size=0.1, seed=0)
    arguments = TrainingArguments(
        output_dir=options.output_dir or tempfile.mkdtemp(),
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        lr_scheduler_type="linear",
        warmup_steps=4,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data["train"], eval_dataset=data["test"])
    trainer.train()
    print(f"validation: {trainer.evaluate()['eval_loss']:.3f} nats/byte")
    trainer.save_model()


if __name__ == "__main__":
    main()
