"""recipes/scaling.sh: its runs have equal tokens per parameter and flags that exist; what cannot be is said first."""

import os
import subprocess

import pytest
import typer
from lease_facts import ROOT

from flashmhf.cli import app
from flashmhf.estimates.cost import model_cost
from flashmhf.models.loading import load_config
from flashmhf.training.arguments import parse_arguments


@pytest.fixture
def recipe(tmp_path):
    """Runs it with commands that only record how they are called: exit code, standard error, the calls."""
    calls = tmp_path / "calls"
    calls.touch()
    for name in ("flashmhf", "python"):
        (tmp_path / name).write_text(
            f'#!/bin/sh\nfor one; do printf "%s\\n" "$one"; done >> {calls}\necho >> {calls}\n'
        )
        (tmp_path / name).chmod(0o755)

    def run(**variables):
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | variables
        command = ["sh", str(ROOT / "recipes/scaling.sh"), "books", "out", "--jobs", "2"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stderr, [call.splitlines() for call in calls.read_text().split("\n\n") if call]

    return run


def test_runs_have_equal_tokens_per_parameter_and_flags_that_exist(recipe, tmp_path):
    code, err, calls = recipe(SIZES="1m 3m 10m 30m", TOKENS_PER_PARAMETER="0.1")
    assert (code, err) == (0, "")
    *comparisons, fit = calls
    assert len(comparisons) == 4
    assert fit[1:] == ["out/scaling", "out/1m", "out/3m", "out/10m", "out/30m"]
    command = typer.main.get_command(app).commands["compare"]
    for name, *call in comparisons:
        context = command.make_context(name, call)
        arguments = parse_arguments(context.args, str(tmp_path))
        tokens = arguments.max_steps * arguments.per_device_train_batch_size * context.params["context_length"]
        parameters = model_cost(load_config(context.params["model"])).parameters_without_embeddings
        assert tokens / parameters == pytest.approx(0.1, rel=0.025)
        assert context.params["jobs"] == "2"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SIZES": "1m 7m"}, "scaling.sh: SIZES: expected some of 1m, 3m, 10m, 30m, got 7m"),
        (
            {"SIZES": "3m 1m", "TOKENS_PER_PARAMETER": "0.02"},
            "scaling.sh: TOKENS_PER_PARAMETER: expected at least 20 steps of 8 x 256 tokens, got 13 at 1m; raise it or "
            "lower BATCH",
        ),
    ],
)
def test_what_cannot_be_is_one_line_before_the_first_run(recipe, variables, message):
    assert recipe(**variables) == (2, message + "\n", [])
