"""Texts of one model, one id at a time: sampling, beams, and rows that come and go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelglue.errors import UserError
from modelglue.models.beams import beam_search
from modelglue.models.forward import inference
from modelglue.models.greedy import Stops, decode
from modelglue.models.joining import JoiningModel, JoiningReader
from modelglue.models.running import Row, RunningBatch
from modelglue.models.sampling import Draw, Sampling
from modelglue.models.text import LiveTextModel, Unanswered

#: rows of `write` that run at a time
_ROWS = 64


@dataclass(frozen=True)
class Asked:
    """A prompt for one model: its ids, and how many may be written behind them."""

    ids: list[int]
    steps: int


class Writer:
    """What continues the texts of a `LiveTextModel` where one greedy answer to each is not all that is wanted.

    `reader`: what reads ids in the place of the model alone, such as several models whose probabilities are mixed.
    """

    def __init__(self, model: LiveTextModel, reader: JoiningReader | None = None) -> None:
        self.model = model
        self.reader: JoiningReader = JoiningModel(model.model, model.pad) if reader is None else reader

    @property
    def limit(self) -> int:
        """Ids that the model holds: prompt and continuation together."""
        return self.model.encoder.limit

    def batch(self) -> RunningBatch:
        return RunningBatch(self.reader)

    def running(self) -> Any:
        """The context in which ids are read and written."""
        return inference(self.model.model)

    def ids(self, prompt: str) -> list[int]:
        """The ids of a whole prompt, at least one."""
        return self.model.encoder.once(prompt)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt that the model's chat template makes of messages. UserError without a template, or where it refuses them."""
        if not getattr(self.model.tokenizer, "chat_template", None):
            raise UserError("this model has no chat template. Ask for a completion of a text instead, or add a chat_template.jinja.")
        try:
            return str(self.model.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
        except Exception as error:  # templates are foreign programs
            raise UserError(f"the model's chat template refuses these messages: {error}") from error

    def row(self, asked: Asked, until: Sequence[str], sampling: Sampling | None = None, sample: int = 0) -> Row:
        """A row to be put into a batch. `sample` numbers the texts that one seed draws."""
        draw = None if sampling is None or sampling.greedy else Draw(sampling, sample)
        ends, stops = self.model.ends(until), Stops(self.model.tokenizer, until)
        return Row(asked.ids, asked.steps, ends, stops, until, self.model.tokenizer, draw)

    def write(
        self, prompts: Sequence[str], *, until: Sequence[str], max_new_tokens: int, sampling: Sampling | None = None, beams: int = 1
    ) -> list[str]:
        """The continuation of each prompt, cut before the first stop string; prompts that are too long are cut as `generate` cuts them.

        `Unanswered` where the logits are no numbers. With several `beams` (and then no sampling) the best hypothesis of each.
        """
        asked = self.model.encoder.prompts(prompts, max_new_tokens)
        rows = [self.row(Asked(ids, steps), until, sampling) for ids, steps in zip(*asked, strict=True)]
        if not rows:  # nothing may be written
            return [""] * len(prompts)
        with self.running():
            if beams > 1:
                return [self._best(row, beams) for row in rows]
            batch, waiting = self.batch(), list(rows)
            while waiting or batch.rows:
                free = _ROWS - len(batch.rows)
                batch.tick(waiting[:free])
                waiting = waiting[free:]
        return [Unanswered() if row.finish == "invalid" else row.text() for row in rows]

    def _best(self, row: Row, beams: int) -> str:
        reader = row.reader or self.reader
        found = beam_search(reader, row.ids, width=beams, steps=row.steps, ends=row.ends, stops=row.stops)
        return row.stops.cut(decode(row.tokenizer, found[0].ids)) if found else Unanswered()
