"""What searches want to know beforehand: layers, similarities, kinship, item parameters. Weights are read only where they are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from modelglue.checkpoint import Checkpoint
from modelglue.errors import CheckpointError, UserError
from modelglue.evaluation import TaskSet
from modelglue.recipe.layers import Tower, towers_of
from modelglue.search.heuristics import SimilarityTo
from modelglue.search.kinship_greedy import KinshipOf
from modelglue.search.settings import Facts, SearchSettings
from modelglue.studies.item_facts import item_facts
from modelglue.zoo import similarity
from modelglue.zoo.kinship import kinship


def facts_of(settings: SearchSettings, checkpoints: Mapping[str, Checkpoint], tasks: TaskSet, folder: Path) -> Facts:
    """Layers from headers; similarities and kinship of the members by one pass over their weights, if the searcher uses them.

    What is known of the items of `tasks`, which are searched on, stands in files that the fitness names, seen from `folder`.
    """
    name, options = settings.searcher.name, settings.searcher.options
    towers = {alias: _tower(checkpoints[alias]) for alias in settings.members}
    depths = {alias: tower.count for alias, tower in towers.items() if tower is not None}
    same = len(depths) == len(settings.members) and len(set(depths.values())) == 1
    first = towers[settings.members[0]]
    finely = settings.space.granularity != "model" or settings.space.genome is not None
    if finely and not same:
        found = ", ".join(f"{alias} {depths.get(alias, 'no single stack')}" for alias in settings.members)
        raise UserError(f"granularity {settings.space.granularity} needs models with equally many layers; found: {found}.")
    needs_kinship = name == "kinship_greedy" and settings.base is not None
    if name == "kinship_greedy" and settings.base is None and options.get("explore", True):
        raise UserError(
            "searcher kinship_greedy: exploring needs a base, which kinship is measured from. Give zoo.base, or explore: false."
        )
    items, responses = item_facts(settings.fitness, tasks, folder)
    return Facts(
        layers=next(iter(depths.values())) if same else None,
        marker=f"{first.stack}." if first is not None else "layers.",
        depths=depths,
        similarity_to=_similarity(settings.members, checkpoints) if name.startswith("similarity") or name == "all" else None,
        kinship=_kinship(settings.members, str(settings.base), checkpoints) if needs_kinship else None,
        items=items,
        responses=responses,
    )


def _tower(checkpoint: Checkpoint) -> Tower | None:
    try:
        towers = towers_of(checkpoint.names(), checkpoint.config)
    except CheckpointError:
        return None
    return towers[0] if len(towers) == 1 and towers[0].stack is not None else None


def _similarity(members: Sequence[str], checkpoints: Mapping[str, Checkpoint]) -> SimilarityTo:
    found = similarity([checkpoints[alias] for alias in members], labels=list(members), keep_gram=True)
    places = {alias: number for number, alias in enumerate(members)}

    def to_merge(weights: Mapping[str, float], other: str) -> float:
        return found.to_merge({places[alias]: weight for alias, weight in weights.items()}, places[other])

    return to_merge


def _kinship(members: Sequence[str], base: str, checkpoints: Mapping[str, Checkpoint]) -> KinshipOf:
    """Pearson correlation of the changes of two linear merges, from the inner products of the members' changes."""
    sums = kinship(checkpoints[base], [checkpoints[alias] for alias in members], labels=list(members)).sums
    total = sums.total.sum(axis=0)
    centred = sums.product.sum(axis=0) - np.outer(total, total) / sums.count.sum()

    def of(one: Mapping[str, float], other: Mapping[str, float]) -> float:
        a, b = (np.array([weights.get(alias, 0.0) for alias in members]) for weights in (one, other))
        squares = float(a @ centred @ a) * float(b @ centred @ b)
        return float(a @ centred @ b) / squares**0.5 if squares > 0 else float("nan")

    return of
