"""Families: a partition in which every inner pair is above the threshold, found in the documented order."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.checkpoint import TensorsCheckpoint
from modelglue.errors import UserError
from modelglue.zoo import Family, Pair, find_families, groups, signature, similarity
from tests.golden.cases import HERE, Case

if TYPE_CHECKING:
    from numpy.typing import NDArray

nan = float("nan")


def symmetric(*rows: list[float]) -> NDArray[np.float64]:
    """From the entries right of the diagonal, row by row."""
    count = len(rows) + 1
    matrix = np.eye(count)
    for i, row in enumerate(rows):
        for j, value in enumerate(row, start=i + 1):
            matrix[i, j] = matrix[j, i] = value
    return matrix


@st.composite
def matrices(draw: st.DrawFn, *, distinct: bool = False) -> NDArray[np.float64]:
    count = draw(st.integers(1, 8))
    values = st.floats(-1, 1, allow_subnormal=False)
    pairs = list(combinations(range(count), 2))
    entries = draw(st.lists(values if distinct else values | st.just(nan), min_size=len(pairs), max_size=len(pairs), unique=distinct))
    matrix = np.eye(count)
    for (i, j), value in zip(pairs, entries, strict=True):
        matrix[i, j] = matrix[j, i] = value
    return matrix


def sets(found: object) -> list[list[str]]:
    return [list(family.members) for family in found.families]  # type: ignore[attr-defined]


@settings(max_examples=100, deadline=None)
@given(matrix=matrices(), threshold=st.floats(-0.9, 0.9), linkage=st.sampled_from(["complete", "leader", "single"]))
def test_a_partition_ordered_by_size(matrix: NDArray[np.float64], threshold: float, linkage: str) -> None:
    found = find_families(matrix, threshold=threshold, linkage=linkage)  # type: ignore[arg-type]
    members = [int(member) for family in found.families for member in family.members]
    assert sorted(members) == list(range(len(matrix)))
    keys = [(-len(family.members), int(family.members[0])) for family in found.families]
    assert keys == sorted(keys)
    assert [family.id for family in found.families] == list(range(len(found.families)))
    assert all(list(family.members) == sorted(family.members) for family in found.families)


@settings(max_examples=100, deadline=None)
@given(matrix=matrices(), threshold=st.floats(-0.9, 0.9))
def test_complete_linkage_keeps_every_inner_pair_above_the_threshold(matrix: NDArray[np.float64], threshold: float) -> None:
    for family in find_families(matrix, threshold=threshold).families:
        pairs = [matrix[int(a), int(b)] for a, b in combinations(family.members, 2)]
        assert all(value > threshold for value in pairs)
        assert (family.weakest_pair.similarity if family.weakest_pair else None) == (min(pairs) if pairs else None)


@settings(max_examples=100, deadline=None)
@given(matrix=matrices(distinct=True), threshold=st.floats(-0.9, 0.9), data=st.data())
def test_the_order_of_the_zoo_does_not_matter(matrix: NDArray[np.float64], threshold: float, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(matrix))))
    labels = [f"m{index}" for index in order]
    for linkage in ("complete", "single"):
        plain = find_families(matrix, threshold=threshold, linkage=linkage, labels=[f"m{i}" for i in range(len(matrix))])  # type: ignore[arg-type]
        moved = find_families(matrix[np.ix_(order, order)], threshold=threshold, linkage=linkage, labels=labels)  # type: ignore[arg-type]
        assert {frozenset(one) for one in sets(plain)} == {frozenset(one) for one in sets(moved)}


@settings(max_examples=50, deadline=None)
@given(matrix=matrices(), threshold=st.floats(-0.9, 0.9))
def test_single_linkage_is_connected_components(matrix: NDArray[np.float64], threshold: float) -> None:
    reach = np.where(np.isnan(matrix), -2, matrix) > threshold
    for _ in range(len(matrix)):
        reach = reach @ reach
    expected = {frozenset(str(j) for j in np.flatnonzero(row)) for row in reach}
    assert {frozenset(one) for one in sets(find_families(matrix, threshold=threshold, linkage="single"))} == expected


def test_the_threshold_is_strict() -> None:
    matrix = symmetric([0.95])
    assert sets(find_families(matrix, threshold=0.95)) == [["0"], ["1"]]
    assert sets(find_families(matrix, threshold=0.9499)) == [["0", "1"]]


def test_ties_go_to_the_smallest_members() -> None:
    chain = symmetric([0.97, 0.9, 0.9], [0.97, 0.9], [0.97])
    assert sets(find_families(chain)) == [["0", "1"], ["2", "3"]]
    star = symmetric([0.9, 0.97, 0.97], [0.97, 0.97], [0.9])
    assert sets(find_families(star)) == [["0", "2"], ["1", "3"]]


def test_the_strongest_pair_joins_first() -> None:
    chain = symmetric([0.96, 0.9], [0.99])
    assert sets(find_families(chain)) == [["1", "2"], ["0"]]
    assert sets(find_families(chain, linkage="leader")) == [["0", "1"], ["2"]]
    assert sets(find_families(chain, linkage="single")) == [["0", "1", "2"]]


def test_the_report() -> None:
    matrix = symmetric([0.99, 0.97, 0.2], [0.98, 0.1], [nan])
    found = find_families(matrix, labels=["a", "b", "c", "d"])
    assert found.families[0] == Family(0, ("a", "b", "c"), Pair(("a", "c"), 0.97))
    assert found.to_json() == {
        "threshold": 0.95,
        "linkage": "complete",
        "families": [
            {"id": 0, "members": ["a", "b", "c"], "weakest_pair": {"models": ["a", "c"], "similarity": 0.97}},
            {"id": 1, "members": ["d"], "weakest_pair": None},
        ],
        "strongest_across": {"models": ["a", "d"], "similarity": 0.2},
        "warnings": [],
    }


def test_models_that_are_not_comparable_have_no_pair_across() -> None:
    found = find_families(symmetric([nan]))
    assert found.strongest_across is None
    assert [family.weakest_pair for family in found.families] == [None, None]


class TestWarnings:
    def test_a_hair(self) -> None:
        close = find_families(symmetric([0.955, 0.1], [0.945]), labels=["a", "b", "c"])
        (warning,) = close.warnings
        assert "decides by a hair" in warning
        assert "'a' and 'b' (0.9550)" in warning
        assert "'b' and 'c' (0.9450)" in warning
        assert find_families(symmetric([0.98, 0.1], [0.945])).warnings == ()

    def test_pairs_below_the_threshold(self) -> None:
        found = find_families(symmetric([0.96, 0.9], [0.99]), linkage="single")
        assert any("linkage: complete" in warning for warning in found.warnings)

    def test_similar_models_that_signatures_keep_apart(self) -> None:
        found = find_families(symmetric([0.99, 0.5], [0.5]), groups=[[0, 2], [1]])
        (warning,) = found.warnings
        assert "'0' and '1' (0.9900)" in warning
        assert "stay apart" in warning


def test_groups_are_never_joined() -> None:
    everything = np.ones((4, 4))
    found = find_families(everything, groups=[[0, 2], [1], [3]])
    assert sets(found) == [["0", "2"], ["1"], ["3"]]


def test_a_large_zoo_is_quick() -> None:
    """Blocks of fifty models each: every block is one family."""
    matrix = np.full((200, 200), 0.5)
    for start in range(0, 200, 50):
        matrix[start : start + 50, start : start + 50] = 0.97
    np.fill_diagonal(matrix, 1)
    assert [len(family.members) for family in find_families(matrix).families] == [50, 50, 50, 50]


@pytest.mark.parametrize("name", ["similarity-1", "similarity-chain"])
def test_published_and_documented_clusters(name: str) -> None:
    case = Case(HERE / "files" / "model-glue" / f"{name}.safetensors")
    models = [TensorsCheckpoint(tensors, case.params["config"]) for tensors in case.models]
    labels = [f"m{number}" for number in range(len(models))]
    matrix = similarity(models).matrix
    same = groups([signature(one) for one in models])
    assert same == [list(range(len(models)))]
    leader = find_families(matrix, threshold=case.params["threshold"], linkage="leader", groups=same, labels=labels)
    assert sets(leader) == case.params["clusters_leader_rule"]
    complete = find_families(matrix, threshold=case.params["threshold"], groups=same)
    assert [[int(member) for member in one] for one in sets(complete)] == case.params["clusters_complete_linkage"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 1.0}, "between -1 and 1"),
        ({"linkage": "complet"}, "Did you mean 'complete'"),
        ({"labels": ["a"]}, "1 labels for 2 models"),
        ({"groups": [[0], [0, 1]]}, "no partition"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_families(symmetric([0.5]), **arguments)  # type: ignore[arg-type]


def test_the_matrix_is_checked() -> None:
    with pytest.raises(UserError, match="not symmetric"):
        find_families(np.array([[1, 0.1], [0.2, 1]]))
    with pytest.raises(UserError, match=r"allowed is \[n, n\]"):
        find_families(np.zeros((2, 3)))


def test_lower_thresholds_never_give_more_families() -> None:
    generator = np.random.default_rng(0)
    values = generator.uniform(size=(6, 6))
    matrix = (values + values.T) / 2
    np.fill_diagonal(matrix, 1)
    counts = [len(find_families(matrix, threshold=t, linkage="single").families) for t in (0.9, 0.6, 0.4, 0.1)]
    assert all(a >= b for a, b in pairwise(counts))
