"""Blocks and their residual stream, told from names: which tensors write into it, how a scale of it folds away, what leaves it alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from modelglue.errors import CheckpointError

#: what the last matrix of attention, of a state-space mixer or of a feed-forward part is called
_WRITES = ("o_proj", "out_proj", "c_proj", "dense", "dense_4h_to_h", "down_proj", "fc2", "fc_out", "w2", "wo")
#: the norms of blocks that normalise what goes in, and nothing that comes out
_PRE_NORM = (
    {"input_layernorm", "post_attention_layernorm"}, {"input_layernorm"}, {"ln_1", "ln_2"}, {"ln_1"}, {"ln_attn", "ln_mlp"},
    {"self_attn_layer_norm", "final_layer_norm"}, {"attention_norm", "ffn_norm"}, {"operator_norm", "ffn_norm"}, {"norm_1", "norm_2"},
    {"norm"},
)  # fmt: skip
#: those of blocks that also, or only, normalise what comes out of their parts before it is added
_NORMED_OUTPUTS = (
    {"input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"},
    {"post_attention_layernorm", "post_feedforward_layernorm"},
    {"input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm"},
)  # fmt: skip
#: first matrices of a feed-forward part whose matrices stand in the block itself, beside its last one
_BESIDE_WRITERS = {"fc1", "fc_in", "w1", "w3"}
_NORM = re.compile(r"norm|(?:^|_)ln(?:_|\d|$)")
#: settings that turn blocks with such names into something else
_NOT_PRE_NORM = {"apply_residual_connection_post_layernorm": True, "do_layer_norm_before": False, "swin_norm": True}
#: families whose norms multiply by 1 + weight, so that no factor changes their sign
_OFFSET_NORM = re.compile(r"gemma|nemotron|qwen3_next|qwen3_5|qwen4|minimax_m3|step3p7")


def fold_factors(names: Sequence[str], scale: float, config: Mapping[str, Any], label: str) -> dict[str, float]:
    """Factors of one block's tensors (names inside the layer) that make it do on a stream x what it did on `scale` * x, over `scale`.

    What writes is divided by the scale; norms change their sign with it. Nothing for a scale of 1. CheckpointError where the names do
    not tell a pre-norm block, or where a norm has no sign to change.
    """
    if scale == 1:
        return {}
    writers = [name for name in names if _writes(name)]
    norms = {name.split(".")[0] for name in names if _is_block_norm(name)}
    if not writers or norms not in _PRE_NORM or any(config.get(key) is value for key, value in _NOT_PRE_NORM.items()):
        raise CheckpointError(
            f"{label}: is not known to be a pre-norm block (its norms: {', '.join(sorted(norms)) or 'none'}), so a scale of {scale:g} "
            "cannot be folded into it. Use scales of 1."
        )
    factors = dict.fromkeys(writers, 1 / scale)
    if scale < 0:
        kind = str(config.get("model_type", ""))
        if _OFFSET_NORM.match(kind):
            raise CheckpointError(
                f"{label}: the norms of {kind} multiply by 1 + weight and cannot change their sign, so a scale of {scale:g} cannot be "
                "folded into them. Use scales above 0."
            )
        factors |= dict.fromkeys((name for name in names if _is_block_norm(name) and name.endswith(".weight")), -1.0)
    return factors


def silenced(names: Sequence[str], config: Mapping[str, Any], label: str) -> list[str]:
    """The tensors of one block (names inside the layer) that are zero in a block that passes its input on unchanged.

    CheckpointError where the names do not tell the last matrix of every part, or where a norm with a bias stands behind it.
    """
    norms = {name.split(".")[0] for name in names if _is_block_norm(name)}
    known = norms in _PRE_NORM or norms in _NORMED_OUTPUTS
    if not known or any(config.get(key) is value for key, value in _NOT_PRE_NORM.items()):
        raise CheckpointError(
            f"{label}: is not known to be a block that adds to its input (its norms: {', '.join(sorted(norms)) or 'none'}), so it cannot "
            "start as the identity. Known are blocks that normalise before their parts, as in Llama, GPT-NeoX or Gemma."
        )
    writers = [name for name in names if _writes(name)]
    parts = {name.split(".")[0] for name in names} - norms
    writing = {name.split(".")[0] for name in writers}
    if odd := sorted(parts - writing - (_BESIDE_WRITERS if writing else set())):
        raise CheckpointError(
            f"{label}: has a part '{odd[0]}' whose output projection is not known, so the block cannot start as the identity. "
            f"Known are {', '.join(_WRITES)}."
        )
    biased = [name for name in names if _is_block_norm(name) and name.endswith(".bias")]
    if norms in _NORMED_OUTPUTS and biased:
        raise CheckpointError(f"{label}: '{biased[0]}' is added behind the output projections, so the block cannot start as the identity.")
    return writers


def _writes(name: str) -> bool:
    """`mlp.down_proj.weight`, `mlp.down_proj.bias`, and the fused experts' `mlp.experts.down_proj` and `mlp.experts.down_proj_bias`."""
    parts = name.split(".")
    return parts[-1].removesuffix("_bias") in _WRITES or (len(parts) > 1 and parts[-1] in ("weight", "bias") and parts[-2] in _WRITES)


def _is_block_norm(name: str) -> bool:
    """A norm of the block itself; those inside attention see what the block's norm has made."""
    parts = name.split(".")
    return len(parts) == 2 and _NORM.search(parts[0]) is not None
