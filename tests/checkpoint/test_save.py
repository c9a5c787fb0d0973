"""What `save` writes: bytes, and the files around the weights."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import modelglue
from modelglue.checkpoint import (
    ITEM_SIZE,
    RECIPE_FILE,
    RECORD_FILE,
    Checkpoint,
    JoinedCheckpoint,
    MergedCheckpoint,
    RenamedCheckpoint,
    SafetensorsCheckpoint,
    TensorsCheckpoint,
    open_checkpoint,
    plan_output,
    save,
    torch_dtype,
)
from modelglue.checkpoint.output.card import model_card
from modelglue.errors import MergeError, UserError
from modelglue.methods import get
from tests.checkpoint.files import contents, names_in, write_single
from tests.checkpoint.merges import CONFIG, TOKENIZER, merge_of, reopened, tensors_of, write_zoo

INDEX = "model.safetensors.index.json"
TINY = {
    "b.weight": torch.tensor([[1.0, -2.0]]), "a.bias": torch.tensor([0.5, 0.25, 3.0], dtype=torch.bfloat16),
    "z.ids": torch.tensor([7]), "c.mask": torch.tensor(True), "名": torch.empty(0, 2),
}  # fmt: skip
#: the whole file: length, header with sorted keys padded to 8 bytes, then int64, float32, bfloat16, bool
TINY_BYTES = (
    b"\x50\x01\0\0\0\0\0\0"
    b'{"__metadata__":{"format":"pt"},'
    b'"a.bias":{"data_offsets":[16,22],"dtype":"BF16","shape":[3]},'
    b'"b.weight":{"data_offsets":[8,16],"dtype":"F32","shape":[1,2]},'
    b'"c.mask":{"data_offsets":[22,23],"dtype":"BOOL","shape":[]},'
    b'"z.ids":{"data_offsets":[0,8],"dtype":"I64","shape":[1]},'
    b'"\xe5\x90\x8d":{"data_offsets":[16,16],"dtype":"F32","shape":[0,2]}}'
    b"    "
    b"\x07\0\0\0\0\0\0\0"
    b"\0\0\x80\x3f\0\0\0\xc0"
    b"\0\x3f\x80\x3e\x40\x40"
    b"\x01"
)


@pytest.fixture
def zoo(tmp_path: Path) -> list[SafetensorsCheckpoint]:
    return write_zoo(tmp_path / "zoo")


def test_bytes_of_a_tiny_file_are_frozen(tmp_path: Path) -> None:
    report = save(TensorsCheckpoint(TINY), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == TINY_BYTES
    assert (report.tensors, report.bytes, report.shards) == (5, 8 + 8 + 6 + 1, 1)
    assert (report.resumed_bytes, report.already_complete) == (0, False)
    assert names_in(tmp_path / "out") == ["README.md", "model.safetensors", RECIPE_FILE, RECORD_FILE]


def test_header_is_padded_to_8_bytes_whatever_its_length() -> None:
    for length in range(1, 10):
        shard = plan_output(TensorsCheckpoint({"x" * length: torch.zeros(2)})).shards[0]
        assert len(shard.header) % 8 == 0
        assert int.from_bytes(shard.header[:8], "little") == len(shard.header) - 8
        assert len(shard.header.rstrip(b" ")) > len(shard.header) - 8


# -- equal bytes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["linear", "dare_ties", "ties"])
def test_bytes_do_not_depend_on_workers_or_chunks(
    zoo: list[SafetensorsCheckpoint], tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelglue.checkpoint.output.plan.TASK_ELEMENTS", 500)
    expected: dict[str, bytes] | None = None
    for number, (workers, chunk) in enumerate([(1, 2**18), (1, 97), (2, 512), (3, 1000)]):
        out = tmp_path / str(number) / "out"
        save(merge_of(reopened(zoo), method), out, workers=workers, chunk=chunk, shard_bytes=5000)
        expected = expected or contents(out)
        assert contents(out) == expected
    assert expected is not None
    assert len([name for name in expected if name.endswith(".safetensors")]) > 2


HASHED = """
import sys
from modelglue.checkpoint import MergedCheckpoint, RenamedCheckpoint, JoinedCheckpoint, open_checkpoint, save
from modelglue.methods import get
base, *models = [open_checkpoint(path) for path in sys.argv[2:]]
parameters = {"weight": [0.5] * 3, "density": [0.6] * 3, "lambda": 1.0, "normalize": False, "rescale": True, "rescale_by": "length"}
merged = MergedCheckpoint(get("dare_ties"), models, base, parameters)
joined = JoinedCheckpoint({"": merged, "twin.": RenamedCheckpoint(merged, {n: n for n in merged.names()})})
save(joined, sys.argv[1], shard_bytes=5000, workers=2)
"""


def test_bytes_do_not_depend_on_the_hash_seed(zoo: list[SafetensorsCheckpoint], tmp_path: Path) -> None:
    written = []
    for seed in ("1", "2"):
        out = tmp_path / seed / "out"
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        arguments = [str(out), *(str(checkpoint.path) for checkpoint in zoo)]
        subprocess.run([sys.executable, "-c", HASHED, *arguments], env=environment, check=True)
        written.append(contents(out))
    assert written[0] == written[1]
    assert len(written[0]) > 10


@pytest.mark.parametrize("shard_bytes", [1, 100, 3000, 5000, 10**9])
def test_shards_hold_the_same_tensors_whatever_their_size(zoo: list[SafetensorsCheckpoint], tmp_path: Path, shard_bytes: int) -> None:
    merged = merge_of(zoo)
    report = save(merged, tmp_path / "out", shard_bytes=shard_bytes)
    found = SafetensorsCheckpoint(tmp_path / "out")
    assert found.names() == merged.names()
    for name, expected in tensors_of(merged).items():
        assert torch.equal(found.tensor(name), expected)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert report.shards == len(files)
    for file in files:
        inside = SafetensorsCheckpoint(file)
        assert len(inside.names()) == 1 or sum(inside.info(name).nbytes for name in inside.names()) <= shard_bytes
    if len(files) == 1:
        assert not (tmp_path / "out" / INDEX).exists()
    else:
        index = json.loads((tmp_path / "out" / INDEX).read_text())
        assert index["metadata"] == {"total_size": sum(merged.info(name).nbytes for name in merged.names())}
        assert list(index["weight_map"]) == sorted(merged.names())
        assert [file.name for file in files] == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
        for name, file in index["weight_map"].items():
            assert name in SafetensorsCheckpoint(tmp_path / "out" / file).names()


dtypes = st.sampled_from(["F64", "F32", "BF16", "U8", "BOOL", "I16"])
shapes = st.lists(st.integers(0, 9), max_size=3)


@given(
    st.dictionaries(st.text("ab.", min_size=1, max_size=4), st.tuples(dtypes, shapes), min_size=1, max_size=6),
    st.integers(1, 300), st.integers(1, 50), st.integers(1, 60),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_plan_gives_every_element_one_aligned_place(tensors: dict[str, tuple[str, list[int]]], shard: int, chunk: int, task: int) -> None:
    checkpoint = TensorsCheckpoint({name: torch.zeros(shape, dtype=torch_dtype(dtype)) for name, (dtype, shape) in tensors.items()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modelglue.checkpoint.output.plan.TASK_ELEMENTS", task)
        plan = plan_output(checkpoint, shard_bytes=shard)
    assert sorted(plan.home) == sorted(tensors)
    for file in plan.shards:
        spans = sorted((offset, offset + checkpoint.info(name).nbytes) for name, offset in file.offsets.items())
        assert spans[0][0] == len(file.header)
        assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))
        assert spans[-1][1] == file.size
        assert all(offset % ITEM_SIZE[checkpoint.info(name).dtype] == 0 for name, offset in file.offsets.items())
    pieces = sorted(piece for job in plan.tasks for piece in job.spans)
    for name, group in itertools.groupby(pieces, key=lambda piece: piece[0]):
        ranges = [(start, stop) for _, start, stop in group]
        assert ranges[0][0] == 0
        assert ranges[-1][1] == checkpoint.info(name).numel
        assert all(before[1] == after[0] for before, after in itertools.pairwise(ranges))
    assert {name for name, _, _ in pieces} == set(tensors)
    assert plan.tensor_bytes == sum(checkpoint.info(name).nbytes for name in tensors)
    sizes = [job.bytes for job in plan.tasks]
    assert sizes == sorted(sizes, reverse=True), "long tasks first"


# -- the files around the weights ---------------------------------------------------------------------------------------------


def test_config_keeps_its_order_and_what_nobody_knows(zoo: list[SafetensorsCheckpoint], tmp_path: Path) -> None:
    save(merge_of(zoo), tmp_path / "same")
    save(merge_of(zoo, store="float32"), tmp_path / "wider")
    same = json.loads((tmp_path / "same" / "config.json").read_text(encoding="utf-8"))
    wider = json.loads((tmp_path / "wider" / "config.json").read_text(encoding="utf-8"))
    assert list(same.items()) == list(CONFIG.items())
    assert list(wider.items()) == list({**CONFIG, "torch_dtype": "float32"}.items())
    assert "größe" in (tmp_path / "same" / "config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("config", "patched"),
    [
        ({"dtype": "float32", "x": 1}, {"dtype": "float16", "x": 1}),
        ({"torch_dtype": "float32", "dtype": "float32"}, {"torch_dtype": "float32", "dtype": "float16"}),
        ({"x": 1}, {"x": 1, "dtype": "float16"}),
        ({}, {}),
    ],
)
def test_dtype_field_follows_the_stored_dtype(config: dict[str, object], patched: dict[str, object]) -> None:
    model = TensorsCheckpoint({"w": torch.ones(2)}, config)
    assert dict(MergedCheckpoint(get("linear"), [model], None, {"weight": [1.0], "normalize": True}, store="float16").config) == patched


def test_side_files_are_copied_byte_for_byte_and_nothing_else(zoo: list[SafetensorsCheckpoint], tmp_path: Path) -> None:
    save(merge_of(zoo), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == TOKENIZER
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == bytes(range(256))
    assert names_in(tmp_path / "out") == [
        "README.md", "config.json", "model.safetensors", RECIPE_FILE, RECORD_FILE, "tokenizer.json", "tokenizer.model",
    ]  # fmt: skip


def test_side_file_that_cannot_be_read_is_named(zoo: list[SafetensorsCheckpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied", str(source))

    monkeypatch.setattr("shutil.copyfile", refuse)
    with pytest.raises(UserError, match="Permission denied") as caught:
        save(merge_of(zoo), tmp_path / "out")
    assert str(caught.value).startswith(str(zoo[0].path / "tokenizer.json"))
    assert names_in(tmp_path) == ["zoo"]


def test_outputs_recipe_gives_the_same_bytes_again(zoo: list[SafetensorsCheckpoint], tmp_path: Path) -> None:
    save(merge_of(zoo, "dare_ties", seed=5, store="float16"), tmp_path / "1" / "out")
    recipe = tmp_path / "1" / "out" / RECIPE_FILE
    value = yaml.safe_load(recipe.read_text())
    assert value["method"] == "dare_ties"
    assert value["base"] == str(zoo[0].path)
    assert [model["model"] for model in value["models"]] == [str(checkpoint.path) for checkpoint in zoo[1:]]
    assert (value["seed"], value["dtype"]["store"]) == (5, "float16")
    save(modelglue.merge(recipe), tmp_path / "2" / "out")
    assert contents(tmp_path / "2" / "out") == contents(tmp_path / "1" / "out")


def test_recipe_names_local_models_as_they_are_seen_from_the_folder(
    zoo: list[SafetensorsCheckpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From wherever it was called, by whatever names; nested merges too. What is absolute stays."""
    monkeypatch.chdir(tmp_path / "zoo" / "m0")
    named = [SafetensorsCheckpoint(Path("../m1")), open_checkpoint("m2", relative_to=tmp_path / "zoo"), open_checkpoint(zoo[3].path)]
    merged = merge_of([open_checkpoint("."), named[0], merge_of([None, *named[1:]], "linear", store="float32")])
    save(merged, tmp_path / "far" / "1" / "out")
    recipe = yaml.safe_load((tmp_path / "far" / "1" / "out" / RECIPE_FILE).read_text())
    assert recipe["base"] == "../../../zoo/m0"
    assert recipe["models"][0]["model"] == "../../../zoo/m1"
    inner = [entry["model"] for entry in recipe["models"][1]["model"]["models"]]
    assert inner == ["../../../zoo/m2", str(zoo[3].path)]
    card = (tmp_path / "far" / "1" / "out" / "README.md").read_text()
    assert "| `../../../zoo/m0` |\n| `../../../zoo/m1` |\n| `../../../zoo/m2` |\n" in card
    monkeypatch.chdir("/")
    save(modelglue.merge(tmp_path / "far" / "1" / "out" / RECIPE_FILE), tmp_path / "far" / "1" / "again")
    assert contents(tmp_path / "far" / "1" / "again") == contents(tmp_path / "far" / "1" / "out")


