"""The glue file: zoo, tasks, and the few dials of the recipe, each with the default of the published pipeline.

Every group mirrors one line of the parameter table of the recipe; unknown keys are errors with the nearest valid name.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from modelglue.zoo import Zoo

#: names of what a run makes: the mixture, and the merge of a family
_TAKEN = re.compile(r"mixture|family-\d+")


class Group(BaseModel):
    """A frozen group of settings in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Tasks(Group):
    """The three disjoint item sets, as lm-evaluation-harness task names."""

    include: str | None = None
    """Folder with task YAML files, relative to the glue file."""
    proxy: Annotated[list[str], Field(min_length=1)]
    """Searched on: every candidate is scored on these."""
    confirmation: list[str] = []
    """Re-scored on: the winners of the strategies, and the finished mixture."""
    test: list[str] = []
    """Reported on, once, at the end; no decision ever sees them."""


class SimilarityOptions(Group):
    """How close two models are (mean over tensors of the mean column cosine by default)."""

    mode: Literal["column", "tensor", "global"] = "column"
    scope: Literal["all", "attn", "mlp"] = "all"
    delta: bool = False


class ClusterOptions(Group):
    """Which models may be merged with each other."""

    threshold: Annotated[float, Field(gt=-1, lt=1)] = 0.95
    linkage: Literal["complete", "leader", "single"] = "complete"
    allow_config_mismatch: bool = False


class SelectOptions(Group):
    """Which members of a family are merged, and with which coefficients."""

    strategy: Literal["average", "coefficient", "similarity_highest", "similarity_lowest", "all"] = "all"
    coefficients: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1)] = [
        0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9,
    ]  # fmt: skip
    accept: Literal[">=", ">", "significant"] = ">="


class MixtureOptions(Group):
    """Which representatives become experts, and how they are joined."""

    level: Literal["model", "auto"] = "model"
    """`model`: complete models behind one router; `auto`: that, or one model whose feed-forward networks are the experts, whichever scores
    best on the proxy items."""
    router: Literal["linear", "mlp"] = "linear"
    """`mlp` has one hidden layer, and has to be learned."""
    routing: Literal["sample"] = "sample"
    top_k: Literal[1] = 1
    keep: Literal["winners", "all"] = "winners"
    """`winners`: a representative stays if it is best on at least one proxy task."""
    min_gain: Annotated[float, Field(ge=0, le=1)] = 0.0
    """A winner must beat the runner-up by this much on some task."""
    max_experts: Annotated[int, Field(ge=2)] | None = None
    pack: bool = False
    """Copy the experts into the mixture folder instead of referring to them."""


class RouterOptions(Group):
    """The router: learned from the proxy scores of the experts, or made from prompts without training.

    The published pipeline reads the last position (`hidden`) of token embeddings (layer 0), which is blind where prompts end alike.
    """

    source: Literal["auto", "scores", "prompts"] = "auto"
    """`auto`: learned from scores if that beats the prompts on held-out proxy items by more than chance; the others: always this one."""
    objective: Literal["best", "expected"] = "best"
    """What is learned: which expert is best on an item, or the least expected loss."""
    hidden: Annotated[int, Field(ge=1, le=4096)] = 64
    """Hidden units of an mlp router."""
    encoder: str | None = None
    """Alias of the model behind the router; default: the representative of the largest family; `auto`: the expert that does best."""
    gate_mode: Literal["hidden", "hidden_avg", "cheap_embed", "random", "uniform_random", "auto"] = "auto"
    router_layer: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Layer of the encoder whose states are routed on; `auto`: the one that knows its prompts best."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    route_span: Annotated[str, Field(pattern=r"^(prompt|full|first:[1-9][0-9]*)$")] = "prompt"


class DtypeOptions(Group):
    """Arithmetic and files."""

    compute: Literal["float32"] = "float32"
    store: Literal["float32", "float16", "bfloat16"] | None = None
    """Default: the dtype that the family's first member is stored in."""


class GlueFile(Group):
    """One zoo file plus what to measure and how to decide."""

    format: Literal["modelglue/1"]
    zoo: Zoo
    tasks: Tasks
    similarity: SimilarityOptions = SimilarityOptions()
    cluster: ClusterOptions = ClusterOptions()
    select: SelectOptions = SelectOptions()
    mixture: MixtureOptions = MixtureOptions()
    router: RouterOptions = RouterOptions()
    dtype: DtypeOptions = DtypeOptions()
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _aliases_are_free(self) -> GlueFile:
        for model in self.zoo.models:
            if _TAKEN.fullmatch(model.alias):
                raise ValueError(f"the alias '{model.alias}' (of id '{model.id}') is what a result is called; give the model another alias")
        return self

    @model_validator(mode="after")
    def _delta_has_a_base(self) -> GlueFile:
        if self.similarity.delta and self.zoo.base is None:
            raise ValueError("similarity.delta subtracts the base, and the zoo has none; give zoo.base, or leave delta out")
        return self

    @model_validator(mode="after")
    def _an_mlp_is_learned(self) -> GlueFile:
        if self.mixture.router == "mlp" and self.router.source != "scores":
            raise ValueError("mixture.router is 'mlp', which prompts cannot make; give router.source: scores, or mixture.router: linear")
        return self

    @model_validator(mode="after")
    def _encoder_is_known(self) -> GlueFile:
        known = [model.alias for model in self.zoo.models]
        if self.router.encoder not in (None, "auto", *known):
            raise ValueError(f"router.encoder is '{self.router.encoder}', allowed are auto and the aliases {', '.join(known)}")
        if any(model.adapter is not None and model.alias == self.router.encoder for model in self.zoo.models):
            raise ValueError(
                f"router.encoder is '{self.router.encoder}', which has an adapter; allowed are models that stand in one folder"
            )
        return self
