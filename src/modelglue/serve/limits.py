"""What one request may ask for, and how many may wait."""

from __future__ import annotations

from dataclasses import dataclass, fields

from modelglue.errors import UserError


@dataclass(frozen=True)
class Limits:
    """Raises UserError for a limit that would let nothing through."""

    body: int = 2**20
    """Bytes of a request."""
    tokens: int = 4096
    """Tokens that may be written for one choice."""
    choices: int = 16
    """Choices of one request: prompts times `n`."""
    rows: int = 32
    """Choices that one expert writes at a time."""
    queue: int = 256
    """Prompts that wait to be begun; more are sent away."""
    timeout: float = 600.0
    """Seconds from the request's arrival until its last token."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (value >= 1 or (field.name == "timeout" and value > 0)):
                raise UserError(f"the limit of {field.name} is {value}; allowed is a number from 1.")
        if self.choices > self.rows:
            raise UserError(f"a request may have {self.choices} choices, but only {self.rows} rows are written at a time. Raise the rows.")
