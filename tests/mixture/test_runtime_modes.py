"""How a mixture runs: drawn and searched texts, several experts at once, stored dtypes, and an encoder of which little is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.checkpoint import open_checkpoint
from modelglue.errors import CheckpointError, UserError
from modelglue.mixture import ExpertSpec, Mixture, Reader, RouterSpec, write_mixture
from modelglue.mixture.blend import BlendWriter
from modelglue.mixture.encoder import slim_reader
from modelglue.mixture.levels import LevelSpec
from modelglue.models import LiveTextModel, load_live, load_tokenizer
from modelglue.models.sampling import Sampling
from modelglue.models.writer import Asked, Writer
from tests.mixture.levels_making import mixture as inside
from tests.mixture.making import alone, mixture, two_experts
from tests.models.tiny import CONFIGS, letters, pieces, random_model, saved_model

TEXTS = ["abc", "12", "what word is it?", "3 4 5 6", "letters: a", "x", "0"]
WARM = Sampling(temperature=1.0, top_p=0.95, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts of different tokenizers and their mixture; three that share one, and mixtures of those; no test may change them."""
    made = tmp_path_factory.mktemp("modes")
    mixture(made)
    for number, name in enumerate(("one", "two", "three")):
        # One table is padded further than the others.
        saved_model(made / name, "llama", seed=20 + number, tokenizer=letters(), vocab_size=64 + 8 * (number == 1))
    for top_k in (1, 2, 3):
        for combine in ("probabilities", "logits"):
            router = RouterSpec(top_k=top_k, combine=combine, temperature=0.2)
            write_mixture(made / f"{combine}{top_k}", three(made), router, encoder=made / "one")
    return made


def three(folder: Path) -> list[ExpertSpec]:
    prompts = {"one": ("abc", "word"), "two": ("12", "345"), "three": ("?!", "::")}
    return [ExpertSpec(name, folder / name, own) for name, own in prompts.items()]


# -- drawn and searched -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sampling", "beams"), [(WARM, 1), (None, 3), (Sampling(), 1)])
def test_every_text_is_the_chosen_experts_own(folder: Path, sampling: Sampling | None, beams: int) -> None:
    mixed = Mixture.load(folder / "mixture")
    models = {name: Writer(alone(folder, name)) for name in mixed.experts}
    routed = mixed.generate_routed(TEXTS, until=["\n"], max_new_tokens=8, sampling=sampling, beams=beams)
    assert {answer.route.name for answer in routed} == {"llama", "neox"}
    for text, answer in zip(TEXTS, routed, strict=True):
        expected = models[answer.route.name].write([text], until=["\n"], max_new_tokens=8, sampling=sampling, beams=beams)
        assert [answer.text] == expected
    greedy = mixed.generate(TEXTS, until=["\n"], max_new_tokens=8)
    assert ([answer.text for answer in routed] == greedy) == (sampling == Sampling())


@pytest.mark.parametrize(("level", "routing"), [("ffn", "token"), ("ffn", "sample"), ("block", "sample")])
def test_mixtures_inside_one_model_are_written_like_any_model(level: Any, routing: Any) -> None:
    """Where rows cannot be taken out of a cache that remembers routes, each is a batch by itself."""
    model = LiveTextModel(inside([random_model("llama", seed) for seed in (1, 2, 3)], LevelSpec(level, routing, top_k=1)), pieces())
    written = Writer(model).write(TEXTS, until=["b\n"], max_new_tokens=7)
    assert written == model.generate(TEXTS, until=["b\n"], max_new_tokens=7)
    assert len(set(written)) > 3
    drawn = Writer(model).write(TEXTS, until=[], max_new_tokens=7, sampling=WARM)
    assert drawn == [Writer(model).write([text], until=[], max_new_tokens=7, sampling=WARM)[0] for text in TEXTS]


