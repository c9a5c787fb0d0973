"""Experts as differences to their family's average: what comes back, what it costs, and folders that cannot be trusted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from modelglue.checkpoint import TensorsCheckpoint, open_checkpoint
from modelglue.checkpoint.sparse import SparseCheckpoint, SparseDelta
from modelglue.cli.app import main
from modelglue.errors import CheckpointError, MergeError, UserError
from modelglue.mixture import ExpertSpec, Mixture, RouterSpec, write_mixture
from modelglue.mixture.deltas import DeltaStore, families, losses
from modelglue.mixture.deltas.sparse_writer import write_sparse
from tests.models.tiny import letters, pieces, saved_model

PROMPTS = {"a": ("abc", "word"), "b": ("12", "345"), "c": ("xyz",), "far": ("?!",)}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three Llamas of one ancestor, each changed by two directions in every matrix and a little in its norms; and a stranger."""
    folder = tmp_path_factory.mktemp("zoo")
    saved_model(folder / "a", "llama", 1, tokenizer=letters())
    ancestor = load_file(folder / "a" / "model.safetensors")
    for number, name in enumerate("abc"):
        generator = torch.Generator().manual_seed(number)
        changed = {}
        for key, value in ancestor.items():
            rows, columns = value.shape if value.dim() == 2 else (len(value), 0)
            left, right = torch.randn(rows, 2, generator=generator), torch.randn(2, columns or 1, generator=generator)
            changed[key] = value + (0.05 * left @ right if columns else 0.01 * left[:, 0])
        if name != "a":
            shutil.copytree(folder / "a", folder / name)
        save_file(changed, folder / name / "model.safetensors", metadata={"format": "pt"})
    saved_model(folder / "far", "gpt_neox", 9, tokenizer=pieces())
    return folder


def specs(zoo: Path, names: str | list[str] = "abc") -> list[ExpertSpec]:
    return [ExpertSpec(name, zoo / name, PROMPTS[name]) for name in names]


def written(zoo: Path, target: Path, names: str | list[str] = "abc", encoder: str | None = "a", **store: Any) -> dict[str, Any]:
    """The report of a mixture that was written."""
    path = None if encoder is None else zoo / encoder
    write_mixture(target, specs(zoo, names), RouterSpec(), encoder=path, store=DeltaStore(**store), overwrite=True)
    return dict(json.loads((target / "deltas.json").read_text()))


def test_low_rank_experts_come_back(zoo: Path, tmp_path: Path) -> None:
    report = written(zoo, tmp_path / "mix", form="low_rank", energy=0.9999999)
    for expert in report["experts"]:
        restored = open_checkpoint(expert["reference"], relative_to=tmp_path / "mix")
        model = open_checkpoint(zoo / expert["name"])
        assert list(restored.names()) == list(model.names())
        for name in model.names():
            torch.testing.assert_close(restored.tensor(name), model.tensor(name), rtol=1e-3, atol=1e-3)
        assert expert["loss"]["all"]["error"] < 1e-3
        assert expert["loss"]["norm"]["lost"] == 0  # kept whole
        assert expert["why_whole"] is None
    assert report["base_bytes"] == sum(expert["whole_bytes"] for expert in report["experts"]) / 3
    assert report["bytes"] == report["base_bytes"] + sum(expert["bytes"] for expert in report["experts"])


def test_energy_and_density_trade_size_for_loss(zoo: Path, tmp_path: Path) -> None:
    """The loss of the matrices that are decomposed obeys what the energy promises, and the report says what is true."""
    forms: list[dict[str, Any]] = [{"form": "low_rank", "energy": 0.5}, {"form": "low_rank", "energy": 0.999}]
    low, high = (written(zoo, tmp_path / "mix", **form)["experts"][0] for form in forms)
    assert low["bytes"] < high["bytes"]
    assert low["loss"]["attention"]["lost"] > high["loss"]["attention"]["lost"]
    assert low["loss"]["attention"]["lost"] <= 0.5**0.5 + 1e-6
    thin, thick = (written(zoo, tmp_path / "mix", form="sparse", density=density)["experts"][0] for density in (0.1, 0.6))
    assert thin["bytes"] < thick["bytes"]
    assert 0 < thick["loss"]["attention"]["lost"] < thin["loss"]["attention"]["lost"] < 1
    restored, model = open_checkpoint(thick["reference"], relative_to=tmp_path / "mix"), open_checkpoint(zoo / "a")
    base = open_checkpoint(tmp_path / "mix" / "families" / "1")
    names = [name for name in model.names() if "self_attn" in name]
    away = sum(float((restored.tensor(name) - model.tensor(name)).double().square().sum()) for name in names)
    change = sum(float((base.tensor(name) - model.tensor(name)).double().square().sum()) for name in names)
    assert thick["loss"]["attention"]["lost"] == pytest.approx((away / change) ** 0.5)
    assert thick["loss"]["attention"]["elements"] == sum(model.info(name).numel for name in names)


