"""A checkpoint when a signal asks the run to stop."""

import logging
import signal
from typing import Any, Self

import torch
from transformers import TrainerCallback

logger = logging.getLogger(__name__)


class StopOnSignal(TrainerCallback):
    """Within its context, SIGINT and SIGTERM end training after the current step, with a checkpoint."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal: int | None = None  # that ended training: the same in all processes
        self._received = 0  # another may arrive at any time, even while the processes agree on one
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in self.SIGNALS:
            self._handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def on_step_end(self, args, state, control, **kwargs: Any):
        number = self._received
        if args.world_size > 1:  # signals reach processes at different steps, and all must save after the same one
            received = torch.tensor(number, device=args.device)
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
            number = int(received)
        self.signal = number or None
        if self.signal is not None:
            control.should_save = True
            control.should_training_stop = True
        return control

    def _receive(self, number: int, frame: object) -> None:
        self._received = number
        self._restore()
        logger.warning("%s: saving a checkpoint after this step", signal.Signals(number).name)

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
