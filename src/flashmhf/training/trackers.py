"""`--report-to`: a tracker that is not logged in or cannot be reached is refused before the run has a folder."""

import importlib
from collections.abc import Callable
from typing import Any

from flashmhf.errors import InputError, one_line_message

SECONDS = 10  # to wait for a server


def check_trackers(arguments: Any) -> None:
    """Raises InputError for the first tracker that could not record the run.

    Args:
        arguments: TrainingArguments, whose `report_to` are installed.
    """
    if arguments.process_index != 0:
        return
    for name in arguments.report_to:
        if name not in CHECKS:
            continue
        check, otherwise = CHECKS[name]
        try:
            check()
        except Exception as error:  # trackers raise what they like
            said = one_line_message(error)[:200].rstrip(".")
            raise InputError(f"report-to: {name} cannot be used: {said}; {otherwise}") from error


def _check_wandb() -> None:
    """Asks for the key on a terminal; does nothing with WANDB_MODE=offline."""
    importlib.import_module("wandb").login(timeout=SECONDS)


def _check_mlflow() -> None:
    address = importlib.import_module("mlflow").get_tracking_uri()
    if address.startswith("http"):
        importlib.import_module("requests").get(f"{address.rstrip('/')}/health", timeout=SECONDS).raise_for_status()


# Each with what helps otherwise.
CHECKS: dict[str, tuple[Callable[[], None], str]] = {
    "wandb": (_check_wandb, "`wandb login`, or WANDB_MODE=offline to record on this machine"),
    "mlflow": (_check_mlflow, "MLFLOW_TRACKING_URI=file:mlruns records on this machine"),
}