@pytest.mark.parametrize("form", ["low_rank", "sparse"])
def test_a_mixture_of_differences_runs_like_one_of_models(form: str, zoo: Path, tmp_path: Path) -> None:
    exact: dict[str, Any] = {"energy": 1.0} if form == "low_rank" else {"density": 1.0}
    written(zoo, tmp_path / "mix", form=form, **exact)
    write_mixture(tmp_path / "plain", specs(zoo), RouterSpec(), encoder=zoo / "a")
    ours, theirs = Mixture.load(tmp_path / "mix"), Mixture.load(tmp_path / "plain")
    texts = ["abc", "34", "xyz", "word 1"]
    assert [route.name for route in ours.route(texts)] == [route.name for route in theirs.route(texts)]
    assert ours.generate(texts, until=["\n"], max_new_tokens=5) == theirs.generate(texts, until=["\n"], max_new_tokens=5)
    assert ours.manifest.encoder == "families/1+experts/a"
    assert ours.self_test().confusion == theirs.self_test().confusion


def test_a_folder_of_differences_may_be_moved(zoo: Path, tmp_path: Path) -> None:
    written(zoo, tmp_path / "mix", form="sparse", density=0.5)
    before = Mixture.load(tmp_path / "mix")
    text = before.generate(["abc"], until=[], max_new_tokens=3)
    shutil.move(tmp_path / "mix", tmp_path / "elsewhere")
    after = Mixture.load(tmp_path / "elsewhere")
    assert after.identity == before.identity
    assert after.generate(["abc"], until=[], max_new_tokens=3) == text


def test_equal_inputs_give_equal_bytes_wherever_they_are_written(zoo: Path, tmp_path: Path) -> None:
    for form in ("low_rank", "sparse"):
        for place in ("one", "two"):
            (tmp_path / place).mkdir(exist_ok=True)
            written(zoo, tmp_path / place / "mix", "ab", form=form)
        files = {path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()}
        assert len(files) > 10
        for file in files:
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_an_expert_without_a_family_is_kept_whole(zoo: Path, tmp_path: Path) -> None:
    report = written(zoo, tmp_path / "mix", ["a", "far", "b"], form="sparse")
    places = {expert["name"]: expert["reference"] for expert in report["experts"]}
    assert places == {"a": "families/1+experts/a", "far": "experts/far", "b": "families/1+experts/b"}
    assert report["experts"][1]["why_whole"] == "no other expert is of its family"
    stored, model = load_file(tmp_path / "mix" / "experts" / "far" / "model.safetensors"), load_file(zoo / "far" / "model.safetensors")
    assert all(stored[name].equal(model[name]) for name in model)
    assert Mixture.load(tmp_path / "mix").generate(["?!"], until=[], max_new_tokens=2)


def test_no_family_no_differences(zoo: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no two experts are of one family"):
        written(zoo, tmp_path / "mix", ["a", "far"], form="sparse")
    assert not (tmp_path / "mix").exists()
    opened = {name: open_checkpoint(zoo / name) for name in ("far", "a", "c")}
    assert families(opened) == [["far"], ["a", "c"]]


def test_the_encoder_may_be_another_model(zoo: Path, tmp_path: Path) -> None:
    written(zoo, tmp_path / "mix", encoder="far", form="sparse")
    mixture = Mixture.load(tmp_path / "mix")
    assert mixture.manifest.encoder == "encoder"
    assert mixture.route(["abc"])[0].name == "a"
    written(zoo, tmp_path / "mix", encoder=None, form="sparse")
    assert Mixture.load(tmp_path / "mix").manifest.encoder.startswith("families/1+experts/")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"form": "sparse", "energy": 0.5}, "energy and rank are for form: low_rank"),
        ({"form": "low_rank", "density": 0.5}, "density is for form: sparse"),
        ({"form": "sparse", "density": 0}, "greater than 0"),
        ({"form": "low_rank", "energy": 1.5}, "less than or equal to 1"),
        ({"form": "dense"}, "'low_rank' or 'sparse'"),
    ],
)
def test_settings_that_say_nothing_sensible(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DeltaStore(**given)


# -- sparse differences by themselves -----------------------------------------------------------------------------------------------


def sparse(folder: Path, model: torch.Tensor, base: torch.Tensor, density: float) -> SparseCheckpoint:
    """One matrix, written and read back."""
    ours, theirs = TensorsCheckpoint({"w": model, "n": torch.ones(3)}), TensorsCheckpoint({"w": base, "n": torch.ones(3)})
    write_sparse(ours, theirs, folder, density, key="0" * 64)
    return SparseCheckpoint(theirs, SparseDelta(folder), "memory")


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.floats(0.05, 1.0), st.integers(0, 5), st.data())
def test_the_largest_changes_are_kept_and_any_range_reads_alike(rows: int, density: float, seed: int, data: st.DataObject) -> None:
    import tempfile

    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, 7, generator=generator)
    model = base + torch.randint(-3, 4, (rows, 7), generator=generator) / 8
    with tempfile.TemporaryDirectory() as name:
        found = sparse(Path(name) / "x", model, base, density)
        change = (model - base).abs().flatten()
        back = found.tensor("w").flatten()
        kept = back == model.flatten()
        assert bool((kept | (back == base.flatten())).all())
        count = min(max(1, round(density * (7 * rows))), int((change > 0).sum()))
        order = sorted(range(len(change)), key=lambda place: (-float(change[place]), place))
        assert bool(kept[order[:count]].all())
        assert int((kept & (change > 0)).sum()) == count
        start = data.draw(st.integers(0, 7 * rows))
        stop = data.draw(st.integers(start, 7 * rows))
        assert found.read("w", start, stop).equal(back[start:stop])


