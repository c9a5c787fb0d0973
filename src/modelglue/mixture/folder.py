"""The mixture directory: mixture.json, router.safetensors, and experts by reference or packed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modelglue.checkpoint import (
    Checkpoint,
    DiskCheckpoint,
    SafetensorsCheckpoint,
    TensorsCheckpoint,
    json_bytes,
    open_checkpoint,
    staged,
    tensor_file,
)
from modelglue.checkpoint.output.staging import check_apart, check_free
from modelglue.checkpoint.output.writer import RECIPE_FILE
from modelglue.checkpoint.reference import seen_from
from modelglue.errors import CheckpointError, UserError
from modelglue.mixture.blend import check_same_tokens
from modelglue.mixture.deltas import DeltaStore, store_experts
from modelglue.mixture.gates import Gate, GateKind, gate_from
from modelglue.mixture.prompted import prompt_router
from modelglue.mixture.spec import EXPERT_NAME, ROUTE_SPAN, ExpertSpec, MadeFrom, RouterSpec
from modelglue.mixture.trained import TrainedRouter, Training
from modelglue.models import check_fit, has_tokenizer

MANIFEST = "mixture.json"
ROUTER = "router.safetensors"
ENCODER = "encoder"
#: endings of the files that make a model
_MODEL_FILES = (".safetensors", ".json", ".model", ".txt", ".jinja", ".md", ".yaml")


class Prompts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    positive: tuple[str, ...]
    negative: tuple[str, ...] = ()


class Expert(BaseModel):
    """One expert as the manifest knows it; `reference` is relative to the mixture directory, or a hub id."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=f"^{EXPERT_NAME}$")]
    reference: str
    identity: str
    architecture: str | None
    domain: tuple[str, ...] = ()
    prompts: Prompts


class Manifest(BaseModel):
    """mixture.json. Level, routing and top_k are written out so that later levels can be told apart."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["modelglue-mixture/1"] = "modelglue-mixture/1"
    level: Literal["model"] = "model"
    routing: Literal["sample"] = "sample"
    top_k: Annotated[int, Field(ge=1)] = 1
    combine: Literal["probabilities", "logits"] = "probabilities"
    """What is mixed of the experts' next tokens at a top_k above 1."""
    router: GateKind = "linear"
    gate_mode: MadeFrom
    """What the gate was made from: prompts, chance, or the experts' scores."""
    training: Training | None = None
    """How a router from scores was found."""
    router_layer: Annotated[int, Field(ge=0)]
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    route_span: Annotated[str, Field(pattern=f"^({ROUTE_SPAN})$")]
    encoder: str
    encoder_identity: str
    experts: Annotated[tuple[Expert, ...], Field(min_length=2)]

    def specs(self, directory: Path) -> list[ExpertSpec]:
        return [
            ExpertSpec(expert.name, directory / expert.reference, expert.prompts.positive, expert.prompts.negative, expert.domain)
            for expert in self.experts
        ]


def is_mixture(path: str | Path) -> bool:
    """Whether a path is a mixture directory; says nothing about whether it is a sound one."""
    return (Path(path) / MANIFEST).is_file()


