"""Training of new layers, routers and whole models: what changes, how much is learned, and that a killed run ends with the same bits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from modelglue.checkpoint import SafetensorsCheckpoint, open_checkpoint
from modelglue.errors import CheckpointError, RunError, UserError
from modelglue.mixture.levels import LevelSpec, join
from modelglue.models import load_live
from modelglue.recipe import stack
from modelglue.training import Training, train
from modelglue.training.settings import Precision
from modelglue.training.texts import loss_of, rows_from
from tests.mixture.levels_making import gates
from tests.models.tiny import letters, saved_model

TEXT = "the quick brown fox jumps over the lazy dog. " * 40
FAST = Training(rate=0.01, context=32, batch=8, micro_batch=4, epochs=1, steps=24, decay=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models `plain` and `mixtral`, and the file text.txt, which is one sentence over and over."""
    made = tmp_path_factory.mktemp("training")
    for name, kind in (("plain", "llama"), ("mixtral", "mixtral")):
        saved_model(made / name, kind, tokenizer=letters(), initializer_range=0.1)
    (made / "text.txt").write_text(TEXT)
    return made


def weights(path: Path) -> dict[str, torch.Tensor]:
    model = SafetensorsCheckpoint(path)
    return {name: model.tensor(name) for name in model.names()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_new_layers_learn_and_nothing_else_changes(folder: Path, tmp_path: Path) -> None:
    expanded = stack([str(folder / "plain")], every=1)
    report = train(expanded.checkpoint, [folder / "text.txt"], tmp_path / "out", tensors=expanded.new_tensors, training=FAST)
    before = {name: expanded.checkpoint.tensor(name) for name in expanded.checkpoint.names()}
    assert changed(before, weights(tmp_path / "out")) == set(expanded.new_tensors) == set(report.trained)
    assert len(report.losses) == 24
    assert math.log(40) < report.losses[0] < math.log(100)  # random weights: as good as chance among 64 tokens
    assert report.losses[-1] < report.losses[0] - 0.5
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# Trained model" in card
    assert "modelglue merge" not in card


def test_the_whole_model_learns_the_text_and_keeps_its_dtype(folder: Path, tmp_path: Path) -> None:
    half = load_live(open_checkpoint(str(folder / "plain"))).bfloat16()
    half.save_pretrained(tmp_path / "half")
    letters().save_pretrained(tmp_path / "half")
    report = train(str(tmp_path / "half"), [folder / "text.txt"], tmp_path / "out", training=FAST)
    assert report.losses[-1] < report.losses[0] - 1.5
    found = SafetensorsCheckpoint(tmp_path / "out")
    assert {found.info(name).dtype for name in found.names()} == {"BF16"}
    rows = rows_from([folder / "text.txt"], letters(), 32)
    with torch.no_grad():
        after = float(loss_of(load_live(found), rows)) / sum(len(row.response) - 1 for row in rows)
    assert after < report.losses[0] - 1.5


def test_routers_alone(folder: Path, tmp_path: Path) -> None:
    report = train(str(folder / "mixtral"), [folder / "text.txt"], tmp_path / "out", tensors="routers", training=FAST)
    gates = {f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(2)}
    assert changed(weights(folder / "mixtral"), weights(tmp_path / "out")) == gates
    assert report.losses[-1] < report.losses[0]


def test_experts_are_fused_live_and_single_on_disk(folder: Path, tmp_path: Path) -> None:
    before = weights(folder / "mixtral")
    names = [name for name in before if ".experts." in name and ".layers.1." in name]
    train(str(folder / "mixtral"), [folder / "text.txt"], tmp_path / "out", tensors=names, training=FAST)
    assert changed(before, weights(tmp_path / "out")) == set(names)
    with pytest.raises(CheckpointError, match=r"is made of trained tensors and of '.*Train all of them, or none"):
        train(str(folder / "mixtral"), [folder / "text.txt"], tmp_path / "other", tensors=names[:1], training=FAST)


def test_routers_of_a_mixture_of_ones_own(folder: Path, tmp_path: Path) -> None:
    """One expert is at work, with the weight 1: only gating that lets all of them work while training reaches the router."""
    saved_model(tmp_path / "other", "llama", 1, tokenizer=letters(), initializer_range=0.3)
    experts = {"a": open_checkpoint(str(folder / "plain")), "b": open_checkpoint(str(tmp_path / "other"))}
    spec = LevelSpec("ffn", "token", top_k=1)
    mixture = join(experts, experts["a"], gates(spec, 2), spec)
    settings = {"context": 32, "rate": 0.05, "steps": 12, "decay": 0.0}
    report = train(mixture, [folder / "text.txt"], tmp_path / "out", tensors="routers", training=Training(**settings))  # type: ignore[arg-type]
    before = {name: mixture.tensor(name) for name in mixture.names()}
    assert changed(before, weights(tmp_path / "out")) == {name for name in before if ".router." in name} == set(report.trained)
    assert report.losses[-1] < report.losses[0]
    topk = Training(**settings, gating="topk")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no gradient reaches what is trained"):
        train(mixture, [folder / "text.txt"], tmp_path / "none", tensors="routers", training=topk)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [1, 5, 12])
