"""The replayable recipe of a run: representatives, experts and router, with every decision already taken.

`modelglue glue recipe.yaml out/` rebuilds the artefact from it without scoring anything. References are relative to the recipe,
so a run folder and its zoo can move together.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from modelglue.checkpoint import save, write_bytes_atomic, yaml_text
from modelglue.glue.run_folder import RunFolder, open_run
from modelglue.mixture import ExpertSpec, Manifest, RouterSpec, write_mixture
from modelglue.recipe import Document, Recipe, build, canonical, read_recipe

if TYPE_CHECKING:
    from modelglue.glue.bench import Bench
    from modelglue.glue.decide import Representative

RECIPE = "recipe.yaml"


class Planned(BaseModel):
    """Frozen, and unknown keys are errors, as everywhere."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PlannedExpert(Planned):
    """One expert: its weights (relative to the run folder), and the prompts that its gate row is made from."""

    name: str
    model: str
    domain: tuple[str, ...] = ()
    positive: tuple[str, ...]
    negative: tuple[str, ...] = ()


class MixturePlan(Planned):
    """All that a mixture folder is a function of, besides the weights."""

    experts: tuple[PlannedExpert, ...]
    encoder: str
    gate_mode: Literal["hidden", "hidden_avg", "cheap_embed", "random", "uniform_random", "auto"] = "hidden"
    router_layer: int | Literal["auto"] = 0
    temperature: float = 1.0
    route_span: str = "prompt"
    seed: int = 0
    pack: bool = False

    def write(self, root: Path, directory: Path) -> None:
        """Write the mixture folder; references are taken from `root`."""
        experts = [
            ExpertSpec(name=e.name, path=root / e.model, domain=e.domain, positive=e.positive, negative=e.negative) for e in self.experts
        ]
        router = RouterSpec(
            gate_mode=self.gate_mode, router_layer=self.router_layer, temperature=self.temperature,
            route_span=self.route_span, seed=self.seed,
        )  # fmt: skip
        write_mixture(directory, experts, router, encoder=root / self.encoder, pack=self.pack)

    def decided(self, manifest: Manifest) -> MixturePlan:
        """The plan with what was left to `auto` as it was decided."""
        return self.model_copy(update={"gate_mode": manifest.gate_mode, "router_layer": manifest.router_layer})

    def moved(self, old: Path, new: Path) -> MixturePlan:
        """The same plan for a run folder elsewhere: what stands inside the run stays, what stands outside is found from there."""

        def move(reference: str) -> str:
            inside = reference.startswith("representatives/")
            return reference if inside else os.path.relpath((old / reference).resolve(), new.resolve())

        experts = tuple(e.model_copy(update={"model": move(e.model)}) for e in self.experts)
        return self.model_copy(update={"experts": experts, "encoder": move(self.encoder)})


class ReplayBody(Planned):
    """What to rebuild, and what came out of it."""

    representatives: dict[str, Recipe]
    mixture: MixturePlan | None = None
    outcome: dict[str, Any]


class Replay(Planned):
    """A run's recipe.yaml."""

    format: Literal["modelglue/1"]
    replay: ReplayBody


def is_replay(document: Document) -> bool:
    return isinstance(document.value, dict) and "replay" in document.value


def write_replay(
    run: RunFolder, bench: Bench, representatives: Sequence[Representative], plan: MixturePlan | None, outcome: Mapping[str, Any]
) -> None:
    """recipe.yaml, written last: with it the run can be rebuilt."""
    from modelglue.glue.decide import references_from

    references = references_from(bench, run.root)
    value = {
        "format": "modelglue/1",
        "replay": {
            "representatives": {r.name: canonical(bench.recipe_of(r.candidate, references)) for r in representatives if r.is_merge},
            "mixture": plan.model_dump(mode="json") if plan is not None else None,
            "outcome": dict(outcome),
        },
    }
    write_bytes_atomic(run.path(RECIPE), yaml_text(value).encode())


def rebuild(replay: Replay, folder: Path, root: Path, *, overwrite: bool, workers: int | None) -> dict[str, Any]:
    """Write representatives and mixture again, in a new folder, scoring nothing."""
    key = hashlib.sha256(json.dumps(replay.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
    with open_run(root, key, overwrite=overwrite) as run:
        target = run.path("representatives")
        target.mkdir(exist_ok=True)
        for name, recipe in replay.replay.representatives.items():
            if not (target / name).is_dir():
                moved = _moved(recipe, folder, target)
                save(build(moved, relative_to=target), target / name, workers=workers)
        plan = replay.replay.mixture
        if plan is not None and not run.path("mixture").is_dir():
            plan.moved(folder, root).write(root, run.path("mixture"))
        run.finish()
    return dict(replay.replay.outcome)


def _moved(recipe: Recipe, old: Path, new: Path) -> Recipe:
    """The recipe as it reads from the folder `new`."""
    value = canonical(recipe)
    for entry in value["models"]:
        local = old / entry["model"]
        if local.exists():
            entry["model"] = os.path.relpath(local.resolve(), new.resolve())
    return read_recipe(value)
