"""Floor 3: LoRA adapters as things of their own: combined into one, or extracted from a model and its base."""

from modelglue.adapters.combine import MODES, Combined, combine
from modelglue.adapters.extract import EXTRACTION_FILE, Extraction, TensorReport, extract_lora
from modelglue.adapters.low_rank import Truncation, truncated_svd
from modelglue.adapters.written import write_adapter

__all__ = [
    "EXTRACTION_FILE",
    "MODES",
    "Combined",
    "Extraction",
    "TensorReport",
    "Truncation",
    "combine",
    "extract_lora",
    "truncated_svd",
    "write_adapter",
]
