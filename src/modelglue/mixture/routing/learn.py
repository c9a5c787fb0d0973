"""A router from scores: where to read, how strongly to hold it back, and whether it is any better than the router from prompts.

Every choice is made by cross-validation on the scored items, and the check of the whole, choices included, by another one around it: each
item is routed by a router that has seen neither it nor its scores. Test items are for whoever comes afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelglue.checkpoint import open_checkpoint
from modelglue.errors import UserError
from modelglue.mixture.prompted import PromptRouter, prompt_router
from modelglue.mixture.router import Reader
from modelglue.mixture.routing.fit import Fit, Fitted, Frame, fit_gate, temperature_of, with_penalty
from modelglue.mixture.routing.scored import ScoredItems
from modelglue.mixture.spec import ExpertSpec, RouterSpec
from modelglue.mixture.trained import HeldOut, TrainedRouter, Training
from modelglue.models import decoder_layers, load_live, load_tokenizer
from modelglue.recipe import Scores, paired_interval

if TYPE_CHECKING:
    import torch

#: below this, a held-out check says nothing
FEWEST_ITEMS = 20
FOLDS = 5
_INNER_FOLDS = 3
_PENALTIES = (1e-3, 1e-2, 1e-1)
_RIDGES = (1e-2, 1e-1, 1.0)
#: layers that are tried where the layer is left open, evenly spaced
_MOST_LAYERS = 8


@dataclass(frozen=True)
class Place:
    """What a router may read: the states that enter one layer of one encoder, in their frame."""

    encoder: Path
    layer: int
    frame: Frame
    states: torch.Tensor
    """[items, r], float64."""


@dataclass(frozen=True)
class LearnedRouter:
    """What came of learning: a router, and whether to use it."""

    router: TrainedRouter | None
    """None where there was nothing to learn from."""
    used: bool
    message: str
    """Why it is used, or why not: one sentence."""
    tasks: Mapping[str, Mapping[str, float]]
    """Task -> held-out score of `trained` and `reference`, and of the task's best expert (`oracle`)."""
    load: Mapping[str, Mapping[str, int]]
    """Task -> expert -> how many held-out items it got."""

    def to_json(self) -> dict[str, Any]:
        training = self.router.training.model_dump(mode="json") if self.router is not None else None
        return {
            "used": self.used, "message": self.message, "training": training,
            "held_out_tasks": {task: dict(row) for task, row in self.tasks.items()},
            "held_out_load": {task: dict(row) for task, row in self.load.items()},
        }  # fmt: skip


def learn_router(
    experts: Sequence[ExpertSpec], items: ScoredItems, router: RouterSpec, fit: Fit, *, encoder: Path | None = None, always: bool = False
) -> LearnedRouter:
    """Fit a router to the items' scores, and hold it against the router from prompts.

    It is `used` if it beats, on items that it was not fitted on, the router from prompts (where no prompts allow one: the expert that is
    best for everything) by more than chance, or `always`. `encoder`: the model that texts are read through, None tries every expert;
    `router.router_layer`: a layer, or auto for up to eight.

    Equal inputs give equal bits. Raises UserError for experts other than the scored ones. Time: one pass of all texts through every
    encoder, then seconds. Memory: one encoder at a time, and the pooled states.
    """
    from modelglue.checkpoint.engine.workers import single_thread

    if [expert.name for expert in experts] != list(items.experts):
        raise UserError(f"the scores are of {', '.join(items.experts)}, the experts are {', '.join(e.name for e in experts)}. Score these.")
    if len(items.items) < FEWEST_ITEMS or items.telling == 0:
        few = f"{len(items.items)} scored items are too few (at least {FEWEST_ITEMS})" if items.telling else "all experts score alike"
        return LearnedRouter(None, False, f"{few}: there is nothing to learn a router from.", {}, {})
    with single_thread():
        reference, against = _reference(experts, items, router, encoder)
        places = [place for path in _encoders(experts, encoder) for place in _places(path, items, router)]
        check = _Problem(items, places, fit)
        choices = check.held_out()
        trained, oracle = items.outcome(choices), items.outcome(items.oracle())
        held_out = compared(trained, reference, oracle, against)
        made = check.final(held_out)
    used = held_out.better or always
    tasks = {
        task: {"trained": value, "reference": reference.tasks()[task], "oracle": oracle.tasks()[task]}
        for task, value in trained.tasks().items()
    }
    load = {task: dict.fromkeys(items.experts, 0) for task in items.tasks}
    for item, choice in zip(items.items, choices, strict=True):
        load[item.task][items.experts[choice]] += 1
    return LearnedRouter(made, used, verdict(held_out, used), tasks, load)


