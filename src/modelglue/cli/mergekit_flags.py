"""mergekit's own command-line flags on `modelglue merge`: obeyed where they mean something here, explained where they do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from modelglue.errors import UserError


@dataclass(frozen=True)
class Flag:
    """One of mergekit's flags. `ours`: what it is here, given its value; `why`: why nothing needs to be done."""

    takes_value: bool = False
    ours: Callable[[str], list[str]] | None = None
    why: str = ""


def _shard_size(value: str) -> list[str]:
    """mergekit counts bytes in K, M and B (10^9); 0 is one file of any size."""
    units = {"k": "KB", "m": "MB", "b": "GB"}
    number, unit = (value[:-1], units[value[-1].lower()]) if value[-1:].lower() in units else (value, "B")
    if not number.isdecimal():
        raise UserError(f"--out-shard-size is '{value}'; allowed is a whole number, or one with K, M or B (10^9 bytes), such as 5B.")
    return ["--shard-size", f"{number}{unit}" if int(number) else "1000000TB"]


_LAZY = "weights are always read lazily, and pickled ones never executed"
_BOUNDED = "memory is bounded anyway; see --memory"
#: without leading dashes; of a switch, the form that says yes
FLAGS = {
    "cuda": Flag(ours=lambda _: ["--device", "cuda"]),
    "gpu-rich": Flag(ours=lambda _: ["--device", "cuda"]),
    "multi-gpu": Flag(why="several devices are named: --device cuda:0,cuda:1"),
    "read-to-gpu": Flag(why="--device reads through pinned buffers, beside the arithmetic"),
    "low-cpu-memory": Flag(why=_BOUNDED),
    "num-threads": Flag(True, ours=lambda value: ["--workers", value]),
    "random-seed": Flag(True, ours=lambda value: ["--seed", value]),
    "allow-crimes": Flag(ours=lambda _: ["--allow-mixed"]),
    "unsafe-truncate-embeddings": Flag(ours=lambda _: ["--truncate-vocabulary"]),
    "out-shard-size": Flag(True, ours=_shard_size),
    "lazy-unpickle": Flag(why=_LAZY),
    "lora-merge-cache": Flag(True, why="adapters are applied while their base is read, without a copy on disk"),
    "lora-merge-dtype": Flag(True, why="adapters are applied in float32 and rounded once"),
    "transformers-cache": Flag(True, why="models of the hub are cached where HF_HOME or HF_HUB_CACHE says; set that instead"),
    "trust-remote-code": Flag(why="no code of a model is ever run"),
    "clone-tensors": Flag(why="tensors of the output never share memory"),
    "copy-tokenizer": Flag(why="the tokenizer is always written"),
    "write-model-card": Flag(why="the card is always written"),
    "safe-serialization": Flag(why="safetensors is always what is written"),
    "async-write": Flag(why="reading, arithmetic and writing always overlap"),
    "write-threads": Flag(True, why="every worker writes its own part; see --workers"),
    "i-understand-this-is-not-useful-without-training": Flag(why="experts that are equal are answered with a warning"),
    "load-in-4bit": Flag(why="the base is read a layer at a time, for the gates alone"),
    "load-in-8bit": Flag(why="the base is read a layer at a time, for the gates alone"),
    "quiet": Flag(ours=lambda _: ["--quiet"]),
    "verbose": Flag(why="there is one progress bar; --json prints what was done"),
}
_HERE = "the base is read on the processor, a layer at a time"
#: where `mix` has no option of ours for what mergekit-moe takes
FOR_MIX = {
    **{name: Flag(FLAGS[name].takes_value, why=_HERE) for name in ("cuda", "gpu-rich")},
    "device": Flag(True, why=_HERE),
    "random-seed": Flag(True, why="the file says it (`seed`), and without it the seed is 0"),
    "allow-crimes": Flag(why="models of one family may be mixed anyway"),
    "unsafe-truncate-embeddings": Flag(why="the base's embeddings are the only ones that are taken"),
}
#: what their "no" means where that is not just the default: nothing here either, but they are told so
NEGATED = {
    "copy-tokenizer": "a model without its tokenizer is of no use; remove the files by hand if they should not be there",
    "write-model-card": "the card is written all the same; remove README.md by hand if it should not be there",
    "safe-serialization": "pickled weights are never written",
}


def _long(token: str) -> str:
    """The long form of -j 4, -j4, -v and -vv."""
    if token.startswith("-j") and (token == "-j" or token[2:].isdecimal()):
        return f"--num-threads={token[2:]}" if token[2:] else "--num-threads"
    return "--verbose" if token.startswith("-v") and set(token[1:]) == {"v"} else token


def translate(tokens: Sequence[str], command: str = "merge") -> tuple[list[str], list[str]]:
    """(tokens in our words, a line about every flag that is not needed); what is none of mergekit's flags stays as it is.

    `command`: merge takes those of mergekit-yaml, mix those of mergekit-moe.

    Raises UserError for a flag without its value.
    """
    flags = {**FLAGS, **FOR_MIX} if command == "mix" else FLAGS
    found: list[str] = []
    notes: list[str] = []
    waiting = list(tokens)
    while waiting:
        token = waiting.pop(0)
        name, equals, value = _long(token).partition("=")
        name = name.removeprefix("--") if name.startswith("--") else ""
        negated = name.startswith("no-") and name[3:] in flags and not flags[name[3:]].takes_value
        flag = flags.get(name[3:] if negated else name)
        if token == "--":  # what follows is no flag
            return [*found, token, *waiting], notes
        if flag is None:
            found.append(token)
            continue
        if flag.takes_value and not equals:
            if not waiting:
                raise UserError(f"{token}: is given without its value.")
            value = waiting.pop(0)
        if negated:
            if name[3:] in NEGATED:
                notes.append(f"--{name}: {NEGATED[name[3:]]}.")
        elif flag.ours is not None:
            found += flag.ours(value)
        else:
            notes.append(f"--{name}: not needed here: {flag.why}.")
    return found, notes
