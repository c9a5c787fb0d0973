"""Vocabularies: which row of an embedding belongs to which token, and views that make models agree on it.

Only headers, configs and tokenizer files are read here; no tensor before somebody reads the result. In the order of use
(`labels` names the models, then the base, in messages; every view is the very input where it would change nothing):

    check_vocabularies(models, base, labels)            without a tokenizer section: MergeError with the remedies, or nothing
    truncate(models, base, labels) -> Alignment         ... unless the recipe says `vocabulary_mismatch: truncate`
    align(models, base, request, labels) -> Alignment   with one
    tied_heads(models, base) -> TiedHeads               then, before layers are sliced
    chat_template(models, output, value) -> ChatTemplate  on the finished output (its files are what will be written)
    dressed(checkpoint, config=, files=, description=)  -> the same tensors with updated config, side files and recipe
    transplant(whole, part, tables) -> Transplant       what a larger model must say when its part's tables become those of a merge

`VocabularyRequest(source, tokens, pad_to_multiple_of)`: source is "union", "base" or a position among `models` (len(models)
is the base); tokens maps a token to `TokenPolicy(source, force)`, whose source is None (automatic), `FromModel(model)`,
`FromToken(model, token=... | token_id=...)` or `Zero()`; models are positions again. "Base" is `base`, else models[0].

`Alignment`: .models, .base (views), .config (fields to update, nested), .files (name -> path or bytes; None removes the file),
.report (what every row became), .warnings. `TiedHeads`: .models, .base, .config. `ChatTemplate`: .files, .warnings.
The output: `dressed(merged, config=alignment.config, files=alignment.files, description={"tokenizer": {...}})`.

`vocabulary(checkpoint) -> Vocabulary | None` reads the tokenizer: token -> id below the config's vocab_size, with the settings
of added tokens; `all_tokens` also those without a row. No transformers, no torch.
"""

from modelglue.checkpoint.vocabulary.align import align
from modelglue.checkpoint.vocabulary.alignment import Alignment, AlignmentReport, ModelReport
from modelglue.checkpoint.vocabulary.chat import TEMPLATES, ChatTemplate, chat_template
from modelglue.checkpoint.vocabulary.dressed import DressedCheckpoint, dressed
from modelglue.checkpoint.vocabulary.heads import TiedHeads, tied_heads
from modelglue.checkpoint.vocabulary.mismatch import check_vocabularies, truncate
from modelglue.checkpoint.vocabulary.request import FromModel, FromToken, TokenPolicy, VocabularyRequest, Zero
from modelglue.checkpoint.vocabulary.tables import Tables, tables_of
from modelglue.checkpoint.vocabulary.tokens import Vocabulary, all_tokens, vocabulary
from modelglue.checkpoint.vocabulary.transplant import Transplant, transplant
from modelglue.checkpoint.vocabulary.union import RowCounts
from modelglue.checkpoint.vocabulary.view import RevocabularyCheckpoint

__all__ = [
    "TEMPLATES",
    "Alignment",
    "AlignmentReport",
    "ChatTemplate",
    "DressedCheckpoint",
    "FromModel",
    "FromToken",
    "ModelReport",
    "RevocabularyCheckpoint",
    "RowCounts",
    "Tables",
    "TiedHeads",
    "TokenPolicy",
    "Transplant",
    "Vocabulary",
    "VocabularyRequest",
    "Zero",
    "align",
    "all_tokens",
    "chat_template",
    "check_vocabularies",
    "dressed",
    "tables_of",
    "tied_heads",
    "transplant",
    "truncate",
    "vocabulary",
]
