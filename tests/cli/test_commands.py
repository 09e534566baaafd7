"""The commands as typed: results on standard output, one line on bad input, exit codes."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import flashmhf.cli

FLAGS = ["--per-device-train-batch-size", "2", "--report-to", "none", "--disable-tqdm", "true"]


class Outcome:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> dict:
        return json.loads(self.out)

    @property
    def last_line(self) -> str:
        return self.err.strip().splitlines()[-1]


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command line in this process."""

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["flashmhf", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            flashmhf.cli.main()
        captured = capsys.readouterr()
        return Outcome(caught.value.code or 0, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory, corpus_folder, model_file) -> Path:
    """A model that was trained for a few steps."""
    from flashmhf.data.config import DataConfig
    from flashmhf.training.arguments import parse_arguments
    from flashmhf.training.config import TrainConfig
    from flashmhf.training.run import train

    folder = tmp_path_factory.mktemp("trained") / "model"
    flags = ["--max-steps", "20", "--learning-rate", "1e-2", "--eval-strategy", "no", *FLAGS]
    config = TrainConfig(model=str(model_file), data=DataConfig(source=str(corpus_folder), context_length=64))
    train(config, parse_arguments(flags, str(folder)))
    return folder


def test_info_on_this_machine(command):
    outcome = command("info", "--json")
    assert outcome.code == 0
    assert outcome.json["backends"]["blockwise"] is None
    preset = outcome.json["presets"]["flashmhf-370m"]
    assert (preset["parameters"], preset["num_heads"], preset["num_subnetworks"]) == (409029632, 8, 7)
    lines = command("info").out.splitlines()
    assert max(map(len, lines[:20])) <= 80
    assert next(line for line in lines if line.startswith("flashmhf-370m")).split()[1:4] == ["409.0", "M", "1,024"]
    assert "  blockwise: runs here" in lines


def test_info_on_a_preset_and_a_folder(command, trained):
    report = command("info", "flashmhf-128m", "--json").json
    assert report["parameters"] == 121392384
    assert "parameters" in command("info", str(trained)).out


def test_info_on_a_training_with_several_gpus(command):
    arguments = ("info", "flashmhf-tiny", "--gpus", "2", "--tokens", "1000000000", "--context-length", "256")
    training = command(*arguments, "--json").json["training"]
    assert training["memory"]["fsdp"]["peak"] < training["memory"]["ddp"]["peak"]
    assert training["hours"] > 0
    text = command(*arguments).out
    assert re.search(r"tp: peak [\d,]+ MiB per GPU; parameters \d+, ", text)
    assert "tp: num_attention_heads: expected a multiple" in command(*arguments, "--gpus", "3").out


def test_train_eval_generate(command, tmp_path, corpus_folder, model_file):
    folder = str(tmp_path / "run")
    arguments = ["--model", str(model_file), "--data", str(corpus_folder), "--context-length", "64"]
    outcome = command("train", *arguments, "--output-dir", folder, "--max-steps", "3", "--json", *FLAGS)
    assert outcome.code == 0
    assert outcome.json["steps"] == 3
    evaluated = command(
        "eval", folder, "--data", str(corpus_folder), "--context-length", "32", "--stride", "16", "--json"
    )
    assert evaluated.code == 0
    assert evaluated.json["context_length"] == 32
    assert evaluated.json["bits_per_byte"] > 0
    everything = command("eval", folder, "--data", str(corpus_folder), "--split", "all", "--json").json
    assert everything["documents"] == 30
    assert "nats/token" in command("eval", folder, "--data", str(corpus_folder)).out
    generated = command("generate", folder, "--prompt", "the quick", "--max-new-tokens", "5", "--json")
    assert generated.json["prompt"] == "the quick"
    again = command("generate", folder, "--prompt", "the quick", "--max-new-tokens", "5", "--json")
    assert again.out == generated.out
    assert command("generate", folder, "--max-new-tokens", "5", "--temperature", "0").code == 0


def test_resume_from_the_command_line(command, tmp_path, corpus_folder, model_file):
    folder = str(tmp_path / "run")
    arguments = ["--model", str(model_file), "--data", str(corpus_folder), "--context-length", "64", *FLAGS]
    arguments += ["--output-dir", folder, "--eval-strategy", "no", "--save-steps", "2"]
    assert command("train", *arguments, "--max-steps", "2").code == 0
    refused = command("train", *arguments, "--max-steps", "4")
    assert refused.code == 2
    assert "or --resume" in refused.last_line
    assert command("train", *arguments, "--max-steps", "4", "--resume", "--json").json["steps"] == 4


def test_tokenizer_then_train_with_it(command, tmp_path, corpus_folder, model_file):
    folder = str(tmp_path / "bpe")
    made = command("tokenizer", str(corpus_folder), folder, "--vocab-size", "280", "--json")
    assert made.json["vocab_size"] <= 280
    assert made.json["validation_bytes_per_token"] > 1.5
    arguments = ["--model", str(model_file), "--data", str(corpus_folder), "--tokenizer", folder, *FLAGS]
    outcome = command(
        "train", *arguments, "--context-length", "32", "--output-dir", str(tmp_path / "run"), "--max-steps", "2"
    )
    assert outcome.code == 0
    refused = command("tokenizer", str(corpus_folder), folder)
    assert (refused.code, refused.out) == (2, "")
    assert "DIR: expected a new or empty folder" in refused.last_line


@pytest.mark.slow
def test_compare(command, tmp_path, corpus_folder, model_file):
    arguments = ["--model", str(model_file), "--data", str(corpus_folder), "--context-length", "64", "--max-steps", "3"]
    arguments += ["--learning-rate", "swiglu=1e-3,flashmhf=2e-3", "--output-dir", str(tmp_path / "out"), *FLAGS]
    outcome = command("compare", *arguments, "--document-mask", "--bad-data", "skip", "--seeds", "0")
    assert outcome.code == 0
    assert outcome.out.startswith("FFN ")
    assert "flashmhf against swiglu: not decided by 1 seed; a verdict needs 3 or more." in outcome.out
    assert outcome.out.splitlines()[-2:] == [
        f"report: {tmp_path / 'out/report.html'}", f"loss curves: {tmp_path / 'out/loss.png'}"
    ]  # fmt: skip
    assert (tmp_path / "out/loss.png").exists()


def test_convert(command, tmp_path):
    from reference_model import reference_config, reference_model, save_reference

    config = reference_config()
    save_reference(reference_model(config), config, tmp_path / "theirs")
    outcome = command("convert", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--json")
    assert (outcome.code, outcome.json["to"]) == (0, "flashmhf")
    back = command("convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "reference")
    assert back.code == 0


def test_bench_layer_and_op(command, tmp_path):
    sizes = ["--hidden-size", "32", "--num-heads", "2", "--num-subnetworks", "2", "--subnetwork-size", "16"]
    sizes += ["--tokens", "8,16", "--repeats", "1"]
    output = tmp_path / "out"
    outcome = command("bench", "layer", *sizes, "--dtypes", "float32", "--output", str(output), "--json")
    assert outcome.code == 0
    assert json.loads((output / "results.json").read_text()) == outcome.json
    assert {file.name for file in output.iterdir()} == {"results.json", "results.csv", "results.png", "report.html"}
    assert {row["variant"] for row in outcome.json["rows"]} == {"swiglu", "naive", "flashmhf"}
    assert len(outcome.json["rows"]) == 2 * 2 * 3
    assert {"machine", "torch", "commit", "command"} <= outcome.json["provenance"].keys()
    op = command("bench", "op", *sizes, "--dtypes", "float32", "--compare", str(output / "results.json"))
    assert "| blockwise |" in op.out
    assert "8 new, 12 gone; commit" in op.out


def test_bench_decode_and_model(command, model_file):
    sizes = ["--hidden-size", "32", "--num-heads", "2", "--num-subnetworks", "2", "--subnetwork-size", "16"]
    decode = command("bench", "decode", *sizes, "--dtypes", "float32", "--repeats", "1", "--json")
    assert decode.code == 0
    assert [row["tokens"] for row in decode.json["rows"]] == [t for t in (1, 2, 4, 8, 16, 32, 64, 128) for _ in "ab"]
    sizes = ["--batch-size", "2", "--context-length", "16", "--new-tokens", "3"]
    models = ["--models", f"swiglu-tiny,{model_file}"]
    model = command("bench", "model", *models, *sizes, "--dtypes", "float32", "--repeats", "1", "--json")
    assert model.code == 0
    assert model.json["workload"]["new_tokens"] == 3
    assert [row["task"].split(",")[0] for row in model.json["rows"]] == ["training"] * 2 + ["generation"] * 2
    refused = command("bench", "model", *models, "--context-length", "127", "--repeats", "1", "--dtypes", "float32")
    assert (refused.code, refused.out) == (2, "")
    assert "context-length: expected at most the model's 128, got 159" in refused.last_line


BAD = {
    "info of nothing": (["info", "flashmhf-2t"], "model: expected a preset"),
    "no such command": (["launch"], "No such command 'launch'"),
    "no such option": (["generate", "x", "--speed", "9"], "--speed"),
    "missing option": (["train"], "--model"),
    "unknown training flag": (["train", "--model", "flashmhf-tiny", "--output-dir", "x", "--warp", "9"], "--warp"),
    "unknown variant": (["compare", "--output-dir", "x", "--variants", "relu"], "variants: expected some of"),
    "no seed": (["compare", "--output-dir", "x", "--seeds", ""], "seeds: expected at least one, got none"),
    "seed twice": (["compare", "--output-dir", "x", "--seed", "7"], "seed: expected --seeds, got 7"),
    "every nth step": (
        ["compare", "--output-dir", "x", "--logging-steps=5"],
        "logging-steps: expected nothing, since every step is logged, got 5",
    ),
    "resume of a comparison": (["compare", "--output-dir", "x", "--resume", "--seeds", ""], "seeds: expected at least"),
    "flag of nothing": (["compare", "--output-dir", "x", "--frobnicate"], "flags: expected those of flashmhf train or"),
    "no job": (
        ["compare", "--output-dir", "x", "--jobs", "0"],
        "jobs: expected auto or a number of at least 1, got 0",
    ),
    "jobs no number": (
        ["compare", "--output-dir", "x", "--jobs", "many"],
        "jobs: expected auto or a number of at least 1, got many",
    ),
    "seed no number": (["compare", "--output-dir", "x", "--seeds", "one"], "seeds: expected a whole number, got 'one'"),
    "rate no number": (
        ["compare", "--output-dir", "x", "--learning-rate", "swiglu=fast"],
        "learning-rate: expected a number",
    ),
    "sweep of no length": (["sweep", "--output-dir", "x"], "max-steps: expected the steps of a full run, or --budget"),
    "sweep with too little": (
        ["sweep", "--output-dir", "x", "--max-steps", "100", "--budget", "1e6"],
        "budget: expected at least 6,553,600 tokens for each contender's 20 runs (8 cells, 3 seeds for the last 4) of",
    ),
    "sweep of one cell": (
        ["sweep", "--output-dir", "x", "--max-steps", "100", "--learning-rates", "1e-3", "--warmups", "0.1"],
        "learning-rates: expected at least two, got one; there is nothing to sweep",
    ),
    "sweep of one rate of its own": (
        ["sweep", "--output-dir", "x", "--max-steps", "100", "--learning_rate", "1e-3"],
        "learning-rate: expected --learning-rates, got a value",
    ),
    "sweep with its own warm-up": (
        ["sweep", "--output-dir", "x", "--max-steps", "100", "--warmup-steps=10"],
        "warmup-steps: expected --warmups, got a value",
    ),
    "sweep of epochs": (
        ["sweep", "--output-dir", "x", "--num_train_epochs", "1"],
        "num-train-epochs: expected --max-steps or --budget, got a value",
    ),
    "sweep without a warm-up": (
        ["sweep", "--output-dir", "x", "--max-steps", "100", "--lr-scheduler-type", "constant"],
        "warmup-steps: expected none without a schedule that warms up",
    ),
    "sweep rate no number": (
        ["sweep", "--output-dir", "x", "--max-steps", "100", "--learning-rates", "1e-3,fast"],
        "learning-rates: expected a number, got 'fast'",
    ),
    "sweep budget no number": (
        ["sweep", "--output-dir", "x", "--budget", "much"],
        "budget: expected a number, got 'much'",
    ),
    "sweep without a budget": (
        ["sweep", "--output-dir", "x", "--budget", "-1"],
        "budget: expected a positive number of tokens, got -1",
    ),
    "eval of nothing": (["eval", "nowhere"], "model: expected a folder with config.json, got 'nowhere'"),
    "generate from nothing": (["generate", "nowhere"], "model: expected a folder with config.json"),
    "convert nothing": (["convert", "nowhere", "x"], "SRC: expected a folder with config.json"),
    "bench unknown variant": (["bench", "op", "--variants", "cuda"], "variants: expected some of"),
    "bench unknown dtype": (["bench", "op", "--dtypes", "int8"], "dtypes: expected some of float32, bfloat16, float16"),
    "bench tokens": (["bench", "op", "--tokens", "many"], "tokens: expected whole numbers above 0, got 'many'"),
    "bench kind": (["bench", "attention"], "'attention' is not one of 'op', 'layer', 'decode', 'model'"),
    "bench liger": (["bench", "layer", "--variants", "swiglu-liger"], "variants: expected the package liger-kernel"),
    "bench decode of a model": (
        ["bench", "decode", "--models", "x"],
        "models: expected nothing with bench decode, got 'x'",
    ),
    "bench model with tokens": (
        ["bench", "model", "--tokens", "9"],
        "tokens: expected nothing with bench model, got '9'",
    ),
    "bench to a file": (["bench", "op", "--output", "rows.json"], "output: expected a folder, got 'rows.json'"),
    "bench against nothing": (
        ["bench", "op", "--compare", "gone.json"],
        "compare: expected a JSON object in gone.json, got [Errno 2] No such file",
    ),
    "bench unknown model": (["bench", "model", "--models", "gpt-9"], "model: expected a preset"),
    "temperature": (["generate", "x", "--temperature", "-1"], "temperature"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_bad_usage_is_one_line_and_exit_code_2(command, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = command(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.last_line.startswith("flashmhf: ")
    assert message in outcome.last_line
    assert "Traceback" not in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_bad_input_for_a_trained_model(command, trained, corpus_folder, tmp_path):
    for arguments, message in (
        (["eval", "--context-length", "999"], "context-length: expected 2 to the model's 128, got 999"),
        (["eval", "--stride", "0"], "stride: expected 1 to the context length 128, got 0"),
        (["eval", "--split", "test"], "split: expected validation, train or all, got 'test'"),
        (["eval", "--data", "nowhere/at-all"], "data: expected stdlib, a file, a folder"),
        (["eval", "--device", "quantum"], "device: 'quantum' cannot be used here"),
        (["generate", "--max-new-tokens", "999"], "max-new-tokens: expected at most 127 after this prompt"),
    ):
        name, *rest = arguments
        data = [] if name == "generate" or "--data" in rest else ["--data", str(corpus_folder)]
        outcome = command(name, str(trained), *rest, *data)
        assert (outcome.code, outcome.out) == (2, "")
        assert message in outcome.last_line


def test_a_truncated_model_is_named(command, trained, tmp_path):
    import shutil

    shutil.copytree(trained, tmp_path / "torn", ignore=shutil.ignore_patterns("checkpoint-*"))
    file = tmp_path / "torn/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    outcome = command("generate", str(tmp_path / "torn"))
    assert outcome.code == 2
    assert "model.safetensors is corrupt: expected" in outcome.last_line


def test_help_is_fast_and_names_every_command():
    fastest = 99.0
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "flashmhf", "--help"], capture_output=True, text=True, check=True)
        fastest = min(fastest, time.perf_counter() - started)
    for name in ("info", "train", "eval", "generate", "compare", "sweep", "convert", "tokenizer", "bench"):
        assert name in done.stdout
    assert fastest < 1.0  # 0.25 s on an idle core; tests run in parallel


TYPOS = {
    "command": (["trian"], "Did you mean 'train'?"),
    "option": (["eval", "x", "--strid", "3"], "No such option: --strid; did you mean --stride?"),
    "flag": (["train", "--model", "flashmhf-tiny", "--output-dir", "x", "--lr", "1e-3"], "mean --learning-rate?"),
    "flag of a comparison": (["compare", "--output-dir", "x", "--max-step", "3"], "did you mean --max-steps?"),
    "preset": (["train", "--model", "flashmhf-tny", "--output-dir", "x"], "did you mean flashmhf-tiny?"),
    "folder": (["generate", "./nowhere"], "model: expected a folder with config.json, got './nowhere'"),
    "data": (["sweep", "--output-dir", "x", "--data", "a/b/c.txt"], "data: no such file or folder: a/b/c.txt"),
}


@pytest.mark.parametrize(("arguments", "message"), TYPOS.values(), ids=TYPOS.keys())
def test_a_typo_is_refused_before_heavy_imports(arguments, message, tmp_path):
    code = (
        "import sys, flashmhf.cli\n"
        "try: flashmhf.cli.main()\n"
        "finally: print(*{'torch', 'transformers', 'datasets', 'numpy', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.rstrip().endswith(message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["train", "compare", "sweep"])
def test_help_lists_the_flags_of_training_with_our_defaults(command):
    done = subprocess.run([sys.executable, "-m", "flashmhf", command, "-h"], capture_output=True, text=True, check=True)
    text = " ".join(done.stdout.replace("│", " ").split())
    assert "--weight-decay Of matrices. [default: 0.1]" in text
    assert "--eval-steps Steps between two validations. [default: 500]" in text
    assert "--label-smoothing-factor [default: 0.0]" in text
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_version_and_module_entry_point():
    shown = subprocess.run([sys.executable, "-m", "flashmhf", "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout == f"flashmhf {flashmhf.__version__}\n"
    done = subprocess.run(
        [sys.executable, "-m", "flashmhf", "info", "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["backends"]["reference"] is None
