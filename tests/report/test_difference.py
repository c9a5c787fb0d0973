"""The picture of a difference: what stands in it, and that it is safe and self-contained."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from modelglue.checkpoint import TensorsCheckpoint
from modelglue.errors import UserError
from modelglue.report.difference import picture, write_difference
from modelglue.zoo import Difference, diff
from tests.zoo.models import model, tensors

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def found() -> Difference:
    before, after = tensors(1), tensors(1)
    after["model.layers.1.mlp.up_proj.weight"] *= 1.5
    after["model.layers.0.self_attn.q_proj.weight"] *= 1.001
    after["lm_head.weight"] = after["lm_head.weight"] + 1
    before["extra.zero"], after["extra.zero"] = torch.zeros(2), torch.ones(2)
    return diff(model(before), model(after), labels=("<a>", "b&b"))


def texts(svg: str) -> list[str]:
    """What is written, without the tooltips."""
    found = ElementTree.fromstring(svg).iter(f"{SVG}text")
    return [(node.text or "") + "".join(child.tail or "" for child in node) for node in found]


def test_rows_columns_and_numbers(found: Difference) -> None:
    seen = texts(picture(found))
    assert seen[:7] == [
        "Where b&b differs from <a>", "relative difference |b - a| / |a|", "embedding", "attention", "feed-forward", "norms", "head",
    ]  # fmt: skip
    assert [text for text in seen if text.startswith(("layer", "outside"))] == ["layer 0", "layer 1", "outside"]
    assert seen.count("=") == 5  # both norms, attention of layer 1, feed-forward of layer 0, embedding
    assert "!" in seen  # from zero to something has no relative size
    tooltips = [node.text for node in ElementTree.fromstring(picture(found)).iter(f"{SVG}title")]
    assert any(tip is not None and tip.startswith("layer 1, feed-forward: relative 0.3") for tip in tooltips)
    assert "layer 0, norms: relative 0, norm 0, cosine 1.0000, changed 0.0 % of 6" in tooltips


def test_deeper_colours_are_larger_differences(found: Difference) -> None:
    fills: dict[str, str] = {}
    for group in ElementTree.fromstring(picture(found)).iter(f"{SVG}g"):
        title, box = group.find(f"{SVG}title"), group.find(f"{SVG}rect")
        assert title is not None
        assert box is not None
        fills[str(title.text).partition(":")[0]] = box.attrib["fill"]
    assert fills["layer 0, attention"] == "#e8f0fa"  # the lowest of the scale
    assert fills["outside, head"] == "#10468c"  # the highest
    assert fills["layer 1, attention"] == "#ffffff"  # untouched


def test_long_names_fit() -> None:
    weights = {"w": torch.ones(1)}
    name = "a-very-long-name-of-a-model-that-goes-on-and-on-and-on"
    svg = ElementTree.fromstring(picture(diff(TensorsCheckpoint(weights), TensorsCheckpoint(weights), labels=(name, name[::-1]))))
    title = texts(picture(diff(TensorsCheckpoint(weights), TensorsCheckpoint(weights), labels=(name, name[::-1]))))[0]
    assert title == f"Where {name[::-1][:39]}… differs from {name[:39]}…"
    assert float(svg.attrib["width"]) > 8.5 * len(title)


def test_several_stacks_are_named() -> None:
    weights = {f"{side}.block.{n}.attn.w": torch.ones(2) for side in ("encoder", "decoder") for n in range(2)}
    svg = picture(diff(TensorsCheckpoint(weights), TensorsCheckpoint(weights)))
    assert [text for text in texts(svg) if "block" in text] == ["decoder.block.0", "decoder.block.1", "encoder.block.0", "encoder.block.1"]
    assert texts(svg).count("=") == 4


@pytest.mark.parametrize("name", ["d.svg", "d.html"])
def test_files_need_nothing_else_and_are_equal_for_equal_differences(found: Difference, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_difference(found, path)
    first = path.read_text()
    write_difference(found, path)
    assert path.read_text() == first
    assert "<a>" not in first
    assert "&lt;a&gt;" in first
    for outside in ("http://", "https://", "<script", "<link", "@import", "url("):
        assert outside not in first.replace("http://www.w3.org/2000/svg", "").replace("url(#hatch)", ""), outside
    if name == "d.html":
        assert "model.layers.1.mlp.up_proj.weight" in first
        assert "extra.zero" in first
        assert "model.layers.1.mlp.down_proj.weight" not in first  # unchanged, so not among the most changed


def test_other_endings_are_refused(found: Difference, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"d\.png: a picture ends in \.svg or \.html"):
        write_difference(found, tmp_path / "d.png")
    assert list(tmp_path.iterdir()) == []
