"""Pages, tables, pictures and files of comparisons: they show what the results contain."""

import json
import re
from dataclasses import replace

import pytest
from jinja2 import UndefinedError
from matplotlib.text import Text

from comparison_results import SEEDS, Collector, differences, result, run_result, spread
from flashmhf.comparison.results import (
    ComparisonResult,
    Curve,
    DocumentsResult,
    Spread,
    read_comparison,
    write_comparison,
)
from flashmhf.errors import InputError
from flashmhf.reports.comparison import write_files, write_report
from flashmhf.reports.comparison_figures import bars, loss_curves, sizes_vary
from flashmhf.reports.comparison_tables import cost_table, loss_table, markdown_table, terminal_text
from flashmhf.reports.render import png
from flashmhf.reports.seed_bands import seed_bands
from flashmhf.reports.style import COLOURS
from flashmhf.training.instability import Instability


def test_the_page_shows_all_results_and_loads_nothing(tmp_path):
    write_report(result(), tmp_path / "report.html", tmp_path)
    page = Collector()
    page.feed((tmp_path / "report.html").read_text())
    assert page.tags.count("svg") == 9
    assert "script" not in page.tags
    assert ("name", "viewport") in page.attributes
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href") and value]
    assert all(value.startswith(("#", "data:image/png;")) for value in links)
    for expected in (
        "1,234,567",
        "1.610 ± 0.010",
        "4,321",
        "unigram entropy",
        "flashmhf is better than swiglu: held-out loss -0.100 nats/token, 95 % interval -0.150 to -0.050, 3 seeds.",
        "with a band from the lowest to the highest seed",
        "0.875 to 0.875",
        "def <b>",
        "</pre>z",
        "<script>alert(1)",
    ):
        assert expected in page.text
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]


def test_the_table_has_the_variants_as_they_were_given():
    header, rule, first, second, _, *costs, _, note, _, verdict, _, worth = markdown_table(result()).splitlines()
    assert header == ("| FFN | held-out loss | to swiglu (95 %) | verdict | resolution | validation loss | bits/byte |")
    assert set(rule) <= set("|-: ")
    assert first.startswith("| swiglu | 1.800 ± 0.010 |  |  |  | 1.710 ± 0.010 |")
    assert second.startswith(
        "| flashmhf | 1.700 ± 0.010 | -0.100 [-0.150, -0.050] | better | 0.015 | 1.610 ± 0.010 | 2.312 ± 0.010 |"
    )
    assert costs[0] == "| FFN | parameters | MFLOP/token | layers | d_ff | tokens/s | memory (MiB) |"
    assert costs[3] == "| flashmhf | 1,234,567 | 7.7 | 4 | 576 | 4,321 | 888 |"
    assert "the first 65,536 bytes of each of 5" in note
    assert "from 3 seeds on with a 95 % interval over seeds (Student's t) and documents (bootstrap)" in note
    assert verdict == (
        "- flashmhf is better than swiglu: held-out loss -0.100 nats/token, 95 % interval -0.150 to -0.050, 3 seeds."
    )
    assert "about one comparison in twenty would have a verdict nevertheless" in worth


LOSS = "held-out loss -0.100 nats/token"


def judged(**verdict) -> ComparisonResult:
    """The comparison without a decision, for the reason given."""
    swiglu, flashmhf = result().variants
    found = differences(-0.1, -0.2, 0.1, **verdict)
    if found.verdict.seeds < 3:
        found = replace(found, nats_per_token=replace(found.nats_per_token, interval=None))
    return result(variants=(swiglu, replace(flashmhf, difference=found)))


