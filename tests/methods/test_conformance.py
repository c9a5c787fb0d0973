"""Every registered method passes every check of the shipped conformance suite."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from modelglue.methods import Method, all_methods
from modelglue.testing import CHECKS


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("method", all_methods(), ids=lambda method: method.id)
def test_conformance(method: Method, check: Callable[[Method], None]) -> None:
    check(method)
