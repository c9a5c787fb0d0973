"""Bodies of requests, as OpenAI's clients write them; what is not done here is refused by name, never ignored."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modelglue.errors import did_you_mean
from modelglue.models.sampling import Sampling

#: parameters of OpenAI's that mean nothing here, with the values at which they ask for nothing; None: whatever they say
_NEUTRAL: Mapping[str, tuple[Any, ...] | None] = {
    "best_of": (1,), "echo": (False,), "suffix": ("",), "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},),
    "logprobs": (False,), "top_logprobs": (0,), "tools": ([],), "tool_choice": ("none",), "functions": ([],),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "user": None, "metadata": None, "store": (False,),
    "parallel_tool_calls": None, "service_tier": None, "safety_identifier": None, "prompt_cache_key": None,
}  # fmt: skip


class RequestError(Exception):
    """A request that cannot be answered: HTTP status, message, and the parameter and code of OpenAI's error object."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    include_usage: bool = False
    include_obfuscation: bool = False


class _Request(BaseModel):
    """What both kinds of completions have."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    n: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def until(self) -> list[str]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [stop for stop in stops if stop]

    @property
    def usage_wanted(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self) -> Sampling:
        """Without a seed every request draws its own numbers."""
        temperature = 1.0 if self.temperature is None else self.temperature
        seed = secrets.randbits(62) if self.seed is None else self.seed
        return Sampling(temperature, 1.0 if self.top_p is None else self.top_p, seed)


class CompletionRequest(_Request):
    prompt: str | Annotated[list[str], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def tokens(self) -> int:
        return 16 if self.max_tokens is None else self.max_tokens


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["text"]
    text: str


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """What chat templates know: a role and a text."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(_Request):
    messages: Annotated[list[_Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def parsed(kind: type[_Request], value: Any) -> Any:
    """The request that a JSON value is. RequestError names what is wrong with it."""
    if not isinstance(value, dict):
        raise RequestError(f"the body is {type(value).__name__}; allowed is a JSON object.")
    known = set(kind.model_fields)
    for name in sorted(set(value) - known):
        if name not in _NEUTRAL:
            near = did_you_mean(name, sorted(known | set(_NEUTRAL)))
            raise RequestError(f"there is no parameter '{name}'.{near}", param=name, code="unknown_parameter")
        neutral = _NEUTRAL[name]
        if neutral is not None and value[name] is not None and not any(_same(value[name], one) for one in neutral):
            raise RequestError(
                f"{name} is {value[name]!r}; allowed is {neutral[0]!r}: this server does not do more. Leave it out.",
                param=name,
                code="unsupported_parameter",
            )
    try:
        return kind.model_validate({name: value[name] for name in value if name in known})
    except ValidationError as error:
        faults = [(".".join(str(part) for part in fault["loc"]), fault["msg"]) for fault in error.errors()]
        said = "; ".join(f"{place}: {message}" for place, message in faults)
        raise RequestError(f"{said}.", param=faults[0][0].split(".")[0], code="invalid_value") from error


def _same(value: Any, neutral: Any) -> bool:
    """Python takes 0 for False: `logprobs: 0` asks for something, `logprobs: false` does not."""
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)
