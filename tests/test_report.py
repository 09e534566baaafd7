"""The report is one file that shows what the results say."""

import html.parser

import pytest

from flashmhf.report import markdown_table, write_report


def results() -> dict:
    def measure(*values):
        return {
            "mean": sum(values) / len(values),
            "standard_deviation": 0.01 if len(values) > 1 else None,
            "values": values,
        }

    def variant(name, loss):
        return {
            "variant": name,
            "parameters": 1234567,
            "intermediate_size": 576,
            "validation_loss": measure(loss, loss + 0.02),
            "bits_per_byte": measure(loss * 1.44, loss * 1.45),
            "tokens_per_second": measure(4321.0),
            "peak_memory_mib": measure(888.0),
            "elapsed_s": measure(60.0),
        }

    def run(name, seed, loss):
        curve = [[step, 5.0 - step / 50] for step in range(1, 101, 10)]
        return {
            "variant": name,
            "seed": seed,
            "tokens": 409600,
            "curve": curve,
            "validation_curve": [[50, 3.0], [100, loss]],
        }

    return {
        "settings": {
            "variants": ["swiglu", "flashmhf"],
            "data": "<script>alert(1)</script>",
            "tokenizer": "bytes",
            "seeds": [0, 1],
            "context_length": 512,
        },
        "unigram_entropy_nats": 3.2,
        "variants": [variant("swiglu", 1.7), variant("flashmhf", 1.6)],
        "runs": [run(n, s, loss) for n, loss in (("swiglu", 1.7), ("flashmhf", 1.6)) for s in (0, 1)],
        "samples": {"prompt": "def <b>", "continuations": {"swiglu": "x & y", "flashmhf": "</pre>z"}},
    }


class Collector(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_and_loads_nothing(tmp_path):
    write_report(results(), tmp_path / "report.html")
    page = Collector()
    page.feed((tmp_path / "report.html").read_text())
    assert page.tags.count("svg") == 4
    assert "script" not in page.tags
    assert "viewport" in dict(page.attributes).values()
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href") and value]
    assert all(value.startswith("#") for value in links)
    for expected in (
        "1,234,567",
        "1.610 ± 0.010",
        "4,321",
        "unigram entropy",
        "def <b>",
        "</pre>z",
        "<script>alert(1)",
    ):
        assert expected in page.text
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]


def test_the_table_is_sorted_by_loss():
    header, rule, first, second = markdown_table(results()).splitlines()
    assert header.startswith("| FFN | validation loss")
    assert set(rule) <= set("|-: ")
    assert first.startswith("| flashmhf | 1.610 ± 0.010 | 2.312 ± 0.010 | 1,234,567 | 576 |")
    assert second.startswith("| swiglu |")


def test_one_seed_has_no_spread():
    one = results()
    one["variants"][0]["validation_loss"]["standard_deviation"] = None
    assert "| 1.710 |" in markdown_table(one)


@pytest.mark.parametrize("missing", ["runs", "samples"])
def test_nothing_half_written_replaces_a_good_report(tmp_path, missing):
    file = tmp_path / "report.html"
    write_report(results(), file)
    good = file.read_text()
    broken = {key: value for key, value in results().items() if key != missing}
    with pytest.raises(KeyError):
        write_report(broken, file)
    assert file.read_text() == good
