"""References: what is a path is taken literally, what has a plus sign is a base with adapters, the rest is an id of the hub."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as tensor_bytes

from modelglue.checkpoint import PickledCheckpoint, SafetensorsCheckpoint, open_checkpoint, save
from modelglue.checkpoint.formats.folder import hub_id_of
from modelglue.checkpoint.reference import reference_from, split_reference
from modelglue.errors import CheckpointError, ModelGlueError, UserError
from tests.checkpoint.fake_hub import FakeHub, commit_of, serving
from tests.checkpoint.files import names_in, write_single

A = {"a": torch.arange(4.0)}
B = {"b": torch.arange(6.0).view(2, 3)}


def refused(reference: str, *words: str, **options: Any) -> None:
    with pytest.raises(ModelGlueError) as caught:
        open_checkpoint(reference, **options)
    assert caught.value.exit_code == 2
    for word in words:
        assert word in str(caught.value)


def write_adapter(folder: Path, rank: int = 1, scale: float = 1.0) -> Path:
    """A LoRA adapter of the linear `layer`, of weight [2, 3]: B is all `scale`, A all ones, so the update is rank x scale everywhere."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["layer"]})
    )
    prefix = "base_model.model.layer"
    tensors = {f"{prefix}.lora_A.weight": torch.ones(rank, 3), f"{prefix}.lora_B.weight": torch.full((2, rank), scale)}
    (folder / "adapter_model.safetensors").write_bytes(tensor_bytes(tensors))
    return folder


# -- local paths -------------------------------------------------------------------------------------------------------------------


def test_references_are_kept_as_they_were_written(tmp_path: Path) -> None:
    write_single(tmp_path / "zoo" / "model", A)
    checkpoint = open_checkpoint("zoo/../zoo/model", relative_to=tmp_path)
    assert checkpoint.describe() == {"model": "zoo/../zoo/model"}
    assert list(checkpoint.places) == [tmp_path / "zoo/../zoo/model"]


def test_home_and_absolute_paths_are_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_single(tmp_path / "model", A)
    for reference in ("~/model", str(tmp_path / "model"), tmp_path / "model" / "model.safetensors"):
        assert open_checkpoint(reference, relative_to=Path("/nowhere")).names() == ("a",)


@pytest.mark.parametrize("name", ["a+b", "a@b", "a+b@c+d", "+", "@x", "x+"])
def test_a_path_that_exists_is_taken_literally(tmp_path: Path, name: str) -> None:
    write_single(tmp_path / name, A)
    assert split_reference(name, tmp_path) == [name]
    assert open_checkpoint(name, relative_to=tmp_path).names() == ("a",)


@pytest.mark.parametrize(
    ("reference", "halves"),
    [
        ("base+one", ["base", "one"]),
        ("base+one+two", ["base", "one", "two"]),
        ("plus+sign+one", ["plus+sign", "one"]),
        ("base+plus+sign", ["base", "plus+sign"]),
        ("base+plus+sign+one", ["base", "plus+sign", "one"]),
        ("org/base@v1+org/one@v2", ["org/base@v1", "org/one@v2"]),
        ("./base+./one", ["./base", "./one"]),
    ],
)
def test_a_plus_sign_parts_base_and_adapters(tmp_path: Path, reference: str, halves: list[str]) -> None:
    for name in ("base", "one", "two", "plus+sign"):
        (tmp_path / name).mkdir()
    assert split_reference(reference, tmp_path) == halves


@pytest.mark.parametrize("reference", ["base+", "+base", "base++one", ""])
def test_an_empty_half_is_an_error(tmp_path: Path, reference: str) -> None:
    (tmp_path / "base").mkdir()
    with pytest.raises(UserError, match="one half of it is empty"):
        split_reference(reference, tmp_path)


def test_a_local_path_has_no_revision(tmp_path: Path) -> None:
    write_single(tmp_path / "org" / "model", A)
    refused("org/model@main", "'org/model' is a local path, which has no revisions. Leave out '@main'.", relative_to=tmp_path)


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("org/model@a@b", "A hub id has one revision: org/name@revision."),
        ("nothing", "'nothing': no such file or folder (looked at "),
        ("./org/model", "'./org/model': no such file or folder"),
        ("/org/model", "'/org/model': no such file or folder"),
        ("x" * 5000, "no such file or folder"),
        ("a\0b", "no such file or folder"),
        ("zoo/modle", "Did you mean 'model'?"),
    ],
)
def test_a_mistyped_path_is_never_a_hub_id(tmp_path: Path, reference: str, words: str) -> None:
    (tmp_path / "zoo" / "model").mkdir(parents=True)
    refused(reference, words, relative_to=tmp_path)


