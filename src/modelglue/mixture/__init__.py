"""Floor 5: several models behind a router."""

from modelglue.mixture.diagnostics import LoadReport, SelfTest, load_report, oracle_gap
from modelglue.mixture.folder import Manifest, is_mixture, read_manifest, write_mixture
from modelglue.mixture.router import Encoded, Reader, build_gate, entering, gate_row
from modelglue.mixture.runtime import Mixture, Route, Routed
from modelglue.mixture.spec import DOMAIN_PROMPTS, ExpertSpec, RouterSpec, domain_prompts, read_prompts
from modelglue.mixture.trained import HeldOut, TrainedRouter, Training

__all__ = [
    "DOMAIN_PROMPTS",
    "Encoded",
    "ExpertSpec",
    "HeldOut",
    "LoadReport",
    "Manifest",
    "Mixture",
    "Reader",
    "Route",
    "Routed",
    "RouterSpec",
    "SelfTest",
    "TrainedRouter",
    "Training",
    "build_gate",
    "domain_prompts",
    "entering",
    "gate_row",
    "is_mixture",
    "load_report",
    "oracle_gap",
    "read_manifest",
    "read_prompts",
    "write_mixture",
]
