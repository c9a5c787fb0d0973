"""The expression of a mixture below model level: one `Checkpoint` with shared parts, experts and routers; nothing is read yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from modelglue.checkpoint import Checkpoint, JoinedCheckpoint, RenamedCheckpoint, SideFile, TensorsCheckpoint
from modelglue.errors import UserError
from modelglue.mixture.gates import Gate, LinearGate, MlpGate
from modelglue.mixture.levels.members import Member, members
from modelglue.mixture.levels.requirements import POSITIONS, Level, require
from modelglue.models import check_fit
from modelglue.models.mixture_code import MODEL_TYPE, source_files
from modelglue.models.mixture_code.configuration_mixture import FORMAT

Routing = Literal["token", "sample"]


@dataclass(frozen=True)
class LevelSpec:
    """How experts are joined inside one model. Raises UserError for settings that no mixture has."""

    level: Level
    routing: Routing
    top_k: int = 1
    merged_layers: int = 0
    """The lowest layers that are no experts but the merged model's."""
    temperature: float = 1.0
    route_span: str = "prompt"
    compat: Literal["none", "official"] = "none"
    """`official`: pool over pads too, route every call anew, keep no cache, as the research code of Model-GLUE does."""

    def __post_init__(self) -> None:
        if self.routing == "token" and self.level != "ffn":
            raise UserError(f"mixture: routing is token at the level {self.level}; allowed is sample, or level: ffn.")
        if self.top_k < 1:
            raise UserError(f"mixture: top_k is {self.top_k}; allowed are whole numbers from 1.")


def join(
    experts: Mapping[str, Checkpoint],
    shared: Checkpoint,
    gates: Mapping[int, Gate],
    spec: LevelSpec,
    *,
    merged: Checkpoint | None = None,
    description: Mapping[str, Any] | None = None,
    donors: Sequence[Checkpoint] = (),
) -> Checkpoint:
    """The mixture as a checkpoint that `save` writes and `load_live` runs; reading a tensor costs what its source costs.

    `shared` gives embedding, final norm, head, config and tokenizer, at the level ffn also attention and norms; `merged` the lowest
    `merged_layers` layers (default: shared). `gates`: for every layer that decides (`deciding_layers`) a gate that reads its states.
    `donors` are models that the gates were made with.

    Raises UserError for experts that do not allow the level (with the level that would work), for top_k above their number, and
    CheckpointError for parts that do not fit the model class.
    """
    base, lower, own = Member("shared", shared), Member("merged", merged or shared), members(experts)
    if len(own) < 2:
        raise UserError(f"a mixture needs at least 2 experts, {len(own)} given.")
    if spec.top_k > len(own):
        raise UserError(f"mixture: top_k is {spec.top_k}, but there are {len(own)} experts; allowed is 1 to {len(own)}.")
    require(spec.level, own, base)
    if not 0 <= spec.merged_layers < base.roles.count:
        raise UserError(
            f"mixture: merged_layers is {spec.merged_layers}; allowed is 0 to {base.roles.count - 1}. "
            "With all layers merged there is no mixture: merge the models."
        )
    if spec.merged_layers:
        require("block", [lower], base)
    _check_gates(gates, spec, base, len(own))
    parts = [_shared_part(base, lower, spec), *_expert_parts(own, base, spec), _routers(gates, base, spec)]
    joined = JoinedCheckpoint(
        [("", part) for part in parts if part.names()], _config(own, base, gates, spec), description,
        files={**shared.files, **_code(base)}, donors=[shared, *experts.values(), *donors],
    )  # fmt: skip
    check_fit(joined)
    return joined


def deciding_layers(spec: LevelSpec, layers: int) -> range:
    """The layers that have a router: at the level model one decides for all."""
    return range(spec.merged_layers, spec.merged_layers + 1 if spec.level == "model" else layers)


def _shared_part(base: Member, lower: Member, spec: LevelSpec) -> Checkpoint:
    """Everything that is no expert's; the lowest layers come from the merged model."""
    names: dict[str, str] = {}
    for live, disk in base.live.items():
        layer, path = _place(live, base)
        if layer is None or (layer >= spec.merged_layers and spec.level == "ffn" and not _within(path, base.feed_forward)):
            names[live] = disk
    upper = RenamedCheckpoint(base.checkpoint, names)
    places = ((live, disk, _place(live, lower)[0]) for live, disk in lower.live.items())
    start = {live: disk for live, disk, layer in places if layer is not None and layer < spec.merged_layers}
    return JoinedCheckpoint([("", upper), ("", RenamedCheckpoint(lower.checkpoint, start))]) if start else upper


