"""Label smoothing: the next token's loss in training whatever the model's class, and the plain loss in validation."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.trainer_pt_utils import LabelSmoother

from flashmhf.data.config import DataConfig
from flashmhf.data.tokenizer import byte_tokenizer
from flashmhf.errors import InputError
from flashmhf.models.loading import load_model
from flashmhf.training.arguments import parse_arguments
from flashmhf.training.config import TrainConfig
from flashmhf.training.label_smoothing import SmoothedLoss
from flashmhf.training.run import _prepare_model, train
from flashmhf.training.trainer import PretrainingTrainer

FLAGS = [
    "--learning-rate",
    "1e-2",
    "--logging-steps",
    "1",
    "--report-to",
    "none",
    "--disable-tqdm",
    "true",
    "--bf16",
    "false",
]
FLAGS += ["--label-smoothing-factor", "0.1"]


@pytest.fixture
def data(corpus_folder) -> DataConfig:
    return DataConfig(source=str(corpus_folder), context_length=32, validation_tokens=2048)


@pytest.fixture
def llama(tmp_path) -> Path:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=320, max_position_embeddings=64)).save_pretrained(
        tmp_path / "llama"
    )
    byte_tokenizer().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def same_and_next(folder: Path) -> tuple[float, float]:
    """How often the likeliest token is the current one, and the next one."""
    ids = torch.tensor([byte_tokenizer()("the quick brown fox jumps over")["input_ids"]])
    guess = load_model(str(folder))(ids).logits.argmax(-1)[0]
    return (guess == ids[0]).float().mean().item(), (guess[:-1] == ids[0, 1:]).float().mean().item()


@pytest.mark.parametrize("items", [None, 20])
def test_the_loss_is_that_of_transformers_with_shifted_labels(items):
    logits, labels = torch.randn(2, 9, 7), torch.randint(0, 7, (2, 9))
    labels[0, 3:5] = -100
    expected = LabelSmoother(epsilon=0.2)({"logits": logits}, labels, shift_labels=True, num_items_in_batch=items)
    torch.testing.assert_close(SmoothedLoss(0.2)({"logits": logits}, labels, items), expected)


@pytest.mark.parametrize("family", ["flashmhf", "llama"])
def test_the_model_learns_the_next_token_and_reports_the_plain_loss(data, model_file, llama, tmp_path, family):
    model = str(model_file) if family == "flashmhf" else str(llama)
    flags = [*FLAGS, "--max-steps", "40", "--per-device-train-batch-size", "4"]
    flags += ["--eval-steps", "40", "--load-best-model-at-end", "true", "--save-steps", "40"]
    result = train(TrainConfig(model=model, data=data), parse_arguments(flags, str(tmp_path / "run")))
    same, following = same_and_next(tmp_path / "run")
    assert following > same
    plain = train(  # the same weights, validated without smoothing
        TrainConfig(model=str(tmp_path / "run"), data=data),
        parse_arguments(
            [*flags[:-6], "--label-smoothing-factor", "0", "--learning-rate", "0"], str(tmp_path / "plain")
        ),
    )
    assert result.validation_loss == pytest.approx(plain.validation_loss, abs=1e-6)
    assert result.train_loss > result.validation_loss + 0.2  # the log has the smoothing term, as in transformers


def first_losses(config: TrainConfig, folder: Path, *flags: str) -> list[float]:
    from flashmhf.training.run_log import read_log

    train(config, parse_arguments([*FLAGS, "--max-steps", "3", "--eval-strategy", "no", *flags], str(folder)))
    return [row["loss"] for row in read_log(folder).rows if "loss" in row]


@pytest.mark.parametrize("document_mask", [False, True])
def test_accumulated_batches_give_the_losses_of_one_batch(data, model_file, tmp_path, document_mask):
    from dataclasses import replace

    config = TrainConfig(model=str(model_file), data=replace(data, document_mask=document_mask))
    one = first_losses(config, tmp_path / "one", "--per-device-train-batch-size", "4")
    two = first_losses(
        config, tmp_path / "two", "--per-device-train-batch-size", "2", "--gradient-accumulation-steps", "2"
    )
    assert two == pytest.approx(one, rel=1e-5)


def test_the_name_of_the_class_does_not_matter(data, model_file, tmp_path, monkeypatch):
    """torch.compile and FSDP2 give a model's class another name."""
    config = TrainConfig(model=str(model_file), data=data)
    flags = ("--per-device-train-batch-size", "4")
    named = first_losses(config, tmp_path / "named", *flags)
    prepare = PretrainingTrainer._prepare_for_training

    def renamed(trainer, *args, **options):
        model = trainer.model
        model.__class__ = type("FSDP" + type(model).__name__, (type(model),), {})
        return prepare(trainer, *args, **options)

    monkeypatch.setattr(PretrainingTrainer, "_prepare_for_training", renamed)
    assert first_losses(config, tmp_path / "renamed", *flags) == named


def test_a_fused_loss_is_not_used_with_it(make_model, tmp_path):
    arguments = parse_arguments(FLAGS, str(tmp_path / "run"))
    config = TrainConfig(model="never read", fused_loss="on")
    with pytest.raises(InputError, match=r"label-smoothing-factor: expected 0 with --fused-loss on, got 0.1"):
        _prepare_model(make_model(), config, arguments)
