"""Experts of one family as differences to their merge: low-rank (a LoRA adapter each) or sparse."""

from modelglue.mixture.deltas.loss import Loss, losses
from modelglue.mixture.deltas.spec import DeltaStore
from modelglue.mixture.deltas.store import REPORT, Kept, Stored, families, store_experts

__all__ = ["REPORT", "DeltaStore", "Kept", "Loss", "Stored", "families", "losses", "store_experts"]
