"""`modelglue inspect`: a model's contents from its headers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelglue.checkpoint import open_checkpoint
from tests.cli.conftest import Run
from tests.recipe.on_disk import write_model
from tests.zoo.models import tensors


def test_the_table(run: Run, zoo: Path) -> None:
    found = run("inspect", zoo / "half")
    assert (found.code, found.err) == (0, "")
    assert f"{zoo}/half LlamaForCausalLM: 0.00 M parameters in 14 tensors, 960 B, 2 layers" in found.text
    rows = [line.split() for line in found.out.splitlines()]
    heading = rows.index(["tensor", "times", "shape", "dtype", "bytes"])
    assert rows[heading + 1 :] == [
        ["lm_head.weight", "1", "8", "x", "6", "BF16", "96", "B"],
        ["model.embed_tokens.weight", "1", "8", "x", "6", "BF16", "96", "B"],
        ["model.layers.*.input_layernorm.weight", "2", "6", "BF16", "24", "B"],
        ["model.layers.*.mlp.down_proj.weight", "2", "6", "x", "10", "BF16", "240", "B"],
        ["model.layers.*.mlp.up_proj.weight", "2", "10", "x", "6", "BF16", "240", "B"],
        ["model.layers.*.self_attn.k_proj.weight", "2", "4", "x", "6", "BF16", "96", "B"],
        ["model.layers.*.self_attn.q_proj.bias", "2", "6", "BF16", "24", "B"],
        ["model.layers.*.self_attn.q_proj.weight", "2", "6", "x", "6", "BF16", "144", "B"],
    ]


def test_what_is_said_before_the_tables(run: Run, zoo: Path) -> None:
    lines = run("inspect", zoo / "half").out.splitlines()
    assert [line.split(maxsplit=1) for line in lines[1:5]] == [
        ["dtypes", "BF16 960 B in 14"],
        ["vocabulary", "8 tokens, ids to 7; 8 embedding rows"],
        ["head", "stored"],
        ["files", "tokenizer.json"],
    ]
    assert [line.split() for line in lines[6:12]] == [
        ["role", "tensors", "parameters", "bytes"],
        ["embedding", "1", "48", "96", "B"],
        ["attention", "6", "132", "264", "B"],
        ["feed-forward", "4", "240", "480", "B"],
        ["norm", "2", "12", "24", "B"],
        ["head", "1", "48", "96", "B"],
    ]


def test_every_tensor(run: Run, zoo: Path) -> None:
    rows = [line.split() for line in run("inspect", zoo / "half", "--tensors").out.splitlines()]
    heading = rows.index(["tensor", "layer", "role", "shape", "dtype", "bytes"])
    assert len(rows) == heading + 1 + 14
    assert rows[heading + 1] == ["lm_head.weight", "head", "8", "x", "6", "BF16", "96", "B"]
    assert rows[-1] == ["model.layers.1.self_attn.q_proj.weight", "1", "attention", "6", "x", "6", "BF16", "72", "B"]
    listed = json.loads(run("inspect", zoo / "half", "--tensors", "--json").out)["list"]
    assert listed[-1] == {
        "name": "model.layers.1.self_attn.q_proj.weight", "layer": 1, "role": "attention", "shape": [6, 6], "dtype": "BF16", "bytes": 72,
    }  # fmt: skip
    assert sum(row["bytes"] for row in listed) == 960


def test_json(run: Run, zoo: Path) -> None:
    found = json.loads(run("inspect", zoo / "half", "--json").out)
    groups, roles = found.pop("groups"), found.pop("roles")
    assert found == {
        "model": str(zoo / "half"), "architecture": "LlamaForCausalLM", "tensors": 14, "parameters": 480, "bytes": 960,
        "layers": 2, "stacks": {"model.layers": 2}, "files": ["tokenizer.json"], "head": "stored", "quantised": None,
        "dtypes": {"BF16": {"tensors": 14, "parameters": 480, "bytes": 960}},
        "vocabulary": {"tokens": 8, "highest_id": 7, "rows": 8, "config": 8},
    }  # fmt: skip
    assert groups[3] == {"name": "model.layers.*.mlp.down_proj.weight", "count": 2, "shape": [6, 10], "dtype": "BF16", "bytes": 240}
    assert sum(group["bytes"] for group in groups) == 960
    assert sum(group["count"] for group in groups) == 14
    assert sum(row["bytes"] for row in roles.values()) == 960


@pytest.mark.parametrize(
    ("config", "weights", "expected"),
    [
        ({"vocab_size": 9}, {}, "8 tokens, ids to 7; 8 embedding rows, vocab_size 9"),
        ({}, {"model.embed_tokens.weight": (5, 6)}, "8 tokens, ids to 7; 5 embedding rows, vocab_size 8; some tokens have no row"),
        ({"vocab_size": None, "text_config": {"vocab_size": 7}}, {}, "8 tokens, ids to 7; 8 embedding rows, vocab_size 7"),
        ({"words": None}, {}, "no tokenizer; 8 embedding rows"),
    ],
)
def test_vocabulary(run: Run, tmp_path: Path, config: Any, weights: dict[str, tuple[int, ...]], expected: str) -> None:
    made = {**tensors(1), **{name: torch.zeros(shape) for name, shape in weights.items()}}
    lines = run("inspect", write_model(tmp_path / "m", weights=made, **config)).out.splitlines()
    assert [line.split(maxsplit=1)[1] for line in lines if line.startswith("vocabulary")] == [expected]


@pytest.mark.parametrize(
    ("tied", "stored", "expected"),
    [(True, False, "tied"), (True, True, "stored, though the config ties it"), (False, True, "stored"), (None, False, "none")],
)
def test_heads(run: Run, tmp_path: Path, tied: bool | None, stored: bool, expected: str) -> None:
    made = {name: value for name, value in tensors(1).items() if stored or name != "lm_head.weight"}
    folder = write_model(tmp_path / "m", weights=made, tie_word_embeddings=tied)
    assert json.loads(run("inspect", folder, "--json").out)["head"] == expected


def test_quantised_models(run: Run, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", quantization_config={"quant_method": "gptq", "bits": 4})
    lines = [line for line in run("inspect", folder).out.splitlines() if line.startswith("quantised")]
    assert len(lines) == 1
    assert "GPTQ" in lines[0]


def test_several_stacks_and_dtypes(run: Run, tmp_path: Path) -> None:
    weights = {f"encoder.block.{n}.layer.0.SelfAttention.q.weight": torch.zeros(2, 2) for n in range(3)}
    weights["decoder.block.0.layer.0.SelfAttention.q.weight"] = torch.zeros(2, 2, dtype=torch.float16)
    lines = run("inspect", write_model(tmp_path / "m", weights=weights)).out.splitlines()
    assert lines[0].endswith("56 B, 3 layers")
    assert lines[1].split() == ["dtypes", "F32", "48", "B", "in", "3,", "F16", "8", "B", "in", "1"]
    assert lines[2].split() == ["stacks", "decoder.block", "(1),", "encoder.block", "(3)"]


def test_the_committed_models(run: Run, tiny_zoo: Path) -> None:
    folder = tiny_zoo / "models" / "generalist"
    weights = load_file(folder / "model.safetensors")
    found = json.loads(run("inspect", folder, "--json").out)
    assert found["tensors"] == len(weights)
    assert found["parameters"] == sum(value.numel() for value in weights.values())
    assert found["bytes"] == sum(value.nbytes for value in weights.values())
    assert found["layers"] == json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    assert found["files"] == ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]


def test_tensors_of_one_name_and_several_shapes_are_told_apart(run: Run, tmp_path: Path) -> None:
    weights = {f"h.{n}.w": torch.zeros(2, 2 + n // 2) for n in range(4)}
    weights["h.0.experts.1.w"] = torch.zeros(1, dtype=torch.float16)
    found = json.loads(run("inspect", write_model(tmp_path / "m", weights=weights), "--json").out)
    assert [(group["name"], group["count"], group["shape"]) for group in found["groups"]] == [
        ("h.*.experts.1.w", 1, [1]), ("h.*.w", 2, [2, 2]), ("h.*.w", 2, [2, 3]),
    ]  # fmt: skip


def test_a_file_without_layers_or_config(run: Run, tmp_path: Path) -> None:
    save_file({"w": torch.zeros(3), "empty": torch.zeros(0, 4)}, tmp_path / "x.safetensors")
    found = json.loads(run("inspect", tmp_path / "x.safetensors", "--json").out)
    assert (found["layers"], found["architecture"], found["files"], found["parameters"]) == (0, None, [], 3)
    assert "no config: 0.00 M parameters in 2 tensors, 12 B, 0 layers" in run("inspect", tmp_path / "x.safetensors").text


def test_identity(run: Run, zoo: Path) -> None:
    expected = open_checkpoint(zoo / "a").identity
    assert len(expected) == 64
    assert "identity" not in json.loads(run("inspect", zoo / "a", "--json").out)
    assert json.loads(run("inspect", zoo / "a", "--json", "--identity").out)["identity"] == expected
    assert run("inspect", zoo / "a", "--identity").out.splitlines()[-1] == f"identity {expected}"
    write_model(zoo / "again", 1)
    assert json.loads(run("inspect", zoo / "again", "--json", "--identity").out)["identity"] == expected
    assert json.loads(run("inspect", zoo / "b", "--json", "--identity").out)["identity"] != expected


def test_names_that_look_like_markup(run: Run, tmp_path: Path) -> None:
    weights = {"[red]w": torch.zeros(1), "x[/b]": torch.zeros(1)}
    text = run("inspect", write_model(tmp_path / "[bold]m[" / "b]", weights=weights)).text
    assert "[bold]m[/b] LlamaForCausalLM: " in text
    assert "[red]w 1 1 F32 4 B x[/b] 1 1 F32 4 B" in text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("aa", "no such file or folder. Did you mean 'a'?"),
        ("a/config.json", "is no file of weights that is known."),
        ("broken", "is too short for"),
    ],
)
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_refusals(run: Run, zoo: Path, name: str, expected: str, options: tuple[str, ...]) -> None:
    (zoo / "broken").mkdir()
    (zoo / "broken" / "model.safetensors").write_bytes(b"123")
    found = run("inspect", zoo / name, *options)
    assert (found.code, found.out) == (2, "")
    assert found.err.startswith("error: ")
    assert str(zoo / name) in found.err
    assert expected in found.err or name == "broken"


def test_an_unknown_hub_id_without_network(run: Run) -> None:
    found = run("inspect", "some-org/some-model")
    assert found.code == 2
    assert found.err == (
        "error: 'some-org/some-model': is no local path, and not in the hub's cache, and the hub cannot be reached. "
        "Download it first, or give the path of a local folder.\n"
    )