def test_a_killed_run_ends_with_the_same_bits(folder: Path, tmp_path: Path, after: int) -> None:
    """Two epochs of 8 steps, a state after every third: the order of the second epoch, moments and schedule go on as they were."""
    settings = Training(rate=0.01, context=32, batch=8, micro_batch=3, epochs=2, keep_every=3)
    arguments: tuple[Any, ...] = (str(folder / "plain"), [folder / "text.txt"])
    whole = train(*arguments, tmp_path / "whole", training=settings)
    assert (whole.rows, len(whole.losses), whole.resumed_steps) == (57, 16, 0)

    def killing(step: int, steps: int, loss: float) -> None:
        if step == after:
            raise Killed

    with pytest.raises(Killed):
        train(*arguments, tmp_path / "out", training=settings, progress=killing)
    assert not (tmp_path / "out").exists()
    resumed = train(*arguments, tmp_path / "out", training=settings)
    assert resumed.resumed_steps == (after - 1) // 3 * 3
    assert resumed.losses == whole.losses
    assert changed(weights(tmp_path / "whole"), weights(tmp_path / "out")) == set()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_state_of_other_inputs_is_not_used(folder: Path, tmp_path: Path) -> None:
    def killing(step: int, steps: int, loss: float) -> None:
        if step == 3:
            raise Killed

    first = Training(rate=0.01, context=32, steps=4, keep_every=1)
    with pytest.raises(Killed):
        train(str(folder / "plain"), [folder / "text.txt"], tmp_path / "out", training=first, progress=killing)
    state = tmp_path / ".out.training" / "state.safetensors"
    assert state.is_file()
    other = Training(rate=0.02, context=32, steps=4)
    assert train(str(folder / "plain"), [folder / "text.txt"], tmp_path / "out", training=other).resumed_steps == 0
    with pytest.raises(Killed):
        train(str(folder / "plain"), [folder / "text.txt"], tmp_path / "torn", training=first, progress=killing)
    torn = tmp_path / ".torn.training" / "state.safetensors"
    torn.write_bytes(torn.read_bytes()[:-7])
    assert train(str(folder / "plain"), [folder / "text.txt"], tmp_path / "torn", training=first).resumed_steps == 0


def test_micro_batches_and_seeds(folder: Path, tmp_path: Path) -> None:
    """A batch in parts is the same gradient up to rounding; another seed is another order."""
    found = [
        train(
            str(folder / "plain"), [folder / "text.txt"], tmp_path / str(number),
            training=Training(context=32, batch=6, micro_batch=micro, steps=3, rate=1e-3, seed=seed),
        ).losses
        for number, (micro, seed) in enumerate([(6, 0), (2, 0), (6, 1)])
    ]  # fmt: skip
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0][0] != found[2][0]


