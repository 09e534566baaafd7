"""The order of blocks: a resumed run sees what the uninterrupted one would have seen, on any number of ranks."""

import itertools
import json
import shutil

import datasets
import pytest
import torch
from accelerate import PartialState, skip_first_batches
from accelerate.data_loader import DataLoaderDispatcher, prepare_data_loader
from torch.utils.data import DataLoader, SequentialSampler

from flashmhf.data.blocks import TokenBlocks, iterate_blocks
from flashmhf.data.config import DataConfig
from flashmhf.data.mixing import load_blocks
from flashmhf.data.shuffling import ShuffledBlocks, count_turns, weighted_turns
from flashmhf.data.tokenizer import byte_tokenizer
from flashmhf.data.tokens import tokenize
from flashmhf.training.arguments import parse_arguments
from flashmhf.training.config import TrainConfig
from flashmhf.training.run import train
from flashmhf.training.trainer import PretrainingTrainer

BATCH = 2
WORLDS = [1, 2, 4]


@pytest.fixture(autouse=True)
def process_state():
    PartialState()


def numbered(count: int, first: int = 0) -> TokenBlocks:
    """Blocks of two tokens, the first of which is the block's number."""
    texts = [chr(33 + first + i) for i in range(count)]
    return TokenBlocks(tokenize(datasets.Dataset.from_dict({"text": texts}), byte_tokenizer()), 2)


def shuffled(count: int, seed: int) -> ShuffledBlocks:
    return ShuffledBlocks([numbered(count)], [1.0], seed, names=["a"])


def batches(loader) -> list[tuple[int, ...]]:
    return [tuple(int(ids[0]) for ids in batch["input_ids"]) for batch in loader]


def loader_of(dataset, world: int, rank: int):
    """As the Trainer makes it: accelerate cuts the batches of the one sampler for the ranks."""
    loader = DataLoader(dataset, batch_size=BATCH, sampler=SequentialSampler(dataset), drop_last=True)
    return prepare_data_loader(loader, num_processes=world, process_index=rank, put_on_device=False)


def epochs_of(make, world: int, rank: int, epochs: int, resume_at: tuple[int, int] = (0, 0)):
    """The Trainer's loop over epochs, from the middle of one where it resumes."""
    loader, seen = loader_of(make(), world, rank), []
    first, skipped = resume_at
    for epoch in range(first, epochs):
        current = skip_first_batches(loader, skipped) if epoch == first and skipped else loader
        current.set_epoch(epoch)
        seen.append(batches(current))
    return seen


@pytest.mark.parametrize("world", WORLDS)
def test_stored_blocks_resume_at_the_exact_token(world):
    def make():
        return shuffled(64, seed=3)

    ranks = [epochs_of(make, world, rank, 3) for rank in range(world)]
    for rank, (epoch, skipped) in itertools.product(range(world), [(0, 3), (1, 0), (1, 5), (2, 7)]):
        resumed = epochs_of(make, world, rank, 3, (epoch, skipped))
        assert resumed == [ranks[rank][epoch][skipped:], *ranks[rank][epoch + 1 :]]
    for epoch in range(3):
        seen = [number for rank in ranks for batch in rank[epoch] for number in batch]
        assert sorted(seen) == list(range(33, 97))  # disjoint, and all of them
    assert ranks[0][0] != ranks[0][1] != ranks[0][2]
    # the order of the epoch does not depend on how many ranks share it
    merged = [batch for step in zip(*(rank[1] for rank in ranks), strict=True) for batch in step]
    assert merged == epochs_of(make, 1, 0, 2)[1]


def test_orders_differ_by_seed():
    orders = [
        [int(item["input_ids"][0]) for item in map(shuffled(40, seed).__getitem__, range(40))] for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]


def test_blocks_are_described_by_their_documents():
    def documents(source: str, *lengths: int) -> TokenBlocks:
        origins = [f"{source}.txt, line {i + 1}" for i in range(len(lengths))]
        texts = datasets.Dataset.from_dict({"text": ["x" * (length - 1) for length in lengths]})
        return TokenBlocks(tokenize(texts, byte_tokenizer()), 8, origins=origins)

    data = ShuffledBlocks([documents("a", 16), documents("b", 4, 1, 1, 1, 9)], [3, 1], seed=0, names=["a", "b"])
    assert len(data) == 8
    assert [data.describe(number) for number in range(6)] == ["0 of a (a.txt, line 1)"] * 6  # three times over
    assert data.describe(6) == "0-4 of b (b.txt, line 1, b.txt, line 2, b.txt, line 3 and 2 more)"
    assert data.describe(7) == "4 of b (b.txt, line 5)"
    assert ShuffledBlocks([numbered(4)], [1.0], 0, names=["c"]).describe(2) == "2 of c"


