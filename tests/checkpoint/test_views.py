"""Views move names around; joined and renamed models stay the models that they are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.checkpoint import JoinedCheckpoint, RenamedCheckpoint, SafetensorsCheckpoint, TensorInfo, TensorsCheckpoint, save
from modelglue.errors import CheckpointError
from tests.checkpoint.files import randn
from tests.checkpoint.merges import merge_of, tensors_of

SOURCE = TensorsCheckpoint({f"layers.{n}.w": randn(4, 3, seed=n) for n in range(3)}, {"layers": 3}, {"x": Path("/x")}, label="org/source")

names = st.sampled_from(list(SOURCE.names()))


@given(st.dictionaries(st.text("abc.", min_size=1, max_size=4), names, min_size=1))
@settings(max_examples=30, deadline=None)
def test_renamed_serves_every_tensor_under_its_new_name(mapping: dict[str, str]) -> None:
    """One tensor may stand at many names, another at none."""
    view = RenamedCheckpoint(SOURCE, mapping)
    assert list(view.names()) == sorted(mapping)
    for new, old in mapping.items():
        assert view.info(new) == SOURCE.info(old)
        assert torch.equal(view.tensor(new), SOURCE.tensor(old))
        assert torch.equal(view.read(new, 2, 7), SOURCE.read(old, 2, 7))
        out = torch.empty(5)
        assert view.read(new, 2, 7, out=out) is out
        assert torch.equal(out, SOURCE.read(old, 2, 7))


def test_renamed_keeps_config_and_files_unless_told_otherwise() -> None:
    mapping = {"w": "layers.0.w"}
    assert RenamedCheckpoint(SOURCE, mapping).config == {"layers": 3}
    assert RenamedCheckpoint(SOURCE, mapping, {"layers": 1}).config == {"layers": 1}
    assert RenamedCheckpoint(SOURCE, mapping).files == {"x": Path("/x")}
    assert RenamedCheckpoint(SOURCE, mapping).describe() == {"rename": mapping, "of": {"model": "org/source"}}


def test_renaming_what_is_not_there_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(CheckpointError, match=r"'w' should be 'layers\.9\.w', which the source does not have\. Did you mean"):
        RenamedCheckpoint(SOURCE, {"w": "layers.9.w"})
    view = RenamedCheckpoint(SOURCE, {"new.w": "layers.0.w"})
    for old in ("layers.0.w", "new.x"):
        with pytest.raises(CheckpointError, match=f"no tensor '{old}'"):
            view.read(old)


def test_joined_stands_side_by_side() -> None:
    other = TensorsCheckpoint({"w": torch.ones(2)}, {"layers": 9}, {"y": Path("/y")}, label="other")
    view = JoinedCheckpoint({"": SOURCE, "experts.0.": other, "experts.1.": other})
    assert list(view.names()) == ["experts.0.w", "experts.1.w", "layers.0.w", "layers.1.w", "layers.2.w"]
    assert view.info("experts.1.w") == TensorInfo((2,), "F32")
    assert torch.equal(view.tensor("layers.2.w"), SOURCE.tensor("layers.2.w"))
    assert torch.equal(view.read("experts.0.w", 1, 2), torch.ones(1))
    assert (view.config, view.files) == ({"layers": 3}, {"x": Path("/x")})
    assert JoinedCheckpoint({"": SOURCE}, {"a": 1}).config == {"a": 1}
    assert view.describe() == {
        "join": [
            {"prefix": "", "of": {"model": "org/source"}},
            {"prefix": "experts.0.", "of": {"model": "other"}},
            {"prefix": "experts.1.", "of": {"model": "other"}},
        ]
    }
    with pytest.raises(CheckpointError, match=r"no tensor 'experts\.2\.w' here\. Did you mean 'experts\.[01]\.w'"):
        view.info("experts.2.w")


def test_joining_two_tensors_under_one_name_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"would make a second tensor 'layers\.0\.w'"):
        JoinedCheckpoint({"": SOURCE, "layers.": TensorsCheckpoint({"0.w": torch.ones(1)})})
    with pytest.raises(CheckpointError, match="nothing to join"):
        JoinedCheckpoint({})


VIEWS: list[Any] = [
    RenamedCheckpoint(SOURCE, {"a": "layers.0.w", "b": "layers.1.w"}),
    RenamedCheckpoint(SOURCE, {"a": "layers.1.w", "b": "layers.0.w"}),
    RenamedCheckpoint(SOURCE, {"a": "layers.0.w", "b": "layers.1.w"}, {"layers": 2}),
    RenamedCheckpoint(TensorsCheckpoint({f"layers.{n}.w": torch.zeros(1) for n in range(2)}), {"a": "layers.0.w", "b": "layers.1.w"}),
    JoinedCheckpoint({"": SOURCE}),
    JoinedCheckpoint({"x.": SOURCE}),
    JoinedCheckpoint({"": SOURCE, "x.": SOURCE}),
    JoinedCheckpoint({"x.": SOURCE, "": SOURCE}),
    JoinedCheckpoint({"": SOURCE}, {"layers": 2}),
]


@pytest.mark.parametrize("attribute", ["identity", "stamp"])
def test_views_are_told_apart(attribute: str) -> None:
    found = [getattr(view, attribute) for view in VIEWS]
    assert len(set(found)) == len(VIEWS)
    assert getattr(RenamedCheckpoint(SOURCE, {"b": "layers.1.w", "a": "layers.0.w"}), attribute) == found[0]


def test_views_of_a_merge_are_prepared_split_and_cut_as_the_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    zoo = [TensorsCheckpoint({"a": randn(6, 10, seed=n), "b": randn(30, seed=n), "ids": torch.arange(3)}, label=f"m{n}") for n in range(3)]
    rows, whole = merge_of(zoo, "model_stock", filter_wise=True), merge_of(zoo, "ties", trim_scope="model")
    renamed = RenamedCheckpoint(rows, {"x": "a", "y": "ids"})
    joined = JoinedCheckpoint({"rows.": renamed, "whole.": whole})
    assert renamed.pieces("x", 25) == rows.pieces("a", 25) == joined.pieces("rows.x", 25) == [(0, 20), (20, 40), (40, 60)]
    assert (renamed.splittable("x"), joined.splittable("rows.x"), joined.splittable("whole.a")) == (True, True, False)
    assert (renamed.computed("x"), renamed.computed("y"), joined.computed("whole.a"), joined.computed("whole.ids")) == (
        True,
        False,
        True,
        False,
    )
    calls: list[Any] = []
    monkeypatch.setattr(type(whole), "prepare", lambda self, names=None: calls.append((self, names)))
    joined.prepare(["whole.b", "rows.y"])
    assert calls == [(rows, ["ids"]), (whole, ["b"])]
    calls.clear()
    joined.prepare(["whole.b"])
    assert calls == [(whole, ["b"])]
    calls.clear()
    joined.prepare()
    assert calls == [(rows, ["a", "ids"]), (whole, ["a", "b", "ids"])]


def test_view_of_merges_is_saved_like_any_other(tmp_path: Path) -> None:
    zoo = [TensorsCheckpoint({"a": randn(60, 10, seed=n), "b": randn(30, seed=n)}, label=f"m{n}") for n in range(3)]
    view = JoinedCheckpoint({"one.": merge_of(zoo, "ties"), "two.": RenamedCheckpoint(merge_of(zoo, "linear"), {"x": "a", "y": "a"})})
    save(view, tmp_path / "out", workers=2, shard_bytes=3000, chunk=100)
    found = SafetensorsCheckpoint(tmp_path / "out")
    expected = tensors_of(view)
    assert list(found.names()) == sorted(expected) == ["one.a", "one.b", "two.x", "two.y"]
    for name, values in expected.items():
        assert torch.equal(found.tensor(name), values)


def test_tensors_in_memory_are_a_checkpoint() -> None:
    values = torch.arange(6.0).view(2, 3).t()
    checkpoint = TensorsCheckpoint({"t": values}, label="mine")
    assert checkpoint.read("t", 1, 3).tolist() == [3.0, 1.0]
    assert torch.equal(checkpoint.tensor("t"), values)
    assert checkpoint.describe() == {"model": "mine"}
    assert (checkpoint.splittable("t"), checkpoint.computed("t")) == (True, False)
    assert checkpoint.pieces("t", 4) == [(0, 4), (4, 6)]
    with pytest.raises(CheckpointError, match="mine: has no tensor 'u'"):
        checkpoint.info("u")
