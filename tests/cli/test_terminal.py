"""Names and text of others do not control the terminal, whoever writes them."""

import logging
import sys
import warnings

import pytest
import torch
import typer

import flashmhf.cli
from flashmhf.cli import terminal
from flashmhf.cli.output import emit
from flashmhf.errors import InputError, RunError
from flashmhf.printable import one_line, printable

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x1b[31mred\x9b1m\u202egnp.exe\u2028\x7f\ud83d"
SHOWN = r"\x1b]0;owned\x07\x1b[2J\x1b[31mred\x9b1m\u202egnp.exe\u2028\x7f\ud83d"


@pytest.fixture(autouse=True)
def protected(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    before = logging.getLogRecordFactory()
    terminal.protect()
    yield
    logging.setLogRecordFactory(before)


def test_what_is_escaped():
    assert printable(HOSTILE) == SHOWN
    assert printable("tab\tnew\nline") == "tab\tnew\nline"
    assert one_line("tab\tnew\nline\r") == r"tab\tnew\nline\r"
    for kept in ("naïve 漢字 \U0001f600 \u200d ـَ", "\xa0"):
        assert one_line(kept) == kept


@pytest.mark.parametrize("name", ["flashmhf.data", "transformers.trainer", "datasets"])
def test_logs(caplog, name):
    logging.getLogger(name).warning("read %s", HOSTILE)
    assert caplog.messages[-1] == f"read {SHOWN}"
    logging.getLogger("flashmhf.data").warning("two\nlines")
    assert caplog.messages[-1] == r"two\nlines"


def test_warnings_and_tracebacks(capsys):
    assert SHOWN in warnings.formatwarning(HOSTILE, UserWarning, "file.py", 1)
    try:
        raise RuntimeError(HOSTILE)
    except RuntimeError:
        sys.excepthook(*sys.exc_info())
    written = capsys.readouterr().err
    assert f"RuntimeError: {SHOWN}\n" in written
    assert "\x1b" not in written


@pytest.mark.parametrize("error", [InputError, RunError, OSError, typer.BadParameter, KeyboardInterrupt])
def test_how_commands_end(monkeypatch, capsys, error):
    def failing(**options):
        raise error(f"two\nlines of {HOSTILE}")

    monkeypatch.setattr(flashmhf.cli, "app", failing)
    with pytest.raises(SystemExit):
        flashmhf.cli.main()
    written = capsys.readouterr().err
    assert written.count("\n") == 1
    assert not set(written) & set("\x1b\x07\x9b\u202e")
    assert "owned" in written or error is KeyboardInterrupt


def test_an_error_in_a_worker_process(monkeypatch, capsys):
    def failing(**options):
        def fetch(_):
            raise InputError("data: expected text")

        class Data(torch.utils.data.Dataset):
            __len__, __getitem__ = (lambda self: 1), (lambda self, index: fetch(index))

        next(iter(torch.utils.data.DataLoader(Data(), num_workers=1)))

    monkeypatch.setattr(flashmhf.cli, "app", failing)
    with pytest.raises(SystemExit) as caught:
        flashmhf.cli.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == "flashmhf: data: expected text\n"


def test_options_that_are_misspelt(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["flashmhf", "info", f"--{HOSTILE}"])
    with pytest.raises(SystemExit):
        flashmhf.cli.main()
    written = capsys.readouterr().err
    assert written.startswith("flashmhf: ")
    assert not set(written) & set("\x1b\x07\x9b\u202e")


def test_results(capsys, monkeypatch):
    emit({}, f"model {HOSTILE}\n", False)
    assert capsys.readouterr().out == f"model {SHOWN}\n\n"
    emit({}, "text of a model: \x1b[31m", False, verbatim=True)
    assert capsys.readouterr().out == "text of a model: \x1b[31m\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    emit({}, "text of a model: \x1b[31m", False, verbatim=True)
    assert capsys.readouterr().out == "text of a model: \\x1b[31m\n"


def test_json_is_json(capsys):
    emit({"a": float("nan"), "b": [float("inf"), (1.5,)], HOSTILE: HOSTILE}, "", True)
    written = capsys.readouterr().out
    assert written.isascii()
    assert written.startswith('{"a": null, "b": [null, [1.5]], "\\u001b]0;owned')
