"""The empty model that a config describes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from modelglue.errors import CheckpointError

if TYPE_CHECKING:
    from modelglue.checkpoint import Checkpoint

#: what configs call a number of layers
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def check_claims(checkpoint: Checkpoint, label: str) -> None:
    """CheckpointError where a config, or one inside it, claims more layers or experts than there are tensors: they would take for ever."""
    tensors = len(checkpoint.names())
    configs = [checkpoint.config]
    while configs:
        for key, value in configs.pop().items():
            inside = [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, Mapping)]
            count = value if key in _LAYERS and isinstance(value, int) else len(inside)
            if count > tensors:
                what = "layers" if key in _LAYERS else key
                raise CheckpointError(f"{label}: its config claims {count:,} {what}, but it has only {tensors:,} tensors.")
            configs += inside


def empty_model(config: Mapping[str, Any], label: str, *, meta: bool = False, dtype: str = "float32") -> Any:
    """A model of the class that the config names, in evaluation mode, with uninitialised weights of one dtype.

    A config that names no class of transformers' own (`architectures`) gives the causal language model of its type. With `meta` no
    memory is allocated for weights. What a class wants in float32 whatever its weights are (rotary frequencies) stays so. Code that
    comes with a model is never run: CheckpointError for a config whose class transformers does not have, or that its class cannot be
    built from.
    """
    # Models are described by configs at hand; nothing here has a reason to ask the hub.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from modelglue.models.mixture_code import MODEL_TYPE, parsed_config

    precision = getattr(torch, dtype)
    values = dict(config)
    kind = values.pop("model_type", None)
    if kind is None:
        raise CheckpointError(f"{label}: its config.json has no model_type, so no live model can be made of it.")
    try:
        parsed, named = parsed_config(values) if kind == MODEL_TYPE else (AutoConfig.for_model(kind, **values), None)
        with torch.device("meta") if meta else nullcontext(), _without_initialisation():
            named = named or _named_class(config, parsed)
            if named is not None:
                model = named._from_config(parsed, dtype=precision)
            else:
                model = AutoModelForCausalLM.from_config(parsed, dtype=precision, trust_remote_code=False)
    except Exception as error:  # a foreign config goes through foreign code: anything may be raised
        raise CheckpointError(
            f"{label}: transformers cannot build model_type {kind!r} from its config: {error}. Restore the model's config.json."
        ) from error
    model.tie_weights()  # part of the initialisation that was left out
    return model.eval()


def _named_class(config: Mapping[str, Any], parsed: Any) -> Any:
    """The class of transformers that stands under `architectures` and takes this config, or None."""
    import transformers

    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    found: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        return None
    wanted = getattr(found, "config_class", None)
    return found if wanted is not None and isinstance(parsed, wanted) else None


def _without_initialisation() -> AbstractContextManager[Any]:
    """Random weights that are overwritten anyway cost minutes on large models; where transformers cannot leave them out, so be it."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:
        return nullcontext()
    context: AbstractContextManager[Any] = no_init_weights()
    return context
