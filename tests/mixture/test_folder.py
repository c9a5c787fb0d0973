"""The mixture directory: its exact content, equal bytes, nothing half-written, and every way that one can be damaged."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelglue.checkpoint import open_checkpoint
from modelglue.errors import CheckpointError, UserError
from modelglue.mixture import ExpertSpec, Mixture, Reader, RouterSpec, build_gate, is_mixture, read_manifest, write_mixture
from modelglue.mixture.deltas import DeltaStore
from modelglue.models import load_live, load_tokenizer
from tests.conftest import REPOSITORY
from tests.mixture.making import mixture, two_experts
from tests.models.tiny import bigram_model, letters, saved_model


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_what_is_written(tmp_path: Path) -> None:
    experts = two_experts(tmp_path)
    router = RouterSpec(gate_mode="hidden", router_layer=1, temperature=2.0, route_span="first:9")
    written = write_mixture(tmp_path / "mixture", experts, router, encoder=experts[1].path)
    assert sorted(_bytes(tmp_path / "mixture")) == ["mixture.json", "router.safetensors"]
    llama, neox = (open_checkpoint(expert.path).identity for expert in experts)
    assert json.loads((tmp_path / "mixture" / "mixture.json").read_text()) == {
        "format": "modelglue-mixture/1",
        "level": "model",
        "routing": "sample",
        "top_k": 1,
        "combine": "probabilities",
        "router": "linear",
        "gate_mode": "hidden",
        "training": None,
        "router_layer": 1,
        "temperature": 2.0,
        "route_span": "first:9",
        "encoder": "../neox",
        "encoder_identity": neox,
        "experts": [
            {
                "name": "llama",
                "reference": "../llama",
                "identity": llama,
                "architecture": "LlamaForCausalLM",
                "domain": ["words"],
                "prompts": {"positive": ["abc", "word", "letters"], "negative": ["12", "345"]},
            },
            {
                "name": "neox",
                "reference": "../neox",
                "identity": neox,
                "architecture": "GPTNeoXForCausalLM",
                "domain": ["numbers"],
                "prompts": {"positive": ["12", "345"], "negative": ["abc", "word"]},
            },
        ],
    }
    checkpoint = open_checkpoint(experts[1].path)
    gate, _ = build_gate(Reader(load_live(checkpoint), load_tokenizer(checkpoint), 1), experts, router)
    stored = load_file(tmp_path / "mixture" / "router.safetensors")
    assert list(stored) == ["gate"]
    assert torch.equal(stored["gate"], gate.weight)
    manifest, read = read_manifest(tmp_path / "mixture")
    assert manifest == written
    assert torch.equal(read.tensors()["gate"], gate.weight)
    assert manifest.specs(tmp_path / "mixture") == [replace(one, path=tmp_path / "mixture" / ".." / one.path.name) for one in experts]


def test_auto_settings_are_written_as_what_they_found(tmp_path: Path) -> None:
    experts = two_experts(tmp_path)
    written = write_mixture(tmp_path / "mixture", experts, RouterSpec(gate_mode="auto", router_layer="auto"), encoder=experts[0].path)
    assert written.gate_mode in ("hidden", "hidden_avg")
    assert written.router_layer in (0, 1)
    again = RouterSpec(gate_mode=written.gate_mode, router_layer=written.router_layer)
    write_mixture(tmp_path / "again", experts, again, encoder=experts[0].path)
    assert _bytes(tmp_path / "again") == _bytes(tmp_path / "mixture")


def test_the_encoder_through_which_prompts_are_known_best(tmp_path: Path) -> None:
    """Of three experts one has a state per letter, one the same state for all, and one none."""
    for name, factor in (("letters", 1.0), ("alike", 0.0), ("silent", 0.0)):
        model = bigram_model({}, letters())
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(factor).add_(1.0 if name == "alike" else 0.0)
        model.save_pretrained(tmp_path / name)
        letters().save_pretrained(tmp_path / name)
    for order in (("letters", "alike", "silent"), ("silent", "alike", "letters")):
        experts = [ExpertSpec(name, tmp_path / name, (prompt,)) for name, prompt in zip(order, ("a", "b", "c"), strict=True)]
        assert write_mixture(tmp_path / "mixture", experts, RouterSpec(), encoder=None, overwrite=True).encoder == "../letters"
    random = RouterSpec(gate_mode="random")
    assert write_mixture(tmp_path / "mixture", experts, random, encoder=None, overwrite=True).encoder == "../silent"
    with pytest.raises(UserError, match="router_layer is 1, the encoder has 1 layers"):
        write_mixture(tmp_path / "mixture", experts, RouterSpec(router_layer=1), encoder=None, overwrite=True)
    deep = two_experts(tmp_path)
    assert write_mixture(tmp_path / "mixture", deep, RouterSpec(router_layer=2), encoder=None, overwrite=True).encoder == "../neox"


@pytest.mark.parametrize("options", [{"gate_mode": "hidden_avg", "router_layer": 1}, {"gate_mode": "random", "seed": 3}])
def test_two_writes_give_the_same_bytes(options: dict[str, Any], tmp_path: Path) -> None:
    experts = two_experts(tmp_path)
    for name in ("one", "two"):
        write_mixture(tmp_path / name, experts, RouterSpec(**options), encoder=experts[0].path, pack=True)
    first = _bytes(tmp_path / "one")
    assert len(first) > 8
    assert _bytes(tmp_path / "two") == first
    torch.set_num_threads(2)
    try:
        write_mixture(tmp_path / "one", experts, RouterSpec(**options), encoder=experts[0].path, pack=True, overwrite=True)
    finally:
        torch.set_num_threads(1)
    assert _bytes(tmp_path / "one") == first


def test_an_existing_folder_is_kept_and_nothing_is_computed_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = two_experts(tmp_path)
    monkeypatch.setattr("modelglue.mixture.folder.prompt_router", None)
    (tmp_path / "mixture").mkdir()
    (tmp_path / "mixture" / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        write_mixture(tmp_path / "mixture", experts, RouterSpec(), encoder=experts[0].path)
    assert _bytes(tmp_path / "mixture") == {"letter.txt": b"mine"}


@pytest.mark.parametrize(("out", "relation"), [("neox", "is"), (".", "holds"), ("llama/mixture", "lies in")])
@pytest.mark.parametrize("store", [None, DeltaStore(form="sparse")])
def test_a_model_that_is_read_is_never_replaced(out: str, relation: str, store: DeltaStore | None, tmp_path: Path) -> None:
    zoo = tmp_path / "zoo"
    experts = two_experts(zoo)
    (zoo / "mixture.json").write_text("{}")  # of an earlier mixture: a folder that may be replaced
    before = _bytes(zoo)
    with pytest.raises(UserError, match=f"{relation} the model '(llama|neox)'"):
        write_mixture(zoo / out, experts, RouterSpec(), encoder=None, store=store, overwrite=True)
    assert _bytes(zoo) == before


def test_an_encoder_that_is_read_is_never_replaced(tmp_path: Path) -> None:
    saved_model(tmp_path / "reader", "llama", seed=9, tokenizer=letters())
    before = _bytes(tmp_path / "reader")
    with pytest.raises(UserError, match="is the model 'encoder'"):
        write_mixture(tmp_path / "reader", two_experts(tmp_path), RouterSpec(), encoder=tmp_path / "reader", overwrite=True)
    assert _bytes(tmp_path / "reader") == before


def test_a_packed_mixture_stands_by_itself(tmp_path: Path) -> None:
    """Experts, links and all, and an encoder that is none of them; nothing that is no part of a model."""
    work = tmp_path / "work"
    experts = two_experts(work)
    encoder = saved_model(work / "encoder-model", "llama", seed=9, tokenizer=letters())
    blob = work / "blob"
    (experts[0].path / "model.safetensors").rename(blob)
    (experts[0].path / "model.safetensors").symlink_to(blob)
    (experts[0].path / "optimizer.pt").write_bytes(b"large")
    (experts[0].path / ".git").mkdir()
    (experts[0].path / "checkpoint-100").mkdir()
    manifest = write_mixture(tmp_path / "mixture", experts, RouterSpec(), encoder=encoder, pack=True)
    assert [expert.reference for expert in manifest.experts] == ["experts/llama", "experts/neox"]
    assert manifest.encoder == "encoder"
    files = [
        *(f"experts/llama/{name}" for name in _MODEL),
        *(f"experts/neox/{name}" for name in _MODEL),
        *(f"encoder/{name}" for name in _MODEL),
    ]
    assert sorted(_bytes(tmp_path / "mixture")) == sorted([*files, "mixture.json", "router.safetensors"])
    assert not any(path.is_symlink() for path in (tmp_path / "mixture").rglob("*"))
    prompts = ["abc", "12 34", "x"]
    expected = Mixture.load(tmp_path / "mixture").generate(prompts, until=["\n"], max_new_tokens=5)
    work.rename(tmp_path / "gone")
    (tmp_path / "mixture").rename(tmp_path / "moved")
    assert Mixture.load(tmp_path / "moved").generate(prompts, until=["\n"], max_new_tokens=5) == expected


_MODEL = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def test_a_packed_encoder_that_is_an_expert_is_packed_once(tmp_path: Path) -> None:
    experts = two_experts(tmp_path)
    manifest = write_mixture(tmp_path / "mixture", experts, RouterSpec(), encoder=tmp_path / "llama" / ".." / "neox", pack=True)
    assert manifest.encoder == "experts/neox"
    assert not (tmp_path / "mixture" / "encoder").exists()


def test_an_error_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = two_experts(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())

    def full(*_: Any) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("modelglue.mixture.folder.tensor_file", full)
    with pytest.raises(Exception, match="the disk is full"):
        write_mixture(tmp_path / "mixture", experts, RouterSpec(), encoder=experts[0].path, pack=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_killed_write_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    two_experts(tmp_path)
    script = (
        "import os, signal\nfrom pathlib import Path\nfrom modelglue.mixture import folder, RouterSpec\n"
        "from tests.mixture.making import two_experts\n"
        "folder.json_bytes = lambda value: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"experts = two_experts(Path({str(tmp_path)!r}))\n"
        f"folder.write_mixture({str(tmp_path / 'mixture')!r}, experts, RouterSpec(), encoder=experts[0].path, pack=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    left = [path for path in tmp_path.iterdir() if path.name not in ("llama", "neox")]
    assert [path.name.startswith(".mixture.") for path in left] == [True]  # what was killed is hidden, and found again
    written = mixture(tmp_path)
    write_mixture(tmp_path / "mixture", two_experts(tmp_path), RouterSpec(), encoder=tmp_path / "llama", pack=True, overwrite=True)
    assert written.experts == ["llama", "neox"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "mixture", "neox"]


def test_is_mixture(tmp_path: Path) -> None:
    two_experts(tmp_path)
    assert not is_mixture(tmp_path / "llama")
    assert not is_mixture(str(tmp_path / "nowhere"))
    mixture(tmp_path)
    assert is_mixture(str(tmp_path / "mixture"))


def _no_tokenizer(experts: list[ExpertSpec]) -> list[ExpertSpec]:
    (experts[1].path / "tokenizer.json").unlink()
    return experts


def _no_weights(experts: list[ExpertSpec]) -> list[ExpertSpec]:
    (experts[1].path / "model.safetensors").unlink()
    return experts


def _other_config(experts: list[ExpertSpec]) -> list[ExpertSpec]:
    (experts[1].path / "config.json").write_bytes((experts[0].path / "config.json").read_bytes())
    return experts


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda experts: experts[:1], "a mixture needs at least 2 experts, 1 given"),
        (lambda experts: [experts[0], replace(experts[1], name="llama")], "experts must have different names, got llama, llama"),
        (lambda experts: [replace(one, positive=()) for one in experts], "expert 'llama': has no positive prompts"),
        (lambda experts: [replace(one, positive=("a",), negative=()) for one in experts], "'llama' and 'neox' have the same prompts"),
        (lambda experts: [replace(experts[0], negative=experts[0].positive), experts[1]], "expert 'llama': its negative prompts cancel"),
        (lambda experts: [replace(experts[0], path=experts[0].path / "model.safetensors"), experts[1]], "'llama' .* has no tokenizer"),
        (lambda experts: [replace(experts[0], path=experts[0].path / "missing"), experts[1]], "missing': no such file or folder"),
        (_no_tokenizer, r"expert 'neox' \(.*neox\) has no tokenizer; at model level every expert needs its own"),
        (_no_weights, r"neox: holds no .safetensors file"),
        (_other_config, r"neox'\): LlamaForCausalLM has no place for .*'gpt_neox.embed_in.weight'"),
    ],
)
def test_experts_that_cannot_be_mixed(spoil: Callable[[list[ExpertSpec]], list[ExpertSpec]], message: str, tmp_path: Path) -> None:
    experts = two_experts(tmp_path)
    with pytest.raises(UserError, match=message):
        write_mixture(tmp_path / "mixture", spoil(experts), RouterSpec(), encoder=experts[0].path)
    assert not (tmp_path / "mixture").exists()


def test_a_layer_that_the_encoder_does_not_have(tmp_path: Path) -> None:
    experts = two_experts(tmp_path)
    with pytest.raises(UserError, match="router_layer is 3, the encoder has 3 layers"):
        write_mixture(tmp_path / "mixture", experts, RouterSpec(router_layer=3), encoder=experts[1].path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("", r"mixture.json: is not a mixture of this format"),
        ("{", r"mixture.json: is not a mixture of this format"),
        ("[]", r"file: Input should be a valid dictionary"),
        ({"format": "modelglue-mixture/2"}, r"format: Input should be 'modelglue-mixture/1'"),
        ({"flavour": 1}, r"flavour: Extra inputs are not permitted"),
        ({"top_k": 0}, r"top_k: Input should be greater than or equal to 1"),
        ({"level": "ffn"}, r"level: Input should be 'model'"),
        ({"experts": []}, r"experts: Tuple should have at least 2 items"),
        ({"route_span": "first:-1"}, r"route_span: String should match pattern"),
        ({"temperature": -1}, r"temperature: Input should be greater than 0"),
        ({"temperature": math.inf}, r"temperature: Input should be a finite number"),
        ({"router_layer": -1}, r"router_layer: Input should be greater than or equal to 0"),
        ({"gate_mode": "loudest"}, r"gate_mode: Input should be"),
        ({"encoder": None}, r"encoder: Input should be a valid string"),
    ],
)
def test_a_damaged_manifest(change: str | dict[str, Any], message: str, tmp_path: Path) -> None:
    mixture(tmp_path)
    path = tmp_path / "mixture" / "mixture.json"
    path.write_text(change if isinstance(change, str) else json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        Mixture.load(tmp_path / "mixture")


def test_a_manifest_that_is_no_text(tmp_path: Path) -> None:
    mixture(tmp_path)
    (tmp_path / "mixture" / "mixture.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="is not a mixture of this format"):
        Mixture.load(tmp_path / "mixture")


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"mixture.json: cannot be read \(No such file or directory\). Give the folder of a mixture"):
        Mixture.load(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"gate": torch.zeros(3, 16)}, r"gate is float32 \[3, 16\], allowed is float32 \[2, d\]"),
        ({"gate": torch.zeros(32)}, r"gate is float32 \[32\], allowed is float32 \[2, d\]"),
        ({"gate": torch.zeros(2, 16, dtype=torch.float16)}, r"gate is float16 \[2, 16\]"),
        ({"gate": torch.full((2, 16), torch.nan)}, r"gate holds values that are not finite"),
        ({"gates": torch.zeros(2, 16)}, r"gates: unknown; gate: missing"),
        (None, r"router.safetensors"),
    ],
)
def test_a_damaged_router(tensors: dict[str, torch.Tensor] | None, message: str, tmp_path: Path) -> None:
    mixture(tmp_path)
    path = tmp_path / "mixture" / "router.safetensors"
    if tensors is None:
        path.unlink()
    else:
        save_file(tensors, path)
    with pytest.raises(CheckpointError, match=message):
        Mixture.load(tmp_path / "mixture")


def test_a_router_cut_short(tmp_path: Path) -> None:
    mixture(tmp_path)
    path = tmp_path / "mixture" / "router.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="The file is damaged or hostile"):
        Mixture.load(tmp_path / "mixture")


def test_a_gate_for_another_encoder(tmp_path: Path) -> None:
    mixture(tmp_path)
    save_file({"gate": torch.zeros(2, 20)}, tmp_path / "mixture" / "router.safetensors")
    with pytest.raises(CheckpointError, match=r"gate rows have 20 values, the encoder's states 16\. Make"):
        Mixture.load(tmp_path / "mixture").route(["abc"])


@pytest.mark.parametrize(("name", "what"), [("neox", "expert 'neox'"), ("encoder", "encoder")])
def test_a_model_that_has_changed_since(name: str, what: str, tmp_path: Path) -> None:
    experts = two_experts(tmp_path)
    saved_model(tmp_path / "encoder", "llama", seed=9, tokenizer=letters())
    write_mixture(tmp_path / "mixture", experts, RouterSpec(), encoder=tmp_path / "encoder")
    Mixture.load(tmp_path / "mixture")
    tensors = load_file(tmp_path / name / "model.safetensors")
    changed = sorted(tensors)[len(tensors) // 2]
    tensors[changed].view(-1)[0] += 1.0
    save_file(tensors, tmp_path / name / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"the {what} \(../{name}\) has changed since the mixture was made .*Restore it, or make"):
        Mixture.load(tmp_path / "mixture")


def test_a_tokenizer_that_has_changed_since(tmp_path: Path) -> None:
    mixture(tmp_path)
    path = tmp_path / "neox" / "tokenizer_config.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(CheckpointError, match=r"the expert 'neox' .* has changed since"):
        Mixture.load(tmp_path / "mixture")


def test_a_model_that_has_gone(tmp_path: Path) -> None:
    mixture(tmp_path)
    (tmp_path / "neox").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"the expert 'neox' \(../neox\) cannot be opened. '../neox': no such file or folder"):
        Mixture.load(tmp_path / "mixture")
