"""The mixture directory: mixture.json, router.safetensors, and experts by reference or packed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from modelglue.checkpoint import SafetensorsCheckpoint, TensorsCheckpoint, json_bytes, open_checkpoint, staged, tensor_file
from modelglue.errors import CheckpointError, UserError
from modelglue.mixture.router import Reader, build_gate
from modelglue.mixture.spec import ExpertSpec, GateMode, RouterSpec
from modelglue.models import load_live, load_tokenizer

if TYPE_CHECKING:
    import torch

FORMAT = "modelglue-mixture/1"
MANIFEST = "mixture.json"
ROUTER = "router.safetensors"


class Prompts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    positive: tuple[str, ...]
    negative: tuple[str, ...] = ()


class Expert(BaseModel):
    """One expert as the manifest knows it; `reference` is relative to the mixture directory, or a hub id."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    reference: str
    identity: str
    architecture: str | None
    domain: tuple[str, ...] = ()
    prompts: Prompts


class Manifest(BaseModel):
    """mixture.json. Level, routing and top_k are written out so that later levels can be told apart."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["modelglue-mixture/1"] = FORMAT
    level: Literal["model"] = "model"
    routing: Literal["sample"] = "sample"
    top_k: Literal[1] = 1
    router: Literal["linear"] = "linear"
    gate_mode: GateMode
    router_layer: int
    temperature: float
    route_span: str
    encoder: str
    encoder_identity: str
    experts: tuple[Expert, ...]

    def identities(self) -> dict[str, str]:
        """Reference -> identity of everything that must not have changed."""
        return {self.encoder: self.encoder_identity, **{expert.reference: expert.identity for expert in self.experts}}

    def specs(self, directory: Path) -> list[ExpertSpec]:
        return [
            ExpertSpec(expert.name, directory / expert.reference, expert.prompts.positive, expert.prompts.negative, expert.domain)
            for expert in self.experts
        ]


def write_mixture(
    directory: str | Path,
    experts: Sequence[ExpertSpec],
    router: RouterSpec,
    *,
    encoder: Path,
    pack: bool = False,
    overwrite: bool = False,
) -> Manifest:
    """Make a mixture directory. The gate is built from the experts' prompts through `encoder`.

    Reads every expert once to hash it (remembered), and runs a few dozen short prompts through the encoder. With `pack` the experts
    are copied into the folder. Raises UserError for experts that cannot be one, or prompts that no router can use.
    """
    directory = Path(directory)
    if len(experts) < 2:
        raise UserError(f"{directory}: a mixture needs at least 2 experts, {len(experts)} given.")
    names = [expert.name for expert in experts]
    if len(set(names)) != len(names):
        raise UserError(f"{directory}: experts must have different names, got {', '.join(names)}.")
    opened = [open_checkpoint(expert.path) for expert in experts]
    for expert, checkpoint in zip(experts, opened, strict=True):
        if not ({"tokenizer.json", "tokenizer.model", "vocab.json"} & set(checkpoint.files)):
            raise UserError(f"expert '{expert.name}' ({expert.path}) has no tokenizer; at model level every expert needs its own.")
    read = open_checkpoint(encoder)
    reader = Reader(load_live(read), load_tokenizer(read), router.router_layer)
    gate, mode = build_gate(reader, experts, router)
    identities = [checkpoint.identity for checkpoint in opened]
    settings = [names, identities, read.identity, mode, router.router_layer, router.temperature, router.route_span, gate.tolist(), pack]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    with staged(directory, key=key, overwrite=overwrite) as folder:
        places = _places(directory, folder, experts, pack)
        manifest = Manifest(
            gate_mode=mode,  # type: ignore[arg-type]
            router_layer=router.router_layer,
            temperature=router.temperature,
            route_span=router.route_span,
            encoder=_place_of_encoder(directory, encoder, experts, places),
            encoder_identity=read.identity,
            experts=tuple(
                Expert(
                    name=expert.name, reference=place, identity=identity, domain=expert.domain,
                    architecture=next(iter(checkpoint.config.get("architectures") or []), None),
                    prompts=Prompts(positive=expert.positive, negative=expert.negative),
                )
                for expert, checkpoint, identity, place in zip(experts, opened, identities, places, strict=True)
            ),
        )  # fmt: skip
        (folder / ROUTER).write_bytes(tensor_file(TensorsCheckpoint({"gate": gate})))
        (folder / MANIFEST).write_bytes(json_bytes(manifest.model_dump(mode="json")))
    return manifest


def _places(directory: Path, folder: Path, experts: Sequence[ExpertSpec], pack: bool) -> list[str]:
    """Where the experts stand, as seen from the mixture directory; packed ones are copied first."""
    if not pack:
        return [os.path.relpath(expert.path.resolve(), directory.resolve()) for expert in experts]
    for expert in experts:
        target = folder / "experts" / expert.name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(expert.path, target)
    return [f"experts/{expert.name}" for expert in experts]


def _place_of_encoder(directory: Path, encoder: Path, experts: Sequence[ExpertSpec], places: Sequence[str]) -> str:
    for expert, place in zip(experts, places, strict=True):
        if expert.path.resolve() == encoder.resolve():
            return place
    return os.path.relpath(encoder.resolve(), directory.resolve())


def read_manifest(directory: Path) -> tuple[Manifest, torch.Tensor]:
    """The manifest and the gate [experts, d] of a mixture directory, checked against each other."""
    path = directory / MANIFEST
    try:
        value: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        manifest = Manifest.model_validate(value)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Give the folder of a mixture.") from error
    except (ValueError, ValidationError) as error:
        raise CheckpointError(f"{path}: is not a mixture of format {FORMAT} ({error}). Make the mixture again.") from error
    router = SafetensorsCheckpoint(directory / ROUTER)
    info = router.info("gate")
    if len(info.shape) != 2 or info.shape[0] != len(manifest.experts) or info.dtype != "F32":
        raise CheckpointError(
            f"{directory / ROUTER}: gate is {info.dtype} {list(info.shape)}, allowed is F32 [{len(manifest.experts)}, d]."
        )
    return manifest, router.tensor("gate").clone()
