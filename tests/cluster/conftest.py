"""One cluster for all tests that need one: this machine, with two workers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def two_workers() -> Iterator[Any]:
    """A local cluster that is shut down whatever happens."""
    ray = pytest.importorskip("ray")
    environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_DISABLE_IMPORT_WARNING", "1")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            ray.init(
                address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
                object_store_memory=80_000_000,
            )  # fmt: skip
            yield ray
        finally:
            ray.shutdown()
