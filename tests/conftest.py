"""Fixtures that every floor's tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Before anything of the hub library is imported: no test may reach for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before torch is imported, here and in what the tests start: test processes share the cores, and threads that wait for one would spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No test may fail because the machine is busy.
settings.register_profile("modelglue", deadline=None)
settings.load_profile("modelglue")

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The long versions run only when asked for by `-m soak`."""
    if "soak" in (config.option.markexpr or ""):
        return
    kept = [item for item in items if "soak" not in item.keywords]
    config.hook.pytest_deselected(items=[item for item in items if "soak" in item.keywords])
    items[:] = kept


@pytest.fixture(scope="session")
def tiny_zoo() -> Path:
    """The folder of the committed tiny zoo (models, tasks, zoo.yaml)."""
    return REPOSITORY / "examples" / "tiny-zoo"


@pytest.fixture(autouse=True, scope="session")
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests neither read nor leave remembered hashes, or converted data, in the user's cache."""
    os.environ["MODELGLUE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))
