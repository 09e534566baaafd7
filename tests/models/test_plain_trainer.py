"""transformers' own Trainer, which looks at a model's class name, signature and attributes."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from flashmhf.models import FlashMHFForQuestionAnswering, FlashMHFForSequenceClassification


def trainer_of(model, tmp_path, **options) -> Trainer:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, **options)
    return Trainer(model=model, args=arguments)


@pytest.mark.parametrize("adapted", [False, True])
def test_label_smoothing_is_on_the_next_token(make_model, tmp_path, adapted):
    model = make_model()
    if adapted:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    trainer = trainer_of(model, tmp_path, label_smoothing_factor=0.1)
    ids = torch.randint(0, 300, (2, 9))
    expected = LabelSmoother(epsilon=0.1)({"logits": model(ids).logits}, ids, shift_labels=True)
    loss = trainer.compute_loss(model, {"input_ids": ids, "labels": ids.clone()})
    torch.testing.assert_close(loss, expected)


def test_accumulated_batches_count_every_token_once(make_model, tmp_path):
    """The model takes the number of predicted tokens of all batches of a step."""
    trainer = trainer_of(make_model(), tmp_path, gradient_accumulation_steps=2)
    assert trainer.model_accepts_loss_kwargs
    batches = [{"input_ids": (ids := torch.randint(0, 300, (2, 9))), "labels": ids} for _ in range(2)]
    batches[1]["labels"] = batches[1]["labels"].clone()
    batches[1]["labels"][:, 5:] = -100
    _, items = trainer.get_batch_samples(iter(batches), 2, torch.device("cpu"))
    assert items == 2 * 8 + 2 * 4
    sums = sum(trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items) for batch in batches)
    means = [trainer.model(**batch).loss for batch in batches]
    torch.testing.assert_close(sums, (16 * means[0] + 8 * means[1]) / 24)


@pytest.mark.parametrize(
    ("model_class", "labels"),
    [
        (FlashMHFForSequenceClassification, ["labels"]),
        (FlashMHFForQuestionAnswering, ["start_positions", "end_positions"]),
    ],
)
def test_labels_are_found_by_the_names_in_the_signature(make_model, tmp_path, model_class, labels):
    assert trainer_of(model_class(make_model().config), tmp_path).label_names == labels


def test_floating_point_operations_grow_with_the_tokens(make_model, tmp_path):
    trainer = trainer_of(make_model(), tmp_path)
    short, long = (trainer.floating_point_ops({"input_ids": torch.zeros(1, n, dtype=torch.long)}) for n in (8, 16))
    assert long == 2 * short > 0
