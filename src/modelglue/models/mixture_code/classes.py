"""The mixture's classes over any backbone, and the two files that make a folder with them self-contained."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from modelglue.errors import CheckpointError

#: config.json of a mixture below model level says so; no class of transformers answers to it
MODEL_TYPE = "modelglue_mixture"
CONFIGURATION, MODELING = "configuration_mixture.py", "modeling_mixture.py"
_CONFIG, _MODEL = "LlamaConfig", "LlamaForCausalLM"


@cache
def mixture_class(backbone: str) -> Any:
    """The mixture over a causal language model of transformers, by the name of its class; CheckpointError if there is none."""
    import transformers

    from modelglue.models.mixture_code.configuration_mixture import MixtureConfig, MixtureSettings
    from modelglue.models.mixture_code.modeling_mixture import Mixture

    stock: Any = getattr(transformers, backbone, None) if isinstance(backbone, str) else None
    if not isinstance(stock, type) or not issubclass(stock, transformers.PreTrainedModel):
        raise CheckpointError(f"config.json: the mixture's backbone is {backbone!r}, which transformers does not have.")
    of_stock: Any = getattr(stock, "config_class", None)
    config: Any = type("MixtureConfig", (MixtureSettings, of_stock), {"model_type": MixtureConfig.model_type})
    return type("MixtureForCausalLM", (Mixture, stock), {"config_class": config})


def parsed_config(values: Mapping[str, Any]) -> tuple[Any, Any]:
    """(the config, its model class) of a mixture's config.json. CheckpointError, or whatever a wrong value makes the classes raise."""
    settings = values.get("mixture")
    made = mixture_class(settings.get("backbone") if isinstance(settings, Mapping) else None)
    return made.config_class(**{key: value for key, value in values.items() if key != "model_type"}), made


def backbone_type(values: Mapping[str, Any]) -> str:
    """The model_type of the model whose parts the experts share."""
    _, made = parsed_config(values)
    return str(made.backbone.config_class.model_type)


def source_files(backbone: Any) -> dict[str, bytes]:
    """The two modelling files for a model class of transformers; they import torch and transformers and nothing else."""
    folder = Path(__file__).parent
    found = {}
    for name in (CONFIGURATION, MODELING):
        text = (folder / name).read_text(encoding="utf-8")
        found[name] = text.replace(_CONFIG, backbone.config_class.__name__).replace(_MODEL, backbone.__name__).encode()
    return found
