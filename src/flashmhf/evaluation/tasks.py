"""Downstream tasks through EleutherAI's lm-eval, which the extra `tasks` brings."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flashmhf.errors import InputError
from flashmhf.evaluation.non_finite import finite_logits
from flashmhf.models.checks import check_context_length, check_vocabulary

# The paper's downstream tasks, in its order.
ALIASES = {"paper": ("hellaswag", "social_iqa", "piqa", "openbookqa", "winogrande", "race")}

# What lm-eval raises for definitions and data that do not fit.
DEFINITION_ERRORS = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, ImportError, AssertionError),
    *(DatasetsError, TemplateError),
)


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Iterable[str],
    *,
    tasks_path: str | None = None,
    context_length: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, Any]]:
    """Every task's measures, as lm-eval names them ("acc,none", "acc_norm,none", ...), zero-shot unless the task says
    otherwise.

    Args:
        model: a causal language model, on its device.
        tokenizer: its own.
        tasks: names that lm-eval knows or tasks_path defines, or `paper` for the paper's six. lm-eval's own tasks load
            their data from the Hub.
        tasks_path: a folder with task definitions (YAML) of the user's own; they take precedence over lm-eval's.
        context_length: maximum tokens of a request. Default: the model's max_position_embeddings.
        batch_size: requests at a time.

    Raises:
        InputError: a task is unknown, or its data cannot be loaded.
        RunError: the model's logits are not finite.
    """
    if tasks_path is not None and not Path(tasks_path).is_dir():
        raise InputError(f"tasks-path: expected a folder, got {tasks_path!r}")
    check_vocabulary(model, tokenizer)
    options = {"tokenizer": tokenizer, "batch_size": batch_size}
    return _run_tasks(
        model, _expand(tasks), tasks_path, {**options, "max_length": check_context_length(model.config, context_length)}
    )


def _run_tasks(
    model: PreTrainedModel, names: list[str], tasks_path: str | None, options: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    wrapped = HFLM(pretrained=model, backend="causal", trust_remote_code=False, **options)
    try:
        manager = TaskManager(include_path=tasks_path)
        unknown = [name for name in names if name not in manager.all_tasks]
        if unknown:
            raise InputError(f"tasks: expected names that lm-eval knows, got {', '.join(unknown)}")
        with finite_logits(model):
            report = simple_evaluate(wrapped, tasks=names, task_manager=manager)
    except InputError:
        raise
    except DEFINITION_ERRORS as error:
        raise InputError(f"tasks: {', '.join(names)}: {_first_lines(error)}") from error
    assert report is not None  # only ranks other than the first get None
    return report["results"]


def _first_lines(error: BaseException) -> str:
    """The first line of an error, and of its cause."""
    said = str(error).partition("\n")[0]
    if isinstance(error, LookupError | TypeError | AttributeError | AssertionError):
        said = f"{type(error).__name__} {said}".strip()
    return said if error.__cause__ is None else f"{said} ({_first_lines(error.__cause__)})"


def _expand(tasks: Iterable[str]) -> list[str]:
    """The names, aliases resolved, without duplicates."""
    given = [name.strip() for name in tasks if name.strip()]
    names = list(dict.fromkeys(name for one in given for name in ALIASES.get(one, (one,))))
    if not names:
        raise InputError(f"tasks: expected names with commas between them or {', '.join(ALIASES)}, got none")
    return names
