"""Every file of a model's folder: cut, zeroed, of another type, deeply nested; one error that names it, or recovery."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from flashmhf.data.tokenizer import byte_tokenizer, load_tokenizer
from flashmhf.errors import InputError
from flashmhf.models.loading import check_folder, load_config, load_model, new_model
from flashmhf.models.reference.conversion import convert
from flashmhf.untrusted import reading
from tiny import tiny_model

Break = Callable[[Path], object]
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("intact") / "m"
    tiny_model(num_subnetworks=3, score_scale=1.0, gate_scale=1.0, output_scale=1.0).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}')
    return folder


@pytest.fixture
def folder(intact, tmp_path) -> Path:
    shutil.copytree(intact, tmp_path / "m")
    return tmp_path / "m"


def load(folder: Path) -> None:
    load_model(str(folder))
    load_tokenizer(str(folder))


def replaced_by_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def replaced_by_a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def grown(file: Path) -> None:
    with file.open("ab") as stream:
        stream.truncate(10 * 2**30)  # sparse


DAMAGE: dict[str, Break] = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "zeroed": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "empty": lambda file: file.write_bytes(b""),
    "a list": lambda file: file.write_text("[]"),
    "a number": lambda file: file.write_text("7"),
    "null": lambda file: file.write_text("null"),
    "a list of lists": lambda file: file.write_text("[" * 200_000),
    "nested": lambda file: file.write_text('{"a":' * 200_000 + "1" + "}" * 200_000),
    "nested a little": lambda file: file.write_text('{"a":' * 900 + "1" + "}" * 900),
    "UTF-16": lambda file: file.write_bytes("{}".encode("utf-16")),
    "with a byte order mark": lambda file: file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes()),
    "no text": lambda file: file.write_bytes(b"\xff\xfe\x00"),
    "a folder": replaced_by_a_folder,
    "a pipe": replaced_by_a_pipe,
    "10 GiB": grown,
}
JSON_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    "model.safetensors.index.json",
)


@pytest.mark.parametrize("name", [*JSON_FILES, WEIGHTS])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named(folder, name, damage):
    if name == "model.safetensors.index.json":
        split(folder)
    DAMAGE[damage](folder / name)
    for command in (load, lambda folder: convert(folder, folder.parent / "out", to="reference")):
        with pytest.raises(InputError) as caught:
            command(folder)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    assert [path.name for path in folder.parent.iterdir()] == ["m"]


def split(folder: Path) -> None:
    """Gives the model an index."""
    header, _ = parts((folder / WEIGHTS).read_bytes())
    names = [name for name in header if name != "__metadata__"]
    (folder / WEIGHTS).rename(folder / "model-1.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def parts(content: bytes) -> tuple[dict, bytes]:
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def header(change: Callable[[dict, list[str]], object]) -> Break:
    """Changes the header of the weights."""

    def damage(folder: Path) -> None:
        values, data = parts((folder / WEIGHTS).read_bytes())
        change(values, [name for name in values if name != "__metadata__"])
        text = json.dumps(values).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)

    return damage


def raw_header(text: bytes) -> Break:
    return lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + bytes(100))


def index(change: Callable[[dict], object]) -> Break:
    """Changes the index of the weights."""

    def damage(folder: Path) -> None:
        split(folder)
        values = json.loads((folder / "model.safetensors.index.json").read_text())
        values["weight_map"] = change(values["weight_map"])
        (folder / "model.safetensors.index.json").write_text(json.dumps(values))

    return damage


def outside(folder: Path) -> None:
    index(lambda names: dict.fromkeys(names, "../model-1.safetensors"))(folder)
    (folder / "model-1.safetensors").rename(folder.parent / "model-1.safetensors")


WRONG_WEIGHTS: dict[str, Break] = {
    "another dtype": header(lambda values, names: values[names[0]].update(dtype="F64")),
    "no floating point": header(lambda values, names: values[names[0]].update(dtype="I32")),
    "an unknown dtype": header(lambda values, names: values[names[0]].update(dtype="evil")),
    "a huge shape": header(lambda values, names: values[names[0]].update(shape=[2**40, 2**40])),
    "a negative shape": header(lambda values, names: values[names[0]].update(shape=[-1])),
    "no shape": header(lambda values, names: values[names[0]].pop("shape")),
    "overlapping tensors": header(
        lambda values, names: values[names[0]].update(data_offsets=values[names[1]]["data_offsets"])
    ),
    "offsets beyond the end": header(lambda values, names: values[names[-1]].update(data_offsets=[0, 10**10])),
    "offsets of text": header(lambda values, names: values[names[-1]].update(data_offsets=["a", "b"])),
    "a list as header": raw_header(b"[]"),
    "a deep header": raw_header(b"[" * 100_000),
    "a deep object as header": raw_header(b'{"a":' * 100_000),
    "a header beyond the end": lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", 10**10) + bytes(99)),
    "a header of 10 GB": lambda folder: (
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", 10**10)),
        grown(folder / WEIGHTS),
    ),
    "numbers in the index": index(lambda names: dict.fromkeys(names, 7)),
    "null in the index": index(lambda names: dict.fromkeys(names)),
    "a list in the index": index(list),
    "an empty index": index(lambda names: {}),
    "files outside of the folder": outside,
    "an absolute path": index(lambda names: dict.fromkeys(names, "/etc/passwd")),
    "another kind of file": index(lambda names: dict.fromkeys(names, "config.json")),
}


@pytest.mark.parametrize("damage", WRONG_WEIGHTS)
def test_wrong_weights_are_errors(folder, damage):
    WRONG_WEIGHTS[damage](folder)
    for command in (load, lambda folder: convert(folder, folder.parent / "out", to="reference")):
        with pytest.raises(InputError, match=r"^(checkpoint|model): ") as caught:
            command(folder)
        assert "\n" not in str(caught.value)
        assert str(folder) in str(caught.value)


def settings(name: str, **values) -> Break:
    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | values
        (folder / name).write_text(json.dumps(content))

    return damage


def config(**values) -> Break:
    return settings("config.json", **values)


def cyclic_link(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("config.json")


WRONG_SETTINGS: dict[str, tuple[Break, str]] = {
    "absurd width": (config(hidden_size=10**9), "config.json: hidden_size: expected a whole number from 1 to 1048576"),
    "negative width": (config(hidden_size=-32), "config.json: hidden_size: expected a whole number"),
    "no width": (config(hidden_size=0), "config.json: hidden_size"),
    "text as width": (config(hidden_size="32"), "config.json: .*hidden_size"),
    "broken number": (config(hidden_size=32.5), "config.json: .*hidden_size"),
    "ten million layers": (config(num_hidden_layers=10**7), "config.json: num_hidden_layers: expected a whole number"),
    "more layers": (config(num_hidden_layers=9000), "num_hidden_layers: expected 1, as the checkpoint has, got 9000"),
    "another width": (config(hidden_size=2**18), "model: expected .* of shape .*, as .*config.json says, got"),
    "a larger vocabulary": (config(vocab_size=2**26), r"model: expected .* of shape \(67108864, 32\), as .* says"),
    "text as sub-networks": (config(num_subnetworks="3"), "config.json: num_subnetworks: expected a whole number"),
    "true as heads": (config(num_ffn_heads=True), "config.json: num_ffn_heads: expected a whole number"),
    "text as flag": (config(q_norm="yes"), "config.json: q_norm: expected true or false, got 'yes'"),
    "unknown ffn_type": (config(ffn_type="evil"), "config.json: ffn_type: expected one of"),
    "a list as ffn_type": (config(ffn_type=["flashmhf"]), "config.json: .*ffn_type"),
    "a list as gate_type": (config(gate_type=[1]), "config.json: .*gate_type"),
    "unknown backend": (config(backend="evil"), "config.json: backend: expected one of"),
    "an object as backend": (config(backend={"a": 1}), "config.json: .*backend"),
    "unknown dtype": (config(dtype="evil"), "config.json: dtype: expected one of float32"),
    "a dtype of integers": (config(dtype="int32"), "config.json: dtype: expected one of float32"),
    "unknown quantization": (config(quantization_config={"quant_method": "evil"}), "config.json: quantization_config"),
    "a list as quantization": (config(quantization_config=[1]), "config.json: quantization_config: expected an object"),
    "NaN": (config(rms_norm_eps=float("nan")), "config.json, got NaN, expected a finite number"),
    "infinity": (config(score_scale=float("inf")), "config.json, got Infinity, expected a finite number"),
    "tagged infinity": (config(score_scale={"__float__": "Infinity"}), "config.json: score_scale"),
    "no rotary type": (config(rope_parameters={"rope_type": "evil"}), "config.json: rope_type: expected one of"),
    "text as rotary": (config(rope_parameters="evil"), "config.json: .*rope_parameters"),
    "text as theta": (config(rope_parameters={"rope_theta": "1e4"}), "config.json: rope_parameters: rope_theta"),
    "a model type of other tensors": (config(model_type="bert"), "model: "),
    "unknown model type": (config(model_type="evil"), "config.json: expected a model_type that flashmhf or"),
    "a list as model type": (config(model_type=["bert"]), "config.json: expected a model_type that flashmhf or"),
    "labels without end": (config(num_labels=10**12), "config.json: num_labels: expected a whole number"),
    "text as label": (config(id2label={"x": "y"}), "config.json: "),
    "text as architectures": (config(architectures="evil"), "config.json: .*architectures"),
    "a padding token beyond the end": (config(pad_token_id=10**6), "config.json: pad_token_id: expected a token of"),
    "text as reference": (config(reference_config="evil"), "config.json: .*reference_config"),
    "text as end": (config(eos_token_id="end"), "config.json: .*eos_token_id"),
    "a negative end": (config(eos_token_id=[1, -5]), "config.json: eos_token_id: expected a token"),
    "true as beginning": (config(bos_token_id=True), "config.json: .*bos_token_id"),
    "unknown problem": (config(problem_type="evil"), "config.json: .*problem_type"),
    "no labels": (config(id2label={}), "config.json: id2label: expected an object with labels"),
    "a number as labels": (config(label2id=5), "config.json: .*label2id"),
    "a number as version": (config(transformers_version=5), "config.json: .*transformers_version"),
    "yarn without factor": (config(rope_parameters={"rope_type": "yarn"}), "rope_parameters: expected factor for"),
    "unequal heads": (config(num_attention_heads=3), "hidden_size: expected a multiple of num_attention_heads 3"),
    "an odd head": (config(head_dim=15), "head_dim: expected an even number"),
    "text as end of text": (
        settings("generation_config.json", eos_token_id="x"),
        "generation_config.json: .*eos_token_id",
    ),
    "a link to itself": (cyclic_link, "config.json"),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter_config.json; merge the adapter"),
    "pickled weights": (lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"), "pickled weights can run code"),
    "unknown cache": (settings("generation_config.json", cache_implementation="evil"), "generation_config.json: "),
    "unknown tokenizer": (settings("tokenizer_config.json", tokenizer_class="Evil"), "tokenizer_config.json: expected"),
    "a list as tokenizer": (settings("tokenizer_config.json", tokenizer_class=[1]), "tokenizer_config.json: expected"),
    "text as length": (settings("tokenizer_config.json", model_max_length={}), "tokenizer: "),
    "no vocabulary": (settings("tokenizer.json", model={"type": "BPE"}), "tokenizer.json: "),
    "unknown tokens": (settings("tokenizer.json", model={"type": "Evil"}), "tokenizer.json: "),
    "a number as padding": (settings("tokenizer_config.json", pad_token=5), "tokenizer: "),
    "text as special tokens": (settings("special_tokens_map.json", eos_token=[["a"]]), "tokenizer: "),
}


@pytest.mark.parametrize("damage", WRONG_SETTINGS)
def test_wrong_settings_are_errors(folder, damage):
    change, message = WRONG_SETTINGS[damage]
    change(folder)
    with pytest.raises(InputError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


CONFIGURATIONS: dict[str, tuple[str, str]] = {
    "another model type": ('{"model_type": "bert"}', "expected model_type 'flashmhf', got 'bert'"),
    "a key that is given twice": ('{"hidden_size": 32, "hidden_size": 64}', "config.json, got hidden_size twice"),
    "a typing error": ('{"num_heads": 4}', "num_heads: expected a field of FlashMHFConfig.*did you mean num_ffn_heads"),
    "text": ("hidden_size = 32", "expected a JSON object in .*config"),
    "a text as width": ('{"hidden_size": "32"}', "hidden_size"),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration_alone(tmp_path, name):
    text, message = CONFIGURATIONS[name]
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_config(str(tmp_path / "config.json"))
    assert str(tmp_path) in str(caught.value)


def test_files_that_may_not_be_read(folder, monkeypatch):
    def refuse(self, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InputError, match=r"Permission denied.*config.json"):
        load(folder)


def test_a_folder_with_an_index_and_a_complete_file_is_read_as_transformers_reads_it(folder):
    content = (folder / WEIGHTS).read_bytes()
    split(folder)
    (folder / WEIGHTS).write_bytes(content[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors is corrupt"):
        check_folder(str(folder))


def test_a_model_that_is_larger_than_memory_is_refused_before_it_is_built(folder):
    from flashmhf.models.loading import check_memory

    values = json.loads((folder / "config.json").read_text()) | {"hidden_size": 2**20, "intermediate_size": 2**20 * 3}
    (folder / "large.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"model: expected one that fits into the memory of \d+ GiB, got [\d,]+ GiB"):
        check_memory(load_config(str(folder / "large.json")))


def test_other_models_of_transformers_load(tmp_path):
    from transformers import LlamaConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    new_model(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path)
    assert type(load_model(str(tmp_path))).__name__ == "LlamaForCausalLM"


class Panic(BaseException):
    """As Rust's libraries raise it."""


Panic.__module__ = "pyo3_runtime"
ERRORS = (ValueError, OSError, KeyError, TypeError, AttributeError, RecursionError, MemoryError, struct.error, Panic)


@pytest.mark.parametrize("kind", [*ERRORS, type("BareError", (Exception,), {})])
def test_whatever_a_library_raises_is_one_line(kind):
    with pytest.raises(InputError, match=r"^the file: .*what\?$"), reading("the file"):
        raise kind("what?\nsecond line")


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, AssertionError, NameError, GeneratorExit])
def test_signals_and_bugs_pass(kind):
    with pytest.raises(kind), reading("the file"):
        raise kind
