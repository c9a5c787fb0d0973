"""`modelglue generate`: text in, text out, from a model or a mixture."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

if TYPE_CHECKING:
    from modelglue.mixture import Mixture
    from modelglue.models import LiveTextModel

_OPTIONS = ("--max-new-tokens", "--until", "--json", "--quiet")
_LIKE_AN_OPTION = re.compile(r"--?[A-Za-z][\w-]*(=.*)?")
_ESCAPED = {"n": "\n", "t": "\t", "\\": "\\"}


def generate(
    model: str,
    *prompts: Annotated[str, Parameter(allow_leading_hyphen=True)],
    max_new_tokens: int = 64,
    until: Annotated[list[str] | None, Parameter(negative=())] = None,
    json: Annotated[bool, Parameter(negative=())] = False,
    quiet: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    r"""Continue prompts, greedily, and print the continuations.

    Behind a mixture every prompt is answered by one expert; which one is said on standard error.

    Parameters
    ----------
    model
        Local folder, hub id, mixture folder, or recipe (.yaml), which is merged in memory.
    prompts
        Texts to continue. `-` stands for the lines of standard input.
    max_new_tokens
        Tokens to write at most, counted by the model's own tokenizer.
    until
        Text to stop before; may be given several times. `\n`, `\t` and `\\` mean line feed, tab and backslash.
    json
        Print a list with prompt, text, expert, weight and logits of every answer.
    quiet
        Say nothing on standard error.
    """
    from modelglue.cli.console import print_json, print_warnings, stderr
    from modelglue.errors import UserError

    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {max_new_tokens}; allowed is a whole number from 1.")
    texts = _read(prompts)
    stops = [re.sub(r"\\([nt\\])", lambda match: _ESCAPED[match[1]], stop) for stop in until or []]
    opened = _open(model)
    answers = _answers(opened, texts, stops, max_new_tokens)
    if json:
        print_json(answers)
    else:
        _print(answers, quiet=quiet)
    if opened.truncated and not quiet:
        print_warnings(stderr(), [f"only the end of {opened.truncated} of {len(texts)} prompts was read: {model} cannot hold more."])


def _read(prompts: Sequence[str]) -> list[str]:
    """The prompts, with those of standard input in the place of `-`."""
    from modelglue.errors import UserError, did_you_mean

    texts: list[str] = []
    for prompt in prompts:
        if _LIKE_AN_OPTION.fullmatch(prompt):
            near = did_you_mean(prompt, _OPTIONS)
            raise UserError(f"there is no option '{prompt}'.{near} If it is a prompt, give it on standard input, with - in its place.")
        try:
            texts += sys.stdin.read().splitlines() if prompt == "-" else [prompt]
        except UnicodeDecodeError as error:
            raise UserError(f"standard input: is not {error.encoding} ({error.reason}). Convert it first.") from error
    if not texts:
        raise UserError(
            'no prompt: give at least one, as in `modelglue generate MODEL "Once upon"`, or - to read lines from standard input.'
        )
    return texts


def _open(model: str) -> Mixture | LiveTextModel:
    from modelglue.checkpoint import Checkpoint
    from modelglue.cli.opening import open_model
    from modelglue.models import LiveTextModel, load_live, load_tokenizer

    opened = open_model(model)
    return LiveTextModel(load_live(opened), load_tokenizer(opened)) if isinstance(opened, Checkpoint) else opened


def _answers(model: Mixture | LiveTextModel, texts: Sequence[str], stops: Sequence[str], max_new_tokens: int) -> list[dict[str, Any]]:
    """Prompt, text, and (of a mixture, else None) whose it is."""
    from modelglue.mixture import Mixture

    if not isinstance(model, Mixture):
        written = model.generate(texts, until=stops, max_new_tokens=max_new_tokens)
        nobody = {"expert": None, "weight": None, "logits": None}
        return [{"prompt": prompt, "text": text, **nobody} for prompt, text in zip(texts, written, strict=True)]
    answers = []
    for prompt, answer in zip(texts, model.generate_routed(texts, until=stops, max_new_tokens=max_new_tokens), strict=True):
        route = answer.route
        logits = dict(zip(model.experts, route.logits, strict=False))  # a prompt without tokens has none
        answers.append({"prompt": prompt, "text": answer.text, "expert": route.name, "weight": route.weight, "logits": logits})
    return answers


def _print(answers: Sequence[dict[str, Any]], *, quiet: bool) -> None:
    """Texts on standard output, who wrote them on standard error."""
    for number, answer in enumerate(answers, start=1):
        if answer["expert"] is not None and not quiet:
            logits = ", ".join(f"{name} {value:.3f}" for name, value in answer["logits"].items()) or "the prompt has no token"
            count = f"{number}: " if len(answers) > 1 else ""
            print(f"{count}{answer['expert']} ({logits})", file=sys.stderr, flush=True)
        print(answer["text"], flush=True)