def test_recipe_keeps_hub_ids(tmp_path: Path) -> None:
    models = [hub_model(tmp_path, "org/one", "org/one"), hub_model(tmp_path, "org/two", "org/two@v1.0")]
    save(MergedCheckpoint(get("linear"), models, None, {"weight": [0.5] * 2, "normalize": True}), tmp_path / "out")
    recipe = yaml.safe_load((tmp_path / "out" / RECIPE_FILE).read_text())
    assert [entry["model"] for entry in recipe["models"]] == ["org/one", "org/two@v1.0"]


def nested_in_bfloat16(zoo: list[SafetensorsCheckpoint]) -> Checkpoint:
    """A nested merge that rounds to the donor's bfloat16, which a recipe must say: its default is float32."""
    return merge_of([zoo[0], merge_of([zoo[0], *zoo[1:]], "linear"), zoo[3]], "ties")


def with_a_donor_of_its_own(zoo: list[SafetensorsCheckpoint]) -> Checkpoint:
    parameters = {"weight": [0.5, 0.5], "normalize": True}
    return MergedCheckpoint(get("linear"), zoo[1:3], None, parameters, donor=zoo[3], store="float32")


@pytest.mark.parametrize("expression", [nested_in_bfloat16, with_a_donor_of_its_own])
def test_recipe_of_an_expression_built_by_hand_gives_the_same_bytes(
    zoo: list[SafetensorsCheckpoint], tmp_path: Path, expression: object
) -> None:
    (zoo[3].path / "tokenizer.json").write_bytes(TOKENIZER.strip())
    assert callable(expression)
    save(expression(reopened(zoo)), tmp_path / "1" / "out")
    save(modelglue.merge(tmp_path / "1" / "out" / RECIPE_FILE), tmp_path / "2" / "out")
    assert contents(tmp_path / "2" / "out") == contents(tmp_path / "1" / "out")


