"""Files that commands read back: cut, zeroed, of another type, nested; one line that names the file, or a result."""

import json
import sys

import pytest
from test_run_report import log_lines

import flashmhf.cli
from benchmark_results import result as benchmark_result
from benchmark_results import row as benchmark_row
from comparison_results import result as comparison_result
from flashmhf.benchmarking.results import read_result as read_benchmark
from flashmhf.comparison.results import write_comparison
from flashmhf.reports import render
from flashmhf.reports.benchmark_page import write_results
from flashmhf.reports.run import write_run_report
from flashmhf.sweeping.results import TUNING_FILE, write_tuning
from flashmhf.training.run_files import write_result
from made_up_sweeps import tuning_result
from tiny import train_result


def spoilt(content: bytes) -> dict[str, bytes]:
    """The content, spoilt in many ways, by name."""
    made = {f"cut at {at}": content[:at] for at in range(0, len(content), max(len(content) // 12, 1))}
    made |= {
        "zeroed": bytes(len(content)),
        "half zeroed": content[: len(content) // 2] + bytes(len(content) - len(content) // 2),
        "nested": b"[" * 200_000,
        "nested in place": b'{"version": 1, "a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        "binary": b"\x89PNG\r\n\x1a\n\xff\xfe",
        "another encoding": '{"a": "é"}'.encode("latin-1"),
        "utf-16": content.decode().encode("utf-16"),
        "digits": b'{"version": ' + b"9" * 10_000 + b"}",
        "surrogate": b'{"\\ud83d": "\\ud83d", "version": 1}',
    }
    made |= {other: other.encode() for other in ("null", "1", '"text"', "[]", "{}", "[{}]", '{"version": 1}', "\n")}
    try:
        values = json.loads(content)
    except ValueError:
        return made
    for name in values:
        for value in (None, "text", -1, 1e300, [], {}, [None], "\x1b[31m", True):
            made[f"{name} is {value!r}"] = json.dumps({**values, name: value}).encode()
        made[f"no {name}"] = json.dumps({key: value for key, value in values.items() if key != name}).encode()
    return made


def run_folder(folder):
    speed = {"tokens_per_second": 1000.0, "memory_mib": 512.0, "grad_norm": 1.0, "num_input_tokens_seen": 9}
    log_lines(
        folder,
        {"start": 0, "time": 0.0, "processes": 1, "machine": "x", "torch": "2"},
        *({"step": step, "time": float(step), "loss": 5.0 - step / 10, **speed} for step in range(1, 5)),
        {"step": 5, "time": 6.0, "eval_loss": 2.5},
    )
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "loss": 5.0}]}))
    write_result(train_result(folder))


def comparison_folder(folder):
    write_comparison(comparison_result(), folder / "results.json")


def sweep_folder(folder):
    write_tuning(tuning_result(folder / "made", variants=("flashmhf",), seeds=(0,)), folder / TUNING_FILE)


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["flashmhf", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            flashmhf.cli.main()
        return caught.value.code or 0, capsys.readouterr().err

    return run


@pytest.fixture
def no_pages(monkeypatch):
    """Pages are not drawn where only what is read matters, since drawing takes half a second.

    In an environment of its own: jinja2 keeps the macros of a loaded template together with their filters, so that a
    filter that is replaced in the common one would stay in every later page of the process.
    """
    environment = render._ENVIRONMENT.overlay()
    environment.filters = {**environment.filters, "svg": lambda figure: ""}
    monkeypatch.setattr(render, "_ENVIRONMENT", environment)


def test_pages_without_figures_leave_no_trace(tmp_path, request, monkeypatch):
    """Whichever of them is the first to load the templates."""
    monkeypatch.setattr(render, "_ENVIRONMENT", render._ENVIRONMENT.overlay())
    run_folder(tmp_path)
    common = render._ENVIRONMENT
    request.getfixturevalue("no_pages")
    write_run_report(tmp_path, tmp_path / "page.html")
    assert "<svg" not in (tmp_path / "page.html").read_text()
    monkeypatch.setattr(render, "_ENVIRONMENT", common)
    write_run_report(tmp_path, tmp_path / "page.html")
    assert "<svg" in (tmp_path / "page.html").read_text()


FILES = [
    (run_folder, "run.json"),
    (run_folder, "result.json"),
    (run_folder, "log.jsonl"),
    (run_folder, "trainer_state.json"),
    (comparison_folder, "results.json"),
    (sweep_folder, "sweep.json"),
]


EVERY = [pytest.param(30, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)]


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize(("make", "name"), FILES, ids=[name for _, name in FILES])
def test_report(tmp_path, command, no_pages, make, name, every):
    make(tmp_path)
    good = (tmp_path / name).read_bytes()
    assert command("report", tmp_path)[0] == 0
    for what, content in list(spoilt(good).items())[::every]:
        (tmp_path / name).write_bytes(content)
        code, err = command("report", tmp_path)
        assert code in (0, 2), (what, err)
        if code:
            assert err.startswith("flashmhf: "), what
            assert err.count("\n") == 1, (what, err)
            assert str(tmp_path) in err, (what, err)
            assert "\x1b" not in err
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    code, err = command("report", tmp_path)
    assert code in (0, 2), err


def test_bench_compare(tmp_path):
    from flashmhf.errors import InputError

    new = benchmark_result(benchmark_row(median_ms=1.0))
    write_results(new, tmp_path)
    file = tmp_path / "results.json"
    good = file.read_bytes()
    for what, content in spoilt(good).items():
        file.write_bytes(content)
        refused = ""
        try:
            new.compared_with(read_benchmark(file))
        except InputError as error:
            refused = str(error)
        assert not refused or (str(file) in refused and "\n" not in refused), what


OUTPUTS = [
    ("eval", "MODEL", "--output", "missing/a.json"),
    ("eval", "MODEL", "--output", "."),
    ("inspect", "MODEL", "--output", "missing/a.png"),
    ("report", "RUN", "--output", "missing/a.html"),
    ("report", "RUN", "--output", "."),
    ("bench", "op", "--output", "a.json"),
    ("bench", "op", "--output", "file/below"),
    ("bench", "op", "--compare", "missing.json"),
    ("bench", "op", "--compare", "."),
    ("tokenizer", "stdlib", "file"),
    ("tokenizer", "stdlib", "file/below"),
]


@pytest.mark.parametrize("arguments", OUTPUTS, ids=" ".join)
def test_outputs_that_cannot_be_written(tmp_path, command, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    run_folder(tmp_path / "RUN")
    (tmp_path / "file").write_text("a file")
    code, err = command(*arguments)
    assert code == 2, err
    assert err.startswith("flashmhf: ")
    assert err.count("\n") == 1, err
