from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelglue.methods import _ranks


@pytest.mark.parametrize("at_once", [1, 40, 2**16])
@given(st.integers(1, 9), st.integers(1, 30), st.integers(0, 2**31), st.sampled_from(["first", "last"]))
def test_ranks_are_those_of_a_stable_sort(at_once: int, rows: int, c: int, seed: int, lower: str) -> None:
    scores = np.random.default_rng(seed).integers(0, 6, (rows, c)).astype(np.float32) * np.float32(1e-44)  # ties, denormals
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ranks, "_AT_ONCE", at_once)
        found = _ranks.by_rank(scores, np.arange(c, dtype=np.float32), lower)  # type: ignore[arg-type]
    turned = scores if lower == "first" else scores[:, ::-1]
    ranks = np.argsort(np.argsort(turned, axis=1, kind="stable"), axis=1, kind="stable")
    assert found.dtype == np.float32
    assert np.array_equal(found, ranks if lower == "first" else ranks[:, ::-1])
