"""`modelglue generate`: text in, text out, from a model or a mixture."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

if TYPE_CHECKING:
    from modelglue.mixture import Mixture
    from modelglue.models import LiveTextModel
    from modelglue.models.sampling import Sampling

_OPTIONS = (
    "--max-new-tokens", "--until", "--temperature", "--top-p", "--seed", "--beams", "--residency", "--dtype", "--json", "--quiet",
)  # fmt: skip
_LIKE_AN_OPTION = re.compile(r"--?[A-Za-z][\w-]*(=.*)?")
_ESCAPED = {"n": "\n", "t": "\t", "\\": "\\"}


def generate(
    model: str,
    *prompts: Annotated[str, Parameter(allow_leading_hyphen=True)],
    max_new_tokens: int = 64,
    until: Annotated[list[str] | None, Parameter(negative=())] = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    beams: int = 1,
    residency: str | None = None,
    dtype: Literal["float32", "stored"] = "float32",
    json: Annotated[bool, Parameter(negative=())] = False,
    quiet: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    r"""Continue prompts and print the continuations.

    Behind a mixture every prompt is answered by the expert that the router chooses for it; which one is said on standard error. A text
    does not depend on the other prompts: equal prompts, settings and seeds give equal texts.

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
    temperature
        Above 0 tokens are drawn; at 0 the most probable one is written, always.
    top_p
        Draw from the fewest tokens that have this probability together.
    seed
        What is drawn is a function of it.
    beams
        Continuations that are kept while the most probable one is searched for; not with a temperature.
    residency
        Which experts of a mixture are in memory: lazy (those that were needed), all, or lru:N (the N that were used last).
    dtype
        Compute in float32, or as stored: in the dtype of the files, which are then mapped and not copied.
    json
        Print a list with prompt, text, expert, weight and logits of every answer.
    quiet
        Say nothing on standard error.
    """
    from modelglue.cli.console import print_json, print_warnings, stderr
    from modelglue.cli.opening import open_live
    from modelglue.errors import UserError
    from modelglue.models.sampling import Sampling

    for option, number in (("--max-new-tokens", max_new_tokens), ("--beams", beams)):
        if number < 1:
            raise UserError(f"{option} is {number}; allowed is a whole number from 1.")
    sampling = Sampling(temperature, top_p, seed)
    if beams > 1 and not sampling.greedy:
        raise UserError(f"--beams is {beams} and --temperature {temperature:g}: beams are not drawn. Leave one of them out.")
    texts = read_prompts(prompts, _OPTIONS, "generate MODEL")
    stops = [re.sub(r"\\([nt\\])", lambda match: _ESCAPED[match[1]], stop) for stop in until or []]
    opened = open_live(model, residency=residency, dtype=dtype)
    answers = _answers(opened, texts, {"until": stops, "max_new_tokens": max_new_tokens}, sampling, beams)
    if json:
        print_json(answers)
    else:
        _print(answers, quiet=quiet)
    if opened.truncated and not quiet:
        print_warnings(stderr(), [f"only the end of {opened.truncated} of {len(texts)} prompts was read: {model} cannot hold more."])


def read_prompts(prompts: Sequence[str], options: Sequence[str], usage: str) -> list[str]:
    """The prompts, with those of standard input in the place of `-`."""
    from modelglue.errors import UserError, did_you_mean

    texts: list[str] = []
    for prompt in prompts:
        if _LIKE_AN_OPTION.fullmatch(prompt):
            near = did_you_mean(prompt, options)
            raise UserError(f"there is no option '{prompt}'.{near} If it is a prompt, give it on standard input, with - in its place.")
        try:
            given = [line.removesuffix("\n") for line in sys.stdin] if prompt == "-" else [prompt]
        except UnicodeDecodeError as error:
            raise UserError(f"standard input: is not {error.encoding} ({error.reason}). Convert it first.") from error
        for number, text in enumerate(given, start=1):
            if any("\ud800" <= letter <= "\udfff" for letter in text):  # bytes that Python could not decode
                place = f"line {number} of standard input" if prompt == "-" else f"the prompt {text!r}"
                raise UserError(f"{place}: holds bytes that are no UTF-8. Convert it first.")
        texts += given
    if not texts:
        raise UserError(f'no prompt: give at least one, as in `modelglue {usage} "Once upon"`, or - to read lines from standard input.')
    return texts


def _answers(
    model: Mixture | LiveTextModel, texts: Sequence[str], how: dict[str, Any], sampling: Sampling, beams: int
) -> list[dict[str, Any]]:
    """Prompt, text, and (of a mixture, else None) whose it is."""
    from modelglue.mixture import Mixture
    from modelglue.models.writer import Writer

    if not isinstance(model, Mixture):
        plain = beams == 1 and sampling.greedy
        written = model.generate(texts, **how) if plain else Writer(model).write(texts, **how, sampling=sampling, beams=beams)
        nobody = {"expert": None, "weight": None, "logits": None}
        return [{"prompt": prompt, "text": text, **nobody} for prompt, text in zip(texts, written, strict=True)]
    answers = []
    for prompt, answer in zip(texts, model.generate_routed(texts, **how, sampling=sampling, beams=beams), strict=True):
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