@pytest.mark.parametrize(
    ("verdict", "sentence"),
    [
        (
            {"seeds_needed": 9},
            f"not decided by 3 seeds ({LOSS}, 95 % interval -0.200 to +0.100); about 9 would decide a difference of "
            "this size.",
        ),
        (
            {},
            f"not decided by 3 seeds ({LOSS}, 95 % interval -0.200 to +0.100); more than 1,000 would be needed for a "
            "difference of this size.",
        ),
        (
            {"more_documents": True},
            f"not decided by 3 seeds ({LOSS}, 95 % interval -0.200 to +0.100); more seeds alone would not decide, more "
            "documents are needed.",
        ),
        ({"seeds": 1, "resolution": None}, f"not decided by 1 seed ({LOSS}); a verdict needs 3 or more."),
        ({"seeds": 2, "seeds_needed": 4}, f"not decided by 2 seeds ({LOSS}); a verdict needs 3 or more."),
    ],
)
def test_what_is_not_decided_is_said_everywhere(tmp_path, verdict, sentence):
    """And neither "better" nor "worse" is said anywhere; without three seeds, there is no interval either."""
    comparison = judged(**verdict)
    page, picture = write_files(comparison, tmp_path)
    words = f"flashmhf against swiglu: {sentence}"
    shown = Collector()
    shown.feed(page.read_text())
    for text in (shown.text, (tmp_path / "table.md").read_text(), " ".join(terminal_text(comparison).split())):
        assert words in " ".join(text.split())
        assert not re.search("better|worse|best", text.lower())
        assert ("-0.200" in text) == (comparison.variants[1].difference.verdict.seeds >= 3)
    assert not re.search("better|worse", json.dumps(comparison.as_dict()))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_text_for_a_terminal_is_short_and_fits():
    lines = terminal_text(judged(seeds_needed=9)).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split("  ")[0] == "FFN"
    assert lines[2].split() == ["swiglu", "1.800", "±", "0.010", "1,234,567", "4,321"]
    assert lines[3].split()[:7] == ["flashmhf", "1.700", "±", "0.010", "-0.100", "[-0.200,", "+0.100]"]
    assert "flashmhf against swiglu: not decided by 3 seeds (held-out loss -0.100" in lines
    assert lines[-5:] == ["--- swiglu, continuing a held-out document", "def <b>x & y", "",
                          "--- flashmhf, continuing a held-out document", "def <b></pre>z"]  # fmt: skip
    assert len(lines) <= 20


def test_ablations_are_compared_with_what_they_change(tmp_path):
    swiglu, flashmhf = result().variants
    gate, norm = ("gate-type", "none"), ("q-norm", "off")
    ablated = result(
        variants=(
            swiglu,
            flashmhf,
            replace(flashmhf, variant="no gate", ablation=gate, effect=differences(0.02, 0.01, 0.03, "flashmhf")),
            replace(flashmhf, variant="no norm", ablation=norm, effect=None),
        )
    )
    lines = markdown_table(ablated).splitlines()
    assert lines[-2:] == [
        "| gate-type none | +0.020 [+0.010, +0.030] | worse | 0.015 |",
        "| q-norm off |  |  |  |",
    ]
    assert (
        "- no gate is worse than flashmhf: held-out loss +0.020 nats/token, 95 % interval +0.010 to +0.030, 3 seeds."
        in lines
    )
    assert "- no norm against flashmhf: no verdict, since no seed of both finished." in lines
    write_report(ablated, tmp_path / "report.html", tmp_path)
    assert "+0.020 [+0.010, +0.030]" in (tmp_path / "report.html").read_text()


def test_one_seed_has_no_spread():
    swiglu, flashmhf = result().variants
    one = replace(swiglu, validation_loss=spread(1.71))
    assert "| 1.710 |" in markdown_table(result(variants=(one, flashmhf)))


def test_runs_that_failed_are_named(tmp_path):
    swiglu, flashmhf = result().variants
    nothing = Spread(mean=None, standard_deviation=None, values=())
    first, second, *others = result().runs
    failed = result(
        variants=(replace(swiglu, documents=DocumentsResult(nats_per_token=nothing, number=None)), flashmhf),
        runs=(first, replace(second, status="failed", tokens=None, curve=Curve(), validation_curve=Curve()), *others),
    )
    table = markdown_table(failed)
    assert table.splitlines()[2].startswith("| swiglu | failed |")
    assert table.endswith("These runs failed and are in no mean: swiglu with seed 1.")
    write_report(failed, tmp_path / "report.html", tmp_path)
    assert "swiglu with seed 1" in (tmp_path / "report.html").read_text()