def test_blocks_are_counted(tmp_path: Path) -> None:
    """A tensor of more than one block, in a short dtype, and read across their border."""
    base = torch.zeros(300, 256, dtype=torch.bfloat16)
    model = torch.randn(300, 256, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    found = sparse(tmp_path / "x", model, base, 0.3)
    starts = load_file(tmp_path / "x" / "delta.safetensors")["w.starts"]
    assert (len(starts), int(starts[-1])) == (3, round(0.3 * 300 * 256))
    whole = found.tensor("w").flatten()
    assert found.read("w", 65_000, 66_000).equal(whole[65_000:66_000])
    assert int((whole != 0).sum()) == int(starts[-1])
    assert found.info("w").dtype == "BF16"


def test_a_model_that_is_the_base_is_kept_too(tmp_path: Path) -> None:
    same = torch.ones(2, 3)
    assert sparse(tmp_path / "x", same, same, 0.5).tensor("w").equal(same)


def test_infinite_differences_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="the difference of 'w' holds NaN or infinity"):
        sparse(tmp_path / "x", torch.full((2, 2), float("inf")), torch.zeros(2, 2), 0.5)
    assert not (tmp_path / "x").exists()


def test_losses_by_hand() -> None:
    model, base, back = (
        TensorsCheckpoint({"model.norm.weight": torch.tensor(norm), "model.layers.0.mlp.w.weight": torch.tensor([mlp])})
        for norm, mlp in (([3.0, 4.0], [6.0, 8.0]), ([3.0, 4.0], [6.0, 4.0]), ([3.0, 4.0], [6.0, 7.0]))
    )
    found = losses(model, back, base, lambda name: "norm" if "norm" in name else "mlp")
    assert (found["norm"].error, found["norm"].lost) == (0.0, 0.0)
    assert (found["mlp"].error, found["mlp"].lost, found["mlp"].elements) == (0.1, 0.25, 2)
    assert found["all"].error == pytest.approx((1 / 125) ** 0.5)


# -- folders that cannot be trusted -------------------------------------------------------------------------------------------------


def spoilt(folder: Path, **tensors: torch.Tensor | None) -> None:
    stored = load_file(folder / "delta.safetensors")
    for name, value in tensors.items():
        if value is None:
            del stored[name.replace("_", ".")]
        else:
            stored[name.replace("_", ".")] = value
    save_file(stored, folder / "delta.safetensors")


