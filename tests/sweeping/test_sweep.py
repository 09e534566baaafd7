"""Sweeps: what is found, equal effort, going on, and what is refused before anything is trained."""

from dataclasses import replace
from pathlib import Path

import pytest

from flashmhf.errors import InputError, RunError
from flashmhf.sweeping import read_tuning, sweep
from flashmhf.sweeping.results import TUNING_FILE, TuningResult
from flashmhf.training.run_files import read_result, write_result
from made_up_sweeps import flag


def quiet(line: str) -> None:
    pass


def contender(result: TuningResult, name: str):
    return next(found for found in result.contenders if found.variant == name)


def test_the_optimum_is_found_with_equal_effort(settings, training, tmp_path):
    lines: list[str] = []
    result = sweep(settings(), tmp_path / "out", lines.append)
    assert [line for line in lines if line.startswith("rung")] == [
        "rung 1 of 2: 8 cells of each contender, 32 steps",
        "rung 2 of 2: 4 cells of each contender, 64 steps",
    ]
    assert read_tuning(tmp_path / "out" / TUNING_FILE) == result
    assert (result.runs_each, result.tokens_each) == (8 + 12, 128 * (8 * 32 + 12 * 64))
    for name in ("swiglu", "flashmhf"):
        assert sum(folder.startswith(name) for folder in training.trained) == result.runs_each
    found = contender(result, "flashmhf")
    assert (found.best.learning_rate, found.best.warmup) == (2e-3, 0.1)
    assert found.fitted_rate == pytest.approx(2e-3, rel=0.1)
    assert found.flat.low < 2e-3 < found.flat.high
    assert (found.flat.open_below, found.flat.open_above) == (False, False)
    assert found.flat.low > 1e-3
    assert found.flat.high < 4e-3
    assert (found.rate_edge, found.warmup_edge) == (None, "upper")
    assert found.best.validation_loss.standard_deviation > 0
    assert contender(result, "swiglu").best.validation_loss.mean == pytest.approx(
        found.best.validation_loss.mean + 0.1, abs=0.02
    )
    assert [rung.seeds for rung in found.rungs] == [(0,), (0, 1, 2)]


def test_a_schedule_belongs_to_its_run(settings, training, tmp_path):
    """Every run of every rung has a warm-up and a decay of its own length, from new weights."""
    sweep(settings(variants=("flashmhf",)), tmp_path / "out", quiet)
    assert len(set(training.trained)) == len(training.trained) == 20
    assert {name.split("-")[1] for name in training.trained} == {"steps32", "steps64"}


def test_the_optimum_at_the_edge(settings, training, tmp_path):
    result = sweep(settings(rates=(2e-3, 4e-3, 8e-3)), tmp_path / "out", quiet)
    assert contender(result, "flashmhf").rate_edge == "lower"
    assert contender(result, "flashmhf").flat.open_below


@pytest.mark.parametrize(("spread", "decided"), [(0.0, True), (1.0, False)])
def test_the_runner_up(settings, training, tmp_path, spread, decided):
    def loss(run):
        worse = 10 * abs(run.learning_rate - 2e-3) + abs(flag(run, "--warmup-steps") - 0.1)
        return 1.5 + worse + spread * (run.learning_rate * 1e3 * (run.seed - 1))

    training.loss = loss
    found = contender(sweep(settings(), tmp_path / "out", quiet), "flashmhf")
    assert found.decided is decided
    assert found.runner_up is not None


def test_one_seed_decides_nothing(settings, training, tmp_path, caplog):
    result = sweep(settings(seeds=(7,), warmups=(0.1,)), tmp_path / "out", quiet)
    for found in result.contenders:
        assert (found.noise, found.decided, found.within_noise) == (None, None, None)
    assert "seeds: fewer than 3 hardly tell cells apart, got 1" in caplog.text


def test_finished_runs_are_not_repeated(settings, training, tmp_path):
    result = sweep(settings(), tmp_path / "out", quiet)
    before = len(training.trained)
    assert sweep(settings(), tmp_path / "out", quiet) == result
    assert len(training.trained) == before
    wide = {"rates": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3), "seeds": (0, 1, 2, 3)}
    wider = sweep(settings(**wide), tmp_path / "out", quiet)
    assert len(set(training.trained)) == len(training.trained)
    assert wider.settings.halving.cells == (10, 5, 4)
    with pytest.raises(InputError, match=r"holds a sweep with seeds \[0, 1, 2, 3\]; got \[0, 1, 2\]"):
        sweep(settings(), tmp_path / "out", quiet)
    with pytest.raises(InputError, match=r"holds a sweep with learning_rates .*0\.00025.*; got "):
        sweep(settings(seeds=(0, 1, 2, 3)), tmp_path / "out", quiet)
    with pytest.raises(InputError, match="holds a sweep with max_steps 64; got 128"):
        sweep(
            settings(rates=(2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3), seeds=(0, 1, 2, 3), max_steps=128), tmp_path / "out", quiet
        )


def test_a_sweep_that_was_killed_goes_on(settings, training, tmp_path):
    class Killed(BaseException):
        pass

    def loss(run):
        if len(training.trained) in (5, 20, 30):
            training.trained.pop()
            raise Killed
        return normal(run)

    normal, training.loss = training.loss, loss
    for _ in range(3):
        with pytest.raises(Killed):
            sweep(settings(), tmp_path / "out", quiet)
        training.trained.append("one more")
        assert not (tmp_path / "out" / TUNING_FILE).exists()
    again = sweep(settings(), tmp_path / "out", quiet)
    training.loss = normal
    assert sweep(settings(), tmp_path / "other", quiet) == again


