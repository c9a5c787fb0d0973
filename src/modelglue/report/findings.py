"""What each section says in one sentence, computed from the same numbers that it shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modelglue.report import text
from modelglue.report.charts import verdict
from modelglue.report.headline import final_row

_NAMED = 3
"""As many models are named in a sentence; more are counted."""


def results(found: Mapping[str, Any], outcome: Mapping[str, Any]) -> str:
    """How many of the other models the result beats over all skills, and how it stands to the best single model of each skill."""
    final = final_row(found, outcome)
    others = [row for row in found["models"] if row is not final]
    if not others:
        return "There is no other model to compare the result with."
    judged = [verdict(row["result_minus"][1:]) for row in others]
    parts = []
    if "better" in judged:
        parts.append(
            _all(len(others)) if set(judged) == {"better"} else f"better than {judged.count('better')} of the {len(others)} others"
        )
    for kind, words in (("undecided", "not to be told apart from"), ("worse", "worse than")):
        if kind in judged:
            parts.append(f"{words} {_names([row['name'] for row, one in zip(others, judged, strict=True) if one == kind])}")
    singles = [row for row in found["models"] if row["kind"] == "single"]
    tasks = [max((row["tasks"][skill] for row in singles), key=lambda task: float(task["score"])) for skill in found["skills"]]
    against = [verdict(task["result_minus"][1:]) for task in tasks]
    stand = ", ".join(f"{kind} on {against.count(kind)}" for kind in ("better", "undecided", "worse"))
    return f"Over all skills the result is {text.listed(parts)}. Against the best single model of each skill it is {stand}."


def _all(count: int) -> str:
    return f"better than every one of the {count} others" if count > 1 else "better than the other"


def families(found: Mapping[str, Any]) -> str:
    """What the families are, and how much they hang on the threshold."""
    count = len(found["families"])
    inside = [family["weakest_pair"]["similarity"] for family in found["families"] if family["weakest_pair"]]
    across = found["strongest_across"]["similarity"] if found["strongest_across"] else None
    if not inside:
        start = "Only one model: nothing to group." if count == 1 else f"No two models are similar enough: {count} families of one."
        return start if across is None else f"{start} Any threshold from {text.similarity(across)} up gives the same."
    start = "All models are one family." if count == 1 else f"{count} families."
    if across is None:
        return f"{start} Any threshold below {text.similarity(min(inside))} gives the same."
    if across < min(inside):
        return f"{start} Any threshold from {text.similarity(across)} to {text.similarity(min(inside))} gives the same."
    return (
        f"{start} The strongest pair across families ({text.similarity(across)}) is no less similar than the weakest pair inside one "
        f"({text.similarity(min(inside))}): the threshold alone does not make the families."
    )


def ranking(decisions: Mapping[str, Any]) -> str:
    """Who leads, and whether the zoo is made of specialists."""
    rows, skills = decisions["ranking"], decisions["tasks"]["proxy"]
    first = rows[0]["alias"]
    leaders = [max(rows, key=lambda row, skill=skill: row["tasks"][skill])["alias"] for skill in skills]  # type: ignore[misc]
    if len(rows) == 1:
        return f"{first} is alone."
    if len(set(leaders)) == 1:
        return f"{leaders[0]} leads on every skill."
    led = sum(leader == first for leader in leaders)
    own = "all of them" if led == len(skills) else "none of them" if not led else f"{led} of them"
    return f"{first} has the best mean; the {len(skills)} skills are led by {len(set(leaders))} different models, {own} by {first}."


def merging(decisions: Mapping[str, Any]) -> str:
    """How many families got a merge, and how many of those beat their best member."""
    larger = [family["representative"] for family in decisions["families"] if len(family["members"]) > 1]
    merged = [one for one in larger if one["kind"] == "merge"]
    if not larger:
        return "No family has two members: there was nothing to merge."
    whole = text.number_of(len(larger), "family with several members", "families with several members")
    if not merged:
        return f"No merge was better than the best member, in {whole}."
    sure = sum(one["interval_vs_best_member"][1] > 0 for one in merged)
    start = f"{len(merged)} of {whole} got a merge; "
    if len(merged) == 1:
        return start + f"its gain over the best member is {'above 0' if sure else 'undecided'}, on items that the search looked at."
    return start + f"the gain over the best member is above 0 for {sure} of them, on items that the search looked at."


def experts(decisions: Mapping[str, Any]) -> str:
    kept = sum(expert["kept"] for expert in decisions["experts"])
    whole = text.number_of(len(decisions["experts"]), "representative", "representatives")
    if decisions["router"] is None and kept > 1:
        return f"{kept} of {whole} became experts inside one model, with a router in every layer."
    if decisions["router"] is None:
        return f"{whole}, no router: " + ("nothing to route." if len(decisions["experts"]) == 1 else "one of them is best at everything.")
    return f"{kept} of {whole} became experts."


def router(view: Mapping[str, Any]) -> str | None:
    """How much of what comes reaches the expert that should have it."""
    said = [f"{load['right']} of the {load['split']} items" for load in reversed(view["loads"]) if load["right"]]
    return f"{text.listed(said)} reach the expert that is best on their skill." if said else None


def cost(times: Mapping[str, Any]) -> str | None:
    """Where the time went."""
    rows = times["rows"]
    if not rows:
        return None
    if len(rows) == 1:
        return f"{times['total']} in all."
    longest = max(rows, key=lambda row: row["seconds"])
    return f"{times['total']} in all, the largest part in {longest['name']} ({longest['share']})."


def _names(names: Sequence[str]) -> str:
    return text.listed(names) if len(names) <= _NAMED else str(len(names))
