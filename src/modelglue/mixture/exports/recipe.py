"""mergekit-moe's configuration files, read unchanged, with the few settings that ours adds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from modelglue.errors import RecipeError, UserError
from modelglue.mixture.exports.choose import named
from modelglue.mixture.exports.export import Export
from modelglue.mixture.router import WITHOUT_PROMPTS
from modelglue.recipe import Document, load_document, validate

Gating = Literal["hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random"]
Dtype = Literal["float32", "float16", "bfloat16"]
_SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "half": "float16"}
#: what mergekit calls a layout whose class is on the hub as code only
DEEPSEEK = ("deepseek", "deepseek moe")


def _reference(value: Any) -> Any:
    """`PATH[@REVISION][+LORA]`, or the mapping {model: {path, revision}, lora: {path, revision}} that says the same."""
    if not isinstance(value, Mapping):
        return value
    halves = []
    for key in ("model", "lora"):
        half = value.get(key)
        if isinstance(half, Mapping):
            half = half.get("path") if half.get("revision") is None else f"{half.get('path')}@{half['revision']}"
        if half is not None:
            halves.append(half)
    if "model" not in value or set(value) - {"model", "lora", "override_architecture"} or not all(isinstance(half, str) for half in halves):
        raise ValueError("allowed is a reference as text, or {model: {path, revision}, lora: {path, revision}}")
    return "+".join(halves)


def _dtype(value: Any) -> Any:
    word = str(value).removeprefix("torch.")
    return _SHORT.get(word, word)


Reference = Annotated[str, Field(min_length=1), BeforeValidator(_reference)]
Scale = Annotated[float, Field(allow_inf_nan=False)]


class MoeExpert(BaseModel):
    """One entry of `experts` or `shared_experts`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source_model: Reference
    positive_prompts: tuple[str, ...] | None = None
    negative_prompts: tuple[str, ...] | None = None
    noise_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Standard deviation of normal noise that is added to every weight of the expert."""
    residual_scale: Scale | None = None
    """Factor of the expert's last matrix, and so of what it adds to the residual stream."""


class MoeRecipe(BaseModel):
    """A whole file. `seed`, `gate_scale` and `weights_dtype` are ours."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_model: Reference
    experts: Annotated[tuple[MoeExpert, ...], Field(min_length=1)]
    gate_mode: Gating = "hidden"
    dtype: Annotated[Dtype, BeforeValidator(_dtype)] | None = None
    experts_per_token: Annotated[int, Field(ge=1)] = 2
    shared_experts: Annotated[tuple[MoeExpert, ...], Field(max_length=1)] | None = None
    architecture: str | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    gate_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Factor of all gate rows: above 1 the router decides more sharply."""
    weights_dtype: Annotated[Dtype, BeforeValidator(_dtype)] = "float32"
    """What the gates are stored in."""

    @property
    def entries(self) -> tuple[MoeExpert, ...]:
        return (*self.experts, *(self.shared_experts or ()))

    @property
    def references(self) -> list[str]:
        """Every model, once, the base first."""
        return list(dict.fromkeys([self.base_model, *(expert.source_model for expert in self.entries)]))

    def described(self) -> dict[str, Any]:
        """The file again, JSON-ready, without what is left at its default."""
        return self.model_dump(mode="json", exclude_defaults=True)


def is_moe_recipe(document: Document) -> bool:
    """Whether a YAML document is in mergekit-moe's dialect."""
    value = document.value
    return isinstance(value, Mapping) and "experts" in value and "base_model" in value and not {"level", "format"} & set(value)


def read_moe_recipe(source: str | Path | Mapping[str, Any] | Document) -> tuple[MoeRecipe, list[str]]:
    """(the recipe, what is odd in it). RecipeError lists every fault with file and line. Reads no model."""
    document = source if isinstance(source, Document) else load_document(source)
    recipe = validate(document, MoeRecipe)
    faults = [*_faults(document, recipe), *_prompt_faults(document, recipe)]
    if faults:
        raise RecipeError("\n".join(faults))
    return recipe, _oddities(document, recipe)


def wanted_export(recipe: MoeRecipe) -> Export | None:
    """The class that the file asks for; None where it leaves that open."""
    word = recipe.architecture
    return None if word is None or word.strip().lower() in ("auto", *DEEPSEEK) else named(word)


def _faults(document: Document, recipe: MoeRecipe) -> list[str]:
    faults = []
    if recipe.experts_per_token > len(recipe.experts):
        allowed = f"allowed is 1 to {len(recipe.experts)}, the number of experts"
        place = ("experts_per_token",) if "experts_per_token" in document.value else ("experts",)
        faults.append(document.fault(place, f"experts_per_token is {recipe.experts_per_token}; {allowed}."))
    try:
        wanted_export(recipe)
    except UserError as error:
        faults.append(document.fault(("architecture",), str(error)))
    return faults


def _prompt_faults(document: Document, recipe: MoeRecipe) -> list[str]:
    if recipe.gate_mode in WITHOUT_PROMPTS:
        return []
    faults = []
    for number, expert in enumerate(recipe.experts):
        if not expert.positive_prompts:
            what = f"gate_mode '{recipe.gate_mode}' needs positive_prompts; gate_mode random and uniform_random need none"
            faults.append(document.fault(("experts", number), f"has no positive_prompts. {what}."))
    sides = {(expert.positive_prompts, expert.negative_prompts) for expert in recipe.experts}
    if not faults and len(recipe.experts) > 1 and len(sides) == 1:
        faults.append(document.fault(("experts",), "all have the same prompts, so no router can tell them apart. Change some."))
    for group, entries in (("experts", recipe.experts), ("shared_experts", recipe.shared_experts or ())):
        for number, expert in enumerate(entries):
            for key, prompts in (("positive_prompts", expert.positive_prompts), ("negative_prompts", expert.negative_prompts)):
                if any(not prompt.strip() for prompt in prompts or ()):
                    faults.append(document.fault((group, number, key), "holds an empty prompt. Write a text, or take it out."))
    return faults


def _oddities(document: Document, recipe: MoeRecipe) -> list[str]:
    found = []
    plain = {expert.source_model for expert in recipe.experts}
    if len(recipe.experts) > 1 and len(plain) == 1 and not any(expert.noise_scale for expert in recipe.experts):
        found.append(document.fault(("experts",), "all come from one model and have no noise_scale: equal experts, to be trained apart."))
    seen: dict[Any, int] = {}
    for number, expert in enumerate(recipe.experts):
        twin = seen.setdefault((expert.positive_prompts, expert.negative_prompts), number)
        if twin != number and recipe.gate_mode not in WITHOUT_PROMPTS:
            found.append(document.fault(("experts", number), f"has the same prompts as expert {twin}: both are always chosen together."))
    if (recipe.architecture or "").strip().lower() in DEEPSEEK:
        found.append(
            document.fault(
                ("architecture",),
                "what mergekit writes here needs code from the hub; the same model is written in a class of transformers' own.",
            )
        )
    return found
