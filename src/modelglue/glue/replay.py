"""The replayable recipe of a run: representatives, experts and router, with every decision already taken.

`modelglue glue recipe.yaml out/` rebuilds the artefact from it without scoring anything. References are relative to the recipe,
so a run folder and its zoo can move together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from modelglue.checkpoint import open_checkpoint, save, write_bytes_atomic, yaml_text
from modelglue.checkpoint.reference import moved_reference
from modelglue.errors import UserError
from modelglue.glue.bench import Bench, renamed
from modelglue.glue.decide import Representative, references_from
from modelglue.glue.run_folder import RunFolder, open_run
from modelglue.mixture import ExpertSpec, Manifest, RouterSpec, write_mixture
from modelglue.mixture.levels import prepare
from modelglue.mixture.recorded import RecordedRouter
from modelglue.recipe import Document, Recipe, build, canonical, read_recipe

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
    encoder: str | None
    """Like an expert's model; None until it is decided which expert knows the prompts best."""
    gate_mode: Literal["hidden", "hidden_avg", "cheap_embed", "random", "uniform_random", "auto"] = "hidden"
    router_layer: int | Literal["auto"] = 0
    temperature: float = 1.0
    route_span: str = "prompt"
    seed: int = 0
    pack: bool = False
    level: Literal["model", "ffn"] = "model"
    """`model`: complete models behind one router; `ffn`: one model whose feed-forward networks are the experts."""
    routing: Literal["sample", "token"] = "sample"
    merged_layers: int = 0
    learned: RecordedRouter | None = None
    """The router that was learned from scores; then mode, layer and temperature above, and the prompts, are not used."""

    def specs(self, root: Path) -> list[ExpertSpec]:
        """The experts, their references taken from `root`."""
        return [
            ExpertSpec(name=e.name, path=path_of(root, e.model), domain=e.domain, positive=e.positive, negative=e.negative)
            for e in self.experts
        ]

    @property
    def router(self) -> RouterSpec:
        """How the router from prompts is made."""
        return RouterSpec(
            gate_mode=self.gate_mode, router_layer=self.router_layer, temperature=self.temperature,
            route_span=self.route_span, seed=self.seed,
        )  # fmt: skip

    def write(self, root: Path, directory: Path) -> None:
        """Write the mixture folder; references are taken from `root`."""
        if self.level != "model":
            prepare(self._inside(), root).write(directory)
            return
        encoder = None if self.encoder is None else path_of(root, self.encoder)
        trained = None
        if self.learned is not None:
            trained = self.learned.trained(path_of(root, self.learned.encoder), len(self.experts))
        write_mixture(directory, self.specs(root), self.router, encoder=encoder, trained=trained, pack=self.pack)

    def _inside(self) -> dict[str, Any]:
        """What `modelglue mix` is told to make one model of the experts; every layer has a router from the experts' prompts."""
        return {
            "level": self.level, "routing": self.routing, "merged_layers": self.merged_layers,
            "experts": [
                {
                    "model": e.model, "name": e.name, "domain": list(e.domain),
                    "prompts": {"positive": list(e.positive), "negative": list(e.negative)},
                }
                for e in self.experts
            ],
            "router": {"gate_mode": self.gate_mode, "temperature": self.temperature, "route_span": self.route_span, "seed": self.seed},
        }  # fmt: skip

    def places(self) -> list[str]:
        """Every model that the mixture is made of, its encoder included."""
        encoder = self.encoder if self.learned is None else self.learned.encoder
        encoder = encoder if self.level == "model" else None
        return [expert.model for expert in self.experts] + ([encoder] if encoder is not None else [])

    def decided(self, manifest: Manifest | None) -> MixturePlan:
        """The plan with what was left to `auto` as it was decided."""
        if self.learned is not None or manifest is None:
            return self
        encoder = self.encoder
        if encoder is None:
            encoder = self.experts[[expert.reference for expert in manifest.experts].index(manifest.encoder)].model
        return self.model_copy(update={"gate_mode": manifest.gate_mode, "router_layer": manifest.router_layer, "encoder": encoder})

    def moved(self, old: Path, new: Path) -> MixturePlan:
        """The same plan for a run folder elsewhere: what stands inside the run stays, what stands outside is found from there."""
        experts = tuple(e.model_copy(update={"model": _seen_from(e.model, old, new)}) for e in self.experts)
        learned = self.learned and self.learned.model_copy(update={"encoder": _seen_from(self.learned.encoder, old, new)})
        encoder = self.encoder and _seen_from(self.encoder, old, new)
        return self.model_copy(update={"experts": experts, "encoder": encoder, "learned": learned})


