"""mergekit-evolve: where a search starts, and what a vector of genes means."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from modelglue.recipe.genome import Genome, GenomeDefinition
from tests.golden.cases import Adapter, Answer, Case


def _decoded(case: Case) -> Answer:
    params = case.params
    models = tuple(f"model{number}" for number in range(params["n_models"]))
    definition = GenomeDefinition(
        models=models,
        merge_method=params["merge_method"],
        base_model=None if params["merge_method"] in ("slerp", "linear") else "base",
        layer_granularity=params["layer_granularity"],
        filters=tuple(params["filters"]) or None,
        allow_negative_weights=params["allow_negative_weights"],
        smooth=params.get("smooth", False),
        normalize=params.get("normalize"),
    )
    genome = Genome(definition, params["num_layers"])
    genes = case.tensors("data")["genotype"].numpy()
    found = genome.decode(genes)
    answers: dict[str, Any] = {
        "initial_genotype": genome.start().reshape(genome.shape),
        "layer_range": genome.ranges,
        "normalize": [int(definition.normalised)],
        "sources": found.pairs,
        "t": found.t,
        **found.values,
    }
    expected = case.tensors("expected")
    return Answer({name: torch.from_numpy(np.array(value)) for name, value in answers.items() if name in expected})


ADAPTERS: dict[str, Adapter] = {"mergekit_evolve/": _decoded}
