"""Floor 4: live models; the only floor below 5 that imports transformers."""

from modelglue.models.cached import batches
from modelglue.models.encoding import TextEncoder
from modelglue.models.forward import inference
from modelglue.models.live import check_fit, load_into, load_live, places_of
from modelglue.models.roles import Roles, decoder_layers, roles_of
from modelglue.models.text import LiveTextModel, TextModel, Unanswered
from modelglue.models.tokenizers import has_tokenizer, load_tokenizer

__all__ = [
    "LiveTextModel",
    "Roles",
    "TextEncoder",
    "TextModel",
    "Unanswered",
    "batches",
    "check_fit",
    "decoder_layers",
    "has_tokenizer",
    "inference",
    "load_into",
    "load_live",
    "load_tokenizer",
    "places_of",
    "roles_of",
]
