"""Code that comes with a model, a tokenizer or a configuration is never run, whatever is answered on standard input."""

import ast
import builtins
import contextlib
import json
import shutil
import signal
import sys
import types
from pathlib import Path

import pytest

import flashmhf
from flashmhf import cli
from flashmhf.data.tokenizer import byte_tokenizer, load_tokenizer
from flashmhf.errors import InputError
from flashmhf.models import FlashMHFConfig
from flashmhf.models.loading import load_config, load_model, new_model
from tiny import tiny_model

KERNEL = "evil-owner/evil-kernel"
EVIL = (
    "from pathlib import Path\nPath({marker!r}).write_text('code was run')\nclass C: pass\nM = T = P = generate = C\n"
)


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("intact") / "m"
    tiny_model(eos_token_id=256, pad_token_id=257).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(intact, tmp_path, monkeypatch):
    """A model's folder with code; after the test, nothing has run it or asked whether to."""
    shutil.copytree(intact, tmp_path / "m")
    code = EVIL.format(marker=str(tmp_path / "OWNED"))
    (tmp_path / "m/evil.py").write_text(code)
    (tmp_path / "m/custom_generate").mkdir()
    (tmp_path / "m/custom_generate/generate.py").write_text(code)
    asked = []

    def answer(question: str = "") -> str:
        asked.append(question)
        return "y"

    monkeypatch.setattr(builtins, "input", answer)
    before = signal.getsignal(signal.SIGALRM)
    yield tmp_path / "m"
    assert not (tmp_path / "OWNED").exists()
    assert asked == []
    assert signal.getsignal(signal.SIGALRM) is before


@pytest.fixture
def kernels(monkeypatch):
    """The package `kernels`, as far as transformers asks for it; a test fails if a kernel is requested."""
    requested = []
    module = types.ModuleType("kernels")
    module.get_kernel = lambda *arguments, **options: requested.append(arguments)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kernels", module)
    for name in ("transformers.modeling_utils", "transformers.integrations.hub_kernels"):
        monkeypatch.setattr(f"{name}.is_kernels_available", lambda *arguments: True, raising=False)
    monkeypatch.setattr(
        "transformers.modeling_utils.lazy_import_flash_attention",
        lambda *arguments, **options: requested.append(arguments),
        raising=False,
    )
    yield
    assert requested == []


def change(file: Path, **values) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | values))


AUTO_MAP = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
COMMANDS = (["generate", "{m}"], ["eval", "{m}"], ["info", "{m}"], ["inspect", "{m}"])


@pytest.mark.parametrize("model_type", ["evilmodel", "flashmhf", "llama", "clip"])
@pytest.mark.parametrize(
    "command", [*COMMANDS, ["train", "--model", "{m}", "--output-dir", "{m}/r"]], ids=lambda c: c[0]
)
def test_auto_map_of_a_model(folder, monkeypatch, capsys, model_type, command, corpus_folder):
    change(folder / "config.json", model_type=model_type, auto_map=AUTO_MAP, architectures=["M"])
    data = ["--data", str(corpus_folder)] if command[0] in ("eval", "train", "inspect") else ["--max-new-tokens", "2"]
    if command[0] == "info":
        data = []
    limits = ["--max-steps", "1", "--report-to", "none"] if command[0] == "train" else []
    monkeypatch.setattr(sys, "argv", ["flashmhf", *(part.format(m=folder) for part in command), *data, *limits])
    if command[0] == "train" and model_type == "flashmhf":
        assert load_model(str(folder)).config.model_type == "flashmhf"
        return
    with pytest.raises(SystemExit) as caught:
        cli.main()
    if model_type == "flashmhf":
        assert not caught.value.code
    elif not (model_type == "llama" and command[0] == "info"):
        assert caught.value.code == 2
        assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "auto_map", [AUTO_MAP, {"AutoTokenizer": [None, "evil.T"]}, {"AutoTokenizer": ["a/b--evil.T", None]}]
)
@pytest.mark.parametrize("name", ["tokenizer_config.json", "processor_config.json", "preprocessor_config.json"])
def test_auto_map_of_a_tokenizer(folder, name, auto_map):
    change(folder / name, auto_map=auto_map, processor_class="P", image_processor_type="P", feature_extractor_type="P")
    assert load_tokenizer(str(folder)).eos_token_id == 256
    change(folder / "tokenizer_config.json", tokenizer_class="T")
    with pytest.raises(InputError, match="tokenizer_class that transformers has, got 'T'"):
        load_tokenizer(str(folder))
    change(folder / "tokenizer_config.json", tokenizer_class=None)
    (folder / "config.json").unlink()
    with contextlib.suppress(InputError):
        load_tokenizer(str(folder))