SPOILT: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "shape": ({"w_mask": torch.zeros(9, dtype=torch.uint8)}, r"'w\.mask' is U8 \[9\], allowed is U8 \[2\]"),
    "dtype": ({"w_starts": torch.tensor([0, 5], dtype=torch.int32)}, r"'w\.starts' is I32 \[2\], allowed is I64 \[2\]"),
    "many": ({"w_values": torch.zeros(99)}, r"'w\.values' is F32 \[99\], allowed is a list of at most 12"),
    "whole": ({"w_values": torch.zeros(5, dtype=torch.int64)}, r"'w\.values' is I64"),
    "missing": ({"w_values": None}, r"do not hold the same tensors \(w\.values\)"),
    "extra": ({"v_mask": torch.zeros(1)}, r"do not hold the same tensors \(v\.mask\)"),
    "count": ({"w_starts": torch.tensor([0, 4])}, r"'w\.starts' does not count 'w\.values'"),
    "negative": ({"w_starts": torch.tensor([-1, 6])}, r"'w\.starts' does not count 'w\.values'"),
    "bits": ({"w_mask": torch.tensor([255, 255], dtype=torch.uint8)}, r"'w\.mask' does not say what 'w\.starts' says"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_spoilt_differences_are_refused(what: str, tmp_path: Path) -> None:
    base = torch.zeros(3, 4)
    sparse(tmp_path / "x", torch.arange(12.0).view(3, 4), base, 0.4)
    changes, message = SPOILT[what]
    spoilt(tmp_path / "x", **changes)
    with pytest.raises(CheckpointError, match=message):
        read_again(tmp_path / "x", base)


def read_again(folder: Path, base: torch.Tensor) -> torch.Tensor:
    theirs = TensorsCheckpoint({"w": base, "n": torch.ones(3)})
    return SparseCheckpoint(theirs, SparseDelta(folder), "memory").tensor("w")


@pytest.mark.parametrize("change", [{"format": "other/1"}, {"surplus": 1}, {"partly": ["w", "w"]}, {"partly": "w"}, {"whole": ["n"]}])
def test_a_spoilt_manifest_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    base = torch.zeros(3, 4)
    sparse(tmp_path / "x", torch.arange(12.0).view(3, 4), base, 0.4)
    file = tmp_path / "x" / "delta.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(CheckpointError, match=r"delta\.json.*Make the mixture again"):
        read_again(tmp_path / "x", base)


def test_another_base_is_refused(zoo: Path, tmp_path: Path) -> None:
    sparse(tmp_path / "x", torch.arange(12.0).view(3, 4), torch.zeros(3, 4), 0.4)
    with pytest.raises(CheckpointError, match="was taken from another base"):
        read_again(tmp_path / "x", torch.ones(3, 4))
    written(zoo, tmp_path / "mix", form="sparse")
    base = load_file(tmp_path / "mix" / "families" / "1" / "model.safetensors")
    base["model.norm.weight"] += 1
    save_file(base, tmp_path / "mix" / "families" / "1" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="was taken from another base"):
        Mixture.load(tmp_path / "mix")
    text = f"{tmp_path}/mix/families/1+{tmp_path}/mix/experts/a+{tmp_path}/mix/experts/b"
    with pytest.raises(CheckpointError, match="is a sparse difference, which stands alone on its base"):
        open_checkpoint(text)


# -- the command --------------------------------------------------------------------------------------------------------------------


def mixed(zoo: Path, target: Path, **changes: Any) -> int:
    """The exit code of `modelglue mix`."""
    value = {
        "format": "modelglue/1",
        "level": "model",
        "experts": [{"model": str(zoo / name), "prompts": {"positive": list(PROMPTS[name])}} for name in "abc"],
        "router": {"encoder": "a"},
        "store": {"form": "sparse", "density": 0.05},
    }
    file = target.parent / "mix.yaml"
    file.write_text(yaml.safe_dump({**value, **changes}, sort_keys=False))
    with pytest.raises(SystemExit) as left:
        main(["mix", str(file), str(target)])
    return int(left.value.code or 0)


def test_the_command_says_what_differences_take_and_lose(zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mixed(zoo, tmp_path / "mix") == 0
    said = capsys.readouterr().err
    report = json.loads((tmp_path / "mix" / "deltas.json").read_text())
    assert f"as differences: {report['bytes'] / 1000:.1f} kB instead of {report['whole_bytes'] / 1000:.1f} kB" in said
    assert f"of the difference {report['experts'][0]['loss']['all']['lost']:.1%} is lost (attention " in said
    assert Mixture.load(tmp_path / "mix").experts == ["a", "b", "c"]
    assert "more than the models themselves" not in said
    assert mixed(zoo, tmp_path / "more", store={"form": "sparse", "density": 1.0}) == 0
    assert "that is more than the models themselves: pack: true copies them" in capsys.readouterr().err


def test_differences_where_they_mean_nothing(zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mixed(zoo, tmp_path / "mix", level="ffn", router={}) == 2
    assert "store: has no meaning at the level ffn: the output is one model" in capsys.readouterr().err
    assert mixed(zoo, tmp_path / "mix", pack=True) == 2
    assert "store: stands beside pack" in capsys.readouterr().err
    assert mixed(zoo, tmp_path / "mix", level="auto", router={}) == 2
    assert "store: is for complete models, but the experts are joined at the level ffn" in capsys.readouterr().err
    assert mixed(zoo, tmp_path / "mix", store={"form": "sparse", "energi": 0.5}) == 2
    assert "store.energi: unknown key. Did you mean 'energy'" in capsys.readouterr().err