def write_mixture(
    directory: str | Path,
    experts: Sequence[ExpertSpec],
    router: RouterSpec,
    *,
    encoder: Path | None,
    trained: TrainedRouter | None = None,
    pack: bool = False,
    store: DeltaStore | None = None,
    recipe: str | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Make a mixture directory. The gate is built from the experts' prompts through `encoder`; None: the expert that does best.

    With a `trained` router its gate, encoder, layer and temperature are used, and no prompts are needed. `recipe` is a file that makes
    the folder again, and is put into it.

    Reads every expert once to hash it (remembered), and runs a few dozen short prompts through the encoder. With `pack` experts
    and encoder are copied into the folder. With `store` they are kept there as differences to their family's average, and the gate is
    built through what comes back. Raises UserError for experts that cannot be one, for prompts that no router can use, and for a folder
    that is, holds or lies in a model that is read.
    """
    directory = Path(directory)
    check_free(directory, overwrite)
    opened = _open_experts(directory, experts)
    _check_apart(directory, experts, opened, encoder if trained is None else trained.encoder)
    if router.top_k > len(experts):
        raise UserError(
            f"{directory}: top_k is {router.top_k}, but there are {len(experts)} experts. Give more experts, or a smaller top_k."
        )
    if router.top_k > 1:
        check_same_tokens({expert.name: checkpoint for expert, checkpoint in zip(experts, opened, strict=True)})
    names, identities = [expert.name for expert in experts], [checkpoint.identity for checkpoint in opened]
    if store is not None:
        return _write_stored(directory, experts, opened, router, encoder, trained, store, recipe, overwrite)
    decided = _decide(experts, router, encoder, trained)
    read = open_checkpoint(decided.encoder)
    settings = [
        names, identities, read.identity, decided.mode, decided.layer, decided.temperature, router.route_span,
        router.top_k, router.combine,
        {name: value.tolist() for name, value in decided.gate.tensors().items()}, pack, recipe,
    ]  # fmt: skip
    with staged(directory, key=_key(settings), overwrite=overwrite) as folder:
        if pack:
            _pack(folder, experts, opened, decided.encoder, read)
        places = [f"experts/{expert.name}" if pack else seen_from(directory, expert.path) for expert in experts]
        place = _place_of_encoder(directory, decided.encoder, experts, places, pack)
        return _write_manifest(folder, experts, opened, places, identities, router, decided, (place, read.identity), recipe)


def _write_stored(
    directory: Path, experts: Sequence[ExpertSpec], opened: Sequence[Checkpoint], router: RouterSpec, encoder: Path | None,
    trained: TrainedRouter | None, store: DeltaStore, recipe: str | None, overwrite: bool,
) -> Manifest:  # fmt: skip
    """The same with the experts as differences. A trained router keeps the encoder that it was fitted through, whole."""
    by_name = {expert.name: checkpoint for expert, checkpoint in zip(experts, opened, strict=True)}
    given = encoder if trained is None else trained.encoder
    settings = [
        store.model_dump(mode="json"), list(by_name), [checkpoint.identity for checkpoint in opened],
        repr(router), [(expert.positive, expert.negative) for expert in experts],
        None if given is None else open_checkpoint(given).identity,
        None if trained is None else {name: value.tolist() for name, value in trained.gate.tensors().items()},
        recipe,
    ]  # fmt: skip
    key = _key(settings)
    with staged(directory, key=key, overwrite=overwrite) as folder:
        kept = store_experts(folder, by_name, store, key=key).experts
        places = [one.reference for one in kept]
        restored = [open_checkpoint(place, relative_to=folder) for place in places]
        paths = [Path("+".join(str(folder / half) for half in place.split("+"))) for place in places]
        within = [replace(expert, path=path) for expert, path in zip(experts, paths, strict=True)]
        if trained is None and encoder is not None:
            encoder = next((path for expert, path in zip(experts, paths, strict=True) if _same(expert.path, encoder)), encoder)
        decided = _decide(within, router, encoder, trained)
        read = open_checkpoint(decided.encoder)
        place = next((place for place, path in zip(places, paths, strict=True) if path == decided.encoder), ENCODER)
        if place == ENCODER:
            _copy(read, folder / ENCODER)
        identities = [checkpoint.identity for checkpoint in restored]
        return _write_manifest(folder, experts, restored, places, identities, router, decided, (place, read.identity), recipe)


@dataclass(frozen=True)
class _Decided:
    """The gate, and what it goes with."""

    encoder: Path
    layer: int
    mode: str
    gate: Gate
    temperature: float
    training: Training | None


def _decide(experts: Sequence[ExpertSpec], router: RouterSpec, encoder: Path | None, trained: TrainedRouter | None) -> _Decided:
    if trained is not None:
        return _Decided(trained.encoder, trained.layer, "scores", trained.gate, trained.temperature, trained.training)
    made = prompt_router(experts, router, encoder)
    return _Decided(made.encoder, made.layer, made.mode, made.gate, router.temperature, None)


def _key(settings: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _write_manifest(
    folder: Path, experts: Sequence[ExpertSpec], opened: Sequence[Checkpoint], places: Sequence[str], identities: Sequence[str],
    router: RouterSpec, decided: _Decided, encoder: tuple[str, str], recipe: str | None,
) -> Manifest:  # fmt: skip
    """`encoder`: its place and its identity."""
    manifest = Manifest.model_validate(
        {
            "router": decided.gate.kind,
            "gate_mode": decided.mode,
            "training": decided.training.model_dump() if decided.training is not None else None,
            "router_layer": decided.layer,
            "temperature": decided.temperature,
            "top_k": router.top_k,
            "combine": router.combine,
            "route_span": router.route_span,
            "encoder": encoder[0],
            "encoder_identity": encoder[1],
            "experts": [
                {
                    "name": expert.name,
                    "reference": place,
                    "identity": identity,
                    "domain": expert.domain,
                    "architecture": next(iter(checkpoint.config.get("architectures") or []), None),
                    "prompts": {"positive": expert.positive, "negative": expert.negative},
                }
                for expert, checkpoint, identity, place in zip(experts, opened, identities, places, strict=True)
            ],
        }
    )
    (folder / ROUTER).write_bytes(tensor_file(TensorsCheckpoint(decided.gate.tensors())))
    if recipe is not None:
        (folder / RECIPE_FILE).write_text(recipe, encoding="utf-8")
    (folder / MANIFEST).write_bytes(json_bytes(manifest.model_dump(mode="json")))
    return manifest


def _open_experts(directory: Path, experts: Sequence[ExpertSpec]) -> list[Checkpoint]:
    """The experts' checkpoints; all that can be refused before anything is read is refused here."""
    if len(experts) < 2:
        raise UserError(f"{directory}: a mixture needs at least 2 experts, {len(experts)} given.")
    names = [expert.name for expert in experts]
    if len(set(names)) != len(names):
        raise UserError(f"{directory}: experts must have different names, got {', '.join(names)}.")
    opened = [open_checkpoint(expert.path) for expert in experts]
    for expert, checkpoint in zip(experts, opened, strict=True):
        if not has_tokenizer(checkpoint):
            raise UserError(
                f"expert '{expert.name}' ({expert.path}) has no tokenizer; at model level every expert needs its own. "
                "Put its tokenizer.json into the folder."
            )
        check_fit(checkpoint)
    return opened


def _check_apart(directory: Path, experts: Sequence[ExpertSpec], opened: Sequence[Checkpoint], encoder: Path | None) -> None:
    """UserError for a folder that is, holds or lies in one that is read: with `overwrite` it would be replaced."""
    inputs = [(expert.name, checkpoint) for expert, checkpoint in zip(experts, opened, strict=True)]
    if encoder is not None:
        inputs.append(("encoder", open_checkpoint(encoder)))
    check_apart(directory, [(name, place) for name, one in inputs for source in one.sources() for place in source.places])


def _pack(folder: Path, experts: Sequence[ExpertSpec], opened: Sequence[Checkpoint], encoder: Path, read: Checkpoint) -> None:
    """Copy the files that make each model; links (the hub's cache is made of them) become files."""
    sources = {f"experts/{expert.name}": checkpoint for expert, checkpoint in zip(experts, opened, strict=True)}
    if not any(_same(expert.path, encoder) for expert in experts):
        sources[ENCODER] = read
    for place, checkpoint in sources.items():
        _copy(checkpoint, folder / place)


def _copy(checkpoint: Checkpoint, target: Path) -> None:
    assert isinstance(checkpoint, DiskCheckpoint)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in sorted(checkpoint.path.iterdir()):
        wanted = path.name.endswith(_MODEL_FILES) or path.name == "LICENSE" or path in checkpoint.shards
        if wanted and path.is_file() and not path.name.startswith("."):
            shutil.copyfile(path, target / path.name)


def _same(first: Path, second: Path) -> bool:
    return first.resolve() == second.resolve()


def _place_of_encoder(directory: Path, encoder: Path, experts: Sequence[ExpertSpec], places: Sequence[str], pack: bool) -> str:
    for expert, place in zip(experts, places, strict=True):
        if _same(expert.path, encoder):
            return place
    return ENCODER if pack else seen_from(directory, encoder)


def read_manifest(directory: Path) -> tuple[Manifest, Gate]:
    """The manifest and the gate of a mixture directory, checked against each other."""
    path = directory / MANIFEST
    try:
        value: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        manifest = Manifest.model_validate(value)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Give the folder of a mixture.") from error
    except ValueError as error:  # not UTF-8, not JSON, or not our keys and values
        raise CheckpointError(f"{path}: is not a mixture of this format ({_faults(error)}). Make the mixture again.") from error
    if manifest.top_k > len(manifest.experts):
        raise CheckpointError(f"{path}: top_k is {manifest.top_k}, but there are {len(manifest.experts)} experts. Make the mixture again.")
    router = SafetensorsCheckpoint(directory / ROUTER)
    tensors = {name: router.tensor(name).clone() for name in router.names()}
    gate = gate_from(manifest.router, tensors, len(manifest.experts), str(directory / ROUTER))
    return manifest, gate


def _faults(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(f"{'.'.join(map(str, fault['loc'])) or 'file'}: {fault['msg']}" for fault in error.errors())
