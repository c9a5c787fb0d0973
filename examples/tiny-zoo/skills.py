"""The skills of the tiny zoo: generated tasks, their misconceptions, and the disjoint item sets.

Every item is a prompt and an answer. A *misconception* is a systematic mistake: for the inputs that `tempts` picks out, the
corpus that the base is trained on gives the wrong answer most of the time, as real corpora do. So the base is able but
middling, and fine-tuning on clean items is a small move, as it is with real models.

Which set an item belongs to is decided by a hash of its prompt, so train, proxy, confirmation and test items are disjoint by
construction, whatever the seeds.
"""

from __future__ import annotations

import hashlib
import json
import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "proxy", "confirmation", "test"]

LETTERS = string.ascii_lowercase
LATE = set(LETTERS[13:])
SPLITS: dict[str, tuple[Split, ...]] = {
    "proxy": ("proxy",), "confirmation": ("confirmation",), "test": ("test",), "train": ("train",),
}  # fmt: skip
ITEMS = {"proxy": 100, "confirmation": 100, "test": 400}


@dataclass(frozen=True)
class Item:
    """One question. `choices` is set for likelihood tasks; `mistake` is what the misconception answers."""

    prompt: str
    answer: str
    mistake: str
    tempting: bool
    choices: tuple[str, str] | None = None


def _word(random_: random.Random, low: int, high: int) -> str:
    return "".join(random_.choice(LETTERS) for _ in range(random_.randint(low, high)))


def _string_skill(
    name: str, answer: Callable[[str], str], mistake: Callable[[str], str], tempting: int, low: int, high: int
) -> Callable[[random.Random], Item]:
    """A string program; the misconception tempts where the letter at position `tempting` is in the alphabet's second half."""

    def make(random_: random.Random) -> Item:
        word = _word(random_, low, high)
        return Item(f"{name}: {word} =", answer(word), mistake(word), word[tempting] in LATE)

    return make


def _larger(random_: random.Random) -> Item:
    first, second = random_.sample(range(100, 1000), 2)
    low, high = sorted((first, second))
    return Item(f"larger: {first} or {second} =", str(high), str(low), first % 2 == 1, (str(first), str(second)))


def _shifted(word: str, by: int) -> str:
    return "".join(LETTERS[(LETTERS.index(letter) + by) % 26] for letter in word)


# Every skill has a mistake and a temptation of its own: where they were shared, mending one skill mended the others too. A mistake shows in
# the first letter: where it had to be kept up over the whole word, the base mixed both answers, and averages fell back to that mixture.
SKILLS: dict[str, Callable[[random.Random], Item]] = {
    "reverse": _string_skill("reverse", lambda w: w[::-1], lambda w: w, 0, 4, 5),
    "sort": _string_skill("sort", lambda w: "".join(sorted(w)), lambda w: "".join(sorted(w))[::-1], -1, 4, 5),
    "next": _string_skill("next", lambda w: _shifted(w, 1), lambda w: w[0] + _shifted(w[1:], 1), 1, 4, 5),
    "larger": _larger,
    "skip": _string_skill("skip", lambda w: w[::2], lambda w: w[1::2], 0, 5, 7),
    "double": _string_skill("double", lambda w: "".join(c + c for c in w), lambda w: w + w, 0, 3, 4),
}
FAMILY_SKILLS = ("reverse", "sort", "next", "larger")
DRIFTED_SKILL = "skip"
STRANGER_SKILL = "double"


def split_of(prompt: str) -> Split:
    """Six tenths of all possible prompts are for training, one each for proxy and confirmation, two for test."""
    bucket = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big") % 10
    if bucket >= 4:
        return "train"
    return ("proxy", "confirmation", "test", "test")[bucket]  # type: ignore[return-value]


def draw(skill: str, split: Split, random_: random.Random) -> Item:
    """A random item of one skill that belongs to `split`."""
    while True:
        item = SKILLS[skill](random_)
        if split_of(item.prompt) == split:
            return item


def item_set(skill: str, split: Split) -> list[Item]:
    """The fixed items of a skill's proxy, confirmation or test set: distinct, and the same for every training seed."""
    random_ = random.Random(f"{skill}/{split}")
    items: dict[str, Item] = {}
    while len(items) < ITEMS[split]:
        item = draw(skill, split, random_)
        items.setdefault(item.prompt, item)
    return list(items.values())


GENERATION_YAML = """\
# exact match of a greedily generated line
task: {skill}_{split}
task_alias: {skill}
dataset_path: json
dataset_kwargs: {{data_files: {{test: data/{skill}/{split}.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 10, do_sample: false}}
filter_list:
  - name: strip
    filter: [{{function: remove_whitespace}}, {{function: take_first}}]
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1}}
"""

CHOICE_YAML = """\
# the likelier of two answers
task: {skill}_{split}
task_alias: {skill}
dataset_path: json
dataset_kwargs: {{data_files: {{test: data/{skill}/{split}.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1}}
"""


def write_tasks(folder: Path) -> None:
    """Write every item set as JSON lines, and one lm-evaluation-harness task per skill and set."""
    for skill in SKILLS:
        for split in ITEMS:
            data = folder / "data" / skill / f"{split}.jsonl"
            data.parent.mkdir(parents=True, exist_ok=True)
            items = item_set(skill, split)  # type: ignore[arg-type]
            data.write_text("".join(json.dumps(_document(item)) + "\n" for item in items), encoding="utf-8")
            template = CHOICE_YAML if items[0].choices else GENERATION_YAML
            (folder / f"{skill}_{split}.yaml").write_text(template.format(skill=skill, split=split), encoding="utf-8")


def _document(item: Item) -> dict[str, object]:
    if item.choices is None:
        return {"prompt": item.prompt, "answer": item.answer}
    return {"prompt": item.prompt, "choices": list(item.choices), "gold": item.choices.index(item.answer)}