def _expert_parts(own: Sequence[Member], base: Member, spec: LevelSpec) -> list[Checkpoint]:
    found: list[Checkpoint] = []
    for number, expert in enumerate(own):
        names = {}
        for layer in range(spec.merged_layers, base.roles.count):
            place = f"{base.roles.layers}.{layer}"
            for path, disk in expert.inside(layer).items():
                if spec.level != "ffn":
                    names[f"{place}.experts.{number}.{path}"] = disk
                elif _within(path, base.feed_forward):
                    names[f"{place}.{base.feed_forward}.experts.{number}{path[len(base.feed_forward) :]}"] = disk
        found.append(RenamedCheckpoint(expert.checkpoint, names))
    return found


def _routers(gates: Mapping[int, Gate], base: Member, spec: LevelSpec) -> Checkpoint:
    inside = f".{base.feed_forward}" if spec.level == "ffn" else ""
    tensors = {}
    for layer, gate in gates.items():
        for name, value in _named(gate).items():
            tensors[f"{base.roles.layers}.{layer}{inside}.router.{name}"] = value.float().contiguous()
    return _Routers(tensors)


class _Routers(TensorsCheckpoint):
    """What was made here comes from no model."""

    def sources(self) -> Sequence[Checkpoint]:
        return ()


def _named(gate: Gate) -> dict[str, Any]:
    if isinstance(gate, LinearGate):
        found = {"weight": gate.weight, "bias": gate.bias}
    else:
        found = {"up_weight": gate.first, "up_bias": gate.first_bias, "down_weight": gate.second, "down_bias": gate.second_bias}
    return {name: value for name, value in found.items() if value is not None}


def _check_gates(gates: Mapping[int, Gate], spec: LevelSpec, base: Member, experts: int) -> None:
    wanted = list(deciding_layers(spec, base.roles.count))
    if sorted(gates) != wanted:
        raise UserError(f"router: gates are for the layers {sorted(gates)}; needed are the layers {wanted}.")
    for layer, gate in gates.items():
        count = len(gate.weight if isinstance(gate, LinearGate) else gate.second)
        if gate.width != base.width or count != experts:
            raise UserError(
                f"router: the gate of layer {layer} is for {count} experts and states of width {gate.width}; "
                f"needed are {experts} experts and width {base.width}."
            )
    kinds = {(type(gate), tuple(_named(gate)), len(gate.first) if isinstance(gate, MlpGate) else 0) for gate in gates.values()}
    if len(kinds) > 1:
        raise UserError("router: the gates of all layers must be of one kind and size.")


def _config(own: Sequence[Member], base: Member, gates: Mapping[int, Gate], spec: LevelSpec) -> dict[str, Any]:
    first = next(iter(gates.values()))
    experts = []
    for expert in own:
        changes = expert.differences(base)
        experts.append({"name": expert.name, "config": changes, "own_positions": any(key in changes for key in POSITIONS)})
    mixture = {
        "format": FORMAT, "backbone": base.class_name, "level": spec.level, "routing": spec.routing, "top_k": spec.top_k,
        "merged_layers": spec.merged_layers, "temperature": spec.temperature, "route_span": spec.route_span, "compat": spec.compat,
        "router_width": len(first.first) if isinstance(first, MlpGate) else None,
        "router_bias": any("bias" in name for name in _named(first)),
        "layers": base.roles.layers, "feed_forward": base.feed_forward if spec.level == "ffn" else None, "experts": experts,
    }  # fmt: skip
    values = {key: value for key, value in base.checkpoint.config.items() if key not in ("model_type", "architectures")}
    head = {"architectures": ["MixtureForCausalLM"], "model_type": MODEL_TYPE}
    auto = {"AutoConfig": "configuration_mixture.MixtureConfig", "AutoModelForCausalLM": "modeling_mixture.MixtureForCausalLM"}
    return {**head, "auto_map": auto, **values, "mixture": mixture}


def _code(base: Member) -> dict[str, SideFile]:
    return dict(source_files(type(base.model)))


def _place(live: str, member: Member) -> tuple[int | None, str]:
    """(decoder layer, path inside it) of a live tensor; (None, its name) for what stands outside the layers."""
    start = f"{member.roles.layers}."
    if not live.startswith(start):
        return None, live
    number, _, path = live[len(start) :].partition(".")
    return int(number), path


def _within(path: str, part: str) -> bool:
    return path.startswith(f"{part}.")