def test_runs_on_the_edge_of_divergence_are_named_everywhere(tmp_path):
    """In one sentence, which survives the file; a file without the field has none."""
    first, second, *others = result().runs
    found = (
        Instability(step=40, kind="gradient norm", found="the gradient norm is 9, 4 times its median"),
        Instability(step=90, kind="spikes", found="3 loss spikes within 20 steps"),
    )
    unstable = result(runs=(first, replace(second, instabilities=found), *others))
    write_comparison(unstable, tmp_path / "results.json")
    unstable = read_comparison(tmp_path / "results.json")
    words = (
        "These runs were on the edge of divergence; lower --learning-rate or lengthen --warmup-steps: swiglu with "
        "seed 1 (step 40: the gradient norm is 9, 4 times its median; step 90: 3 loss spikes within 20 steps)."
    )
    write_report(unstable, tmp_path / "report.html", tmp_path)
    page = Collector()
    page.feed((tmp_path / "report.html").read_text())
    assert words in page.text
    assert words in markdown_table(unstable).splitlines()
    assert words in " ".join(terminal_text(unstable).split())

    content = unstable.as_dict()
    for run in content["runs"]:
        del run["instabilities"]
    (tmp_path / "results.json").write_text(json.dumps(content))
    older = read_comparison(tmp_path / "results.json")
    assert older == result()
    assert "divergence" not in markdown_table(older) + terminal_text(older)


def lines_of(axes) -> dict[str, list[float]]:
    return {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}


def band_of(axes, index: int) -> tuple[float, float]:
    heights = axes.collections[index].get_paths()[0].vertices[:, 1]
    return float(heights.min()), float(heights.max())


def test_the_picture_has_means_bands_and_paired_differences():
    """Of the finished runs, at the steps that all of them logged."""
    runs = []
    for name, offset in (("swiglu", 0.0), ("flashmhf", -0.5)):
        for seed in SEEDS:
            steps = (1, 2, 3, 4) if seed else (1, 2, 4)
            losses = tuple(5.0 - step + seed + offset for step in steps)
            curve = Curve(steps=steps, losses=losses, elapsed_s=tuple(map(float, steps)))
            runs.append(replace(run_result(name, seed, 1.0), curve=curve))
    failed = replace(runs[0], seed=9, status="failed", curve=Curve(steps=(1,), losses=(99.0,), elapsed_s=(1.0,)))
    figure = seed_bands(result(runs=(*runs, failed)))
    above, below = figure.axes
    drawn = lines_of(above)
    assert drawn == {
        "swiglu, 3 seeds": [5.0, 4.0, 2.0],
        "flashmhf, 3 seeds": [4.5, 3.5, 1.5],
    }
    assert band_of(above, 0) == (1.0, 6.0)
    assert band_of(above, 1) == (0.5, 5.5)
    assert [-0.5, -0.5, -0.5] in list(lines_of(below).values())
    assert band_of(below, 0) == (-0.5, -0.5)
    assert "flashmhf is better than swiglu" in above.get_title(loc="left")


def test_a_long_verdict_stays_in_the_picture(monkeypatch):
    verdict = "flashmhf against swiglu: not decided by 3 seeds; more than 1,000 would be needed for this difference."
    monkeypatch.setattr("flashmhf.reports.seed_bands.verdict_lines", lambda result: [verdict])
    figure = seed_bands(result())
    figure.draw_without_rendering()
    title = figure.axes[0].get_title(loc="left")
    assert " ".join(title.split()) == verdict
    (text,) = figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_text() == title)
    assert text.get_window_extent().x1 <= figure.bbox.x1


@pytest.mark.parametrize("steps", [(), (7,)], ids=["no step", "one step"])
def test_a_picture_of_runs_that_share_hardly_a_step(steps):
    first, *others = result().runs
    figure = seed_bands(
        result(
            runs=(
                replace(first, curve=Curve(steps=steps, losses=(2.0,) * len(steps), elapsed_s=(1.0,) * len(steps))),
                *others,
            )
        )
    )
    assert len(png(figure)) > 1000


