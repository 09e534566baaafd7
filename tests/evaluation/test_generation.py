"""Samples of several models side by side, fixed by prompt and seed."""

import json

import pytest
import torch

from flashmhf import cli
from flashmhf.data.tokenizer import byte_tokenizer
from flashmhf.errors import InputError
from flashmhf.evaluation.generation import generate, sample_models
from flashmhf.models import FlashMHFConfig, FlashMHFForCausalLM
from flashmhf.models.loading import load_model

OPTIONS = {"max_new_tokens": 8, "temperature": 1.0, "top_p": 1.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = []
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp("models") / f"m{seed}"
        config = FlashMHFConfig(
            vocab_size=258,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=32,
            init="scaled",
            eos_token_id=256,
        )
        torch.manual_seed(seed)
        model = FlashMHFForCausalLM(config)
        model.lm_head.weight.data *= 30  # far enough from uniform that model and prompt show in a sample
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        made.append(str(folder))
    return made


def test_samples_are_those_of_each_model_and_prompt_alone(folders):
    prompts = ["ab", "", "xyz"]
    samples = sample_models(folders, prompts, torch.device("cpu"), seed=5, **OPTIONS)
    assert [(one.prompt, one.model) for one in samples] == [(text, folder) for text in prompts for folder in folders]
    torch.manual_seed(99)
    for one in samples:
        assert one.continuation == generate(load_model(one.model), byte_tokenizer(), one.prompt, seed=5, **OPTIONS)
    assert len({one.continuation for one in samples}) == len(samples)
    other = sample_models(folders, prompts, torch.device("cpu"), seed=6, **OPTIONS)
    assert all(one.continuation != two.continuation for one, two in zip(samples, other, strict=True))


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["flashmhf", "generate", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code, capsys.readouterr()


def test_from_the_command_line(folders, monkeypatch, capsys):
    options = ["--max-new-tokens", "4", "--seed", "3"]
    code, both = run(monkeypatch, capsys, *folders, "--prompt", "ab", "--prompt", "c", *options, "--json")
    assert code == 0
    samples = json.loads(both.out)["samples"]
    assert [(one["model"], one["prompt"], one["seed"]) for one in samples] == [
        (folder, text, 3) for text in ("ab", "c") for folder in folders
    ]
    _, single = run(monkeypatch, capsys, folders[1], "--prompt", "ab", *options, "--json")
    assert json.loads(single.out) == samples[1]
    _, text = run(monkeypatch, capsys, *folders, "--prompt", "ab", *options)
    assert [line for line in text.out.splitlines() if line.startswith("--- ")] == [f"--- {f}" for f in folders]


def test_refusals(folders, tmp_path, monkeypatch, capsys):
    with pytest.raises(InputError, match=r"max-new-tokens: expected at most 28 after this prompt .*, got 29"):
        sample_models(folders, ["abc"], torch.device("cpu"), max_new_tokens=29)
    code, printed = run(monkeypatch, capsys, folders[0], str(tmp_path))
    assert (code, printed.out) == (2, "")
    assert printed.err == f"flashmhf: model: expected a folder with config.json, got {str(tmp_path)!r}\n"
    code, printed = run(monkeypatch, capsys, folders[0], "--seed", "-1")
    assert (code, printed.out) == (2, "")
    assert "--seed" in printed.err
