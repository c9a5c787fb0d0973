"""Text files become rows of token ids: a text is cut into pieces of one length, a prompt with its response stays one row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelglue.errors import UserError
from modelglue.mixture.routing.texts import Row, read_rows, rows_of

if TYPE_CHECKING:
    import torch

_IGNORED = -100


def rows_from(paths: Sequence[Path], tokenizer: Any, context: int) -> list[Row]:
    """Rows of all files, in order. `.jsonl` holds {"prompt", "response"} or {"text"} in every line; any other file is one text.

    UserError for files that cannot be read or hold nothing to learn from; all of them are named together.
    """
    rows: list[Row] = []
    faults = []
    for path in paths:
        try:
            found = _rows_of_file(path, tokenizer, context)
        except (OSError, ValueError) as error:
            faults.append(f"{path}: cannot be read ({error}). Give text in UTF-8.")
            continue
        except UserError as error:
            faults.append(str(error))
            continue
        if not found:
            faults.append(f"{path}: holds nothing to learn from. Leave it out.")
        rows += found
    if not paths:
        faults.append("there is nothing to train on. Name text files.")
    if faults:
        raise UserError("\n".join(faults))
    return rows


def _rows_of_file(path: Path, tokenizer: Any, context: int) -> list[Row]:
    if path.suffix == ".jsonl":
        whole = read_rows(path, tokenizer, length=context) if _has_prompts(path) else read_rows(path, tokenizer, length=2**62)
    else:
        text = path.read_text(encoding="utf-8")
        whole = rows_of([{"text": text}], tokenizer, length=2**62) if text else []
    return [piece for row in whole for piece in _pieces(row, context) if targets(piece) > 0]


def _has_prompts(path: Path) -> bool:
    """Whether the first line that says anything is a prompt; a file is of one kind."""
    with path.open(encoding="utf-8") as lines:
        return '"prompt"' in next((line for line in lines if line.strip()), "")


def _pieces(row: Row, context: int) -> Iterator[Row]:
    if row.prompt:
        yield row
        return
    for start in range(0, len(row.response), context):
        yield Row((), row.response[start : start + context])


def targets(row: Row) -> int:
    """Tokens that are learned: those of a response, or all of a text but its first."""
    return len(row.response) - (not row.prompt)


def loss_of(model: Any, rows: Sequence[Row]) -> torch.Tensor:
    """The sum of the next-token cross-entropies of all targets, in nats, float32. Rows are padded at their ends."""
    import torch

    length = max(len(row.prompt) + len(row.response) for row in rows)
    ids = torch.zeros((len(rows), length), dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, _IGNORED)
    for number, row in enumerate(rows):
        values = torch.tensor([*row.prompt, *row.response])
        ids[number, : len(values)] = values
        mask[number, : len(values)] = 1
        first = len(row.prompt) or 1
        labels[number, first : len(values)] = values[first:]
    device = next(model.parameters()).device
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    flat = logits[:, :-1].float().flatten(0, 1)
    return torch.nn.functional.cross_entropy(flat, labels[:, 1:].flatten().to(device), ignore_index=_IGNORED, reduction="sum")
