"""On a terminal: a banner, bars that lines never break, everything within 80 columns. Elsewhere: plain lines alone."""

import re
import subprocess
import sys

import pytest

from pseudo_terminal import COLUMNS, CONTROL, on_terminal, seen

STEP = re.compile(r"step \d+/4: ((validation )?loss \d\.\d{4})(, [\d,.%]+ \S+|, data wait \d+%|, MFU \S+)*")
BANNER = ["model", "device", "batch", "tokens", "learning rate", "output"]
NOISE = ("Writing model shards", "Loading weights", "Map", "it/s", "Flattening", "lm_head", "{'loss'")


@pytest.fixture
def train(model_file, corpus_folder, tmp_path):
    flags = "--context-length 32 --max-steps 4 --per-device-train-batch-size 2 --logging-steps 1 --eval-steps 2"
    flags += f" --save-steps 2 --report-to none --model {model_file} --data {corpus_folder}"
    return lambda *more: ["train", *flags.split(), "--output-dir", str(tmp_path / "run"), *more]


@pytest.mark.slow
def test_train_and_eval_on_a_terminal(train, tmp_path):
    code, written = on_terminal(*train())
    assert code == 0
    lines = seen(written)
    assert [line[:15].strip() for line in lines[:6]] == BANNER
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == 4 + 2 + 1
    assert [line for line in steps if not STEP.fullmatch(line)] == []
    assert "training" in written  # the bar
    assert "validating" in written
    assert max(len(line) for line in lines if str(tmp_path) not in line and "/" not in line) <= COLUMNS
    assert not any(noise in written for noise in NOISE)
    assert lines[-1] == f"model: {tmp_path / 'run'}"
    code, written = on_terminal("eval", str(tmp_path / "run"), NO_COLOR="1")
    assert code == 0
    assert "evaluating" in written
    assert re.search(r"\x1b\[[0-9;]*3\d", written) is None  # no colour
    assert not any(noise in written for noise in (*NOISE, "| ---"))
    assert any(line.startswith("nats/token ") for line in seen(written))


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--disable-tqdm", "true")], ids=["", "without tqdm"])
def test_train_into_a_pipe(train, more):
    done = subprocess.run([sys.executable, "-m", "flashmhf", *train(*more)], capture_output=True, text=True, check=True)
    lines = done.stderr.splitlines()
    assert [line[:15].strip() for line in lines[:6]] == BANNER
    assert len([line for line in lines if STEP.fullmatch(line)]) == 4 + 2 + 1
    assert "\r" not in done.stderr
    assert CONTROL.search(done.stderr + done.stdout) is None
    assert not any(noise in done.stderr for noise in NOISE)


@pytest.mark.slow
def test_compare_is_interrupted_and_goes_on_as_it_says(model_file, corpus_folder, tmp_path):
    folder = str(tmp_path / "out")
    flags = "--context-length 32 --max-steps 30 --per-device-train-batch-size 2 --report-to none --seeds 0,1 --jobs 1"
    files = ["--model", str(model_file), "--data", str(corpus_folder)]
    code, written = on_terminal("compare", *files, *flags.split(), "--output-dir", folder, typed=("run 2 of 4", "\x03"))
    assert code == 130
    last = " ".join(" ".join(seen(written)).split("SIGINT; continue with: ")[1].split())
    assert last == f"python -m flashmhf compare --output-dir {folder} --jobs 1"
    code, written = on_terminal(*last.split()[3:])
    assert code == 0
    assert not any(line.startswith("run 1 of 4") for line in seen(written))  # finished before
    assert "loss" in written
    assert any(line.startswith("report: ") for line in seen(written))