class ReplayBody(Planned):
    """What to rebuild, and what came out of it."""

    representatives: dict[str, Recipe]
    mixture: MixturePlan | None = None
    contents: dict[str, str]
    """Reference of every model of the zoo that is needed -> what it was then (SHA-256)."""
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
    references = references_from(bench, run.root)
    written = [r for r in representatives if bench.is_written(r.candidate)]
    needed = {references[alias] for r in written for alias in r.candidate.members}
    needed |= {place for place in (plan.places() if plan is not None else []) if not _inside(place)}
    value = {
        "format": "modelglue/1",
        "replay": {
            "representatives": {r.name: canonical(bench.recipe_of(r.candidate, references)) for r in written},
            "mixture": plan.model_dump(mode="json") if plan is not None else None,
            "contents": {name: bench.checkpoints[alias].identity for alias, name in references.items() if name in needed},
            "outcome": dict(outcome),
        },
    }
    write_bytes_atomic(run.path(RECIPE), yaml_text(value).encode())


def rebuild(replay: Replay, folder: Path, root: Path, *, overwrite: bool, workers: int | None) -> dict[str, Any]:
    """Write representatives and mixture again, in a new folder, scoring nothing.

    UserError if a model of the zoo is not what it was when the recipe was written: the result would silently be another.
    """
    body = replay.replay
    key = hashlib.sha256(json.dumps(replay.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
    models = {name: open_checkpoint(name, relative_to=folder) for name in body.contents}
    for name, checkpoint in models.items():
        if checkpoint.identity != body.contents[name]:
            raise UserError(
                f"'{name}': is not the model that the recipe was made with "
                f"({checkpoint.identity[:12]} instead of {body.contents[name][:12]}). Restore it, or run the glue file again."
            )
    with open_run(root, key, overwrite=overwrite) as run:
        target = run.path("representatives")
        target.mkdir(exist_ok=True)
        for name, recipe in body.representatives.items():
            if not (target / name).is_dir():
                places = {_seen_from(reference, folder, target / name): checkpoint for reference, checkpoint in models.items()}
                opened = {place: renamed(checkpoint, place) for place, checkpoint in places.items()}
                save(build(_moved(recipe, folder, target / name), resolve=opened.__getitem__), target / name, workers=workers)
        if body.mixture is not None and not run.path("mixture").is_dir():
            body.mixture.moved(folder, root).write(root, run.path("mixture"))
        run.finish()
    return dict(body.outcome)


def _moved(recipe: Recipe, old: Path, new: Path) -> Recipe:
    """The recipe as it reads from the folder `new`."""
    value = canonical(recipe)
    for entry in value["models"]:
        entry["model"] = _seen_from(entry["model"], old, new)
    return read_recipe(value)


def _inside(reference: str) -> bool:
    """Whether a reference of a recipe.yaml is to something that the run itself has made."""
    return reference.startswith("representatives/")


def path_of(folder: Path, reference: str) -> Path:
    """What a reference of the recipe.yaml in `folder` means: a path from there, or a hub id."""
    local = folder / reference
    return local if _inside(reference) or reference.startswith(".") or local.exists() else Path(reference)


def _seen_from(reference: str, old: Path, new: Path) -> str:
    """A reference of the recipe.yaml in the folder `old` as it reads in the folder `new`."""
    return reference if _inside(reference) else moved_reference(reference, old, new)
