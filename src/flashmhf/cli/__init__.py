"""The command `flashmhf`. Each command is a file here; what it needs is imported when it runs."""

import contextlib
import os
import select
import signal
import sys
import warnings
from typing import Annotated, NoReturn

import typer
from typer.exceptions import TyperException

from flashmhf import __version__
from flashmhf.cli import (
    bench,
    compare,
    convert,
    evaluate,
    generate,
    info,
    inspect,
    report,
    sweep,
    terminal,
    tokenizer,
    train,
)
from flashmhf.cli.training_flags import TrainingCommand
from flashmhf.console import has_bars
from flashmhf.errors import InputError, Interrupted, RunError
from flashmhf.lifeline import end_with_parent
from flashmhf.system_errors import system_error


def _show_version(asked: bool) -> None:
    if asked:
        terminal.show(f"flashmhf {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="flashmhf",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def flashmhf(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Pretrain, tune, evaluate, compare, generate, convert and benchmark models with FlashMHF feed-forward layers."""


app.command("info")(info.info)
app.command("train", cls=TrainingCommand, context_settings=train.CONTEXT)(train.train)
app.command("eval")(evaluate.evaluate)
app.command("inspect")(inspect.inspect)
app.command("report")(report.report)
app.command("generate")(generate.generate)
app.command("compare", cls=TrainingCommand, context_settings=train.CONTEXT)(compare.compare)
app.command("sweep", cls=TrainingCommand, context_settings=train.CONTEXT)(sweep.sweep)
app.command("convert")(convert.convert)
app.command("tokenizer")(tokenizer.tokenizer)
app.command("bench", no_args_is_help=True)(bench.bench)


def main() -> None:
    """Runs the command line; exits with 0, 1 (failed), 2 (bad usage) or 128 + a signal's number, and one line."""
    end_with_parent()
    terminal.protect()
    terminal.log_to_console(first=int(os.environ.get("RANK", "0")) == 0)  # of the processes that torchrun started
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # otherwise torch's profiler prints each start and stop
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if not has_bars():  # downloads have theirs on a terminal
        warnings.filterwarnings("ignore", "Cannot enable progress bars")  # the Trainer tries to
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        code = app(standalone_mode=False)
        if sys.stdout is not None:  # closed by the shell
            sys.stdout.flush()
    except InputError as error:
        _fail(str(error), 2)
    except TyperException as error:
        _fail(_usage_error(error), error.exit_code)
    except Interrupted as error:
        _fail(str(error), 128 + error.number)
    except KeyboardInterrupt:
        _fail("interrupted", 128 + signal.SIGINT)
    except RunError as error:
        _fail(str(error), 1)
    except Exception as error:
        _fail_by_system(error)
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _usage_error(error: TyperException) -> str:
    """Typer's message; of a misspelt option with the nearest one."""
    meant = getattr(error, "possibilities", None)
    return f"{error.message}; did you mean {meant[0]}?" if meant else error.format_message()


def _fail_by_system(error: Exception) -> NoReturn:
    """For what the operating system refused, whichever library reports it; anything else is a bug and raised."""
    refused = error if isinstance(error, OSError) else system_error(error)
    if refused is None:
        raise error
    reader_left = isinstance(refused, BrokenPipeError) and _output_is_closed()  # such as `head`
    with contextlib.suppress(OSError, ValueError, AttributeError):  # nothing is left to be written at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    _fail("" if reader_left else str(refused) or type(refused).__name__, 1)


def _output_is_closed() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    if sys.platform == "win32":
        return True
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _own_words(message: str) -> str:
    """Of an error in a worker process, which arrives as its traceback, the last line without the error's type."""
    if "Traceback (most recent call last)" not in message:
        return message
    return message.strip().splitlines()[-1].partition(": ")[2] or message


def _fail(message: str, code: int) -> NoReturn:
    if message:  # empty where help was printed instead
        terminal.say(f"flashmhf: {' '.join(_own_words(message).split())}")
    sys.exit(code)
