"""The package with torch alone, and with one extra at a time: what works, and the line that says what is missing."""

import json
import re
import sys
from importlib.util import find_spec

import pytest
from packaging.requirements import Requirement
from sites import EXTRAS, LAYER, PROJECT, distributions, make_site, requirements, run

from flashmhf import extras

# Imports each module of the package, except what vLLM alone loads: prints {module: None or what its import raised}.
IMPORT_ALL = """
import json, flashmhf
from flashmhf.extras import MissingLibraryError
from importlib import import_module
from pathlib import Path
root, failed = Path(flashmhf.__file__).parent, {}
for file in sorted(root.rglob("*.py")):
    module = ".".join(("flashmhf", *file.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
    if module == "flashmhf.integrations.vllm.model":
        continue
    try:
        failed[module] = import_module(module) and None
    except MissingLibraryError as error:
        failed[module] = str(error)
print(json.dumps(failed))
"""

# Runs each command of a JSON list in argv[1]: prints what it exits with.
RUN_ALL = """
import json, sys
from flashmhf.__main__ import main
results = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["flashmhf", *arguments.split()]
    try:
        main()
    except SystemExit as ended:
        results.append(ended.code)
print(json.dumps(results))
"""


def line(needed_by: str, extra: str) -> str:
    """A pattern: whichever library is imported first is named."""
    return rf"{re.escape(needed_by)} needs [\w-]+: pip install 'flashmhf\[{extra}\]'"


