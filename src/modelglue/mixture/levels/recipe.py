"""The file that `modelglue mix` reads: experts, the level at which they are joined, and the router."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from modelglue.errors import RecipeError, UserError
from modelglue.mixture.deltas import DeltaStore
from modelglue.mixture.gates import GateKind
from modelglue.mixture.levels.from_zoo import from_zoo
from modelglue.mixture.recorded import RecordedGates, RecordedRouter
from modelglue.mixture.router import WITHOUT_PROMPTS
from modelglue.mixture.spec import EXPERT_NAME, ROUTE_SPAN, GateMode, domain_prompts, read_prompts
from modelglue.mixture.trained import Objective
from modelglue.recipe import FORMAT, Document, Recipe, canonical, load_document, validate
from modelglue.recipe.schema import Format, Input


class _Part(BaseModel):
    """Frozen; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class MixPrompts(_Part):
    """Texts that an expert's gate row is made from; the negative ones are subtracted."""

    positive: list[str] = []
    negative: list[str] = []


class MixExpert(_Part):
    """One expert: a model on disk or the hub, or a merge."""

    model: Input
    name: Annotated[str, Field(pattern=f"^{EXPERT_NAME}$")]
    """Default: the last part of the reference."""
    domain: list[str] = []
    """Tags; they stand for default prompts where the expert has none of its own."""
    prompts: MixPrompts = MixPrompts()
    prompts_from: str | None = None
    """A file with one positive prompt on every line, relative to this file."""

    @model_validator(mode="before")
    @classmethod
    def _default_name(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and "name" not in value and isinstance(value.get("model"), str):
            return {**value, "name": value["model"].rstrip("/").rpartition("/")[2].partition("@")[0]}
        return value


class MixRouter(_Part):
    """The router: learned from the experts' scores on some tasks, from prompts, or by chance."""

    source: Literal["auto", "scores", "prompts"] = "auto"
    """`auto`: learned from scores where there are `tasks`, if that beats the prompts by more than chance; else from prompts."""
    tasks: list[str] = []
    """Tasks on whose items every expert is scored, or has been."""
    include: str | None = None
    """Folder with task YAML files, relative to this file."""
    store: str | None = None
    """Where scores are kept, relative to this file: the store of a search or an evaluation, or a file that is made."""
    kind: GateKind = "linear"
    """`mlp` has one hidden layer, and has to be learned."""
    objective: Objective = "best"
    """What is learned: which expert is best on an item, or the least expected loss."""
    hidden: Annotated[int, Field(ge=1, le=4096)] = 64
    """Hidden units of an mlp."""
    learned: RecordedRouter | None = None
    """What was learned for complete models: written into the recipe of a mixture, so that it can be made again without scores."""
    layer_gates: RecordedGates | None = None
    """The same for a mixture inside one model."""
    gate_mode: GateMode = "auto"
    router_layer: Annotated[int, Field(ge=0)] | Literal["auto"] | None = None
    """At the level model, for complete models: the layer of the encoder whose states are routed on. Default: auto."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    route_span: Annotated[str, Field(pattern=f"^({ROUTE_SPAN})$")] = "prompt"
    encoder: str | None = None
    """What texts are read through: an expert's name or a reference. Default: the shared model, else the expert that does best."""
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    def from_scores(self) -> bool:
        """Whether a router is to be learned (at the levels that allow it)."""
        return self.source != "prompts" and bool(self.tasks)

    @property
    def recorded(self) -> bool:
        return self.learned is not None or self.layer_gates is not None

    def without_scores(self) -> MixRouter:
        """The same when nothing is left to be learned: what the recipe of the output says."""
        return self.model_copy(update={key: MixRouter.model_fields[key].default for key in _LEARNING} | {"tasks": []})


#: keys that say how a router is learned
_LEARNING = ("source", "tasks", "include", "store", "kind", "objective", "hidden")


class MixRecipe(_Part):
    """A whole file. What is left open (`level: auto`) is decided from the experts, and written out in the output's recipe."""

    format: Format = FORMAT
    level: Literal["auto", "ffn", "block", "model"] = "auto"
    routing: Literal["token", "sample"] | None = None
    """Default: token at the level ffn, sample at the others."""
    top_k: Annotated[int, Field(ge=1)] = 1
    experts: Annotated[list[MixExpert], Field(min_length=2)]
    shared: Input = "merged"
    """What gives embedding, head, norms, and at the level ffn attention: merged, an expert's name, a reference, or a merge."""
    merged: Input | None = None
    """The merge behind `shared: merged` and `merged_layers`; default: the uniform average of the experts."""
    merged_layers: Annotated[int, Field(ge=0)] = 0
    """So many of the lowest layers are the merged model's."""
    share_io: bool = False
    """At the level model: one embedding and head for all, and one decision at the first layer, as the research code has it."""
    combine: Literal["probabilities", "logits"] = "probabilities"
    """What is mixed of complete models at a top_k above 1."""
    pack: bool = False
    """Copy complete models into the output instead of referring to them."""
    store: DeltaStore | None = None
    """Keep complete models of one family in the output as differences to their average."""
    compat: Literal["none", "official"] = "none"
    """`official`: as the research code does it: pads count, every call is routed anew, no cache."""
    export: Literal["auto", "standard", "own"] = "auto"
    """`standard`: a class that transformers has, or an error; `own`: always with modelling code of its own; `auto`: what is possible."""
    router: MixRouter = MixRouter()

    @property
    def inside(self) -> bool:
        """Whether the level is one that makes one model of the experts (auto may turn out either way)."""
        return self.level in ("ffn", "block") or (self.level == "model" and self.share_io)

    def described(self) -> dict[str, Any]:
        """The recipe again, JSON-ready, without what is left at its default."""
        value = self.model_dump(mode="json", exclude_defaults=True, exclude={"experts", "shared", "merged"})
        for key in ("shared", "merged"):
            if (model := getattr(self, key)) not in (None, "merged"):
                value[key] = _plain(model)
        experts = [
            {"model": _plain(one.model), "name": one.name, **one.model_dump(mode="json", exclude_defaults=True, exclude={"model", "name"})}
            for one in self.experts
        ]
        return {"format": self.format, **value, "experts": experts}


def read_mix(source: str | Path | Mapping[str, Any] | Document, folder: Path | None = None) -> tuple[Document, MixRecipe]:
    """(the document, the recipe with every prompt in place). A zoo or glue file is read as well: its models are the experts.

    RecipeError lists every fault with file and line. Reads no model; `folder` is where `prompts_from` is looked for.
    """
    document = from_zoo(source if isinstance(source, Document) else load_document(source))
    recipe = validate(document, MixRecipe)
    recipe = recipe.model_copy(update={"experts": [_with_prompts(document, n, one, folder) for n, one in enumerate(recipe.experts)]})
    if faults := [*_faults(document, recipe), *_router_faults(document, recipe), *_prompt_faults(document, recipe)]:
        raise RecipeError("\n".join(faults))
    return document, recipe


def _with_prompts(document: Document, number: int, expert: MixExpert, folder: Path | None) -> MixExpert:
    """The expert with the prompts of its file, or of its domains."""
    positive, negative = list(expert.prompts.positive), list(expert.prompts.negative)
    if expert.prompts_from is not None:
        try:
            positive += read_prompts((folder or Path()) / expert.prompts_from)
        except UserError as error:
            raise RecipeError(document.fault(("experts", number, "prompts_from"), str(error))) from error
    if not positive:
        default = domain_prompts(expert.domain)
        positive, negative = default["positive"], negative or default["negative"]
    return expert.model_copy(update={"prompts": MixPrompts(positive=positive, negative=negative), "prompts_from": None})


def _faults(document: Document, recipe: MixRecipe) -> list[str]:
    faults = []
    names = [expert.name for expert in recipe.experts]
    for number, name in enumerate(names):
        if name in names[:number]:
            faults.append(document.fault(("experts", number), f"a second expert is called '{name}'. Give one of them another name."))
    if recipe.top_k > len(names):
        faults.append(document.fault(("top_k",), f"is {recipe.top_k}; allowed is 1 to {len(names)}, the number of experts."))
    if recipe.routing == "token" and recipe.level in ("block", "model"):
        what = (
            f"is token, which the level {recipe.level} does not allow: blocks and models are routed by sample. Use sample, or level: ffn."
        )
        faults.append(document.fault(("routing",), what))
    complete = recipe.level == "model" and not recipe.share_io
    only_inside = {"merged_layers": 0, "merged": None, "compat": "none", "shared": "merged", "export": "auto"}
    for key, default in only_inside.items():
        if complete and getattr(recipe, key) != default:
            faults.append(document.fault((key,), "has no meaning for complete models. Leave it out, or say share_io: true."))
    if recipe.share_io and recipe.level != "model":
        faults.append(document.fault(("share_io",), "is for level: model. Leave it out."))
    if recipe.inside and recipe.router.router_layer is not None:
        what = f"has no meaning at the level {recipe.level}: every layer that decides reads its own states. Leave it out."
        faults.append(document.fault(("router", "router_layer"), what))
    if recipe.inside and recipe.pack:
        faults.append(document.fault(("pack",), f"has no meaning at the level {recipe.level}: the output is one model. Leave it out."))
    if recipe.inside and recipe.store is not None:
        what = f"has no meaning at the level {recipe.level}: the output is one model. Use level: model, or leave it out."
        faults.append(document.fault(("store",), what))
    if recipe.pack and recipe.store is not None:
        faults.append(document.fault(("store",), "stands beside pack, which copies whole models. Give one of them."))
    return faults


def _router_faults(document: Document, recipe: MixRecipe) -> list[str]:
    router, faults = recipe.router, []

    def fault(key: str, what: str) -> None:
        faults.append(document.fault(("router", key), what))

    given = [key for key in _LEARNING if key in router.model_fields_set and key != "source"]
    for key in ("learned", "layer_gates"):
        if getattr(router, key) is not None and (key == "learned") == recipe.inside:
            fault(key, f"is no router of the level {recipe.level}. Give the file that the mixture was made from.")
    if router.recorded:
        for key in [*given, *(["source"] if router.source != "auto" else [])]:
            fault(key, "stands beside a router that has been learned. Leave one of them out.")
    elif router.source == "prompts":
        for key in given:
            fault(key, "has no meaning for a router from prompts. Leave it out, or say source: scores.")
    elif not router.tasks:
        if router.source == "scores":
            fault("source", "is scores, but there are no items to score the experts on. Give router.tasks.")
        for key in given:
            if key != "tasks":
                fault(key, "has no meaning without router.tasks. Name the tasks, or leave it out.")
    elif router.source == "scores" and recipe.level == "ffn":
        fault("source", "is scores, which are of complete models and say nothing at the level ffn. Use level: block or model.")
    if router.from_scores and router.kind == "mlp" and router.source != "scores":
        fault("kind", "is mlp, which prompts cannot make. Say source: scores, or kind: linear.")
    return faults


def _prompt_faults(document: Document, recipe: MixRecipe) -> list[str]:
    if recipe.router.gate_mode in WITHOUT_PROMPTS:
        return []
    optional = recipe.router.recorded or (recipe.router.from_scores and recipe.level != "ffn")
    faults = []
    seen: dict[tuple[tuple[str, ...], tuple[str, ...]], str] = {}
    for number, expert in enumerate(recipe.experts):
        sides = (tuple(expert.prompts.positive), tuple(expert.prompts.negative))
        place = ("experts", number)
        if not sides[0]:
            if optional:
                continue
            what = "has no prompts for the router. Give it prompts: {positive: [...]}, prompts_from, a domain, or gate_mode: random."
            faults.append(document.fault(place, what))
        elif any(not prompt.strip() for side in sides for prompt in side):
            faults.append(document.fault(place, "has an empty prompt. Write a text, or take it out."))
        elif (twin := seen.setdefault(sides, expert.name)) != expert.name:
            faults.append(document.fault(place, f"has the same prompts as '{twin}', so no router can tell them apart. Change one."))
    return faults


def _plain(model: str | Recipe) -> Any:
    return model if isinstance(model, str) else canonical(model)
