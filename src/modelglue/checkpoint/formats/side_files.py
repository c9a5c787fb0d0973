"""What stands beside the weights of a model: which files an output needs to load, and to be converted elsewhere."""

from __future__ import annotations

from pathlib import Path

from modelglue.checkpoint.formats.confined import leads_out
from modelglue.checkpoint.protocol import SideFile
from modelglue.errors import CheckpointError

#: files that change how a model reads text, and where it ends its answers
TEXT_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json",
    "tokenizer.model.v1", "tokenizer.model.v2", "tokenizer.model.v3", "tekken.json", "sentencepiece.bpe.model", "spm.model", "source.spm",
    "target.spm", "tiktoken.model", "qwen.tiktoken", "bpe.codes", "dict.txt", "normalizer.json",
)  # fmt: skip
SIDE_FILES = (
    *TEXT_FILES, "preprocessor_config.json", "processor_config.json", "image_processor_config.json", "video_preprocessor_config.json",
    "feature_extractor_config.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE",
)  # fmt: skip
#: files that may say that the model, its tokenizer or its processor is made by code that lies beside the weights
_MAY_NAME_CODE = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
_LARGEST_CONFIG = 100_000_000


def side_files(folder: Path) -> dict[str, SideFile]:
    """The files beside the weights that an output needs: name -> path.

    The folder's Python files are among them where a config has an `auto_map`; they are copied byte for byte and never run. CheckpointError
    for a link that leads out of the folder: an output must not carry away what a stranger's folder points to.
    """
    found = [folder / name for name in SIDE_FILES]
    if any(_names_code(folder / name) for name in _MAY_NAME_CODE):
        found += sorted(folder.glob("*.py"))
    present = [file for file in found if file.is_file()]
    for file in present:
        if (elsewhere := leads_out(folder, file)) is not None:
            raise CheckpointError(f"{file}: is a link that leaves the folder, to {elsewhere}. Put the file itself there.")
    return {file.name: file for file in present}


def _names_code(path: Path) -> bool:
    try:
        return path.is_file() and path.stat().st_size <= _LARGEST_CONFIG and b'"auto_map"' in path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). Check its permissions.") from error