def test_both_halves_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    refused("./no-base+./no-adapter", "'./no-base': no such file", "'./no-adapter': no such file", relative_to=tmp_path)


# -- adapters ----------------------------------------------------------------------------------------------------------------------


def test_base_and_adapters_are_one_model(tmp_path: Path) -> None:
    base = torch.arange(6.0).view(2, 3)
    write_single(tmp_path / "base", {"layer.weight": base, "other": torch.ones(2)})
    write_adapter(tmp_path / "one", scale=0.5)
    write_adapter(tmp_path / "two", rank=2, scale=2.0)
    checkpoint = open_checkpoint("base+one+two", relative_to=tmp_path)
    assert checkpoint.describe() == {"model": "base+one+two"}
    assert list(checkpoint.places) == [tmp_path / "base", tmp_path / "one", tmp_path / "two"]
    assert torch.equal(checkpoint.tensor("layer.weight"), base + 0.5 + 4)
    assert torch.equal(checkpoint.tensor("other"), torch.ones(2))


def test_output_that_would_lie_in_an_adapter_is_refused(tmp_path: Path) -> None:
    write_single(tmp_path / "base", {"layer.weight": torch.ones(2, 3)})
    write_adapter(tmp_path / "one")
    checkpoint = open_checkpoint("base+one", relative_to=tmp_path)
    for place in ("base", "one", "one/out"):
        with pytest.raises(UserError, match=r"the model 'base\+one'"):
            save(checkpoint, tmp_path / place, overwrite=True)


def test_output_refers_to_both_halves_from_where_it_stands(tmp_path: Path) -> None:
    write_single(tmp_path / "zoo" / "base", {"layer.weight": torch.ones(2, 3)})
    write_adapter(tmp_path / "zoo" / "one")
    save(open_checkpoint("base+one", relative_to=tmp_path / "zoo"), tmp_path / "deep" / "er" / "out")
    recipe = (tmp_path / "deep" / "er" / "out" / "modelglue_recipe.yaml").read_text()
    assert "model: ../../../zoo/base+../../../zoo/one\n" in recipe
    again = open_checkpoint("../../../zoo/base+../../../zoo/one", relative_to=tmp_path / "deep" / "er" / "out")
    assert torch.equal(again.tensor("layer.weight"), torch.full((2, 3), 2.0))


def test_references_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "a+b"):
        (tmp_path / name).mkdir()
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    out = tmp_path / "out"
    assert reference_from("base", [Path("base")], out) == "../base"
    assert reference_from(str(tmp_path / "base"), [tmp_path / "base"], out) == str(tmp_path / "base")
    assert reference_from("org/name@v1", [snapshot], out) == "org/name@v1"
    assert reference_from("org/name@v1+base", [snapshot, Path("base")], out) == "org/name@v1+../base"
    assert reference_from("base+a+b", [Path("base"), Path("a+b")], out) == "../base+../a+b"


# -- the hub -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    hub = FakeHub()
    with serving(hub, tmp_path / "cache", monkeypatch):
        yield hub