def test_models_without_safetensors(folder):
    import pickle

    class Evil:
        def __reduce__(self):
            return exec, (EVIL.format(marker=str(folder.parent / "OWNED")),)

    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "model.pt"):
        (folder / name).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InputError, match="pickled weights can run code and are not read"):
        load_model(str(folder))


IMPLEMENTATIONS = [
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
]


@pytest.mark.parametrize("value", [KERNEL, f"paged|{KERNEL}", f"{KERNEL}@main:f", {"": KERNEL}, [KERNEL]], ids=str)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_kernels_named_by_a_configuration(folder, kernels, name, value):
    change(folder / "config.json", **{name: value})
    for load in (load_model, load_config, lambda m: load_config(f"{m}/config.json")):
        with pytest.raises(InputError, match=f"{name}: expected .* installed.*got"):
            load(str(folder))


@pytest.mark.parametrize("value", ["flash_attention_2", "flash_attention_3", "flash_attention_4", "evil"])
@pytest.mark.parametrize("model_type", ["flashmhf", "llama"])
def test_attention_that_is_not_installed_is_not_downloaded_either(folder, kernels, model_type, value):
    change(folder / "config.json", model_type=model_type, attn_implementation=value)
    reason = r"attn_implementation: expected what is installed \((\w+, )*eager, "  # and what other tests registered
    with pytest.raises(InputError, match=reason):
        load_model(str(folder))
    with pytest.raises(ValueError, match=reason):
        FlashMHFConfig(attn_implementation=value)


@pytest.mark.parametrize("value", ["eager", "sdpa", None])
def test_attention_that_is_installed_is_used(folder, value):
    change(folder / "config.json", attn_implementation=value)
    assert load_model(str(folder)).config._attn_implementation == (value or "sdpa")


NESTED = {
    "in a configuration inside": {"text_config": {"model_type": "llama", "attn_implementation": KERNEL}},
    "deep": {"a": [{"b": [{"_attn_implementation": KERNEL}]}]},
    "kernel_config": {"kernel_config": {"RMSNorm": KERNEL}},
    "use_kernels": {"use_kernels": True},
    "other weights": {"transformers_weights": "../other.safetensors"},
    "another configuration": {"configuration_files": ["config.4.0.0.json"]},
}


@pytest.mark.parametrize("model_type", ["flashmhf", "llama", "llava"])
@pytest.mark.parametrize("values", NESTED.values(), ids=NESTED)
def test_what_selects_code_or_other_files(folder, kernels, model_type, values):
    change(folder / "config.json", model_type=model_type, **values)
    with pytest.raises(InputError, match=r"config\.json: "):
        load_model(str(folder))


def test_a_models_own_generation_is_not_used(folder, monkeypatch, caplog):
    settings = {
        "custom_generate": str(folder),
        "num_beams": 3,
        "penalty_alpha": 0.6,
        "top_k": 4,
        "cache_implementation": "static",
    }
    change(folder / "generation_config.json", **settings)
    monkeypatch.setattr(sys, "argv", ["flashmhf", "generate", str(folder), "--max-new-tokens", "3"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    assert "generation_config.json: cache_implementation, num_beams, penalty_alpha: not used" in caplog.text


def test_a_chat_template_is_not_rendered(folder):
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}{% for i in range(10**12) %}{% endfor %}")
    assert load_tokenizer(str(folder)).eos_token_id == 256


def test_auto_map_is_not_kept():
    config = FlashMHFConfig.from_preset("flashmhf-tiny", auto_map=AUTO_MAP)
    assert not hasattr(config, "auto_map")
    assert new_model(config).config.model_type == "flashmhf"


LOADERS = {"from_pretrained", "from_config"}
SAFE_OWNERS = {"FlashMHFConfig", "HeadGateUsage"}


def test_everything_is_loaded_without_remote_code():
    """Every call of a loader in the sources says so; `datasets` has no scripts from version 4 on."""
    found = 0
    for file in sorted(Path(flashmhf.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            named = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name)
            name = (node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id) if named else None
            if name in LOADERS | {"HFLM"}:
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert keywords.get("trust_remote_code") == "False", f"{file}: {ast.unparse(node)}"
                found += 1
    assert found == 4
