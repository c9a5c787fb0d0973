"""Folders, indexes and configs: which files make a model, and every way in which they do not."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from modelglue.checkpoint import PickledCheckpoint, SafetensorsCheckpoint, TensorsCheckpoint, save, tensor_file
from modelglue.checkpoint.formats.opening import open_folder
from modelglue.checkpoint.formats.side_files import SIDE_FILES
from modelglue.errors import CheckpointError
from tests.checkpoint.files import EIGHT, TWO, randn, weight_file, write_model, write_single

INDEX = "model.safetensors.index.json"
A = {"a": torch.arange(4.0)}
B = {"b": torch.arange(6.0).view(2, 3)}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SHARDS = {FIRST: A, SECOND: B}
RIGHT = {"a": FIRST, "b": SECOND}


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_folder(folder)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert message.startswith(str(folder))
    for word in words:
        assert word in message
    assert len(message) < len(str(folder)) + 600
    message.encode()


# -- whole models -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [True, None], ids=["index", "no-index"])
def test_shards_are_read_with_and_without_an_index(tmp_path: Path, index: Any) -> None:
    checkpoint = SafetensorsCheckpoint(write_model(tmp_path, SHARDS, index=index))
    assert checkpoint.names() == ("a", "b")
    assert torch.equal(checkpoint.tensor("a"), A["a"])
    assert torch.equal(checkpoint.tensor("b"), B["b"])


def test_one_file_of_any_name_is_a_model(tmp_path: Path) -> None:
    write_model(tmp_path, {"weights.safetensors": A, "adapter_model.safetensors": B})
    for path in (tmp_path, tmp_path / "weights.safetensors"):
        assert SafetensorsCheckpoint(path).names() == ("a",)


def test_links_into_the_blobs_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--org--name" / "blobs", tmp_path / "models--org--name" / "snapshots" / "0123"
    write_model(blobs, {"first": A, "second": B})
    snapshot.mkdir(parents=True)
    for name, blob in ((FIRST, "first"), (SECOND, "second")):
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    (snapshot / INDEX).write_text(json.dumps({"weight_map": RIGHT}))
    assert torch.equal(SafetensorsCheckpoint(snapshot).tensor("b"), B["b"])


def test_near_names_are_suggested(tmp_path: Path) -> None:
    checkpoint = SafetensorsCheckpoint(write_single(tmp_path, {"layers.0.weight": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"no tensor 'layers\.0\.wieght'\. Did you mean 'layers\.0\.weight'\?"):
        checkpoint.info("layers.0.wieght")


# -- hostile indexes ----------------------------------------------------------------------------------------------------------

#: what stands in the index -> words of the message
BAD_INDEXES: dict[str, tuple[Any, str]] = {
    "empty-file": (b"", "not valid"),
    "not-json": (b"{weight_map", "not valid"),
    "not-utf-8": (b'{"weight_map": {"a\xff": 1}}', "can't decode byte 0xff"),
    "a-list": ([RIGHT], "holds list, not a JSON object"),
    "deep": (b'{"weight_map":' + b"[" * 50_000 + b"]" * 50_000 + b"}", "nested too deeply"),
    "no-weight-map": ({"metadata": {}}, "has no weight_map"),
    "empty-weight-map": ({"weight_map": {}}, "empty or malformed"),
    "weight-map-a-list": ({"weight_map": list(RIGHT.items())}, "malformed"),
    "a-number-for-a-file": ({"weight_map": {**RIGHT, "b": 2}}, "tensor 'b' points to 2"),
    "null-for-a-file": ({"weight_map": {**RIGHT, "b": None}}, "tensor 'b' points to None"),
    "tensor-twice": (f'{{"weight_map": {{"a": "{FIRST}", "b": "{SECOND}", "a": "{SECOND}"}}}}'.encode(), "'a' twice"),
    "unknown-tensor": ({"weight_map": {**RIGHT, "c": FIRST}}, f"tensor 'c' should stand in {FIRST}, but stands in no shard"),
    "wrong-shard": ({"weight_map": {"a": SECOND, "b": FIRST}}, f"'a' should stand in {SECOND}, but stands in {FIRST}"),
    "name-of-half-characters": (
        f'{{"weight_map": {{"a": "{FIRST}", "b": "{SECOND}", "\\ud800": "{FIRST}"}}}}'.encode(), "tensor '\\ud800' should stand",
    ),
    "missing-shard": ({"weight_map": {**RIGHT, "b": "model-00003-of-00003.safetensors"}}, "which does not exist"),
    "parent": ({"weight_map": {**RIGHT, "b": "../outside.safetensors"}}, "not a .safetensors file of this folder"),
    "parent-inside": ({"weight_map": {**RIGHT, "b": f"sub/../{SECOND}"}}, "not a .safetensors file of this folder"),
    "absolute": ({"weight_map": {**RIGHT, "b": "/outside.safetensors"}}, "not a .safetensors file of this folder"),
    "backslash": ({"weight_map": {**RIGHT, "b": "..\\outside.safetensors"}}, "not a .safetensors file of this folder"),
    "drive": ({"weight_map": {**RIGHT, "b": "C:\\outside.safetensors"}}, "not a .safetensors file of this folder"),
    "subfolder": ({"weight_map": {**RIGHT, "b": f"sub/{SECOND}"}}, "not a .safetensors file of this folder"),
    "dot": ({"weight_map": {**RIGHT, "b": f"./{SECOND}"}}, "not a .safetensors file of this folder"),
    "nothing": ({"weight_map": {**RIGHT, "b": ""}}, "not a .safetensors file of this folder"),
    "zero-byte": ({"weight_map": {**RIGHT, "b": "\0.safetensors"}}, "not a .safetensors file of this folder"),
    "half-character": (f'{{"weight_map": {{"a": "{FIRST}", "b": "\\ud800.safetensors"}}}}'.encode(), "not a .safetensors file"),
    "endless-name": ({"weight_map": {**RIGHT, "b": "x" * 5000 + ".safetensors"}}, "not a .safetensors file of this folder"),
    "name-that-no-disk-takes": ({"weight_map": {**RIGHT, "b": "x" * 250 + ".safetensors"}}, "not a .safetensors file of this folder"),
    "other-format": ({"weight_map": {**RIGHT, "b": "pytorch_model.bin"}}, "not a .safetensors file of this folder"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_INDEXES)
def test_hostile_index_is_refused(name: str, tmp_path: Path) -> None:
    index, words = BAD_INDEXES[name]
    folder = write_model(tmp_path / "model", SHARDS, index=index)
    write_model(tmp_path, {"outside.safetensors": B})
    refused(folder, INDEX, words)


def test_index_that_leaves_a_tensor_out_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path, {**SHARDS, FIRST: {**A, "hidden": torch.zeros(1)}}, index={"weight_map": RIGHT})
    refused(folder, INDEX, f"does not list tensor 'hidden' of {FIRST}")


def test_index_that_leaves_a_whole_shard_out_is_refused(tmp_path: Path) -> None:
    """Whoever reads only what is listed would merge half a model."""
    folder = write_model(tmp_path, SHARDS, index={"weight_map": {"a": FIRST}})
    refused(folder, INDEX, "does not list tensors of every shard: shard 2 of 2 is missing")


def test_index_of_shards_with_names_of_their_own_is_read(tmp_path: Path) -> None:
    folder = write_model(tmp_path, {"first.safetensors": A, SECOND: B}, index=True)
    assert SafetensorsCheckpoint(folder).names() == ("a", "b")


def test_index_larger_than_any_is_refused_unread(tmp_path: Path) -> None:
    folder = write_model(tmp_path, SHARDS, index=True)
    os.truncate(folder / INDEX, 100_000_001)  # sparse
    refused(folder, INDEX, "is 100,000,001 bytes long, allowed are 100,000,000")


def test_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", {FIRST: A}, index={"weight_map": RIGHT})
    outside = write_model(tmp_path / "elsewhere" / "blobs", {"secret.safetensors": B}) / "secret.safetensors"
    (folder / SECOND).symlink_to(outside)
    refused(folder, INDEX, f"'{SECOND}' is a link that leaves the folder, to {outside}")


def test_link_within_the_folder_is_followed(tmp_path: Path) -> None:
    folder = write_model(tmp_path, {FIRST: A, "kept": B}, index={"weight_map": RIGHT})
    (folder / SECOND).symlink_to("kept")
    assert SafetensorsCheckpoint(folder).names() == ("a", "b")


def test_dangling_link_and_link_loop_are_missing_shards(tmp_path: Path) -> None:
    folder = write_model(tmp_path, {FIRST: A}, index={"weight_map": RIGHT})
    (folder / SECOND).symlink_to("nowhere")
    refused(folder, SECOND, "does not exist")
    (folder / SECOND).unlink()
    (folder / SECOND).symlink_to(SECOND)
    refused(folder, SECOND)


def test_damaged_shard_is_named(tmp_path: Path) -> None:
    folder = write_model(tmp_path, SHARDS, index=True)
    os.truncate(folder / SECOND, (folder / SECOND).stat().st_size - 1)
    refused(folder, f"{folder / SECOND}: ", "tensor 'b'", "but the file holds 23")


@pytest.mark.parametrize("index", [True, None], ids=["index", "no-index"])
def test_tensor_in_two_shards_is_refused(tmp_path: Path, index: Any) -> None:
    folder = write_model(tmp_path, {FIRST: {**A, **B}, SECOND: B}, index=index)
    refused(folder, f"{folder / SECOND}: ", f"tensor 'b' stands in {FIRST} as well")


# -- hostile folders ----------------------------------------------------------------------------------------------------------


def gap(folder: Path) -> None:
    write_model(folder, {"model-00001-of-00003.safetensors": A, "model-00003-of-00003.safetensors": B})


def wide_gap(folder: Path) -> None:
    write_model(folder, {"model-00001-of-99999.safetensors": A})


def one_too_many(folder: Path) -> None:
    write_model(folder, {**SHARDS, "model-00003-of-00002.safetensors": {"c": torch.zeros(1)}})


def counted_from_zero(folder: Path) -> None:
    write_model(folder, {"model-00000-of-00002.safetensors": A, "model-00001-of-00002.safetensors": B})


def two_counts(folder: Path) -> None:
    write_model(folder, {"model-00001-of-00001.safetensors": A, SECOND: B})


def two_stems(folder: Path) -> None:
    write_model(folder, {FIRST: A, "other-00002-of-00002.safetensors": B})


def two_files(folder: Path) -> None:
    write_model(folder, {"one.safetensors": A, "two.safetensors": B})


def two_models(folder: Path) -> None:
    write_model(folder, {**SHARDS, "model.safetensors": A}, index={"weight_map": RIGHT})


def adapter(folder: Path) -> None:
    write_model(folder, {"adapter_model.safetensors": A})


def adapter_by_its_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def pipeline(folder: Path) -> None:
    (folder / "model_index.json").write_text("{}")
    write_model(folder / "unet", {"diffusion_pytorch_model.safetensors": A})
    write_model(folder / "text_encoder", {"model.safetensors": A})
    (folder / "scheduler").mkdir()


def training_state_only(folder: Path) -> None:
    (folder / "optimizer.pt").write_bytes(b"PK")
    (folder / "training_args.bin").write_bytes(b"PK")


def foreign(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).write_bytes(b"GGUF")

    make.__name__ = name
    return make


def folder_named_like_a_file(folder: Path) -> None:
    (folder / "model.safetensors").mkdir()


BAD_FOLDERS: list[tuple[Callable[[Path], None], str]] = [
    (gap, "shard 2 of 3 is missing"),
    (wide_gap, "shard 2, 3, 4, 5, 6, 7, 8, 9, ... of 99999 is missing"),
    (one_too_many, "shard 3 of 2 is one too many"),
    (counted_from_zero, "shard 2 of 2 is missing"),
    (two_counts, "several .safetensors files and no index"),
    (two_stems, "several .safetensors files and no index"),
    (two_files, "several .safetensors files and no index: one.safetensors, two.safetensors"),
    (two_models, "holds model.safetensors and an index of other shards"),
    (adapter, "is an adapter, not a model. Refer to it together with its base: BASE+"),
    (adapter_by_its_config, "is an adapter, not a model"),
    (pipeline, "is a diffusion pipeline of several models. Refer to one of its components: '"),
    (training_state_only, "holds no .safetensors file, and no .bin"),
    (foreign("q4.gguf"), "holds q4.gguf, which is in GGUF, the quantised format of llama.cpp. Merge the original safetensors release"),
    (foreign("tf_model.h5"), "holds tf_model.h5, which is in TensorFlow's format"),
    (foreign("flax_model.msgpack"), "is in Flax's format"),
    (foreign("model.onnx"), "is an ONNX graph"),
    (folder_named_like_a_file, "holds no .safetensors file"),
    (lambda folder: None, "holds no .safetensors file"),
]


@pytest.mark.parametrize(("make", "words"), BAD_FOLDERS, ids=lambda value: getattr(value, "__name__", ""))
def test_folder_that_is_no_model_is_refused(make: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    make(tmp_path)
    refused(tmp_path, words)


@pytest.mark.parametrize(
    ("name", "words"),
    [("q4.gguf", "is in GGUF"), ("weights.npz", "is no file of weights that is known"), ("model", "is no file of weights")],
)
def test_file_of_another_format_is_refused(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).write_bytes(b"PK")
    refused(tmp_path / name, words, "Allowed is a model folder, or a .safetensors, .bin, .pt, .pth or .ckpt file.")


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    for opened in (open_folder, SafetensorsCheckpoint, PickledCheckpoint):
        with pytest.raises(CheckpointError, match="cannot be read"):
            opened(tmp_path / "model.safetensors")


def test_components_of_a_pipeline_are_named_and_are_models(tmp_path: Path) -> None:
    pipeline(tmp_path)
    refused(tmp_path, f"'{tmp_path / 'text_encoder'}', '{tmp_path / 'unet'}'.")
    assert open_folder(tmp_path / "unet").names() == ("a",)


def test_sharded_component_of_a_pipeline_with_a_variant_beside_it(tmp_path: Path) -> None:
    """The variant in half precision is another model of the same names; the one with the plain name counts."""
    first, second = "diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model-00002-of-00002.safetensors"
    write_model(tmp_path, {first: A, second: B, "diffusion_pytorch_model.fp16.safetensors": {**A, **B}})
    index = {"weight_map": {"a": first, "b": second}}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert open_folder(tmp_path).shards == (tmp_path / first, tmp_path / second)


def test_the_file_with_the_usual_name_is_the_model(tmp_path: Path) -> None:
    write_model(tmp_path, {"model.safetensors": A, "model.fp16.safetensors": B, "consolidated.safetensors": B})
    assert open_folder(tmp_path).names() == ("a",)
    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, "several .safetensors files and no index: consolidated.safetensors, model.fp16.safetensors")


def test_safetensors_win_over_pickled_weights(tmp_path: Path) -> None:
    write_single(tmp_path, A)
    torch.save(B, tmp_path / "pytorch_model.bin")
    assert open_folder(tmp_path).names() == ("a",)
    (tmp_path / "model.safetensors").unlink()
    assert open_folder(tmp_path).names() == ("b",)


def test_code_that_a_config_names_is_a_side_file_and_is_not_run(tmp_path: Path) -> None:
    folder = write_single(tmp_path / "model", A, config={"auto_map": {"AutoModel": "modeling_x.X"}})
    code = b"raise SystemExit('was run')\r\n"
    for name in ("modeling_x.py", "configuration_x.py", "helpers.py"):
        (folder / name).write_bytes(code)
    save(open_folder(folder), tmp_path / "out")
    for name in ("modeling_x.py", "configuration_x.py", "helpers.py"):
        assert (tmp_path / "out" / name).read_bytes() == code
    (folder / "config.json").write_text("{}")
    assert open_folder(folder).files == {}
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["helpers.T", null]}}')
    assert sorted(open_folder(folder).files) == ["configuration_x.py", "helpers.py", "modeling_x.py", "tokenizer_config.json"]


@pytest.mark.parametrize("name", SIDE_FILES)
def test_every_side_file_is_copied(name: str, tmp_path: Path) -> None:
    folder = write_single(tmp_path / "model", A)
    (folder / name).write_bytes(b"{}\r\n")
    save(open_folder(folder), tmp_path / "out")
    assert (tmp_path / "out" / name).read_bytes() == b"{}\r\n"


BAD_CONFIGS = {
    "not-json": (b"{", "not valid"),
    "not-utf-8": (b'{"a": "\xff"}', "can't decode"),
    "a-list": (b"[]", "holds list, not a JSON object"),
    "deep": (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "nested too deeply"),
    "half-a-character": (b'{"a": "\\ud800"}', "half a character"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_broken_config_is_refused_and_before_weights_are_written(name: str, tmp_path: Path) -> None:
    data, words = BAD_CONFIGS[name]
    folder = write_single(tmp_path / "model", A)
    (folder / "config.json").write_bytes(data)
    seen: list[tuple[int, int]] = []
    with pytest.raises(CheckpointError, match=words) as caught:
        save(SafetensorsCheckpoint(folder), tmp_path / "out", progress=lambda *step: seen.append(step))
    assert str(caught.value).startswith(f"{folder / 'config.json'}: ")
    assert seen == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_folder_without_config_has_an_empty_one(tmp_path: Path) -> None:
    write_single(tmp_path, A)
    assert SafetensorsCheckpoint(tmp_path).config == {}
    assert SafetensorsCheckpoint(tmp_path / "model.safetensors").config == {}
    assert SafetensorsCheckpoint(tmp_path / "model.safetensors").files == {}


# -- files that change while they are read ------------------------------------------------------------------------------------


def test_shard_that_shrank_after_it_was_opened_is_named(tmp_path: Path) -> None:
    checkpoint = SafetensorsCheckpoint(write_single(tmp_path, B))
    path = tmp_path / "model.safetensors"
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(CheckpointError, match="has become shorter since it was opened") as caught:
        checkpoint.read("b")
    assert str(caught.value).startswith(str(path))


def test_shard_that_vanished_is_named(tmp_path: Path) -> None:
    checkpoint = SafetensorsCheckpoint(write_single(tmp_path, B))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        _ = checkpoint.stamp


# -- against the safetensors library ------------------------------------------------------------------------------------------

#: every dtype that the library and torch share, every rank, empty and long tensors
EVERY_DTYPE = {
    "f64": randn(3, 5, dtype=torch.float64), "f32": randn(7), "f16": randn(2, 2, 2, dtype=torch.float16),
    "bf16": randn(9, 3, dtype=torch.bfloat16), "e4m3": randn(5).to(torch.float8_e4m3fn), "e5m2": randn(5).to(torch.float8_e5m2),
    "e8m0": torch.arange(7, dtype=torch.uint8).view(torch.float8_e8m0fnu), "i64": torch.tensor([-(2**63), 2**63 - 1]),
    "e4m3fnuz": randn(5).to(torch.float8_e4m3fnuz), "e5m2fnuz": randn(5).to(torch.float8_e5m2fnuz),
    "c64": torch.tensor([1 + 2j, -0.5j]),
    "i32": torch.arange(-3, 3, dtype=torch.int32), "i16": torch.arange(3, dtype=torch.int16), "i8": torch.arange(-2, 3, dtype=torch.int8),
    "u64": torch.arange(3).to(torch.uint64), "u32": torch.arange(3).to(torch.uint32), "u16": torch.arange(3).to(torch.uint16),
    "u8": torch.arange(250, 256).to(torch.uint8), "bool": torch.tensor([True, False, True]),
    "scalar": torch.tensor(3.5), "scalar.bool": torch.tensor(True), "empty": torch.empty(0), "empty.rows": torch.empty(0, 4, 2),
    "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]), "名前": torch.ones(1),
}  # fmt: skip


def assert_bits_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.reshape(-1).view(torch.uint8).tolist() == expected.reshape(-1).view(torch.uint8).tolist()


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    checkpoint = SafetensorsCheckpoint(write_single(tmp_path, EVERY_DTYPE))
    assert checkpoint.names() == tuple(sorted(EVERY_DTYPE))
    for name, expected in EVERY_DTYPE.items():
        assert_bits_equal(checkpoint.tensor(name), expected)


def test_what_is_saved_is_read_by_the_library(tmp_path: Path) -> None:
    save(TensorsCheckpoint(EVERY_DTYPE), tmp_path / "one")
    save(TensorsCheckpoint(EVERY_DTYPE), tmp_path / "many", shard_bytes=40)
    (tmp_path / "bytes.safetensors").write_bytes(tensor_file(TensorsCheckpoint(EVERY_DTYPE)))
    many = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(many) > 5
    for paths in ([tmp_path / "one" / "model.safetensors"], many, [tmp_path / "bytes.safetensors"]):
        found = {}
        for path in paths:
            with safe_open(path, framework="pt") as opened:
                assert opened.metadata() == {"format": "pt"}
                found.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118 - it is no dict
        assert sorted(found) == sorted(EVERY_DTYPE)
        for name, expected in EVERY_DTYPE.items():
            assert_bits_equal(found[name], expected)


PACKED = {"F4": [4, 3], "F6_E2M3": [2, 4], "F6_E3M2": [4]}


@pytest.mark.parametrize("dtype", PACKED)
def test_packed_dtypes_are_described_and_neither_read_nor_written(tmp_path: Path, dtype: str) -> None:
    size = {"F4": 6, "F6_E2M3": 6, "F6_E3M2": 3}[dtype]
    header = {"w": {"dtype": dtype, "shape": PACKED[dtype], "data_offsets": [0, size]}}
    (tmp_path / "model.safetensors").write_bytes(weight_file(header, bytes(size)))
    checkpoint = SafetensorsCheckpoint(tmp_path)
    info = checkpoint.info("w")
    assert (info.dtype, list(info.shape), info.nbytes) == (dtype, PACKED[dtype], size)
    with pytest.raises(CheckpointError, match=f"dtype {dtype} packs several numbers into a byte"):
        checkpoint.read("w")
    with pytest.raises(CheckpointError, match=f"tensor 'w' is {dtype}, several numbers to a byte"):
        save(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["F64", "F32", "BF16", "I64"])
def test_unaligned_tensors_are_read(tmp_path: Path, dtype: str) -> None:
    """A byte before the others shifts them off their alignment, which the format allows."""
    kind = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64}[dtype]
    values = torch.arange(1, 8).to(kind)
    data = values.view(torch.uint8).numpy().tobytes()
    header = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "w": {"dtype": dtype, "shape": [7], "data_offsets": [1, 1 + len(data)]},
    }
    (tmp_path / "model.safetensors").write_bytes(weight_file(header, b"\x2a" + data))
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert torch.equal(checkpoint.read("w"), values)
    assert torch.equal(checkpoint.read("w", 2, 5), values[2:5])
    assert checkpoint.read("byte").tolist() == [42]


def test_metadata_and_padding_of_foreign_writers_are_read(tmp_path: Path) -> None:
    for header in ({"__metadata__": {"format": "pt", "x": "y"}, "w": TWO}, {"__metadata__": None, "w": TWO}):
        (tmp_path / "model.safetensors").write_bytes(weight_file(json.dumps(header).encode() + b" \n\t ", EIGHT))
        assert SafetensorsCheckpoint(tmp_path).names() == ("w",)
        with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
            assert list(opened.keys()) == ["w"]


def test_file_without_tensors_is_a_model_that_cannot_be_saved(tmp_path: Path) -> None:
    save_file({}, tmp_path / "model.safetensors")
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert checkpoint.names() == ()
    with pytest.raises(CheckpointError, match="holds no tensors"):
        save(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- reading ------------------------------------------------------------------------------------------------------------------


def test_ranges_and_out(tmp_path: Path) -> None:
    values = randn(1000)
    checkpoint = SafetensorsCheckpoint(write_single(tmp_path, {"w": values.view(10, 100)}))
    assert torch.equal(checkpoint.read("w", 17, 910), values[17:910])
    assert torch.equal(checkpoint.read("w", 990), values[990:])
    assert checkpoint.read("w", 5, 5).shape == (0,)
    out = torch.empty(3)
    assert checkpoint.read("w", 1, 4, out=out) is out
    assert torch.equal(out, values[1:4])
    assert checkpoint.tensor("w").shape == (10, 100)


def test_a_stray_write_reaches_neither_file_nor_another_reader(tmp_path: Path) -> None:
    checkpoint = SafetensorsCheckpoint(write_single(tmp_path, A))
    before = (tmp_path / "model.safetensors").read_bytes()
    checkpoint.read("a").fill_(9)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert torch.equal(SafetensorsCheckpoint(tmp_path).read("a"), A["a"])


def test_views_stay_valid_when_pages_are_let_go(tmp_path: Path) -> None:
    values = randn(4_000_000)
    checkpoint = SafetensorsCheckpoint(write_single(tmp_path, {"w": values}))
    first = checkpoint.read("w", 0, 1000)
    for start in range(0, 4_000_000, 100_000):
        assert torch.equal(checkpoint.read("w", start, start + 100_000), values[start : start + 100_000])
    assert torch.equal(first, values[:1000])


def test_a_model_of_more_shards_than_a_process_may_have_open_files(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    shards = {f"model-{n:05}-of-00200.safetensors": {f"w{n:03}": torch.full((4,), float(n))} for n in range(1, 201)}
    checkpoint = SafetensorsCheckpoint(write_model(tmp_path, shards))
    resource.setrlimit(resource.RLIMIT_NOFILE, (150, limits[1]))
    try:
        read = [checkpoint.read(name) for name in checkpoint.names()]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert [view.tolist() for view in read] == [[float(n)] * 4 for n in range(1, 201)]


def test_pickled_checkpoint_maps_the_files_itself(tmp_path: Path) -> None:
    checkpoint = SafetensorsCheckpoint(write_model(tmp_path, SHARDS, index=True))
    checkpoint.read("a")
    data = pickle.dumps(checkpoint)
    assert len(data) < 3000
    assert torch.equal(pickle.loads(data).tensor("b"), B["b"])


@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "chat_template.jinja"])
def test_side_file_that_is_a_link_out_of_the_folder(tmp_path: Path, name: str) -> None:
    """A stranger's folder must not make an output carry away a file of the reader's own."""
    folder = write_single(tmp_path / "model", A)
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (folder / name).symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"is a link that leaves the folder, to .*secret\. Put the file itself there"):
        _ = open_folder(folder).files


def test_side_file_that_is_a_link_inside_the_folder(tmp_path: Path) -> None:
    folder = write_single(tmp_path / "model", A)
    (folder / "license.real").write_text("mine")
    (folder / "LICENSE").symlink_to("license.real")
    assert dict(open_folder(folder).files) == {"LICENSE": folder / "LICENSE"}
