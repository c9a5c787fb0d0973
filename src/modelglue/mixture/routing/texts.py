"""Gates of mixtures inside one model, trained on text: what a row is, and the loss on it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelglue.errors import UserError
from modelglue.mixture.gates import Gate, LinearGate, MlpGate
from modelglue.mixture.routing.gradient import Gating, balance_term

if TYPE_CHECKING:
    import torch

_IGNORED = -100
_ROUTER = re.compile(r"(?:^|\.)(\d+)\.(?:.+\.)?router\.(\w+)$")


@dataclass(frozen=True)
class Row:
    """Token ids of a prompt and of what follows it; only what follows is learned from. Without a prompt, all but the first id is."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]


def read_rows(path: str | Path, tokenizer: Any, *, length: int = 2048) -> list[Row]:
    """Rows of a JSON lines file with {"prompt", "response"} or {"text"} in every line; see `rows_of`.

    All faulty lines are reported together, by number, in one UserError.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON strings may hold what else `splitlines` takes for an end
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}). Give a JSON lines file in UTF-8.") from error
    found: list[Mapping[str, str]] = []
    faults = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            faults.append(f"{path}:{number}: is not JSON ({error})")
            continue
        keys = set(value) if isinstance(value, dict) else set()
        wanted = {"prompt", "response"} if "prompt" in keys or "response" in keys else {"text"}
        if not wanted <= keys or not all(isinstance(value[key], str) for key in wanted):
            faults.append(f'{path}:{number}: allowed are {{"prompt": ..., "response": ...}} or {{"text": ...}} with strings')
        elif found and ("text" in found[0]) != (wanted == {"text"}):
            faults.append(f"{path}:{number}: is of another kind than the lines before; give texts, or prompts with responses")
        else:
            found.append({key: value[key] for key in wanted})
    if faults:
        raise UserError("\n".join(faults))
    return rows_of(found, tokenizer, length=length)


def rows_of(records: Iterable[Mapping[str, str]], tokenizer: Any, *, length: int = 2048) -> list[Row]:
    """Ids of records with `prompt` and `response`, or with `text`: begin, plain tokens, end. Cut to `length`: a prompt keeps its end."""
    head = () if tokenizer.bos_token_id is None else (int(tokenizer.bos_token_id),)
    tail = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    rows = []
    for record in records:
        if "text" in record:
            rows.append(Row((), (*head, *ids(record["text"]), *tail)[:length]))
        else:
            response = (*ids(record["response"]), *tail)[: length // 2]
            room = length - len(response) - len(head)
            prompt = ids(record["prompt"])
            rows.append(Row((*head, *prompt[max(len(prompt) - room, 0) :]), response))
    return rows


class GatedModel:
    """A live mixture inside one model (levels ffn, block and model) as `train_gates` wants it; its rows are `Row`s of one kind."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._mixed = [module for module in model.modules() if hasattr(module, "routing") and module is not model]
        self._real: torch.Tensor | None = None

    @property
    def top_k(self) -> int:
        return int(self.model.routing.top_k)

    def gates(self) -> Sequence[torch.nn.Parameter]:
        return [parameter for name, parameter in self.model.named_parameters() if _ROUTER.search(name)]

    def everything(self) -> Sequence[torch.nn.Parameter]:
        return list(self.model.parameters())

    def gating(self, kind: Gating | None) -> None:
        """Only the mixing itself trains: dropout inside the experts stays off."""
        self.model.routing.train_gating = kind
        for module in self._mixed:
            module.training = kind is not None

    def targets(self, rows: Sequence[Row]) -> int:
        return sum(len(row.response) - (not row.prompt) for row in rows)

    def loss(self, rows: Sequence[Row]) -> torch.Tensor:
        """Next-token cross-entropy in nats; rows are padded so that all prompts end at one position."""
        import torch

        before, after = max(len(row.prompt) for row in rows), max(len(row.response) for row in rows)
        shape = (len(rows), before + after)
        ids, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, _IGNORED)
        mask = torch.zeros(shape, dtype=torch.int64)
        for number, row in enumerate(rows):
            here = slice(before - len(row.prompt), before + len(row.response))
            ids[number, here] = torch.tensor([*row.prompt, *row.response])
            mask[number, here] = 1
            start = before if row.prompt else before + 1
            labels[number, start : here.stop] = ids[number, start : here.stop]
        device = next(self.model.parameters()).device
        self._real = mask.bool().flatten().to(device)
        prompt = before if all(row.prompt for row in rows) else None
        output = self.model(input_ids=ids.to(device), attention_mask=mask.to(device), prompt_length=prompt, use_cache=False)
        logits = output.logits[:, :-1].float().flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten().to(device), ignore_index=_IGNORED, reduction="sum")

    def balance(self) -> torch.Tensor | None:
        """Over all layers together, as in the research code; positions of pads do not count."""
        import torch

        assert self._real is not None, "loss comes first"
        found = [logits[self._real] if len(logits) == len(self._real) else logits for logits in self.model.routing.logits.values()]
        return balance_term(torch.cat(found), self.top_k)


def gates_of(model: Any) -> dict[int, Gate]:
    """The gates of a live mixture by layer, float32 copies: what `levels.join` takes to write it again."""
    parts: dict[int, dict[str, torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        found = _ROUTER.search(name)
        if found is not None:
            parts.setdefault(int(found[1]), {})[found[2]] = parameter.detach().float().cpu().clone()
    return {
        layer: LinearGate(own["weight"], own.get("bias"))
        if "weight" in own
        else MlpGate(own["up_weight"], own["down_weight"], own.get("up_bias"), own.get("down_bias"))
        for layer, own in sorted(parts.items())
    }
