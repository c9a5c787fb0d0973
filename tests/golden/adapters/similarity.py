"""Similarity matrices of a zoo: every mode and scope, with and without the base."""

from __future__ import annotations

import torch

from modelglue.checkpoint import TensorsCheckpoint
from modelglue.zoo import similarity
from tests.golden.cases import Adapter, Answer, Case


def _matrices(case: Case) -> Answer:
    models = [TensorsCheckpoint(tensors, case.params["config"]) for tensors in case.models]
    base = TensorsCheckpoint(case.tensors("base"), case.params["config"])
    answer = {}
    for name in case.tensors("expected"):
        kind, mode, scope = name.split(".")
        found = similarity(
            models,
            mode=mode,  # type: ignore[arg-type]
            scope=scope.removeprefix("sim_"),  # type: ignore[arg-type]
            base=base if kind == "delta" else None,
        )
        answer[name] = torch.from_numpy(found.matrix)
    return Answer(answer)


ADAPTERS: dict[str, Adapter] = {"model-glue/similarity-": _matrices}