def test_a_donor_that_a_recipe_would_take_for_a_base_is_refused(zoo: list[SafetensorsCheckpoint], tmp_path: Path) -> None:
    parameters = {"weight": [0.5, 0.5], "nuslerp_flatten": True, "nuslerp_row_wise": False}
    merged = MergedCheckpoint(get("nuslerp"), zoo[1:3], None, parameters, donor=zoo[3])
    with pytest.raises(MergeError, match=r"nuslerp: config and tokenizer come from .*, which is no input of the merge\."):
        save(merged, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_recipe_text_that_is_given_is_kept_as_it_is(zoo: list[SafetensorsCheckpoint], tmp_path: Path) -> None:
    text = "# my words\nmethod: linear # and ümlauts\n"
    save(merge_of(zoo, "linear"), tmp_path / "out", recipe_text=text)
    assert (tmp_path / "out" / RECIPE_FILE).read_text(encoding="utf-8") == text
    assert text.strip() in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def model_at(folder: Path, reference: str) -> SafetensorsCheckpoint:
    return SafetensorsCheckpoint(write_single(folder, {"w": torch.ones(1)}), reference)


def hub_model(cache: Path, name: str, reference: str) -> SafetensorsCheckpoint:
    """A model where the hub's cache keeps it."""
    return model_at(cache / f"models--{name.replace('/', '--')}" / "snapshots" / "0123abcd", reference)


def test_card_names_parents_method_and_recipe(tmp_path: Path) -> None:
    local = model_at(tmp_path / "org" / "local", "org/local")  # a path that reads like a hub id
    models = [hub_model(tmp_path, "org/one", "org/one"), hub_model(tmp_path, "org/two", "org/two@v1.0"), local]
    merged = MergedCheckpoint(get("linear"), [*models, models[0]], None, {"weight": [0.25] * 4, "normalize": True})
    card = model_card(merged, "method: linear\n", {"org/local": "../org/local"})
    opening, front, body = card.split("---\n", 2)
    assert opening == ""
    assert yaml.safe_load(front) == {
        "base_model": ["org/one", "org/two"], "base_model_relation": "merge", "library_name": "transformers",
        "tags": ["merge", "modelglue"],
    }  # fmt: skip
    assert body.startswith("\n# Merged model\n")
    assert "by the method `linear`" in body
    assert body.count("| `org/one` |") == 1
    assert "| `org/two@v1.0` |" in body
    assert "| `../org/local` |" in body
    assert "| `org/local` |" not in body
    assert "```yaml\nmethod: linear\n```" in body


def test_card_without_hub_parents_has_no_base_model() -> None:
    card = model_card(TensorsCheckpoint({"w": torch.ones(1)}, label="/abs/path"), "x", {})
    assert yaml.safe_load(card.split("---\n")[1]) == {"library_name": "transformers", "tags": ["merge", "modelglue"]}


def test_card_reaches_parents_of_nested_merges_and_views(tmp_path: Path) -> None:
    a, b = (hub_model(tmp_path, name, name) for name in ("org/a", "org/b"))
    inner = MergedCheckpoint(get("linear"), [a], None, {"weight": [1.0], "normalize": True})
    joined = JoinedCheckpoint({"x.": inner, "y.": RenamedCheckpoint(b, {"v": "w"})})
    assert yaml.safe_load(model_card(joined, "x", {}).split("---\n")[1])["base_model"] == ["org/a", "org/b"]
