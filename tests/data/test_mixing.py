"""Sources by weight: the syntax, what is refused, and what a run says it used."""

import pytest

from flashmhf.data.config import DataConfig, parse_sources
from flashmhf.data.mixing import load_blocks
from flashmhf.data.tokenizer import byte_tokenizer
from flashmhf.errors import InputError
from flashmhf.training.arguments import parse_arguments
from flashmhf.training.config import TrainConfig
from flashmhf.training.run import train


@pytest.fixture
def two(tmp_path):
    for name, letter in (("a", "a"), ("b", "b")):
        (tmp_path / name).mkdir()
        for i in range(25):
            (tmp_path / name / f"{i}.txt").write_text(f"{i} {letter * 40}" * (1 if name == "a" else 8))
    return str(tmp_path / "a"), str(tmp_path / "b")


@pytest.mark.parametrize(
    ("data", "pairs"),
    [
        ("stdlib", [(1.0, "stdlib")]),
        ("owner/name:subset", [(1.0, "owner/name:subset")]),
        ("0.7*A,0.3*owner/name:subset", [(0.7, "A"), (0.3, "owner/name:subset")]),
        (" 2 * A , 1e-1*B", [(2.0, "A"), (0.1, "B")]),
        ("1*with,comma.txt,2*B", [(1.0, "with,comma.txt"), (2.0, "B")]),
        ("1*A,0*B", [(1.0, "A")]),
    ],
)
def test_syntax(data, pairs):
    assert parse_sources(data) == pairs


def test_a_file_whose_name_looks_like_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "2*a").write_text("text")
    assert parse_sources("2*a") == [(1.0, "2*a")]


@pytest.mark.parametrize(
    ("data", "given"),
    [
        ("-1*A,2*B", "'-1\\*A'"),
        ("0*A,0*B", "'0\\*A,0\\*B'"),
        ("much*A", "'much\\*A'"),
        ("nan*A", "'nan\\*A'"),
        ("inf*A", "'inf\\*A'"),
        ("1*", "'1\\*'"),
        ("A,1*B", "'A'"),
    ],
)
def test_bad_weights(data, given):
    with pytest.raises(InputError, match=rf"^data: expected SOURCE or WEIGHT\*SOURCE.*, got {given}$") as caught:
        parse_sources(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_says_what_it_used(two, tmp_path, model_file, streaming):
    data = f"0.75*{two[0]},0.25*{two[1]}"
    run = TrainConfig(
        model=str(model_file),
        data=DataConfig(source=data, context_length=16, streaming=streaming, validation_tokens=256),
    )
    flags = ["--max-steps", "50", "--per-device-train-batch-size", "4", "--report-to", "none", "--disable-tqdm", "true"]
    result = train(run, parse_arguments([*flags, "--eval-strategy", "no"], str(tmp_path / "run")))
    used = result.tokens_used
    assert sum(used.values()) == result.tokens == 50 * 4 * 16
    assert used[two[0]] / result.tokens == pytest.approx(0.75, abs=0.08)
    assert result.validation_loss > 0


@pytest.mark.parametrize("streaming", [False, True])
def test_counts_are_of_the_blocks_that_came(two, streaming):
    data = load_blocks(
        DataConfig(source=f"3*{two[0]},1*{two[1]}", context_length=8, streaming=streaming), byte_tokenizer(), seed=2
    )
    items = iter(data.train) if streaming else map(data.train.__getitem__, range(len(data.train)))
    blocks = [
        bytes(b for b in map(int, item["input_ids"]) if b < 256) for item, _ in zip(items, range(100), strict=False)
    ]
    letters = [b"a" in block for block in blocks if b"a" in block or b"b" in block]
    used = data.tokens_used(100 * 8)
    assert abs(used[two[0]] / 8 - sum(letters)) <= 100 - len(letters)
    assert sum(used.values()) == 800


def test_validation_is_shared_by_weight(two):
    data = load_blocks(
        DataConfig(source=f"3*{two[0]},1*{two[1]}", context_length=4, validation_tokens=32), byte_tokenizer()
    )
    kinds = [97 in block["input_ids"].tolist() for block in data.validation]
    assert (kinds.count(True), kinds.count(False)) == (6, 2)
    assert data.bytes_per_token == pytest.approx(1, abs=0.05)
