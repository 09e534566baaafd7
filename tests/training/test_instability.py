"""The warning before a run diverges: what is flagged and what is not, on curves, and where a run records it."""

import json
import math
import random
from pathlib import Path

import pytest

from flashmhf.reports.run import write_run_report
from flashmhf.training.arguments import parse_arguments
from flashmhf.training.instability import InstabilityDetector
from flashmhf.training.run import train
from flashmhf.training.run_files import read_result
from flashmhf.training.run_log import read_log
from flashmhf.training.trainer import PretrainingTrainer

FLAGS = ["--per-device-train-batch-size", "2", "--report-to", "none", "--disable-tqdm", "true", "--eval-strategy", "no"]
FLAGS += ["--learning-rate", "1e-9", "--warmup-steps", "2"]
STEPS, WARMUP = 400, 40


def falling(step: int) -> float:
    return 1.5 + 4 * math.exp(-step / 60)


def spike_to_plateau(step: int) -> float:
    return falling(step) if step < 200 else 3.0 + 2 * math.exp(-(step - 200) / 5)


def slow_rise(step: int) -> float:
    return falling(step) + max(0, step - 250) * 0.01


def kinds(loss, norm=lambda step: 1.0, *, noise: float = 0.1, seed: int = 0) -> dict[str, int]:
    """The step of each warning in a curve with noise on loss and norm."""
    numbers, detector, found = random.Random(seed), InstabilityDetector(), {}
    for step in range(1, STEPS + 1):
        values = loss(step) + numbers.gauss(0, noise), norm(step) * math.exp(numbers.gauss(0, 0.2))
        for each in detector.update(step, *values, warming_up=step <= WARMUP):
            assert each.kind not in found
            found[each.kind] = each.step
    return found


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1, 0.3, 0.6])
def test_a_falling_loss_is_not_flagged_whatever_its_noise(noise):
    for seed in range(3):
        assert kinds(falling, noise=noise, seed=seed) == {}


def test_a_rise_during_warmup_or_a_single_outlier_is_not_flagged():
    assert kinds(lambda step: falling(step) + (1.0 if 10 < step < 30 else 0.0)) == {}
    assert kinds(lambda step: falling(step) + (9.0 if step == 200 else 0.0)) == {}
    assert kinds(falling, lambda step: 50.0 if step < 35 or step == 300 else 1.0) == {}


@pytest.mark.parametrize(
    ("loss", "noise", "begins", "within"),
    [(spike_to_plateau, 0.1, 200, 15), (spike_to_plateau, 0.3, 200, 20), (slow_rise, 0.1, 250, 60)],
)
def test_a_plateau_after_a_spike_and_a_slow_rise_are_flagged(loss, noise, begins, within):
    for seed in range(10):
        assert begins < kinds(loss, noise=noise, seed=seed)["loss"] <= begins + within


def test_a_growing_gradient_norm_is_flagged():
    for seed in range(10):
        found = kinds(falling, lambda step: 1.0 if step < 200 else math.exp((step - 200) / 20), seed=seed)
        assert found.keys() == {"gradient norm"}
        assert found["gradient norm"] < 245


def test_repeated_spikes_are_flagged():
    detector = InstabilityDetector()
    found = [
        each for step in range(300) for each in detector.update(step, 2.0, 1.0, spiked=step in (10, 150, 200, 240))
    ]
    assert [(each.step, each.kind, each.found) for each in found] == [(240, "spikes", "3 loss spikes within 91 steps")]


def test_a_detector_goes_on_from_its_state():
    once, numbers = InstabilityDetector(), random.Random(0)
    curve = [(step, spike_to_plateau(step) + numbers.gauss(0, 0.1), 1.0) for step in range(1, 300)]
    whole = [each for values in curve for each in once.update(*values)]
    for cut in (100, 205, 280):
        detector, found = InstabilityDetector(), []
        for values in curve:
            if values[0] == cut:
                state = json.loads(json.dumps(detector.state(), allow_nan=False))
                detector = InstabilityDetector()
                detector.load(state)
            found += detector.update(*values)
        assert found == whole
        assert len(whole) == 1


@pytest.fixture
def diverging(monkeypatch):
    """Losses that rise from step 5 on, in a detector that needs few steps."""
    for name, value in (("RECENT", 2), ("MIN_NORMS", 99)):
        monkeypatch.setattr(f"flashmhf.training.instability.{name}", value)
    compute = PretrainingTrainer.compute_loss

    def rising(self, model, inputs, *args, **options):
        loss = compute(self, model, inputs, *args, **options)
        return loss * 2.0 if model.training and self.state.global_step >= 4 else loss

    monkeypatch.setattr(PretrainingTrainer, "compute_loss", rising)


@pytest.mark.parametrize("flags", ["--logging-steps 1", "--logging-steps 100 --gradient-accumulation-steps 2"])
def test_a_run_records_it_once(short_run, tmp_path, diverging, caplog, flags):
    flags = [*FLAGS, *flags.split(), "--save-steps", "7"]
    train(short_run, parse_arguments([*flags, "--max-steps", "7"], str(tmp_path)))
    result = train(short_run, parse_arguments([*flags, "--max-steps", "9"], str(tmp_path)), resume=True)
    (found,) = result.instabilities
    assert (found.step, found.kind) == (5, "loss")
    assert caplog.text.count("on the edge of divergence: the median loss of 2 steps is ") == 1
    assert "lower --learning-rate or lengthen --warmup-steps" in caplog.text
    assert read_result(tmp_path).instabilities == (found,)
    assert [row["step"] for row in read_log(tmp_path).rows if row.get("unstable") == "loss"] == [5]
    page = Path(tmp_path / "report.html")
    write_run_report(tmp_path, page)
    assert "on the edge of divergence: the median loss of 2 steps" in page.read_text()