def test_a_picture_of_ablations_without_another_layer():
    _, flashmhf = result().variants
    ablated = replace(flashmhf, variant="no gate", ablation=("gate-type", "none"), effect=flashmhf.difference)
    comparison = result()
    settings = replace(comparison.settings, variants=("flashmhf",), ablations={"gate-type": ("none",)})
    runs = tuple(replace(run, variant="no gate" if run.variant == "swiglu" else run.variant) for run in comparison.runs)
    figure = seed_bands(result(settings=settings, variants=(replace(flashmhf, difference=None), ablated), runs=runs))
    assert [text.split(",")[0] for text in lines_of(figure.axes[0])] == ["flashmhf", "no gate"]


def test_a_power_law_requires_three_sizes(tmp_path):
    swiglu, flashmhf = result().variants
    sized = [
        replace(swiglu, parameters=10 ** (6 + i), validation_loss=spread(4.0 * 10.0 ** (-0.05 * i))) for i in range(3)
    ]
    write_report(result(variants=(*sized, flashmhf)), tmp_path / "report.html", tmp_path)
    assert "<!-- swiglu: size^-0.050 -->" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("missing", ["runs", "samples"])
def test_a_page_that_cannot_be_made_leaves_the_old_one(tmp_path, missing):
    file = tmp_path / "report.html"
    write_report(result(), file, tmp_path)
    good = file.read_text()
    with pytest.raises((TypeError, UndefinedError)):
        write_report(result(**{missing: None}), file, tmp_path)
    assert file.read_text() == good


def test_results_survive_their_file(tmp_path):
    swiglu, flashmhf = result().variants
    ablation = replace(flashmhf, ablation=("q-norm", "off"), effect=differences(0.02, 0.01, 0.03))
    written = result(variants=(swiglu, flashmhf, ablation))
    write_comparison(written, tmp_path / "results.json")
    assert read_comparison(tmp_path / "results.json") == written


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": None}, "expected version 2 of a comparison's results, got none; run flashmhf compare again"),
        ({"version": 9}, "expected version 2 of a comparison's results, got 9; run flashmhf compare again"),
        ({"runs": None}, "ComparisonResult: expected runs, got none"),
        ({"jobs": "two"}, "ComparisonResult.jobs: expected int, got 'two'"),
    ],
)
def test_results_of_another_version_or_damaged_are_refused_in_one_line(tmp_path, change, message):
    content = {**result().as_dict(), **change}
    file = tmp_path / "results.json"
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    with pytest.raises(InputError) as caught:
        read_comparison(file)
    assert str(caught.value).startswith(f"{file}: {message}")
    assert len(str(caught.value).splitlines()) == 1


def test_figures_without_anything_to_see_are_not_drawn():
    """Bars of equal length, loss against one size, a validation curve of one point."""
    swiglu, flashmhf = result().variants
    assert bars(result(), "peak_memory_mib") is None
    faster = replace(flashmhf, tokens_per_second=spread(9000.0, 9500.0))
    figure = bars(result(variants=(swiglu, faster)), "tokens_per_second")
    assert figure is not None
    assert [text.get_text() for text in figure.axes[0].texts] == ["9,250", "4,321"]
    assert not sizes_vary(result())
    assert sizes_vary(result(variants=(swiglu, replace(swiglu, parameters=9))))
    one_point = Curve(steps=(100,), losses=(1.7,), elapsed_s=(50.0,))
    curves = loss_curves(result(runs=tuple(replace(run, validation_curve=one_point) for run in result().runs)))
    assert {what: len(figures) for what, figures in curves.items()} == {"steps": 1, "tokens": 1, "time": 1}


def test_headers_are_short():
    for table in (loss_table(result()), cost_table(result())):
        assert max(map(len, table.columns)) <= 18
        assert len(table.columns) <= 7


def test_a_variant_has_one_colour_in_all_figures():
    comparison = result()
    lines = {line.get_label().split(",")[0]: line.get_color() for line in seed_bands(comparison).axes[0].get_lines()}
    for _, figures in loss_curves(comparison).items():
        for figure, _ in figures:
            drawn = {line.get_label().split(",")[0]: line.get_color() for line in figure.axes[0].get_lines()}
            assert {name: drawn[name] for name in lines} == lines
    assert lines == {name: COLOURS[name] for name in ("swiglu", "flashmhf")}