def test_rates_that_fail_lose(settings, training, tmp_path):
    normal = training.loss
    training.loss = lambda run: None if run.learning_rate > 3e-3 else normal(run)
    found = contender(sweep(settings(), tmp_path / "out", quiet), "flashmhf")
    assert (found.best.learning_rate, found.best.failed_seeds) == (2e-3, ())
    failed = next(cell for cell in found.rungs[-1].cells if cell.learning_rate == 4e-3)
    assert (failed.failed_seeds, failed.validation_loss.mean) == ((0, 1, 2), None)
    assert (found.fitted_rate, found.flat.high) == (None, 2e-3)


def test_a_cell_with_a_seed_that_fails_is_not_the_best(settings, training, tmp_path):
    normal = training.loss
    training.loss = lambda run: None if run.learning_rate == 2e-3 and run.seed == 1 else normal(run)
    found = contender(sweep(settings(), tmp_path / "out", quiet), "flashmhf")
    assert found.best.learning_rate != 2e-3
    assert found.best.failed_seeds == ()


def test_a_contender_without_a_finished_run_ends_the_sweep(settings, training, tmp_path):
    normal = training.loss
    training.loss = lambda run: None if run.variant.name == "swiglu" else normal(run)
    with pytest.raises(RunError, match=r"training failed in every run of swiglu in rung 1; .* has the reason"):
        sweep(settings(), tmp_path / "out", quiet)


def test_runs_that_read_different_amounts_are_named(settings, training, tmp_path):
    sweep(settings(), tmp_path / "out", quiet)
    folder = tmp_path / "out/runs/swiglu-steps64-lr0.002-warmup0.1-seed1"
    write_result(replace(read_result(folder), tokens=1))
    with pytest.raises(RunError, match=r"tokens: expected 8,192 in every run of the rung, got 1 in swiglu, 64 steps"):
        sweep(settings(), tmp_path / "out", quiet)


def test_only_the_last_rung_keeps_its_models(settings, training, tmp_path):
    normal = training.loss

    def loss(run):
        (run.folder / "checkpoint-8").mkdir(parents=True)
        (run.folder / "model.safetensors").touch()
        return normal(run)

    training.loss = loss
    sweep(settings(), tmp_path / "out", quiet)
    left = {path.parent.name for path in (tmp_path / "out/runs").glob("*/model.safetensors")}
    assert len(left) == 2 * 12
    assert all("steps64" in name for name in left)
    assert not list(Path(tmp_path / "out/runs").glob("*/checkpoint-8"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rates": (1e-3,), "warmups": (0.1,)}, "learning-rates: expected at least two, got one; there is nothing to"),
        ({"rates": ()}, "learning-rates: expected at least one, got none"),
        ({"rates": (1e-3, 1e-3)}, "learning-rates: expected each once, got 0.001, 0.001"),
        ({"rates": (1e-3, 0.0)}, "learning-rates: expected positive finite numbers, got 0"),
        ({"rates": (1e-3, float("inf"))}, "learning-rates: expected positive finite numbers, got inf"),
        ({"rates": (1e-3, float("nan"))}, "learning-rates: expected positive finite numbers, got nan"),
        ({"warmups": ()}, "warmups: expected at least one, got none"),
        ({"warmups": (0.1, 0.1)}, "warmups: expected each once, got 0.1, 0.1"),
        ({"warmups": (0.1, 1.0)}, "warmups: expected shares of the steps, above 0 and below 1, got 1"),
        ({"warmups": (-0.1,)}, "warmups: expected shares of the steps, above 0 and below 1, got -0.1"),
        (
            {"warmups": (0.02, 0.03)},
            "warmups: expected values that differ in whole steps, got 0.02 and 0.03, both 1 of",
        ),
        ({"warmups": (0.1, 0.99)}, "warmups: expected less than the 32 steps of a run, got 0.99 of them"),
        ({"max_steps": 3}, "max-steps: expected at least 4 for 2 rungs, got 3"),
        ({"rungs": 0}, "rungs: expected 1 or more, got 0"),
        ({"models": ("a", "b")}, "model: expected one, got a, b"),
        ({"seeds": ()}, "seeds: expected at least one, got none"),
        ({"seeds": (1, 1)}, "seeds: expected each once, got 1, 1"),
        ({"variants": ("relu",)}, "variants: expected some of flashmhf"),
        ({"variants": ()}, "variants: expected at least one, got none"),
        (
            {"learning_rates": {"swiglu": (1e-3, 2e-3), "flashmhf": (1e-3,)}},
            "learning-rates: expected as many for each of swiglu, flashmhf, got 2, 1",
        ),
        ({"learning_rates": {"swiglu": (1e-3, 2e-3)}}, "learning-rates: expected at least one, got none"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, changes, message):
    with pytest.raises(InputError, match=message):
        settings(**changes)


def test_one_value_of_either_is_enough(settings):
    assert settings(warmups=(0.1,)).halving.cells == (4, 3)
    assert settings(rates=(1e-3,), warmups=(0.05, 0.1, 0.2)).halving.cells == (3, 2)


def test_jobs(settings, tmp_path):
    with pytest.raises(InputError, match="jobs: expected 1 or more, got 0"):
        sweep(settings(), tmp_path / "out", quiet, jobs=0)
