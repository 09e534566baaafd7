"""Steps and spectra of benchmarks/step_check.py against what docs/parametrisation.md derives, on tiny models."""

import math
import sys
from dataclasses import replace

import pytest
import torch

import step_check
from step_check import CHAINS, Measurement, Setting

TINY = Setting(hidden=64, layers=1, context=64, batch=2)


def steps(setting: Setting, kind: str) -> dict[str, float]:
    return step_check.values(list(step_check.measure("", setting, 0)), kind, "")


def test_gain_divides_the_relative_step_of_v_alone():
    """The change of y by a step of V does not depend on V, that by the other matrices is proportional to it."""
    small, large = (steps(replace(TINY, gain=gain, embed_std=1.0), "sign") for gain in (0.4, 0.8))
    assert small["V"] / large["V"] == pytest.approx(2, rel=0.05)
    for part in ("K", "U", "W_in", "W_out"):
        assert small[part] / large[part] == pytest.approx(1, rel=0.15), part


def test_a_polar_step_of_k_is_proportional_to_the_score_scale_and_matches_a_swiglu_at_sqrt_h():
    """SwiGLU: sqrt(d); FlashMHF: score_scale sqrt(D)."""
    swiglu = steps(replace(TINY, variant="swiglu", embed_std=1.0), "polar")
    scaled, root = (steps(replace(TINY, score_scale=scale, embed_std=1.0), "polar") for scale in (4.0, 2.0))
    assert scaled["K"] / root["K"] == pytest.approx(2, rel=0.1)
    assert root["K"] == pytest.approx(swiglu["K"], rel=0.3)


def test_the_first_embeddings_decide_how_much_of_the_stream_is_the_token():
    shares = [
        step_check.values(list(step_check.measure("", replace(TINY, embed_std=std, gain=2.5), 0)), "stream", "")["0"]
        for std in (0.02, 1.0)
    ]
    assert shares[1] > 0.98
    assert shares[0] < shares[1]


def test_polar_is_the_orthogonal_factor_of_every_matrix():
    gradient = torch.randn(3, 12, 4)
    update = step_check.polar(gradient)
    assert update.square().mean().sqrt().item() == pytest.approx(0.2, rel=1e-4)
    torch.testing.assert_close(torch.linalg.svdvals(update), torch.full((3, 4), 0.2 * math.sqrt(12)))


def command_line(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["step_check.py", *map(str, arguments)])
    step_check.main(
        step_check.__doc__,
        run=step_check.run,
        write_rows=step_check.write_rows,
        read_rows=step_check.read_rows,
        tables=step_check.tables,
        draw=step_check.draw,
    )


def test_rows_come_back_and_are_drawn(tmp_path, monkeypatch, capsys):
    """By its command line, and from the results alone."""
    monkeypatch.setattr(step_check, "SETTINGS", dict.fromkeys(step_check.SETTINGS, TINY))
    rows = list(step_check.spectra(hidden=64))
    assert {row.setting for row in rows} == set(CHAINS)
    once = list(step_check.measure("", TINY, 0))
    rows += [replace(row, setting=name) for name in step_check.SETTINGS for row in once]
    file = tmp_path / "rows.csv"
    monkeypatch.setattr(step_check, "run", lambda: rows)
    command_line(monkeypatch, file, tmp_path / "picture.png")
    printed = capsys.readouterr().out
    back = step_check.read_rows(file)
    assert [replace(row, value=0.0) for row in back] == [replace(row, value=0.0) for row in rows]
    assert [row.value for row in back] == pytest.approx([row.value for row in rows], rel=1e-4)
    assert all(name in printed for name in (*CHAINS, *step_check.SETTINGS))
    monkeypatch.setattr(step_check, "run", None)
    command_line(monkeypatch, file, tmp_path / "again.png", "--draw-only")
    assert capsys.readouterr().out == printed
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "picture.png").read_bytes()
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert isinstance(back[0], Measurement)