@pytest.fixture
def rows(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    for file in range(5):
        lines = [f'{{"text": "file {file}, row {i} {"x" * (i % 13)}"}}' for i in range(30)]
        (folder / f"{file}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("world", WORLDS)
def test_streamed_blocks_resume_at_the_exact_token(rows, world):
    """Rank 0 reads for all and cuts what `world` batches hold; the stream starts again, so it is one epoch."""

    def first_of_all(skip: int, steps: int):
        data = load_blocks(DataConfig(source=str(rows), context_length=16, streaming=True), byte_tokenizer(), seed=5)
        loader = DataLoader(data.train.with_format("torch"), batch_size=BATCH * world, drop_last=True)
        prepared = prepare_data_loader(
            loader,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=True,
            device=torch.device("cpu"),
        )
        assert isinstance(prepared, DataLoaderDispatcher)
        if skip:
            prepared = skip_first_batches(prepared, skip)
        return [batch["input_ids"].tolist() for batch in itertools.islice(prepared, steps)]

    uninterrupted = first_of_all(0, 400 // world)
    assert len(uninterrupted) == 400 // world
    for skip in (1, 37 // world, 380 // world):  # the last is beyond the end of the files
        assert first_of_all(skip, 400 // world - skip) == uninterrupted[skip:]


def test_streams_start_again_in_another_order(rows):
    documents = datasets.IterableDataset.from_generator(lambda: ({"text": f"{i:03d}"} for i in range(300)))
    blocks = [
        bytes(b["input_ids"][:3]).decode()
        for b in itertools.islice(iterate_blocks(documents, byte_tokenizer(), 4, seed=1), 900)
    ]
    passes = [blocks[start : start + 300] for start in (0, 300, 600)]
    assert all(sorted(one) == sorted(passes[0]) for one in passes)
    assert passes[0] != passes[1] != passes[2] != passes[0]


def test_weights_are_shares_of_the_blocks():
    data = ShuffledBlocks([numbered(6), numbered(30, first=32)], [0.5, 0.5], seed=0, names=["a", "b"])
    assert len(data) == 60
    seen = [int(data[i]["input_ids"][0]) for i in range(60)]
    small = [number for number in seen if number < 65]
    assert sorted(small) == sorted([*range(33, 39)] * 5)  # it ended four times, and started again
    assert len(set(seen) - set(small)) == 30
    counts = data.count_used(25)
    assert counts == [sum(n < 65 for n in seen[:25]), sum(n >= 65 for n in seen[:25])]
    data.set_epoch(1)
    rest = [int(data[i]["input_ids"][0]) for i in range(10)]
    assert data.count_used(70) == [30 + sum(n < 65 for n in rest), 30 + sum(n >= 65 for n in rest)]


def test_turns():
    assert list(itertools.islice(weighted_turns([0.5, 0.25, 0.25]), 8)).count(0) == 4
    assert count_turns([7, 3], 1000) == [700, 300]
    assert all(abs(count_turns([7, 3], n)[0] - 0.7 * n) < 1 for n in range(50))


@pytest.mark.parametrize("streaming", [False, True])
def test_the_trainer_resumes_in_the_middle_of_a_later_epoch(rows, tmp_path, model_file, monkeypatch, streaming):
    """26 steps of 8 blocks of 64 are more than one pass over the rows, stored or streamed; the cut is in the second."""
    seen: list[list[list[int]]] = []
    compute_loss = PretrainingTrainer.compute_loss

    def recording(self, model, inputs, *args, **options):
        if model.training:
            seen.append(inputs["input_ids"].tolist())
        return compute_loss(self, model, inputs, *args, **options)

    monkeypatch.setattr(PretrainingTrainer, "compute_loss", recording)
    run = TrainConfig(
        model=str(model_file),
        data=DataConfig(
            source=str(rows), context_length=64, streaming=streaming, validation_tokens=256, document_mask=True
        ),
    )

    def start(resume: bool) -> list:
        seen.clear()
        flags = ["--per-device-train-batch-size", "4", "--gradient-accumulation-steps", "2", "--max-steps", "13"]
        flags += ["--save-steps", "9", "--eval-strategy", "no", "--report-to", "none", "--disable-tqdm", "true"]
        train(run, parse_arguments(flags, str(tmp_path / "run")), resume=resume)
        return list(seen)

    uninterrupted = start(resume=False)
    shutil.rmtree(tmp_path / "run/checkpoint-13")
    assert start(resume=True) == uninterrupted[18:]
    assert len(uninterrupted) == 26
    texts = [json.loads(line)["text"] for file in rows.iterdir() for line in file.read_text().splitlines()]
    assert sum(len(text) + 1 for text in texts) < 18 * 4 * 64  # so the cut is after the first pass
