"""A sweep's page, sentences and command lines."""

import math
import re
import shlex

import pytest
from typer.testing import CliRunner

from comparison_results import Collector
from flashmhf.cli import app
from flashmhf.reports.sweep import PICTURE_FILE, sentence, short, terminal_text, write_files
from flashmhf.reports.sweep_figure import losses_by_rate
from flashmhf.sweeping.commands import commands
from flashmhf.sweeping.plan import SweepPlan
from flashmhf.sweeping.results import TUNING_FILE, write_tuning
from flashmhf.sweeping.summary import summarise
from flashmhf.training.instability import Instability
from flashmhf.training.run_files import write_result
from made_up_sweeps import TOKENS_PER_STEP, flag, made_up_loss, tuning_result
from tiny import train_result


def sentence_of(tmp_path, loss=made_up_loss, **changes) -> str:
    return sentence(tuning_result(tmp_path, loss, variants=("flashmhf",), **changes).contenders[0])


def test_the_page_is_one_file_with_all_losses(tmp_path):
    result = tuning_result(tmp_path)
    page, picture = write_files(result, tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")
    collector = Collector()
    collector.feed(page.read_text())
    assert collector.tags.count("svg") == 2
    assert collector.tags.count("table") == 3
    assert not [value for name, value in collector.attributes if name in ("src", "href") and value[:1] != "#"]
    for contender in result.contenders:
        for rung in contender.rungs:
            for cell in rung.cells:
                assert f"{cell.validation_loss.mean:.3f}" in collector.text
    assert "Tuning: 20 runs, 131,072 tokens each: 8 cells x 32 steps, then 4 cells x 64 steps x 3 seeds" in (
        " ".join(collector.text.split())
    )


def test_the_terminal_has_table_sentences_and_commands(tmp_path):
    text = terminal_text(tuning_result(tmp_path), tmp_path)
    assert max(map(len, text.partition("\nflashmhf train")[0].splitlines())) <= 80
    assert re.search(r"\nflashmhf +2e-3 +10 % +1\.\d{3} ± 0\.\d{3} ", text)
    assert "\nflashmhf: 2e-3 with 10 % warm-up, " in text
    assert f"\nflashmhf train --model {tmp_path}/configs/flashmhf.json --output-dir tuned-flashmhf" in text
    assert "\nflashmhf compare --variants swiglu,flashmhf --model flashmhf-tiny" in text


def test_a_sentence_on_a_decided_optimum(tmp_path):
    assert re.fullmatch(
        r"flashmhf: 2e-3 with 10 % warm-up, 1\.62\d ± 0\.00\d nats/token over 3 seeds; from 1\.\de-3 to 3\.?\d?e-3 it "
        r"loses less than 0\.01\. The next best, 2e-3 with 2 % warm-up, is worse \(\+0\.008; these seeds resolve "
        r"0\.\d{3}\)\. Its warm-up is the longest of the grid; longer ones were not tried\.",
        sentence_of(tmp_path),
    )


def noisy(run) -> float:
    return made_up_loss(run) + 0.5 * math.sin(run.seed * run.learning_rate * 1e5)


def test_a_sentence_on_what_the_seeds_cannot_tell(tmp_path):
    assert re.search(
        r"Not distinguishable from the next best, \S+ with \d+ % warm-up \(\+0\.\d{3}; these seeds resolve 0\.\d+\)\.",
        sentence_of(tmp_path, noisy),
    )


def test_a_sentence_on_one_seed(tmp_path):
    found = sentence_of(tmp_path, seeds=(0,))
    assert "over 1 seed;" in found
    assert "One seed cannot tell it from the next best, " in found


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ((4e-3, 8e-3, 16e-3), "It is the lowest rate of the grid: add lower ones, and the same command goes on."),
        ((2e-4, 4e-4, 8e-4), "It is the highest rate of the grid: add higher ones, and the same command goes on."),
    ],
)
def test_a_sentence_on_the_edge(tmp_path, rates, message):
    assert message in sentence_of(tmp_path, rates=rates)