def compared(trained: Scores, reference: Scores, oracle: Scores, against: Any) -> HeldOut:
    difference, low, high = paired_interval(trained, reference)
    return HeldOut(
        trained=trained.mean, reference=reference.mean, against=against, oracle=oracle.mean, difference=difference, interval=(low, high)
    )  # fmt: skip


def verdict(found: HeldOut, used: bool) -> str:
    low, high = found.interval
    points = f"{100 * found.difference:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"
    gain = f"{points} against the {_NAMES[found.against]} on held-out items"
    if found.better:
        return f"The router learned from scores: {gain}."
    if used:
        return f"The router learned from scores, as asked; it is not better by more than chance: {gain}."
    return f"The router learned from scores is not better by more than chance, so the {_NAMES[found.against]} stays: {gain}."


_NAMES = {"prompts": "router from prompts", "best expert": "best single expert"}


def _encoders(experts: Sequence[ExpertSpec], encoder: Path | None) -> list[Path]:
    return [encoder] if encoder is not None else list(dict.fromkeys(expert.path for expert in experts))


def _places(path: Path, items: ScoredItems, router: RouterSpec) -> list[Place]:
    """The places of one encoder; it is let go of afterwards."""
    checkpoint = open_checkpoint(path)
    model, tokenizer = load_live(checkpoint), load_tokenizer(checkpoint)
    count = len(decoder_layers(model)[1])
    layers = [router.router_layer] if router.router_layer != "auto" else _spread(count)
    pooled = pooled_states(Reader(model, tokenizer, layers[-1]), layers, items.texts, router.route_span)
    found = []
    for layer, states in pooled.items():
        frame = Frame.of(states)
        found.append(Place(path, layer, frame, frame.apply(states)))
    return found


def pooled_states(reader: Reader, layers: Sequence[int], texts: Sequence[str], span: str) -> dict[int, torch.Tensor]:
    """Pooled states of all texts; a text without a token in this vocabulary has the mean of the others."""
    import torch

    readable = torch.tensor(reader.readable(texts))
    if not bool(readable.any()):
        raise UserError("no scored text has a token in the encoder's vocabulary. Give another encoder.")
    found = reader.pooled_at(layers, [text for text, real in zip(texts, readable.tolist(), strict=True) if real], span)
    whole = {}
    for layer, states in found.items():
        whole[layer] = states.mean(dim=0).repeat(len(texts), 1)
        whole[layer][readable] = states
    return whole


def _spread(layers: int) -> list[int]:
    most = min(layers, _MOST_LAYERS)
    return sorted({round(number * (layers - 1) / max(most - 1, 1)) for number in range(most)})


def _reference(experts: Sequence[ExpertSpec], items: ScoredItems, router: RouterSpec, encoder: Path | None) -> tuple[Scores, str]:
    """What the learned router has to beat, on the same items."""
    try:
        made: PromptRouter = prompt_router(experts, router, encoder)
    except UserError:
        return items.outcome([items.best_for_everything()] * len(items.items)), "best expert"
    checkpoint = open_checkpoint(made.encoder)
    reader = Reader(load_live(checkpoint), load_tokenizer(checkpoint), made.layer)
    readable = reader.readable(items.texts)
    choices = [0] * len(items.items)  # as the runtime does with a text that has no token
    rows = reader.logits([text for text, real in zip(items.texts, readable, strict=True) if real], made.gate, router.route_span)
    for place, choice in zip([place for place, real in enumerate(readable) if real], rows.argmax(dim=1).tolist(), strict=True):
        choices[place] = choice
    return items.outcome(choices), "prompts"


