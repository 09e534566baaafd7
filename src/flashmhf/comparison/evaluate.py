"""One trained model of a comparison on its held-out documents: loss, gates, a sample. The model is loaded once."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flashmhf.comparison.results import GateUsage
from flashmhf.comparison.settings import Comparison
from flashmhf.data.splits import truncate_documents
from flashmhf.data.tokenizer import load_tokenizer
from flashmhf.errors import InputError, RunError
from flashmhf.evaluation import Evaluation, TokenizedDocuments, evaluate_tokenized
from flashmhf.evaluation.generation import generate
from flashmhf.evaluation.inspection import inspect_tokenized, multi_head_layers
from flashmhf.files import read_json, write_json
from flashmhf.models.checks import check_vocabulary
from flashmhf.models.loading import load_model

logger = logging.getLogger(__name__)

EVALUATION_FILE = "evaluation.json"  # in a run's folder, as `flashmhf eval --json` prints it
PROMPT_TOKENS = 48
SAMPLE_TOKENS = 160
MARGIN_TOKENS = 8  # for the EOS token, and a prompt whose encoding is longer than the tokens it was decoded from


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What every model is given.

    Attributes:
        documents: truncated and tokenised, once for all models.
        tokenizer: its name.
        context_length: tokens in a window.
        prompt: the beginning of the first document.
        new_tokens: length of the prompt's continuation.
    """

    documents: TokenizedDocuments
    tokenizer: str
    context_length: int
    prompt: str
    new_tokens: int

    @classmethod
    def of(cls, settings: Comparison, documents: Dataset, tokenizer: PreTrainedTokenizerBase) -> "HeldOut":
        context_length = settings.data.context_length
        room = min(PROMPT_TOKENS + SAMPLE_TOKENS, max(context_length - MARGIN_TOKENS, 2))
        given = min(PROMPT_TOKENS, max(room // 3, 1))
        ids = tokenizer(documents[0]["text"][: 16 * PROMPT_TOKENS], add_special_tokens=False)["input_ids"]
        return cls(
            documents=TokenizedDocuments.of(truncate_documents(documents, settings.document_bytes), tokenizer),
            tokenizer=settings.data.tokenizer,
            context_length=context_length,
            prompt=str(tokenizer.decode(ids[:given])),
            new_tokens=room - given,
        )


@dataclass(frozen=True, kw_only=True)
class Score:
    """What was found of one model. Without a finite loss, `problem` names it and the rest is empty."""

    evaluation: Evaluation | None = None
    problem: str = ""
    gates: tuple[GateUsage, ...] = ()
    continuation: str | None = None


class Scorer:
    """Scores models on one device."""

    def __init__(self, held_out: HeldOut, device: torch.device) -> None:
        self._held_out, self._device = held_out, device
        self._tokenizer = load_tokenizer(held_out.tokenizer)

    def score(self, folder: Path, observe: bool) -> Score:
        """The loss, which is kept in the run's folder, and with `observe` gates and a sample."""
        try:
            model: PreTrainedModel = cast(Any, load_model(str(folder))).to(self._device)
        except RunError as error:
            return Score(problem=str(error))
        check_vocabulary(model, self._tokenizer)
        evaluation = read_evaluation(folder)
        if evaluation is None:
            try:
                evaluation = evaluate_tokenized(
                    model, self._held_out.documents, context_length=self._held_out.context_length
                )
            except RunError as error:
                return Score(problem=str(error))
            write_json(folder / EVALUATION_FILE, evaluation.as_dict())
        if not observe:
            return Score(evaluation=evaluation)
        return Score(evaluation=evaluation, gates=self._gates(model), continuation=self._continuation(model))

    def _gates(self, model: PreTrainedModel) -> tuple[GateUsage, ...]:
        if not multi_head_layers(model):
            return ()
        return tuple(
            GateUsage(layer=head.layer, head=head.head, entropy=head.gate_entropy, load=head.load_entropy)
            for head in inspect_tokenized(model, self._held_out.documents.tokens["input_ids"])
            if head.gate_entropy is not None and head.load_entropy is not None
        )

    def _continuation(self, model: PreTrainedModel) -> str:
        return generate(model, self._tokenizer, self._held_out.prompt, max_new_tokens=self._held_out.new_tokens)


def read_evaluation(folder: Path) -> Evaluation | None:
    """What an earlier call left in a run's folder; None if it cannot be read, so that it is computed again."""
    file = folder / EVALUATION_FILE
    if not file.exists():
        return None
    try:
        return Evaluation.from_dict(read_json(file))
    except InputError as error:
        logger.warning("%s is computed again: %s", file, error)
        return None
