"""`--push-to-hub`: what is refused before a folder exists, and what of a finished run is uploaded."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.utils import filter_repo_objects

from flashmhf.data.config import DataConfig
from flashmhf.errors import InputError, RunError
from flashmhf.training import hub, trackers
from flashmhf.training.arguments import parse_arguments
from flashmhf.training.config import TrainConfig
from flashmhf.training.run import train

FLAGS = ["--max-steps", "2", "--per-device-train-batch-size", "2", "--eval-strategy", "no"]
FLAGS += ["--report-to", "none", "--save-steps", "1"]
PUSH = ["--push-to-hub", "true", "--hub-model-id", "me/model", "--hub-private-repo", "true", "--hub-token", "secret"]


class FakeHub:
    """Stands in for HfApi; `failing` names a method that raises."""

    calls: list[tuple] = []
    failing = ""

    def __init__(self, token: str | None = None) -> None:
        self.token = token

    def _called(self, name: str, *arguments: object) -> None:
        FakeHub.calls.append((name, self.token, *arguments))
        if FakeHub.failing == name:
            raise ConnectionError("no route\nto the Hub")

    def whoami(self) -> dict[str, str]:
        self._called("whoami")
        return {"name": "me"}

    def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> SimpleNamespace:
        self._called("create_repo", repo_id, private)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, folder_path: str, allow_patterns, ignore_patterns, **options) -> None:
        self._called("upload_folder", options["repo_id"])
        files = [str(file.relative_to(folder_path)) for file in Path(folder_path).rglob("*") if file.is_file()]
        FakeHub.uploaded = set(
            filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        )


@pytest.fixture
def run(tmp_path, model_file, corpus_folder, monkeypatch):
    monkeypatch.setattr(hub, "HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "calls", [])
    monkeypatch.setattr(FakeHub, "failing", "")

    def run(*flags: str):
        data = DataConfig(source=str(corpus_folder), context_length=32, validation_tokens=512)
        arguments = parse_arguments([*FLAGS, *flags], str(tmp_path / "run"))
        return train(TrainConfig(model=str(model_file), data=data), arguments)

    return run


def test_the_finished_model_is_uploaded_once_with_its_card(run, tmp_path):
    run(*PUSH)
    assert [call[:3] for call in FakeHub.calls] == [
        ("whoami", "secret"),
        ("create_repo", "secret", "me/model"),
        ("upload_folder", "secret", "me/model"),
    ]
    assert FakeHub.uploaded == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors", "result.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    card = (tmp_path / "run/README.md").read_text()
    assert 'from_pretrained("me/model")' in card
    assert "| steps | 2 |" in card
    assert "secret" not in (tmp_path / "run/run.json").read_text()


def test_a_hub_out_of_reach_is_refused_before_a_folder_exists(run, tmp_path, monkeypatch):
    monkeypatch.setattr(FakeHub, "failing", "whoami")
    with pytest.raises(InputError, match=r"^push-to-hub: expected a Hub that can be reached .*: no route to the Hub$"):
        run(*PUSH)
    assert not (tmp_path / "run").exists()


def test_a_failed_upload_leaves_a_complete_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr(FakeHub, "failing", "upload_folder")
    with pytest.raises(RunError, match=r"the model is complete in .*: `hf upload me/model "):
        run(*PUSH)
    assert (tmp_path / "run/result.json").exists()


def test_a_tracker_out_of_reach_is_refused_before_a_folder_exists(run, tmp_path, monkeypatch):
    def refuses() -> None:
        raise ConnectionError("no server\nat that address.")

    monkeypatch.setitem(trackers.CHECKS, "tensorboard", (refuses, "try later"))
    with pytest.raises(InputError) as caught:
        run("--report-to", "tensorboard")
    assert str(caught.value) == "report-to: tensorboard cannot be used: no server at that address; try later"
    assert not (tmp_path / "run").exists()
