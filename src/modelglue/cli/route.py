"""`modelglue route`: which expert of a mixture a text goes to, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

if TYPE_CHECKING:
    from modelglue.mixture import Mixture, Route

_OPTIONS = ("--json",)


def route(
    mixture: str,
    *texts: Annotated[str, Parameter(allow_leading_hyphen=True)],
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Say which expert of a mixture a text goes to, and why.

    Shown are the router's logit for every expert, and the margin: the lead of the largest over the next. Runs the router alone; no
    expert is loaded.

    Parameters
    ----------
    mixture
        Mixture folder.
    texts
        Texts to route. `-` stands for the lines of standard input.
    json
        Print a list with text, expert, weight, margin, logits, probabilities, and the other experts that answer too.
    """
    from modelglue.cli.console import print_json, print_table, stdout
    from modelglue.cli.generate import read_prompts
    from modelglue.cli.opening import open_model
    from modelglue.errors import UserError
    from modelglue.mixture import Mixture

    asked = read_prompts(texts, _OPTIONS, "route MIXTURE")
    opened = open_model(mixture)
    if not isinstance(opened, Mixture):
        raise UserError(f"{mixture}: is one model, so there is nothing to choose. Give the folder of a mixture.")
    decided = [_decision(opened, text, route) for text, route in zip(asked, opened.route(asked), strict=True)]
    if json:
        print_json(decided)
    else:
        print_table(stdout(), _table(opened.experts, decided))


def _decision(mixture: Mixture, text: str, route: Route) -> dict[str, Any]:
    import math

    shares = [math.exp(logit - max(route.logits)) for logit in route.logits]
    return {
        "text": text,
        "expert": route.name,
        "weight": route.weight,
        "also": [{"expert": mixture.experts[number], "weight": weight} for number, weight in route.also],
        "margin": route.margin,
        "logits": dict(zip(mixture.experts, route.logits, strict=False)),  # a text without tokens has none
        "probabilities": dict(zip(mixture.experts, [share / sum(shares) for share in shares], strict=False)),
    }


def _table(experts: list[str], decided: list[dict[str, Any]]) -> Any:
    """One line for each text."""
    from rich.table import Table

    table = Table("text", "expert", "weight", "margin", *experts, box=None, pad_edge=False)
    for one in decided:
        names = ", ".join([one["expert"], *(other["expert"] for other in one["also"])])
        weights = ", ".join(f"{weight:.2f}" for weight in [one["weight"], *(other["weight"] for other in one["also"])])
        margin = "no token" if one["margin"] is None else f"{one['margin']:.3f}"
        table.add_row(_short(one["text"]), names, weights, margin, *(f"{one['logits'][name]:.3f}" for name in experts if one["logits"]))
    return table


def _short(text: str) -> str:
    line = text.replace("\n", "\\n").replace("[", "\\[")  # brackets would be styles
    return line if len(line) <= 48 else f"{line[:45]}..."
