"""Ends a run of many processes when one of them hangs, and says which: the others would wait for it in a collective."""

import logging
import os
import threading
import time
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

BEAT_S = 1.0
BEATS_TO_JUDGE = 3

Look = dict[int, tuple[int, int]]  # every rank's beat and position


class Watchdog(TrainerCallback):
    """While training: where no step, validation batch or checkpoint has ended for `limit_s`, ends this process.

    torchrun then ends the others. Each process tells the others through the store of the process group how far it has
    come, from a thread that beats on while the training waits. The one to blame is the one whose thread has stopped
    (a stopped process, a lost machine), else the one that is least far.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._position = 0  # counts what has begun and ended
        self._moved_at = time.monotonic()
        self._ended = threading.Event()

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def on_train_end(self, args, state, control, **kwargs: Any) -> None:
        self._ended.set()

    def on_step_begin(self, args, state, control, **kwargs: Any) -> None:
        self._position += 1
        self._moved_at = time.monotonic()

    on_step_end = on_substep_end = on_prediction_step = on_evaluate = on_save = on_step_begin

    def _watch(self) -> None:
        store = dist.PrefixStore("watchdog", dist.distributed_c10d._get_default_store())
        rank, beat, first_beat = dist.get_rank(), 0, 0
        first: Look | None = None
        while not self._ended.wait(BEAT_S):
            beat += 1
            store.set(str(rank), f"{beat} {self._position}")
            waited_s = time.monotonic() - self._moved_at
            if waited_s < self.limit_s:
                first = None
            elif first is None:
                first, first_beat = _look(store), beat
            elif beat >= first_beat + BEATS_TO_JUDGE:
                logger.error(
                    "rank %d has waited %.0f s for %s; the run ends", rank, waited_s, blamed(first, _look(store))
                )
                os._exit(1)


def blamed(before: Look, after: Look) -> str:
    """Who holds the others up."""
    still = [rank for rank in after if after[rank][0] == before[rank][0]]
    if still:
        return f"rank {still[0]}, which has stopped"
    least = min(after, key=lambda rank: after[rank][1])
    if after[least][1] == max(position for _, position in after.values()):
        return "what all ranks are in, none further than another"
    return f"rank {least}, which is the least far"


def _look(store: dist.Store) -> Look:
    """At every rank; one that has not beaten yet is at its beginning (the store would wait for it)."""
    look = dict.fromkeys(range(dist.get_world_size()), (0, 0))
    for rank in look:
        if store.check([str(rank)]):
            beat, position = store.get(str(rank)).decode().split()
            look[rank] = int(beat), int(position)
    return look
