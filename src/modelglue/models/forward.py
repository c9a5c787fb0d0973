"""How a forward pass is run: without gradients, and small models in one thread."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: a model below this many parameters is slower in several threads than in one (measured: twenty times where cores are shared)
_SMALL = 2**26
_COUNTS: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


@contextmanager
def inference(model: Any) -> Iterator[None]:
    """No gradients; models of fewer than 67 M parameters in one thread, so their answers do not depend on the number of cores either."""
    import torch

    threads = torch.get_num_threads()
    small = _parameters(model) < _SMALL
    if small:
        torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            yield
    finally:
        if small:
            torch.set_num_threads(threads)


def _parameters(model: Any) -> int:
    """How many it has; counted once, since counting takes as long as a tenth of a tiny model's forward pass."""
    if model not in _COUNTS:
        _COUNTS[model] = sum(parameter.numel() for parameter in model.parameters())
    return _COUNTS[model]
