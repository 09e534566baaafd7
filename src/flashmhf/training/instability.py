"""Warns, once per kind, when training is about to diverge or has just done so.

Three signs, all from the loss and the gradient norm that `NonFiniteGuard` has on the host in every step, averaged over
processes and gradient accumulation, so that the check costs no synchronisation and all processes decide alike:

- "loss": the median of the last 20 losses exceeds the lowest such median by RISE times the noise of a step (and by
  MIN_RISE nats). It finds a slow rise and a plateau after a spike alike.
- "gradient norm": the median of the last 5 norms exceeds NORM times the median of the 100 before them.
- "spikes": SPIKES of the last 100 steps were spikes, as the guard defines them.

The noise of a step is 1.48 times the median absolute difference of consecutive losses, divided by sqrt(2), so that a
falling loss does not count as noise. Nothing is reported during warm-up.

Calibrated on the curves of 58 runs of 200 to 700 steps with a warm-up of 10 % (AdamW and Muon, SwiGLU and FlashMHF):
none is flagged; the largest rise was 1.34 times the noise, the largest ratio of norms 1.5. Of synthetic curves
(tests/training/test_instability.py), all spikes that end on a plateau, slow rises and growing norms are found. Not
found: 2 of 2 runs with a warm-up of 7 steps of 350 (1e-3), which ended worse. Their losses fell as smoothly as the
others', only more slowly, and their norms stayed below 1.6 times the median: these signs find a run that gets worse,
not one that learns slowly.
"""

import collections
import itertools
import logging
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments

from flashmhf.training.non_finite_steps import NonFiniteGuard
from flashmhf.training.run_log import add_row

logger = logging.getLogger(__name__)

STATE = "instability"  # in the Trainer's state: what a resumed run continues with
ROW = "unstable"  # in rows of the log: the kind
RECENT, NORMS, NORMS_BEFORE, SPIKES_WITHIN = 20, 5, 100, 100  # steps
MIN_NORMS = 20  # before the last ones
RISE, MIN_RISE = 2.5, 0.1
NORM = 3.0
SPIKES = 3
ADVICE = "lower --learning-rate or lengthen --warmup-steps"


@dataclass(frozen=True, kw_only=True)
class Instability:
    """A warning.

    Attributes:
        step: of the run, from 1.
        kind: "loss", "gradient norm" or "spikes".
        found: what was seen, in words.
    """

    step: int
    kind: str
    found: str

    def __str__(self) -> str:
        return f"step {self.step}: on the edge of divergence: {self.found}; {ADVICE}"

    def as_row(self) -> dict[str, Any]:
        """For the Trainer's log_history and for log.jsonl."""
        return {"step": self.step, ROW: self.kind, "found": self.found}


def recorded(history: Iterable[dict[str, Any]]) -> tuple[Instability, ...]:
    """The warnings in a Trainer's log_history, since the first start of the run."""
    return tuple(Instability(step=row["step"], kind=row[ROW], found=row["found"]) for row in history if ROW in row)


class InstabilityDetector:
    """Looks at each step of a run. What it has seen survives in `state`."""

    def __init__(self) -> None:
        self._warned: set[str] = set()
        self._losses: collections.deque[float] = collections.deque(maxlen=NORMS_BEFORE)
        self._norms: collections.deque[float] = collections.deque(maxlen=NORMS_BEFORE + NORMS)
        self._spikes: collections.deque[int] = collections.deque(maxlen=SPIKES)
        self._lowest = math.inf

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON."""
        lowest = None if math.isinf(self._lowest) else self._lowest
        lists = {"losses": list(self._losses), "norms": list(self._norms), "spikes": list(self._spikes)}
        return {"lowest": lowest, **lists, "warned": sorted(self._warned)}

    def load(self, state: dict[str, Any] | None) -> None:
        """The inverse of `state`; None of a checkpoint by an earlier version, or of a new run."""
        self.__init__()  # type: ignore[misc]
        if state is not None:
            self._lowest = math.inf if state["lowest"] is None else state["lowest"]
            self._warned |= set(state["warned"])
            for own, saved in ((self._losses, "losses"), (self._norms, "norms"), (self._spikes, "spikes")):
                own.extend(state[saved])

    def update(
        self, step: int, loss: float, grad_norm: float, *, spiked: bool = False, warming_up: bool = False
    ) -> list[Instability]:
        """What is new in this step.

        Args:
            step: its number, from 1.
            loss: nats/token, finite.
            grad_norm: before clipping; not finite where fp16 overflowed.
            spiked: whether the guard calls this loss a spike.
            warming_up: whether the learning rate still rises.
        """
        self._losses.append(loss)
        if math.isfinite(grad_norm):
            self._norms.append(grad_norm)
        if spiked:
            self._spikes.append(step)
        found = {"loss": self._risen_loss(), "gradient norm": self._grown_norm(), "spikes": self._many_spikes(step)}
        if warming_up:
            return []
        new = [Instability(step=step, kind=kind, found=text) for kind, text in found.items() if text is not None]
        new = [each for each in new if each.kind not in self._warned]
        self._warned |= {each.kind for each in new}
        return new

    def _risen_loss(self) -> str | None:
        if len(self._losses) < RECENT:
            return None
        losses = list(self._losses)
        level = statistics.median(losses[-RECENT:])
        self._lowest = min(self._lowest, level)
        steps = [abs(after - before) for before, after in itertools.pairwise(losses)]
        noise = 1.4826 * statistics.median(steps) / math.sqrt(2)
        rise = level - self._lowest
        if rise <= max(RISE * noise, MIN_RISE):
            return None
        return f"the median loss of {RECENT} steps is {rise:.2g} nats above its lowest, {self._lowest:.4g}"

    def _grown_norm(self) -> str | None:
        norms = list(self._norms)
        before, last = norms[:-NORMS], norms[-NORMS:]
        if len(before) < MIN_NORMS:
            return None
        usual, now = statistics.median(before), statistics.median(last)
        if now <= NORM * usual:
            return None
        return f"the gradient norm is {now:.3g}, {now / usual:.2g} times its median" if usual else None

    def _many_spikes(self, step: int) -> str | None:
        if len(self._spikes) < SPIKES or self._spikes[0] <= step - SPIKES_WITHIN:
            return None
        return f"{SPIKES} loss spikes within {step - self._spikes[0] + 1} steps"


def watch(
    detector: InstabilityDetector, guard: NonFiniteGuard, state: TrainerState, arguments: TrainingArguments
) -> None:
    """Shows the step that `guard` has just checked to `detector`; warns, and logs, what is new."""
    if guard.measured is None:
        return
    step = state.global_step + 1
    warming_up = step <= arguments.get_warmup_steps(state.max_steps)
    for found in detector.update(step, *guard.measured, spiked=guard.spiked, warming_up=warming_up):
        state.log_history.append(found.as_row())
        if arguments.process_index == 0:
            logger.warning("%s", found)
            add_row(Path(str(arguments.output_dir)), found.as_row())