def test_only_responses_are_learned(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "ab", "response": "cd"}) + "\n" + json.dumps({"prompt": "abcd", "response": "e"}) + "\n")
    rows = rows_from([path], letters(), 16)
    live = load_live(open_checkpoint(str(folder / "plain")))
    expected = 0.0
    with torch.no_grad():
        for row in rows:
            ids = [*row.prompt, *row.response]
            logs = torch.log_softmax(live(torch.tensor([ids])).logits[0].double(), -1)
            expected -= sum(float(logs[at - 1, ids[at]]) for at in range(len(row.prompt), len(ids)))
        assert float(loss_of(live, rows)) == pytest.approx(expected, rel=1e-5)


def test_texts_are_cut_and_lines_are_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdef")
    (tmp_path / "b.jsonl").write_text('{"text": "abc"}\n\n{"text": "a"}\n')
    ids = letters()("abcdef", add_special_tokens=False)["input_ids"]
    rows = rows_from([tmp_path / "a.txt", tmp_path / "b.jsonl"], letters(), 5)
    assert [row.response for row in rows] == [(1, *ids[:4]), (*ids[4:], 2), (1, *ids[:3], 2), (1, ids[0], 2)]


def test_refused_texts_are_named_together(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "odd.jsonl").write_text('{"words": 1}\n')
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    paths = [tmp_path / name for name in ("empty.txt", "odd.jsonl", "bytes.txt", "missing.txt")]
    with pytest.raises(UserError) as error:
        train(str(folder / "plain"), paths, tmp_path / "out")
    lines = str(error.value).split("\n")
    assert [line.split(":")[0] for line in lines] == [str(path) for path in paths]
    with pytest.raises(UserError, match="there is nothing to train on"):
        train(str(folder / "plain"), [], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refused_tensors(folder: Path, tmp_path: Path) -> None:
    def attempt(tensors: Any) -> None:
        train(str(folder / "plain"), [folder / "text.txt"], tmp_path / "out", tensors=tensors)

    with pytest.raises(CheckpointError, match="has no routers"):
        attempt("routers")
    with pytest.raises(CheckpointError, match=r"has no trainable_tensors\.json"):
        attempt("new")
    with pytest.raises(UserError, match=r"'model\.norm\.wight' is no tensor to train\. Did you mean 'model\.norm\.weight'"):
        attempt(["model.norm.wight"])
    with pytest.raises(UserError, match="no tensors are named"):
        attempt([])
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        attempt("all")


def test_a_loss_that_is_no_number_ends_the_run(folder: Path, tmp_path: Path) -> None:
    live = load_live(open_checkpoint(str(folder / "plain")))
    with torch.no_grad():
        live.model.norm.weight.fill_(1e38)
        live.lm_head.weight.fill_(1e38)
    live.save_pretrained(tmp_path / "broken")
    letters().save_pretrained(tmp_path / "broken")
    with pytest.raises(RunError, match=r"training: the loss of step 1 is (nan|inf)"):
        train(str(tmp_path / "broken"), [folder / "text.txt"], tmp_path / "out", training=FAST)
    assert not (tmp_path / "out").exists()


def test_half_precision_is_close(folder: Path, tmp_path: Path) -> None:
    kinds: tuple[Precision, ...] = ("float32", "bfloat16")
    found = [
        train(
            str(folder / "plain"), [folder / "text.txt"], tmp_path / kind, training=Training(context=32, steps=2, rate=1e-3, precision=kind)
        ).losses
        for kind in kinds
    ]
    assert found[0] == pytest.approx(found[1], rel=0.02)
    assert found[0] != found[1]


def test_settings_that_cannot_be_are_named_together() -> None:
    with pytest.raises(UserError) as error:
        Training(rate=0, batch=0, warm_up=1.0, decay=-1, steps=0, precision="int8")  # type: ignore[arg-type]
    assert str(error.value).count("; allowed") == 6