# -- an encoder of which little is read -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {"mamba"}))
def test_the_slim_encoder_reads_as_the_whole_model(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    random_model(name, seed=4).to(dtype).save_pretrained(tmp_path / "model")
    letters().save_pretrained(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    for layer in (0, 1):
        whole = Reader(load_live(checkpoint), load_tokenizer(checkpoint), layer)
        assert torch.equal(slim_reader(checkpoint, layer).pooled(TEXTS, "prompt"), whole.pooled(TEXTS, "prompt"))


# -- several experts at once ------------------------------------------------------------------------------------------------------


def _next(folder: Path, names: list[str], weights: list[float], prompt: str, ids: list[int], combine: str) -> torch.Tensor:
    """What the mixture should give each next token, from the experts' own uncached logits: float64 [64], of sum 1 for probabilities."""
    total = torch.zeros(72, dtype=torch.float64)
    for name, weight in zip(names, weights, strict=True):
        model = alone(folder, name)
        row = torch.tensor([model.encoder.encode([prompt])[0] + ids])
        with torch.inference_mode():
            logits = model.model(input_ids=row).logits[0, -1].double()
        total[: len(logits)] += weight * (logits.softmax(dim=-1) if combine == "probabilities" else logits)
    kept = total[:64]
    return kept / kept.sum() if combine == "probabilities" else kept


@pytest.mark.parametrize("combine", ["probabilities", "logits"])
@pytest.mark.parametrize("top_k", [2, 3])
def test_probabilities_are_mixed_by_the_routers_weights(folder: Path, top_k: int, combine: str) -> None:
    mixed = Mixture.load(folder / f"{combine}{top_k}")
    for prompt in ("abc", "12:?"):
        (route,) = mixed.route([prompt])
        logits = torch.tensor(route.logits)
        kept = sorted(logits.topk(top_k).indices.tolist())
        assert list(route.key) == kept
        assert list(route.weights) == pytest.approx(logits[kept].softmax(dim=0).tolist(), abs=1e-6)
        assert route.weight == max(route.weights) < 1
        names = [mixed.experts[number] for number in route.key]
        written: list[int] = []
        for _ in range(5):
            written.append(int(_next(folder, names, list(route.weights), prompt, written, combine).argmax()))
        text = load_tokenizer(open_checkpoint(folder / "one")).decode(written, skip_special_tokens=True)
        assert mixed.generate([prompt], until=[], max_new_tokens=5) == [text]


def test_likelihood_of_mixed_probabilities(folder: Path) -> None:
    mixed = Mixture.load(folder / "probabilities2")
    pairs = [(context, continuation) for context in ("abc", "12:?", "") for continuation in ("yes", "12", "q")]
    found = mixed.loglikelihood(pairs)
    for (context, continuation), (value, greedy) in list(zip(pairs, found, strict=True))[:6]:
        (route,) = mixed.route([context])
        names = [mixed.experts[number] for number in route.key]
        total, best = 0.0, True
        ids = letters()(continuation, add_special_tokens=False)["input_ids"]
        for place, token in enumerate(ids):
            shares = _next(folder, names, list(route.weights), context, ids[:place], "probabilities")
            total += float(shares[token].log())
            best &= int(shares.argmax()) == token
        assert (value, greedy) == (pytest.approx(total, abs=1e-4), best)
    assert [value for value, _ in found] == pytest.approx([mixed.loglikelihood([pair])[0][0] for pair in pairs], abs=1e-4)


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_rows_of_different_weights_share_a_batch_and_change_nothing(folder: Path, data: st.DataObject) -> None:
    mixed = _OPEN.setdefault("mixed", Mixture.load(folder / "probabilities3"))
    picks = data.draw(st.lists(st.integers(0, len(TEXTS) - 1), min_size=2, max_size=5))
    joins = data.draw(st.lists(st.integers(0, 4), min_size=len(picks), max_size=len(picks)))
    routes = mixed.route([TEXTS[pick] for pick in picks])
    writer = mixed.writer(routes[0].key)
    assert isinstance(writer, BlendWriter)
    rows = [
        writer.row_of(route.weights, Asked(writer.ids(TEXTS[pick]), 6), until=["b"], sampling=WARM)
        for route, pick in zip(routes, picks, strict=True)
    ]
    batch = writer.batch()
    with writer.running():
        for moment in range(12):
            batch.tick([row for row, join in zip(rows, joins, strict=True) if join == moment])
    for row, pick in zip(rows, picks, strict=True):
        alone_text = mixed.generate_routed([TEXTS[pick]], until=["b"], max_new_tokens=6, sampling=WARM)[0].text
        assert row.text() == alone_text


_OPEN: dict[str, Mixture] = {}


def test_copies_of_one_model_are_that_model_whatever_k_is(folder: Path, tmp_path: Path) -> None:
    copies = [ExpertSpec(f"copy{number}", folder / "one", (prompt,)) for number, prompt in enumerate(("ab", "12", "q"))]
    for combine in ("probabilities", "logits"):
        write_mixture(tmp_path / combine, copies, RouterSpec(top_k=2, combine=combine), encoder=folder / "one")  # type: ignore[arg-type]
        mixed = Mixture.load(tmp_path / combine)
        assert mixed.generate(TEXTS, until=["b"], max_new_tokens=8) == alone(folder, "one").generate(TEXTS, until=["b"], max_new_tokens=8)


def test_k_equal_to_all_experts_needs_all_of_them_in_memory(folder: Path) -> None:
    with pytest.raises(UserError, match=r"asks 2 experts at once \(top_k\)\. Use lru:2"):
        Mixture.load(folder / "probabilities2", "lru:1")
    assert Mixture.load(folder / "probabilities2", "lru:2").generate(TEXTS, until=[], max_new_tokens=3) == Mixture.load(
        folder / "probabilities2"
    ).generate(TEXTS, until=[], max_new_tokens=3)


def test_different_tokenizers_cannot_be_mixed(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"experts 'llama' and 'neox' do not number the same tokens alike\. Use top_k: 1"):
        write_mixture(tmp_path / "mixture", two_experts(folder), RouterSpec(top_k=2), encoder=folder / "llama")
    manifest = json.loads((folder / "mixture" / "mixture.json").read_text())
    (tmp_path / "by-hand").mkdir()
    (tmp_path / "by-hand" / "router.safetensors").write_bytes((folder / "mixture" / "router.safetensors").read_bytes())
    for name in ("llama", "neox"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "by-hand" / "mixture.json").write_text(json.dumps({**manifest, "top_k": 2}))
    with pytest.raises(UserError, match="do not number the same tokens alike"):
        Mixture.load(tmp_path / "by-hand")
    (tmp_path / "by-hand" / "mixture.json").write_text(json.dumps({**manifest, "top_k": 3}))
    with pytest.raises(CheckpointError, match="top_k is 3, but there are 2 experts"):
        Mixture.load(tmp_path / "by-hand")


@pytest.mark.parametrize(
    ("values", "said"), [({"top_k": 4}, "top_k is 4, but there are 3 experts"), ({"top_k": 0}, "from 1 to the number")]
)
def test_k_out_of_range(folder: Path, tmp_path: Path, values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        write_mixture(tmp_path / "mixture", three(folder), RouterSpec(**values), encoder=folder / "one")


def test_identity_knows_k_and_what_is_mixed(folder: Path) -> None:
    names = ["probabilities1", "probabilities2", "probabilities3", "logits2", "logits3"]
    assert len({Mixture.load(folder / name).identity for name in names}) == 5
    assert Mixture.load(folder / "logits1").identity == Mixture.load(folder / "probabilities1").identity


# -- stored dtypes and residency --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residency", ["lru:1", "lazy"])
def test_stored_in_bfloat16(residency: str, tmp_path: Path) -> None:
    """Experts compute in the dtype of their files; who is chosen does not depend on it."""
    for name, kind, tokenizer in (("llama", "llama", letters()), ("neox", "gpt_neox", pieces())):
        random_model(kind, seed=5).to(torch.bfloat16).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    mixture(tmp_path, router_layer=1)
    stored = Mixture.load(tmp_path / "mixture", residency, dtype="stored")
    full = Mixture.load(tmp_path / "mixture", residency)
    assert stored.route(TEXTS) == full.route(TEXTS)
    for number, name in enumerate(stored.experts):
        own = [text for text, route in zip(TEXTS, stored.route(TEXTS), strict=True) if route.name == name]
        assert own
        (model,) = stored._models([number])
        assert {parameter.dtype for parameter in model.model.parameters()} == {torch.bfloat16}
        assert len(stored._residents.names()) <= stored.resident_limit
        assert stored.generate(own, until=[], max_new_tokens=5) == model.generate(own, until=[], max_new_tokens=5)


def test_a_text_without_a_prompt_is_routed_by_its_beginning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = Mixture.load(folder / "mixture")
    spans: list[tuple[str, tuple[str, ...]]] = []
    logits = mixed.reader.logits
    monkeypatch.setattr(
        mixed.reader, "logits", lambda texts, gate, span: (spans.append((span, tuple(texts))), logits(texts, gate, span))[1]
    )
    mixed.loglikelihood([("abc", "12"), ("", "12 12"), ("12", "x")])
    assert spans == [("prompt", ("abc", "12")), ("first:256", ("12 12",))]
