"""A comparison or sweep goes on with the settings of its folder; what is given again counts."""

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from flashmhf.cli import compare, sweep
from flashmhf.cli.earlier_settings import complete, how_to_continue
from flashmhf.comparison.settings import Comparison
from flashmhf.data.config import DataConfig
from flashmhf.files import write_json
from flashmhf.serialization import as_plain
from flashmhf.sweeping import Sweep
from flashmhf.training.config import TrainConfig

FLAGS = ("--max-steps", "300", "--weight-decay=0.2")
COMPARISON = Comparison(
    variants=("swiglu", "flashmhf"),
    models=("flashmhf-tiny",),
    train=TrainConfig(model="", data=DataConfig(context_length=64, bad_data="skip"), optimizer="adamw"),
    training_flags=FLAGS,
    seeds=(3, 4),
    learning_rates={"swiglu": (1e-3, 2e-3), "flashmhf": (4e-3,)},
    ablations={"gate-type": ("none", "softmax")},
    document_bytes=999,
    match="flops",
)
SWEEP = Sweep(
    variants=("swiglu", "flashmhf"),
    models=("flashmhf-tiny",),
    train=TrainConfig(model=""),
    learning_rates={"swiglu": (1e-3, 2e-3), "flashmhf": (1e-3, 2e-3)},
    warmups=(0.05, 0.2),
    max_steps=400,
    rungs=2,
)


class Context(SimpleNamespace):
    """What `complete` needs of typer's context."""

    def __init__(self, folder: Path, *args: str, **given: object) -> None:
        defaults = dict.fromkeys(("budget", "max_steps", "learning_rates", "warmups", "rungs"))
        defaults |= {"variants": "x", "model": "x", "seeds": "0", "learning_rate": "", "jobs": "auto", "gate_type": ""}
        defaults |= {"match": "parameters", "depth": "same", "document_bytes": 1, **TrainConfig(model="x").options()}
        params = {**defaults, "output_dir": str(folder), **given}
        super().__init__(params=params, args=list(args), command_path="flashmhf compare", given=given)

    def get_parameter_source(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name="COMMANDLINE" if name in self.given else "DEFAULT")


@pytest.mark.parametrize(("settings", "command"), [(COMPARISON, compare), (SWEEP, sweep)], ids=["comparison", "sweep"])
def test_the_folder_alone_gives_the_same_settings(settings, command, tmp_path, monkeypatch):
    assert settings.settings_file == command.SETTINGS_FILE
    write_json(tmp_path / settings.settings_file, {"version": 1, **as_plain(asdict(settings)), "inputs": {}})
    options, flags = complete(Context(tmp_path), settings.settings_file)
    monkeypatch.setattr(command, "check_flags", lambda *_: None)
    empty = {name: "" for name in compare.ABLATIONS if name != "gate_type"}
    assert command._settings({**options, **empty}, flags) == settings


def test_what_is_given_counts(tmp_path):
    write_json(tmp_path / "compare.json", as_plain(asdict(COMPARISON)))
    given = Context(tmp_path, "--weight_decay", "0.2", "--adam-beta2=0.9", seeds="3,4,5", optimizer="muon")
    options, flags = complete(given, "compare.json")
    assert (options["seeds"], options["optimizer"], options["context_length"]) == ("3,4,5", "muon", 64)
    assert flags == (*FLAGS, "--adam-beta2=0.9")
    assert complete(Context(tmp_path, "--max-steps", "9"), "compare.json")[1] == ("--max-steps", "9", FLAGS[2])
    new = Context(tmp_path / "new", "--max-steps", "9", seeds="1")
    assert complete(new, "compare.json") == (new.params, ("--max-steps", "9"))


def test_what_to_type(tmp_path):
    assert how_to_continue(Context(tmp_path), "compare.json") == "nothing has been trained yet"
    write_json(tmp_path / "compare.json", {})
    assert how_to_continue(Context(tmp_path), "compare.json") == (
        f"continue with: flashmhf compare --output-dir {tmp_path}"
    )
