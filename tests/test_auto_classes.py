"""transformers' Auto classes load this package's models once `flashmhf` is imported, before transformers or after."""

import subprocess
import sys

import pytest
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import flashmhf.models
from flashmhf import auto_classes, replace_ffn
from flashmhf.models.replaced import MODEL_TYPE
from tiny import tiny_model

ORDERS = {
    "flashmhf first": "import flashmhf; from transformers import AutoModelForCausalLM as Auto",
    "transformers first": "from transformers import AutoModelForCausalLM as Auto; import flashmhf",
    "an Auto class in use": "from transformers import AutoConfig, AutoModelForCausalLM as Auto; "
    "AutoConfig.for_model('llama'); from flashmhf import FlashMHF",
}
LOAD = "; [print(type(layer.mlp).__name__) for layer in Auto.from_pretrained({!r}).model.layers]"


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and in `replaced` a Llama with one FlashMHF layer."""
    folder = tmp_path_factory.mktemp("models")
    tiny_model().save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    replace_ffn(LlamaForCausalLM(LlamaConfig(vocab_size=9, **sizes)), layers=[1]).save_pretrained(folder / "replaced")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_models_load_after_importing_flashmhf(folder, order):
    assert run(order + LOAD.format(str(folder))).stdout.split() == ["FlashMHF"]
    assert run(order + LOAD.format(str(folder / "replaced"))).stdout.split() == ["LlamaMLP", "FlashMHF"]


@pytest.mark.slow
def test_transformers_alone_names_the_model_type(folder):
    for path, model_type in ((folder, "flashmhf"), (folder / "replaced", MODEL_TYPE)):
        done = run("from transformers import AutoModelForCausalLM as Auto" + LOAD.format(str(path)))
        assert done.returncode == 1
        assert f"has model type `{model_type}` but Transformers does not recognize" in done.stderr


def test_every_registered_type_has_a_stand_in():
    registered = {n for n, c in CONFIG_MAPPING._extra_content.items() if c.__module__.startswith("flashmhf")}
    assert registered == set(auto_classes.MODEL_TYPES)


def test_a_stand_in_becomes_the_configuration(monkeypatch):
    for model_type in auto_classes.MODEL_TYPES:
        real = CONFIG_MAPPING._extra_content[model_type]
        stand_in = auto_classes._stand_in(model_type, sys.modules[auto_classes.TABLE_MODULE])
        assert stand_in is not real
        assert stand_in.real() is real
    stand_in = auto_classes._stand_in("flashmhf", sys.modules[auto_classes.TABLE_MODULE])
    assert type(stand_in(hidden_size=32, num_attention_heads=2)) is flashmhf.models.FlashMHFConfig
    assert type(stand_in.from_dict({"hidden_size": 32, "num_attention_heads": 2})) is flashmhf.models.FlashMHFConfig


def test_the_finder_adds_them_once_to_a_module_that_is_imported_later(monkeypatch, tmp_path):
    (tmp_path / "table_of_a_test.py").write_text(
        "class Table(dict):\n    register = dict.__setitem__\n\nCONFIG_MAPPING = Table(flashmhf='there')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(auto_classes, "TABLE_MODULE", "table_of_a_test")
    before = list(sys.meta_path)
    auto_classes.register()
    assert len(sys.meta_path) == len(before) + 1
    import table_of_a_test  # type: ignore[import-not-found]

    assert sys.meta_path == before
    assert list(table_of_a_test.CONFIG_MAPPING) == ["flashmhf", MODEL_TYPE]
    assert table_of_a_test.CONFIG_MAPPING["flashmhf"] == "there"