@dataclass(frozen=True)
class _Problem:
    """Items, the places at which they can be read, and the kind of gate that is wanted."""

    items: ScoredItems
    places: Sequence[Place]
    fit: Fit

    def held_out(self) -> list[int]:
        """The expert of every item by a router that was chosen and fitted without the item's fold."""
        import torch

        folds = self.items.folds(FOLDS, self.fit.seed)
        choices = torch.zeros(len(self.items.items), dtype=torch.int64)
        for fold in range(FOLDS):
            known, new = folds != fold, folds == fold
            place, penalty = self._choose(known)
            choices[new] = self._fitted(place, penalty, known).logits(place.states[new]).argmax(dim=1)
        return [int(choice) for choice in choices]

    def final(self, held_out: HeldOut) -> TrainedRouter:
        """Chosen and fitted on all items; its temperature is that of held-out logits."""
        import torch

        values, weights = self.items.values(), self.items.weights()
        everything = torch.ones(len(values), dtype=torch.bool)
        place, penalty = self._choose(everything)
        logits = self._crossed(place, penalty, everything, FOLDS)
        fitted = self._fitted(place, penalty, everything)
        training = Training(
            objective=self.fit.objective, penalty=penalty, hidden=self.fit.hidden if self.fit.kind == "mlp" else None, seed=self.fit.seed,
            items=len(values), tasks=self.items.tasks, held_out=held_out,
        )  # fmt: skip
        return TrainedRouter(fitted.gate(place.frame), place.encoder, place.layer, temperature_of(logits, values, weights), training)

    def _choose(self, rows: torch.Tensor) -> tuple[Place, float]:
        """The place whose states tell most by ridge regression, then the penalty of the gate there; both by what they route to on folds."""
        place = max(self.places, key=lambda place: self._told(place, rows))
        reached = {penalty: self._value(self._crossed(place, penalty, rows, _INNER_FOLDS), rows) for penalty in _PENALTIES}
        return place, max(reached, key=lambda penalty: (reached[penalty], penalty))  # of equal ones the stronger

    def _told(self, place: Place, rows: torch.Tensor) -> float:
        """Held-out value of routing by ridge regression on the values, with the best of a few ridges: closed form, milliseconds."""
        import torch

        values, weights = self.items.values(), self.items.weights()
        values = values - values.mean(dim=1, keepdim=True)
        inputs = torch.cat([place.states, torch.ones(len(values), 1, dtype=torch.float64)], dim=1)
        folds = self.items.folds(_INNER_FOLDS, self.fit.seed)
        found = {ridge: torch.zeros_like(values) for ridge in _RIDGES}
        for fold in range(_INNER_FOLDS):
            known, new = rows & (folds != fold), rows & (folds == fold)
            weighted = inputs[known] * weights[known, None]
            square, target = weighted.T @ inputs[known], weighted.T @ values[known]
            for ridge, logits in found.items():
                eye = torch.eye(len(square), dtype=torch.float64) * ridge * weights[known].sum()
                logits[new] = inputs[new] @ torch.linalg.solve(square + eye, target)
        return max(self._value(logits, rows) for logits in found.values())

    def _crossed(self, place: Place, penalty: float, rows: torch.Tensor, count: int) -> torch.Tensor:
        """Logits [items, experts] of the rows, each by a gate that was fitted without its fold; zeros elsewhere."""
        import torch

        folds = self.items.folds(count, self.fit.seed + 1)
        logits = torch.zeros(len(rows), len(self.items.experts), dtype=torch.float64)
        for fold in range(count):
            new = rows & (folds == fold)
            logits[new] = self._fitted(place, penalty, rows & (folds != fold)).logits(place.states[new])
        return logits

    def _fitted(self, place: Place, penalty: float, rows: torch.Tensor) -> Fitted:
        values, weights = self.items.values(), self.items.weights()
        return fit_gate(place.states[rows], values[rows], weights[rows], with_penalty(self.fit, penalty))

    def _value(self, logits: torch.Tensor, rows: torch.Tensor) -> float:
        """Weighted mean value of the experts with the largest logits."""
        values, weights = self.items.values(), self.items.weights()
        chosen = values.gather(1, logits.argmax(dim=1, keepdim=True)).squeeze(1)
        return float((chosen * weights)[rows].sum() / weights[rows].sum())
