"""Do these checkpoints have the same tensors? Asked of headers, before a merge reads a weight."""

from __future__ import annotations

from collections.abc import Sequence

from modelglue.checkpoint.protocol import FLOATING, Checkpoint
from modelglue.errors import MergeError


def check_same_tensors(donor: Checkpoint, inputs: Sequence[Checkpoint], method: str) -> None:
    """Every input has the donor's tensors in the donor's shapes; all differences are named in one error."""
    names = set(donor.names())
    faults: list[str] = []
    for checkpoint in inputs:
        if checkpoint is donor:
            continue
        label, theirs = label_of(checkpoint), set(checkpoint.names())
        faults += [f"tensor '{name}' is missing in {label}" for name in sorted(names - theirs)]
        faults += [f"tensor '{name}' is only in {label}, not in {label_of(donor)}" for name in sorted(theirs - names)]
        for name in sorted(names & theirs):
            ours, found = donor.info(name).shape, checkpoint.info(name).shape
            if ours != found:
                faults.append(f"tensor '{name}' has shape {list(found)} in {label} and {list(ours)} in {label_of(donor)}")
            kind, kind_found = donor.info(name).dtype, checkpoint.info(name).dtype
            if kind != kind_found and not {kind, kind_found} <= FLOATING:
                faults.append(f"tensor '{name}' is {kind_found} in {label} and {kind} in {label_of(donor)}")
    if faults:
        shown = "\n  ".join(faults[:12]) + (f"\n  ... and {len(faults) - 12} more" if len(faults) > 12 else "")
        raise MergeError(
            f"{method}: the models do not have the same tensors:\n  {shown}\n"
            "Merge models of one architecture and vocabulary; leave the odd one out, or convert it first."
        )


def label_of(checkpoint: Checkpoint) -> str:
    """What an error calls this checkpoint: its reference, or the method of the merge."""
    description = checkpoint.describe()
    model = description.get("model")
    return str(model) if isinstance(model, str) else f"the {description.get('method', 'nested')} merge"
