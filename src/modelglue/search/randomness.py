"""Random numbers of a search: drawn anew for every purpose from a hash of what they are for, never from a running state.

So a candidate gets the same numbers whether or not the run was interrupted, and whoever asks first.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np


def rng(*words: int | str) -> np.random.Generator:
    """The generator of (run seed, searcher, generation, index, ...): equal words, equal numbers, on every machine.

    Draw with `random()` alone where the numbers must survive a change of numpy's version; its other distributions may be reworked.
    """
    digest = hashlib.sha256(json.dumps(words).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def draw(generator: np.random.Generator, count: int) -> int:
    """A whole number from 0 to count - 1."""
    return min(int(generator.random() * count), count - 1)


def permutation(generator: np.random.Generator, count: int) -> list[int]:
    """0 to count - 1 in random order."""
    return [int(position) for position in np.argsort(generator.random(count), kind="stable")]
