"""LoRA adapters: laid on a base, combined, extracted. Folders are written as PEFT writes them and opened by the public doors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file

from modelglue.adapters import MODES, combine, extract_lora, truncated_svd
from modelglue.checkpoint import SafetensorsCheckpoint, TensorsCheckpoint
from modelglue.checkpoint.adapted import open_adapted
from modelglue.checkpoint.adapter import open_adapter
from tests.golden.adapters.merge_methods import GivenUniforms, answer, base_of
from tests.golden.cases import Adapter, Answer, Case

PREFIX = "base_model.model."


def write(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Path:
    folder.mkdir()
    save_file({name: values.contiguous() for name, values in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _adapted(case: Case) -> Answer:
    base = base_of(case)
    assert base is not None
    params = case.params
    configs = params.get("adapter_configs") or [params["adapter_config"]]
    with TemporaryDirectory() as home:
        folders = [
            write(Path(home) / f"a{n}", tensors, config) for n, (tensors, config) in enumerate(zip(case.models, configs, strict=True))
        ]
        return answer(open_adapted(base, folders, "base+adapter", scales=[params.get("adapter_scale", 1.0)] * len(folders)))


def _combined(case: Case) -> Answer:
    base = base_of(case)
    assert base is not None
    params = case.params
    mode = params["combination_type"]
    assert mode in MODES
    uniforms = [case.tensors(f"data.model{number}.uniform") for number in range(len(case.models))]
    with TemporaryDirectory() as home:
        configs = [{"peft_type": "LORA", **config} for config in params["configs"]]
        folders = [
            write(Path(home) / f"a{n}", tensors, config) for n, (tensors, config) in enumerate(zip(case.models, configs, strict=True))
        ]
        made = combine(
            [open_adapter(folder) for folder in folders],
            params["weights"],
            mode,
            density=params.get("density"),
            majority_sign=params.get("majority_sign_method", "total"),
            svd_rank=params.get("svd_rank"),
            svd_clamp=params.get("svd_clamp"),
            uniform_source=GivenUniforms(uniforms) if uniforms[0] else None,
        )
        made.write(Path(home) / "out")
        found = dict(answer(open_adapted(base, [Path(home) / "out"], "base+out")).tensors)
    if case.tensors("expected.factors"):
        found.update({f"factors.{name}": values for name, values in made.tensors.items()})
    return Answer(found)


def _extracted(case: Case) -> Answer:
    """A whole extraction, or the truncation of one difference."""
    params = case.params
    if "delta" in case.tensors("data"):
        best = truncated_svd(case.tensors("data")["delta"], energy=params["energy_threshold"])
        A, B = best.factors()
        return Answer({"product": B @ A, "rank": torch.tensor([best.rank])})
    (tensors,) = case.models
    base = base_of(case)
    assert base is not None
    with TemporaryDirectory() as home:
        done = extract_lora(
            TensorsCheckpoint(tensors, label="model"),
            base,
            Path(home) / "out",
            max_rank=params.get("max_rank"),
            sv_epsilon=params.get("sv_epsilon", 0.0),
            energy=params.get("energy_threshold"),
            distribute=params.get("distribute_scale", True),
            fan_in_fan_out=params.get("transpose"),
        )
        written = SafetensorsCheckpoint(Path(home) / "out" / "adapter_model.safetensors")
        found: dict[str, torch.Tensor] = {}
        for report in done.tensors:
            module = report.name.removesuffix(".weight")
            A, B = (written.tensor(f"{PREFIX}{module}.lora_{side}.weight").clone() for side in "AB")
            found |= {
                f"product.{module}": B @ A,
                f"rank.{module}": torch.tensor([report.rank]),
                f"col_norms_B.{module}": B.norm(dim=0),
                f"row_norms_A.{module}": A.norm(dim=1),
            }
    return Answer({name: values for name, values in found.items() if name in case.tensors("expected")})


ADAPTERS: dict[str, Adapter] = {"peft-adapter/": _adapted, "peft-combine/": _combined, "lora-extract/": _extracted}
