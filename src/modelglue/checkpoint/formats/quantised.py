"""Is a model quantised? A merge would have to compute with its packed integers as if they were weights, so it is refused by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from modelglue.checkpoint.formats.header import shown
from modelglue.checkpoint.protocol import PACKED_BITS, Checkpoint
from modelglue.checkpoint.remembered import once_per_checkpoint

_ORIGINAL = "Merge the release that it was quantised from, and quantise the result."


@dataclass(frozen=True)
class _Scheme:
    """One way to quantise: what configs call it, by which endings of tensor names it is known (all of one group), and the way out."""

    label: str
    methods: tuple[str, ...]
    endings: tuple[tuple[str, ...], ...]
    remedy: str


_SCHEMES = (
    _Scheme("GPTQ or AWQ", ("gptq", "awq", "auto-round", "autoround"), ((".qweight", ".qzeros"), (".qweight", ".scales")), _ORIGINAL),
    _Scheme(
        "bitsandbytes",
        ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"),
        ((".quant_state.bitsandbytes__nf4",), (".quant_state.bitsandbytes__fp4",), (".absmax", ".quant_map"), (".SCB",)),
        "Load it with transformers, call model.dequantize() and save it, or merge the release that it was quantised from.",
    ),
    _Scheme(
        "MXFP4",
        ("mxfp4",),
        (("_blocks", "_scales"),),
        "Load it with transformers and Mxfp4Config(dequantize=True) and save it in bfloat16, or take a bfloat16 release.",
    ),
    _Scheme(
        "compressed-tensors",
        ("compressed-tensors", "compressed_tensors"),
        ((".weight_packed",), (".weight_scale", ".weight_zero_point")),
        _ORIGINAL,
    ),
    _Scheme("HQQ", ("hqq",), ((".W_q",),), _ORIGINAL),
    _Scheme("quanto", ("quanto",), (("._data", "._scale"),), _ORIGINAL),
    _Scheme("AQLM", ("aqlm",), ((".codebooks", ".codes"),), _ORIGINAL),
    _Scheme("torchao", ("torchao",), (("_qdata", "_scale"),), _ORIGINAL),
    _Scheme(
        "scaled fp8",
        ("fp8", "fbgemm_fp8", "finegrained_fp8", "modelopt", "quark"),
        ((".weight_scale_inv",), (".weight_scale",), (".scale_weight",), (".weight_scale_2",)),
        "Load it with transformers and FineGrainedFP8Config(dequantize=True) and save it in bfloat16, or take a bfloat16 release.",
    ),
)
#: entries of a config that say how its weights were quantised
_SECTIONS = ("quantization_config", "compression_config")


@once_per_checkpoint
def quantisation_of(checkpoint: Checkpoint) -> str | None:
    """How the checkpoint is quantised and what to do about it, as the rest of a sentence that begins with its name; None if it is not.

    Asks names, dtypes and the config: reads no weights.
    """
    names = checkpoint.names()
    for scheme in _SCHEMES:
        for group in scheme.endings:
            examples = [next((name for name in names if name.endswith(ending)), None) for ending in group]
            if examples[0] is not None and None not in examples:
                return f"is quantised ({scheme.label}: it has the tensor {shown(examples[0])}). {scheme.remedy}"
    for name in names:
        if (dtype := checkpoint.info(name).dtype) in PACKED_BITS:
            return f"is quantised (tensor {shown(name)} is {dtype}, several numbers to a byte). {_ORIGINAL}"
    for place, method in _methods(checkpoint.config):
        scheme_of = next((scheme for scheme in _SCHEMES if method.lower() in scheme.methods), None)
        label, remedy = (scheme_of.label, scheme_of.remedy) if scheme_of else (method, _ORIGINAL)
        plain = "If its weights are plain numbers, take that entry out of config.json."
        return f"is quantised ({label}, says {place} of its config.json). {remedy} {plain}"
    return None


def _methods(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(where it stands, quantisation method) of every section of the config that names one; parts of a larger model have their own."""
    for key in _SECTIONS:
        section = config.get(key)
        if isinstance(section, Mapping) and section:
            four, eight = section.get("load_in_4bit"), section.get("load_in_8bit")
            method = section.get("quant_method") or ("bitsandbytes" if four or eight else None)
            yield key, str(method or section.get("quant_algo") or "an unknown method")
    for key, part in config.items():
        if key not in _SECTIONS and isinstance(part, Mapping):
            for inner in _SECTIONS:
                if isinstance(section := part.get(inner), Mapping) and section:
                    yield f"{key}.{inner}", str(section.get("quant_method") or "an unknown method")
