"""The scaling fit on made-up losses of a known law."""

import json
import sys

import numpy as np
import pytest

import scaling_fit
from flashmhf.errors import InputError
from scaling_fit import CLAIM, CONTENDERS, Estimate, Run, fit, seeds_needed, verdict

SIZES = {"1m": 1_330_176, "3m": 3_348_736, "10m": 10_633_344, "30m": 26_776_064}


def runs_of(
    noise: float, *, seed: int = 0, alpha: float = 0.3, floor: float = 1.5, ratio: float = 1.0, seeds: int = 4
) -> list[Run]:
    generator = np.random.default_rng(seed)
    return [
        Run(
            size=size,
            ffn_type=name,
            seed=number,
            parameters=parameters,
            tokens=4 * parameters,
            loss=(floor + 2.5 * (parameters / 1.33e6) ** -alpha) * factor + noise * generator.standard_normal(),
        )
        for size, parameters in SIZES.items()
        for number in range(seeds)
        for name, factor in zip(CONTENDERS, (1.0, ratio), strict=True)
    ]


def test_a_known_law_is_recovered():
    found = fit(runs_of(1e-5, ratio=1 + CLAIM))
    assert found.has_floor
    for name in CONTENDERS:
        assert found.exponents[name].value == pytest.approx(0.3, abs=0.003)
    assert found.difference_at_target.value == pytest.approx(CLAIM, abs=2e-4)


def test_the_interval_covers_the_exponent_at_about_its_rate(monkeypatch):
    monkeypatch.setattr(scaling_fit, "DRAWS", 400)
    covered = 0
    for seed in range(60):
        estimate = fit(runs_of(0.004, seed=seed), seed=seed).exponents["swiglu"]
        covered += estimate.low <= 0.3 <= estimate.high
    assert 52 <= covered <= 60  # 57 of 60 are expected


def test_the_jacobian_agrees_with_the_draws_where_noise_is_small():
    found = fit(runs_of(0.004))
    half = (found.exponents["swiglu"].high - found.exponents["swiglu"].low) / 2
    assert half == pytest.approx(2.1 * found.jacobian_errors["swiglu"], rel=0.4)


def test_noisy_runs_say_that_it_cannot_be_told():
    assert fit(runs_of(0.05, ratio=1 + CLAIM)).verdict.startswith("It cannot be told from these runs")


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (-0.01, 0.01, "cannot be told"),
        (-0.01, -0.001, "agree with the paper's claim"),
        (-0.001, 0.001, "agree with no difference"),
        (0.001, 0.01, "agree neither"),
    ],
)
def test_the_verdict_follows_from_the_interval(low, high, words):
    assert words in verdict(Estimate(value=(low + high) / 2, low=low, high=high))


def test_three_sizes_have_a_pure_power_law():
    runs = [run for run in runs_of(1e-5, floor=0.0) if run.size != "30m"]
    found = fit(runs)
    assert not found.has_floor
    assert found.exponents["flashmhf"].value == pytest.approx(0.3, abs=0.003)


def test_seeds_needed_grow_with_the_square_of_the_deviation():
    assert seeds_needed(1e-4) == 3
    assert seeds_needed(0.02) == pytest.approx(4 * seeds_needed(0.01), rel=0.1)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (lambda run: run.size == "1m", "sizes: expected at least two, got 1m"),
        (lambda run: run.seed == 0, "seeds: expected at least two at 1m, each of both contenders, got 1"),
        (lambda run: (run.size, run.seed, run.ffn_type) != ("3m", 3, "swiglu"), "seeds: .* at 3m, .*, got 3"),
    ],
)
def test_too_few_runs_are_refused(keep, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        fit([run for run in runs_of(0.01) if keep(run)])


def test_unequal_tokens_per_parameter_are_refused():
    runs = runs_of(0.01)
    longer = Run(**{**vars(runs[0]), "tokens": 2 * runs[0].tokens})
    with pytest.raises(InputError, match=r"^tokens per parameter: expected equal ones \(to 5%\), got 4 to 8$"):
        fit([longer, *runs[1:]])


def test_rows_of_a_gpu_become_a_page(tmp_path, monkeypatch, capsys):
    lines = [
        {"step": "pairs", "final": True, **vars(run), "parameters_without_embeddings": run.parameters}
        | {"validation_nats_per_token": run.loss}
        for run in runs_of(0.01)
    ]
    (tmp_path / "gpu.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "scaling"), str(tmp_path / "gpu.jsonl")])
    scaling_fit.main()
    assert (tmp_path / "scaling.md").read_text() in capsys.readouterr().out
    assert json.loads((tmp_path / "scaling.json").read_text())["has_floor"]
