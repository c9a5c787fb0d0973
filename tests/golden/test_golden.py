"""Every golden file is one test; what has no adapter yet is reported as such, and what had one cannot lose it."""

from __future__ import annotations

import json

import pytest
import torch

from tests.golden.cases import FOLDER, HERE, Case, adapter_for, all_cases, assert_same_json, load_adapters

ADAPTERS = load_adapters()
BUILT = (HERE / "BUILT.txt").read_text(encoding="utf-8").split()


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in all_cases()])
def test_golden(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = adapter_for(case.id, ADAPTERS)
    if adapter is None:
        pytest.skip(f"not built yet: {case.path.parent.name}/{case.system}")
    # surveys in pieces as well: golden tensors are smaller than one block
    monkeypatch.setattr("modelglue.checkpoint.engine.arithmetic.SURVEY_ELEMENTS", 53)
    answer = adapter(case)
    rtol, atol = float(case.metadata["rtol"]), float(case.metadata["atol"])
    expected = case.tensors("expected")
    assert sorted(answer.tensors) == sorted(expected)
    for name, value in expected.items():
        ours = answer.tensors[name]
        assert ours.shape == value.shape, name
        torch.testing.assert_close(ours.to(value.dtype), value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
    if "expected" in case.metadata:
        assert_same_json(answer.json, json.loads(case.metadata["expected"]), rtol, atol)
    else:
        assert expected, "the file expects nothing"


def test_built_cases_stay_built() -> None:
    """An adapter that vanishes or no longer matches must fail here, not turn into a skip; a new one is entered in BUILT.txt."""
    present = {case.id for case in all_cases()}
    answered = {case_id for case_id in present if adapter_for(case_id, ADAPTERS) is not None}
    assert present, f"{FOLDER} holds no golden files"
    assert sorted(set(BUILT)) == BUILT
    assert set(BUILT) & present <= answered
    if FOLDER == HERE / "files":  # another folder may hold other cases of the same systems
        assert set(BUILT) == answered