def torch_bytes(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


CONFIG = {"config.json": b'{"model_type": "x"}', "tokenizer.json": b"{}", "README.md": b"# x", "modeling_x.py": b"pass"}
ELSEWHERE = {"training_args.bin": b"x", "runs/log.txt": b"x", "flax_model.msgpack": b"x", "onnx/model.onnx": b"x", "figure.png": b"x"}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SHARDED = {
    FIRST: tensor_bytes(A), SECOND: tensor_bytes(B), "consolidated.safetensors": tensor_bytes({**A, **B}),
    "model.safetensors.index.json": json.dumps({"weight_map": {"a": FIRST, "b": SECOND}}).encode(),
}  # fmt: skip


def test_what_is_needed_is_downloaded_and_nothing_else(hub: FakeHub) -> None:
    hub.add("org/model", {**CONFIG, **ELSEWHERE, "model.safetensors": tensor_bytes(A), "pytorch_model.bin": torch_bytes(B)})
    checkpoint = open_checkpoint("org/model")
    assert isinstance(checkpoint, SafetensorsCheckpoint)
    assert torch.equal(checkpoint.tensor("a"), A["a"])
    assert checkpoint.hub_id == "org/model"
    assert hub_id_of(Path("cache/datasets--org--model/snapshots/main")) is None
    assert hub_id_of(Path("mine/org--model/snapshots/main")) is None
    assert checkpoint.describe() == {"model": "org/model"}
    assert hub.fetched() == sorted([*CONFIG, "model.safetensors"])
    assert "Bearer hf_of_a_test" in hub.tokens


def test_pickled_weights_are_downloaded_where_there_are_no_others(hub: FakeHub) -> None:
    hub.add("org/model", {**CONFIG, **ELSEWHERE, "pytorch_model.bin": torch_bytes(B)})
    checkpoint = open_checkpoint("org/model")
    assert isinstance(checkpoint, PickledCheckpoint)
    assert torch.equal(checkpoint.tensor("b"), B["b"])
    assert hub.fetched() == sorted([*CONFIG, "pytorch_model.bin"])


def test_shards_are_those_of_the_index(hub: FakeHub) -> None:
    hub.add("org/model", {**CONFIG, **SHARDED})
    checkpoint = open_checkpoint("org/model")
    assert checkpoint.names() == ("a", "b")
    assert "consolidated.safetensors" not in hub.fetched()


def test_revisions_are_told_apart(hub: FakeHub) -> None:
    hub.add("org/model", {**CONFIG, "model.safetensors": tensor_bytes(A)})
    hub.add("org/model", {**CONFIG, "model.safetensors": tensor_bytes(B)}, "v2")
    assert open_checkpoint("org/model").names() == ("a",)
    for reference in ("org/model@v2", f"org/model@{commit_of('org/model', 'v2')}"):
        checkpoint = open_checkpoint(reference)
        assert checkpoint.names() == ("b",)
        assert checkpoint.describe() == {"model": reference}
    refused("org/model@v3", "the repository has no revision 'v3'")


def test_what_was_downloaded_is_found_without_a_network(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.add("org/model", {**CONFIG, **SHARDED})
    hub.add("org/model", {**CONFIG, "model.safetensors": tensor_bytes(B)}, "v2")
    open_checkpoint("org/model")
    open_checkpoint("org/model@v2")
    asked = len(hub.asked)
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert open_checkpoint("org/model").names() == ("a", "b")
        assert open_checkpoint("org/model@v2").names() == ("b",)
        refused("org/other", "is no local path, and not in the hub's cache, and the hub cannot be reached")
    assert len(hub.asked) == asked
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert open_checkpoint("org/model").names() == ("a", "b")
    refused("org/other", "the hub cannot be reached")


def test_adapters_of_the_hub_are_downloaded_as_adapters(hub: FakeHub, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "made", scale=3.0)
    files = {path.name: path.read_bytes() for path in adapter.iterdir()}
    hub.add("org/adapter", {**files, "README.md": b"# x", "optimizer.pt": b"x", "checkpoint-5/adapter_model.safetensors": b"x"}, "v1")
    hub.add("org/base", {**CONFIG, "model.safetensors": tensor_bytes({"layer.weight": torch.ones(2, 3)})})
    checkpoint = open_checkpoint("org/base+org/adapter@v1")
    assert torch.equal(checkpoint.tensor("layer.weight"), torch.full((2, 3), 4.0))
    assert hub.fetched() == sorted([*CONFIG, "model.safetensors", *files])
    refused("org/base+org/base", "'org/base': is no adapter: the repository has no adapter_config.json.")
    refused("org/adapter@v1", "is an adapter, not a model. Refer to it together with its base: BASE+org/adapter@v1.")


def test_refusals_of_the_hub_say_what_to_do(hub: FakeHub) -> None:
    hub.add("org/gated", CONFIG)
    hub.gated.add("org/gated")
    hub.add("org/pipeline", {"model_index.json": b"{}", "unet/diffusion_pytorch_model.safetensors": b"x"})
    hub.add("org/gguf", {"q4.gguf": b"GGUF"})
    hub.add("org/empty", {"README.md": b"x"})
    refused("org/gated", "'org/gated': is gated. Accept its terms on the hub, and set HF_TOKEN")
    refused("org/nobody", "the hub has no such repository, or not for you. Check the name; for a private one set HF_TOKEN.")
    refused("org/pipeline", "is a diffusion pipeline of several models. Download it (hf download org/pipeline)")
    refused("org/gguf", "holds GGUF files only, the quantised format of llama.cpp")
    refused("org/empty", "the repository holds no .safetensors, .bin, .pt or .pth file")
    refused("a--b/c", "'a--b/c': is no local path, and no hub id either")
    assert [file for verb, file, _ in hub.asked] == []


def test_headers_alone_are_enough_to_check(hub: FakeHub, tmp_path: Path) -> None:
    large = {"w": torch.zeros(1_000_000)}
    files = {**CONFIG, "model.safetensors": tensor_bytes(large)}
    hub.add("org/model", files)
    checkpoint = open_checkpoint("org/model", headers_only=True)
    assert checkpoint.names() == ("w",)
    assert checkpoint.info("w").shape == (1_000_000,)
    assert checkpoint.config == {"model_type": "x"}
    assert sorted(checkpoint.files) == ["tokenizer.json"]
    assert (checkpoint.hub_id, checkpoint.describe()) == ("org/model", {"model": "org/model"})
    assert hub.fetched() == sorted(CONFIG)
    assert [part for _, file, part in hub.asked if file == "model.safetensors" and part] == ["bytes=0-99999"]
    for read in (lambda: checkpoint.read("w"), lambda: checkpoint.identity):
        with pytest.raises(UserError, match="only the headers of this model are here"):
            read()
    with pytest.raises(CheckpointError, match=r"has no tensor 'v'"):
        checkpoint.info("v")
    assert torch.equal(open_checkpoint("org/model").tensor("w"), large["w"])
    assert isinstance(open_checkpoint("org/model", headers_only=True), SafetensorsCheckpoint), "what is in the cache is opened"


def test_check_of_a_recipe_downloads_no_weights(hub: FakeHub, tmp_path: Path) -> None:
    from modelglue.recipe import check

    for name in ("one", "two"):
        hub.add(f"org/{name}", {"config.json": b"{}", "model.safetensors": tensor_bytes({"w": torch.zeros(1_000_000)})})
    (tmp_path / "recipe.yaml").write_text("method: linear\nmodels: [{model: org/one, weight: 1.0}, {model: org/two, weight: 1.0}]\n")
    report = check(tmp_path / "recipe.yaml")
    assert report.models == ("org/one", "org/two")
    assert hub.fetched() == ["config.json"]


def test_a_reference_too_long_for_a_path_is_named_in_a_recipe(tmp_path: Path) -> None:
    from modelglue.recipe import check

    (tmp_path / "recipe.yaml").write_text(f"method: linear\nmodels: [{{model: {'x' * 5000}, weight: 1.0}}]\n")
    with pytest.raises(CheckpointError, match="no such file or folder"):
        check(tmp_path / "recipe.yaml")


def test_long_headers_of_shards_are_fetched_in_parts(hub: FakeHub) -> None:
    many = {f"a.tensor.with.a.long.name.{number:06d}": torch.zeros(1, dtype=torch.uint8) for number in range(3000)}
    index = {"weight_map": {**dict.fromkeys(many, FIRST), "b": SECOND}}
    hub.add("org/model", {**CONFIG, **SHARDED, FIRST: tensor_bytes(many), "model.safetensors.index.json": json.dumps(index).encode()})
    checkpoint = open_checkpoint("org/model", headers_only=True)
    assert list(checkpoint.names()) == sorted([*many, "b"])
    assert len([part for _, file, part in hub.asked if file == FIRST and part]) == 2
    hub.ranges = False
    with pytest.raises(CheckpointError, match="does not hand out parts of files"):
        open_checkpoint(f"org/model@{commit_of('org/model', 'main')}", headers_only=True)


def test_headers_of_pickled_weights_are_not_guessed(hub: FakeHub) -> None:
    hub.add("org/model", {**CONFIG, "pytorch_model.bin": torch_bytes(B)})
    refused("org/model", "has pickled weights only, whose shapes cannot be read from afar. Download the model first.", headers_only=True)


def test_hostile_header_from_afar_is_refused(hub: FakeHub) -> None:
    hub.add("org/model", {**CONFIG, "model.safetensors": (2**40).to_bytes(8, "little") + b"{}"})
    refused("org/model", "org/model/model.safetensors: claims a header of 1,099,511,627,776 bytes", headers_only=True)


def test_an_index_that_leads_elsewhere_fetches_nothing_outside(hub: FakeHub, tmp_path: Path) -> None:
    index = {"weight_map": {"a": "../../evil.safetensors", "b": "*"}}
    files = {**CONFIG, FIRST: tensor_bytes(A), "model.safetensors.index.json": json.dumps(index).encode()}
    hub.add("org/model", files)
    refused("org/model", "which is not a .safetensors file of this folder")
    assert FIRST not in hub.fetched()
    assert names_in(tmp_path) == ["cache"]
