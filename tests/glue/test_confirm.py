"""The last decision: the mixture, unless the best candidate is better by more than chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pytest

from modelglue.glue.bench import Bench
from modelglue.glue.decide import Representative
from modelglue.glue.mix import confirm
from modelglue.mixture import Mixture
from modelglue.recipe import Candidate, Scores, paired_interval

ITEMS = 40


def right(*counts: int) -> Scores:
    """Scores on the tasks t0, t1, ...: so many of forty items are right, always the first ones."""
    return Scores({f"t{task}": {str(item): float(item < count) for item in range(ITEMS)} for task, count in enumerate(counts)})


@dataclass
class Measured:
    """A bench on which everything has been measured: split -> what (members joined by +, or "mixture") -> scores."""

    scores: Mapping[str, Mapping[str, Scores]]
    members: Sequence[str]

    @property
    def tasks(self) -> Mapping[str, Any]:
        return self.scores

    def score(self, candidate: Candidate, split: str) -> Scores:
        return self.scores[split]["+".join(candidate.members)]

    def score_text_model(self, model: Any, identity: str, split: str) -> Scores:
        assert identity == "its identity"
        return self.scores[split]["mixture"]


class Joined:
    identity = "its identity"


def representative(number: int, *members: str) -> Representative:
    candidate = Candidate.linear(dict.fromkeys(members, 1.0))
    name = f"family-{number}" if len(members) > 1 else members[0]
    return Representative(number, name, members, candidate, {}, {})


def decided(mixture: Scores | None, *, split: str = "confirmation", **scores: Scores) -> tuple[dict[str, Any], Scores | None]:
    """The outcome for the family a, b with its merge, and the model c."""
    table = {"a": right(20, 0), "b": right(20, 0), "c": right(0, 20), "a+b": right(20, 0), **scores}
    if mixture is not None:
        table["mixture"] = mixture
    reversed_proxy = {name: right(0, 0) for name in table}  # the proxy says nothing: it must not be asked where there is confirmation
    splits = {"proxy": table} if split == "proxy" else {"proxy": reversed_proxy, "confirmation": table}
    bench = Measured(splits, ["a", "b", "c"])
    joined = None if mixture is None else cast(Mixture, Joined())
    return confirm(cast(Bench, bench), [representative(0, "a", "b"), representative(1, "c")], joined)


@pytest.mark.parametrize("split", ["confirmation", "proxy"])
def test_a_better_mixture(split: str) -> None:
    mixture = right(20, 20)
    outcome, proxy = decided(mixture, split=split)
    assert (outcome["kind"], outcome["name"], outcome["split"], outcome["score"]) == ("mixture", "mixture", split, 0.5)
    assert outcome["best_single"] == "a"
    assert outcome["interval_vs_best_single"] == list(paired_interval(mixture, right(20, 0)))
    assert proxy == (mixture if split == "proxy" else right(0, 0))


@pytest.mark.parametrize("count", [38, 39, 40])
def test_a_mixture_that_is_worse_by_chance_stays(count: int) -> None:
    """One or two items of eighty: the interval of the difference reaches zero."""
    mixture = right(count, 20)
    outcome, _ = decided(mixture, **{"a+b": right(40, 20)})
    assert paired_interval(mixture, right(40, 20))[2] >= 0
    assert (outcome["kind"], outcome["score"]) == ("mixture", mixture.mean)


def test_a_mixture_that_is_worse_by_more_than_chance() -> None:
    mixture, merge = right(20, 20), right(40, 20)
    difference, low, high = paired_interval(mixture, merge)
    assert high < 0
    outcome, proxy = decided(mixture, **{"a+b": merge})
    assert (outcome["kind"], outcome["name"], outcome["score"]) == ("merge", "family-0", merge.mean)
    assert outcome["reason"] == f"the mixture is worse than family-0 by {-difference:.3f} ({-high:.3f} to {-low:.3f}); look at the router"
    assert outcome["interval_vs_best_single"] == list(paired_interval(merge, right(20, 0)))
    assert proxy == right(0, 0)  # the router's report needs it all the same
    outcome, _ = decided(mixture, c=right(40, 40))
    assert (outcome["kind"], outcome["name"], outcome["best_single"]) == ("single", "c", "c")
    assert outcome["interval_vs_best_single"] == [0.0, 0.0, 0.0]


def test_a_member_that_is_better_than_its_merge_and_than_the_mixture() -> None:
    """The merge won on the proxy; here its member does, by more than chance."""
    outcome, _ = decided(right(20, 20), b=right(40, 20))
    assert (outcome["kind"], outcome["name"], outcome["best_single"]) == ("single", "b", "b")
    assert outcome["reason"].startswith("the mixture is worse than b by 0.250 (")
    outcome, _ = decided(None, b=right(40, 20), **{"a+b": right(20, 20)})
    assert (outcome["kind"], outcome["name"]) == ("single", "b")
    assert outcome["reason"].startswith("the merge family-0 is worse than b by 0.250 (")
    outcome, _ = decided(None, b=right(40, 20), **{"a+b": right(39, 20)})
    assert (outcome["kind"], outcome["name"]) == ("merge", "family-0")


def test_without_a_mixture() -> None:
    outcome, proxy = decided(None, **{"a+b": right(30, 10)})
    assert (outcome["kind"], outcome["name"], outcome["reason"]) == ("merge", "family-0", "one representative is best at everything")
    assert outcome["score"] == 0.5
    assert proxy is None
