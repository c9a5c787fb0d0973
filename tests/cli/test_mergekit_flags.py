"""mergekit's flags: every one of them is obeyed or explained, none is an error and none is ignored without a word."""

from __future__ import annotations

import pytest

from modelglue.cli.app import app
from modelglue.cli.mergekit_flags import FLAGS, NEGATED, translate
from modelglue.errors import UserError

#: mergekit-yaml 0.1.5: flag -> whether it takes a value
THEIRS = {
    "allow-crimes": False, "unsafe-truncate-embeddings": False, "transformers-cache": True, "lora-merge-cache": True,
    "lora-merge-dtype": True, "cuda": False, "device": True, "low-cpu-memory": False, "out-shard-size": True, "copy-tokenizer": False,
    "clone-tensors": False, "trust-remote-code": False, "random-seed": True, "lazy-unpickle": False, "write-model-card": False,
    "safe-serialization": False, "quiet": False, "read-to-gpu": False, "multi-gpu": False, "num-threads": True, "gpu-rich": False,
    "async-write": False, "write-threads": True,
}  # fmt: skip
#: these are ours under the same name
SHARED = {"device", "quiet"}


@pytest.mark.parametrize("name", THEIRS)
def test_every_flag_is_known(name: str) -> None:
    if name in SHARED:
        assert translate([f"--{name}"]) == ([f"--{name}"], [])
        return
    assert FLAGS[name].takes_value == THEIRS[name]
    tokens, notes = translate(["r.yml", f"--{name}", *(["7"] if THEIRS[name] else []), "out"])
    assert tokens[0] == "r.yml"
    assert tokens[-1] == "out"
    assert bool(notes) != bool(tokens[1:-1])  # one of the two: a word for us, or a word to the user
    assert all(note.startswith(f"--{name}: not needed here: ") and note.endswith(".") for note in notes)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--cuda"], ["--device", "cuda"]),
        (["--gpu-rich"], ["--device", "cuda"]),
        (["--random-seed", "5"], ["--seed", "5"]),
        (["--random-seed=5"], ["--seed", "5"]),
        (["-j", "3"], ["--workers", "3"]),
        (["-j3"], ["--workers", "3"]),
        (["-jx", "-x", "-"], ["-jx", "-x", "-"]),
        (["--quiet", "--no-quiet"], ["--quiet"]),
        (["--num-threads", "3"], ["--workers", "3"]),
        (["--allow-crimes"], ["--allow-mixed"]),
        (["--unsafe-truncate-embeddings"], ["--truncate-vocabulary"]),
        (["--out-shard-size", "5B"], ["--shard-size", "5GB"]),
        (["--out-shard-size", "500m"], ["--shard-size", "500MB"]),
        (["--out-shard-size", "12k"], ["--shard-size", "12KB"]),
        (["--out-shard-size", "1234"], ["--shard-size", "1234B"]),
        (["--out-shard-size", "0"], ["--shard-size", "1000000TB"]),
        (["--no-cuda", "--no-allow-crimes", "--no-lazy-unpickle"], []),
        (["--workers", "2", "--json"], ["--workers", "2", "--json"]),
        (["--shard-size", "5B"], ["--shard-size", "5B"]),
        (["--", "--cuda"], ["--", "--cuda"]),
        (["cuda"], ["cuda"]),
        (["--no-nonsense"], ["--no-nonsense"]),
    ],
)
def test_what_is_obeyed(given: list[str], expected: list[str]) -> None:
    assert translate(given) == (expected, [])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--lazy-unpickle"], "--lazy-unpickle: not needed here: weights are always read lazily, and pickled ones never executed."),
        (["-v"], "--verbose: not needed here: there is one progress bar; --json prints what was done."),
        (["-vvv"], "--verbose: not needed here: there is one progress bar;"),
        (["--lora-merge-cache", "/tmp/x"], "--lora-merge-cache: not needed here: adapters are applied while their base is read,"),
        (["--no-copy-tokenizer"], "--no-copy-tokenizer: a model without its tokenizer is of no use; remove the files by hand"),
        (["--no-write-model-card"], "--no-write-model-card: the card is written all the same;"),
        (["--no-safe-serialization"], "--no-safe-serialization: pickled weights are never written."),
    ],
)
def test_what_is_explained(given: list[str], expected: str) -> None:
    tokens, notes = translate([*given, "out"])
    assert tokens == ["out"]
    assert len(notes) == 1
    assert notes[0].startswith(expected)


def test_every_no_that_is_not_the_default_is_answered() -> None:
    assert set(NEGATED) == {"copy-tokenizer", "write-model-card", "safe-serialization"}  # the switches that are on by default there


@pytest.mark.parametrize("given", [["--num-threads"], ["r.yml", "--lora-merge-cache"]])
def test_a_value_that_is_missing(given: list[str]) -> None:
    with pytest.raises(UserError, match="is given without its value"):
        translate(given)


@pytest.mark.parametrize("value", ["5G", "x", "", "1.5B", "-1"])
def test_shard_sizes_that_are_none(value: str) -> None:
    with pytest.raises(UserError, match=r"--out-shard-size is '.*'; allowed is a whole number, or one with K, M or B"):
        translate(["--out-shard-size", value])


def test_mix_takes_every_flag_of_theirs() -> None:
    """What is made of a flag is an option that the command has; the rest is said."""
    given = ["mix", "c.yml", "out", "--i-understand-this-is-not-useful-without-training", "--load-in-4bit", "--load-in-8bit"]
    for name, takes_value in THEIRS.items():
        given += [f"--{name}", *(["7"] if takes_value else [])]
    tokens, notes = translate(given, "mix")
    assert tokens == ["mix", "c.yml", "out", "--shard-size", "7B", "--quiet", "--workers", "7"]
    assert len(notes) == len(THEIRS) + 3 - 3  # shard size, workers and quiet are obeyed
    assert "--random-seed: not needed here: the file says it (`seed`), and without it the seed is 0." in notes
    app.parse_args(tokens, exit_on_error=False, print_error=False)
