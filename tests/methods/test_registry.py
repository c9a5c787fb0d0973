"""What a signature can say about a method."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from torch import Tensor

from modelglue.methods import get, method, registry


def test_a_base_may_be_needed_welcome_or_unknown() -> None:
    facts = {name: (get(name).needs_base, get(name).takes_base) for name in ("ties", "nuslerp", "multislerp", "linear", "passthrough")}
    assert facts == {
        "ties": (True, True), "nuslerp": (False, True), "multislerp": (False, True),
        "linear": (False, False), "passthrough": (False, False),
    }  # fmt: skip


def test_what_mergekits_recipes_mean_is_said_by_the_method() -> None:
    assert get("model_stock").mergekit == {"clip_ratio": False}
    assert get("linear").mergekit == {}
    assert get("linear").without_effect == ("int8_mask",)
    assert get("karcher").without_effect == ("int8_mask", "weight")


def test_declared_values_must_be_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registry", {})
    with pytest.raises(TypeError, match=r"halves: mergekit= names \['wait'\], which are no parameters of it"):

        @method(source="a test", mergekit={"wait": 1.0, "scale": 2.0})
        def halves(models: Sequence[Tensor], *, scale: float = 1.0) -> Tensor:
            return models[0]


def test_none_is_a_value_where_the_type_says_so() -> None:
    scale, weight = get("passthrough").parameter("scale"), get("linear").parameter("weight")
    assert scale is not None
    assert weight is not None
    assert (scale.optional, scale.type, scale.per_model, scale.default) == (True, float, True, None)
    assert scale.fault(None) is None
    assert weight.fault(None) == "is None, allowed is a number"


def test_only_a_plain_passthrough_copies() -> None:
    assert get("passthrough").copies({"scale": [None]})
    assert not get("passthrough").copies({"scale": [1.0]})
    assert not get("linear").copies({"weight": [1.0], "normalize": True})
