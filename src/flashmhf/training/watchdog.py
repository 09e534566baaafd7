"""Ends a distributed run when a process hangs, and says which one: the others would wait for it in a collective."""

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

Snapshot = dict[int, tuple[int, int]]  # heartbeat and position of every rank


class Watchdog(TrainerCallback):
    """While training: ends this process if no step, validation batch or checkpoint has finished for `limit_s`.

    torchrun then ends the others. A thread in each process publishes a heartbeat and the process's progress in the
    store of the process group, even while training is blocked. The culprit is a rank whose heartbeat has stopped (a
    stopped process, a lost machine), otherwise the one with the least progress.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._position = 0  # counts steps, batches and checkpoints
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
        first: Snapshot | None = None
        while not self._ended.wait(BEAT_S):
            beat += 1
            store.set(str(rank), f"{beat} {self._position}")
            waited_s = time.monotonic() - self._moved_at
            if waited_s < self.limit_s:
                first = None
            elif first is None:
                first, first_beat = _snapshot(store), beat
            elif beat >= first_beat + BEATS_TO_JUDGE:
                logger.error(
                    "rank %d has waited %.0f s for %s; the run ends", rank, waited_s, culprit(first, _snapshot(store))
                )
                os._exit(1)


def culprit(before: Snapshot, after: Snapshot) -> str:
    """What the others wait for."""
    still = [rank for rank in after if after[rank][0] == before[rank][0]]
    if still:
        return f"rank {still[0]}, which has stopped"
    least = min(after, key=lambda rank: after[rank][1])
    if after[least][1] == max(position for _, position in after.values()):
        return "an operation that all ranks are in, with equal progress"
    return f"rank {least}, which has the least progress"


def _snapshot(store: dist.Store) -> Snapshot:
    """Of every rank; zeros for one without a heartbeat yet (the store would wait for it)."""
    snapshot = dict.fromkeys(range(dist.get_world_size()), (0, 0))
    for rank in snapshot:
        if store.check([str(rank)]):
            beat, position = store.get(str(rank)).decode().split()
            snapshot[rank] = int(beat), int(position)
    return snapshot
