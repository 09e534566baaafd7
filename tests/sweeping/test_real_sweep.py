"""A sweep as typed, with real training runs: stopped, continued, read again."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from flashmhf.errors import InputError, Interrupted
from flashmhf.sweeping import read_tuning
from flashmhf.sweeping.results import TUNING_FILE

FLAGS = ["--learning-rates", "1e-3,1e-2", "--warmups", "0.2,0.5", "--max-steps", "8", "--seeds", "0", "--jobs", "2"]
SMALL = ["--context-length", "64", "--validation-tokens", "512", "--per-device-train-batch-size", "2"]


@pytest.mark.slow
def test_two_rates_and_two_warmups(tmp_path, corpus_folder, model_file):
    folder = tmp_path / "out"
    command = [sys.executable, "-m", "flashmhf", "sweep", "--output-dir", str(folder), "--report-to", "none"]
    command += ["--model", str(model_file), "--data", str(corpus_folder), *FLAGS, *SMALL, "--json"]
    stopped = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not list(folder.glob("runs/*/result.json")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    stopped.send_signal(signal.SIGINT)
    out, err = stopped.communicate(timeout=240)
    assert (stopped.returncode, out) == (130, "")
    again = f"continue with: python -m flashmhf sweep --output-dir {folder} --jobs 2"
    assert err.strip().splitlines()[-1] == f"flashmhf: SIGINT; {again}"
    before = {file: file.stat().st_mtime_ns for file in folder.glob("runs/*/result.json")}
    assert 0 < len(before) < 8

    command = [sys.executable, "-m", "flashmhf", *again.split()[5:], "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=500)
    found = json.loads(done.stdout)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    result = read_tuning(folder / TUNING_FILE)
    assert [contender.variant for contender in result.contenders] == ["swiglu", "flashmhf"]
    assert (result.runs_each, result.tokens_each) == (4, 4 * 8 * 2 * 64)
    for contender, read in zip(result.contenders, found["contenders"], strict=True):
        assert contender.best.learning_rate == read["best"]["learning_rate"] == 1e-2
        assert len({cell.validation_loss.mean for cell in contender.rungs[0].cells}) == 4  # the warm-up reaches the run
        assert (contender.rate_edge, contender.noise) == ("upper", None)
    rates = [row["learning_rate"] for row in log(folder / "runs/flashmhf-steps8-lr0.01-warmup0.5-seed0")]
    assert max(rates) == pytest.approx(1e-2)
    assert rates.index(max(rates)) == 4  # half of the steps
    assert os.path.getsize(found["report"]) > 10_000
    assert not list(folder.glob("runs/*/checkpoint-*"))


def log(run) -> list[dict]:
    return [row for line in (run / "log.jsonl").read_text().splitlines() if "loss" in (row := json.loads(line))]


@pytest.mark.parametrize(("raised", "code"), [(KeyboardInterrupt(), 130), (Interrupted(signal.SIGTERM), 143)])
def test_a_signal_says_how_to_go_on(monkeypatch, capsys, tmp_path, raised, code):
    import flashmhf.cli
    import flashmhf.sweeping

    def stop(*arguments, **options):
        raise raised

    monkeypatch.setattr(flashmhf.sweeping, "sweep", stop)
    monkeypatch.setattr(sys, "argv", ["flashmhf", "sweep", "--output-dir", str(tmp_path / "out"), "--max-steps", "64"])
    with pytest.raises(SystemExit) as caught:
        flashmhf.cli.main()
    assert caught.value.code == code
    assert capsys.readouterr().err.endswith("; nothing has been trained yet\n")


def test_a_folder_of_something_else(training, settings, tmp_path):
    from flashmhf.sweeping import sweep

    (tmp_path / "compare.json").write_text("{}")
    with pytest.raises(InputError, match=r"output-dir: expected a new or empty folder, got .* with compare.json"):
        sweep(settings(), tmp_path, lambda line: None)
    assert training.trained == []