def test_a_sentence_on_seeds_that_fail(tmp_path):
    result = tuning_result(tmp_path, lambda run: None if run.seed == 1 and run.learning_rate > 1e-3 else 1.5)
    assert "failed" not in sentence(result.contenders[0])
    result = tuning_result(tmp_path / "2", lambda run: None if run.seed == 1 and run.learning_rate != 1e-3 else 1.5)
    assert re.search(
        r"The next best, \S+ with \d+ % warm-up, failed with 1 of its seeds\.", sentence(result.contenders[0])
    )


def test_a_sentence_on_an_optimum_on_the_edge_of_divergence(tmp_path):
    result = tuning_result(tmp_path)
    assert "divergence" not in sentence(result.contenders[1])
    (folder,) = (tmp_path / "runs").glob("flashmhf-steps64-lr0.002-warmup0.1-seed1")
    found = Instability(step=5, kind="loss", found="it rises")
    write_result(train_result(folder, validation_loss=1.6, tokens=64 * TOKENS_PER_STEP, instabilities=(found,)))
    again = summarise(SweepPlan(result.settings, tmp_path))
    assert "On the edge of divergence with seed 1." in sentence(again.contenders[1])
    assert "divergence" not in sentence(again.contenders[0])


def test_a_sentence_on_one_rate(tmp_path):
    found = sentence_of(tmp_path, rates=(2e-3,), warmups=(0.05, 0.1, 0.2))
    assert "loses less" not in found
    assert "grid" not in found


def test_command_lines_are_those_that_were_swept(tmp_path):
    """Each option exists, and the values are those of the best cells and of the sweep."""
    result = tuning_result(tmp_path / "a sweep")
    lines = [shlex.split(line) for line in commands(result, tmp_path / "a sweep")]
    assert [line[:2] for line in lines] == [["flashmhf", "train"]] * 2 + [["flashmhf", "compare"]]
    for line in lines:
        values = dict(zip(line[2::2], line[3::2], strict=True))
        assert values["--max-steps"] == "64"
        assert values["--warmup-steps"] == "0.1"
        assert values["--data"] == "books"
        assert values["--context-length"] == "64"
        assert values["--validation-tokens"] == "512"
        assert values["--per-device-train-batch-size"] == "2"
    assert lines[1][lines[1].index("--model") + 1] == str(tmp_path / "a sweep/configs/flashmhf.json")
    assert lines[2][lines[2].index("--learning-rate") + 1] == "swiglu=0.002,flashmhf=0.002"


def test_no_comparison_with_one_warmup_for_all_if_the_best_differ(tmp_path):
    def loss(run) -> float:
        return made_up_loss(run) + (flag(run, "--warmup-steps") if run.variant.name == "swiglu" else 0.0)

    result = tuning_result(tmp_path, loss)
    assert [line.split()[1] for line in commands(result, tmp_path)] == ["train", "train"]


def test_rates_that_diverge_do_not_hide_the_others(tmp_path):
    result = tuning_result(tmp_path, lambda run: made_up_loss(run) + (9.0 if run.learning_rate > 3e-3 else 0.0))
    figure = losses_by_rate(result)
    assert figure.axes[0].get_ylim()[1] < 3.0


def test_the_command_report_draws_it_again(tmp_path):
    write_tuning(tuning_result(tmp_path), tmp_path / TUNING_FILE)
    outcome = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert outcome.exit_code == 0, outcome.output
    assert (tmp_path / "report.html").is_file()
    assert "flashmhf: 2e-3 with 10 % warm-up" in outcome.output
    assert (tmp_path / PICTURE_FILE).is_file()


def test_rates_as_people_type_them():
    assert [short(rate) for rate in (1.2e-3, 5e-4, 1.0, 0.000123456789)] == ["1.2e-3", "5e-4", "1e0", "1.23457e-4"]
    assert short(1.2345e-3, 2) == "1.2e-3"