COMMANDS = {
    "models": {
        "train --model flashmhf-tiny --output-dir run": line("flashmhf train", "train"),
        "eval . --data stdlib": line("flashmhf eval", "train"),
        "eval . --tasks piqa": line("flashmhf eval --tasks", "tasks"),
        "tokenizer stdlib run": line("flashmhf tokenizer", "train"),
        "inspect . --data stdlib": line("flashmhf inspect", "report"),
        "report .": line("flashmhf report", "report"),
        "compare --output-dir run": line("flashmhf compare", "report"),
        "sweep --output-dir run": line("flashmhf sweep", "report"),
        "bench op --output run": line("flashmhf bench --output or --compare", "report"),
    },
    "train": {
        "eval . --tasks piqa": line("flashmhf eval --tasks", "tasks"),
        "inspect . --data stdlib": line("flashmhf inspect", "report"),
        "report .": line("flashmhf report", "report"),
        "compare --output-dir run": line("flashmhf compare", "report"),
        "sweep --output-dir run": line("flashmhf sweep", "report"),
    },
}
WORKS = {  # at least these, with each extra
    None: ("layers", "ops.blockwise", "data.config", "training.config", "evaluation", "reports.table"),
    "models": ("models", "models.replace", "models.reference.conversion", "estimates.memory", "evaluation.generation"),
    "train": ("training.run", "evaluation.loss", "data.mixing", "comparison", "sweeping", "distributed.sharded"),
    "report": ("reports.comparison", "reports.sweep", "reports.run", "reports.heads", "reports.benchmark_page"),
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Makes the environment of an extra once."""
    folder, made = tmp_path_factory.mktemp("sites"), {}

    def make(extra: str | None):
        if extra not in made:
            made[extra] = make_site(folder / f"with-{extra}", requirements(extra))
        return made[extra]

    return make


def included(extra: str | None) -> set[str]:
    """The extra and all that it includes."""
    return {extra, *included(extras.INCLUDED.get(extra))} if extra else set()


def test_torch_alone_is_required():
    assert [Requirement(text).name for text in PROJECT["dependencies"]] == ["torch"]


def test_the_table_is_that_of_pyproject():
    for extra, libraries in extras.LIBRARIES.items():
        names = {Requirement(text).name for text in EXTRAS[extra]}
        assert names - {"flashmhf"} == set(libraries)
        own = {name for text in EXTRAS[extra] for name in Requirement(text).extras}
        assert own == ({extras.INCLUDED[extra]} if extra in extras.INCLUDED else set())
    (all_of_them,) = map(Requirement, EXTRAS["all"])
    assert set.union(*map(included, all_of_them.extras)) == set(extras.LIBRARIES)
    assert set(EXTRAS) - set(extras.LIBRARIES) == {"all", "dev", "docs", "integrations"}


def test_names_to_import():
    assert all(find_spec(module) for module in extras.LIBRARY_OF)


def test_the_layer_with_torch_alone(site):
    done = run(site(None), "-c", LAYER)
    assert done.returncode == 0, done.stderr
    reasons = dict(text.split(" ", 1) for text in done.stdout.splitlines())
    assert reasons["blockwise"] == reasons["reference"] == "None"
    assert reasons["onednn"] == "needs numba: pip install 'flashmhf[cpu]'"
    if "triton" not in (distribution.name for distribution in distributions(requirements(None))):  # of torch for GPUs
        assert reasons["triton"] == reasons["hopper"] == "needs triton: pip install 'flashmhf[triton]'"


@pytest.mark.parametrize("extra", WORKS)
def test_a_module_runs_or_names_an_extra_that_is_missing(site, extra):
    done = run(site(extra), "-c", IMPORT_ALL)
    assert done.returncode == 0, done.stderr
    failed = json.loads(done.stdout.splitlines()[-1])
    for module, said in failed.items():
        if said is not None:
            assert "\n" not in said
            (named,) = (name for name in extras.LIBRARIES if said.endswith(f": pip install 'flashmhf[{name}]'"))
            assert named not in included(extra), f"{module}: {said}"
    for name in {name for one in (None, *included(extra)) for name in WORKS[one]}:
        assert failed[f"flashmhf.{name}"] is None


@pytest.mark.parametrize(
    ("code", "expected"),
    {
        "from flashmhf.models import FlashMHFConfig": line("flashmhf.models", "models"),
        "from flashmhf import replace_ffn": line("flashmhf.models", "models"),
        "import flashmhf; flashmhf.models": line("flashmhf.models", "models"),
        "from flashmhf.data import load_corpus": line("flashmhf.data", "train"),
        "from flashmhf.training.run import train": line("flashmhf.training", "train"),
        "from flashmhf.comparison import compare": line("flashmhf.comparison", "report"),
        "from flashmhf.reports import render": line("flashmhf.reports", "report"),
    }.items(),
)
def test_the_last_line_of_an_import_error(site, code, expected):
    done = run(site(None), "-c", code)
    assert done.returncode == 1
    assert re.fullmatch(f"flashmhf.extras.MissingLibraryError: {expected}", done.stderr.splitlines()[-1])


@pytest.mark.parametrize("arguments", ["", "--help", "info"])
def test_the_command_with_torch_alone(site, arguments):
    done = run(site(None), "-m", "flashmhf", *arguments.split())
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(line("flashmhf", "models") + "\n", done.stderr)


@pytest.mark.parametrize("extra", COMMANDS)
def test_a_command_names_the_extra_that_it_needs(site, extra):
    (site(extra) / "config.json").write_text("{}")  # a model's folder, until it is read
    done = run(site(extra), "-c", RUN_ALL, json.dumps(list(COMMANDS[extra])))
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    for (command, expected), result in zip(COMMANDS[extra].items(), results, strict=True):
        assert re.fullmatch(expected, str(result)), command
    assert not (site(extra) / "run").exists()


def test_commands_that_models_is_enough_for(site):
    """And by `generate` and `convert` that they get as far as their own arguments."""
    commands = ["info flashmhf-tiny", "generate nowhere", "convert nowhere there"]
    commands.append("bench op --tokens 8 --dtypes float32 --repeats 1 --hidden-size 32 --num-heads 2")
    done = run(site("models"), "-c", RUN_ALL, json.dumps(commands))
    assert json.loads(done.stdout.splitlines()[-1]) == [0, 2, 2, 0], done.stderr


def test_other_packages_fail_as_usual(site):
    """They probe for libraries in their own way, which must go on to work."""
    code = """
import _thread, flashmhf, importlib.util, queue, sys
assert importlib.util.find_spec("transformers") is None
errors = queue.Queue()
sys.unraisablehook = lambda raised: errors.put(raised.exc_value)
_thread.start_new_thread(importlib.import_module, ("transformers",))  # only the import system is on its stack
for names in ({}, {"__name__": None}):
    try:
        exec("import transformers", names)
    except ImportError as error:
        errors.put(error)
for _ in range(3):
    error = errors.get(timeout=60)
    assert type(error) is ModuleNotFoundError and str(error) == "No module named 'transformers'"
"""
    done = run(site(None), "-c", code)
    assert done.returncode == 0, done.stderr


def test_a_folder_of_the_same_name_is_not_the_library(tmp_path, monkeypatch):
    (tmp_path / "numba").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "numba", raising=False)
    assert extras.missing("numba") == "needs numba: pip install 'flashmhf[cpu]'"
    with pytest.raises(extras.MissingLibraryError, match=r"^x needs numba: pip install 'flashmhf\[cpu\]'$") as raised:
        extras.check("x", "numba")
    assert raised.value.name == "numba"
