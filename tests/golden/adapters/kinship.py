"""Model kinship: the plain metrics, per tensor, and in low precision. The official cosine is an absolute one."""

from __future__ import annotations

import numpy as np
import torch

from modelglue.checkpoint import TensorsCheckpoint
from modelglue.zoo.kinship import kinship
from tests.golden.cases import Adapter, Answer, Case


def _kinship(case: Case) -> Answer:
    base = TensorsCheckpoint(case.tensors("base"))
    models = [TensorsCheckpoint(tensors) for tensors in case.models]
    plain, coarse = kinship(base, models), kinship(base, models, low_precision=True)
    found = {}
    for metric in case.params["metrics"]:
        absolute = metric == "cs"
        found[metric] = plain.mean(metric, absolute=absolute)
        found[f"low_precision.{metric}"] = coarse.mean(metric, absolute=absolute)
        split = plain.by_tensor(metric, absolute=absolute)
        found[f"split.{metric}"] = round(float(split[np.triu_indices(len(models), k=1)].mean()), case.params["split_decimals"])
    return Answer({name: torch.tensor([value], dtype=torch.float64) for name, value in found.items()})


ADAPTERS: dict[str, Adapter] = {"model_kinship/": _kinship}
