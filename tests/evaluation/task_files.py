"""Task files of every kind that items are made of, with a few documents each."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

Documents = Sequence[Mapping[str, Any]]

WORDS: Documents = [{"prompt": f"reverse: {word} =", "answer": word[::-1]} for word in ("abcd", "noon", "tiger", "zyx")]
CHOICES: Documents = [
    {"prompt": f"larger: {a} or {b} =", "choices": [str(a), str(b)], "gold": int(b > a)} for a, b in ((718, 444), (320, 644), (100, 999))
]

GENERATION: Mapping[str, Any] = {
    "output_type": "generate_until",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 10, "do_sample": False},
    "filter_list": [{"name": "strip", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
CHOICE: Mapping[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{prompt}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "gold",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
LIKELIHOOD: Mapping[str, Any] = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{answer}}",
    "target_delimiter": " ",
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ],
}


def write_task(
    folder: Path,
    name: str = "task",
    kind: Mapping[str, Any] = GENERATION,
    documents: Documents = WORDS,
    shots: Documents = (),
    **changes: Any,
) -> Path:
    """NAME.yaml, and beside it NAME.jsonl with the documents and NAME.shots.jsonl with examples to put before every question.

    `changes` replace settings, None removes one. Returns the YAML file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {"test": f"{name}.jsonl"}
    write_lines(folder / files["test"], documents)
    settings: dict[str, Any] = {"task": name, "dataset_path": "json", "test_split": "test", **kind}
    if shots:
        files["shots"] = f"{name}.shots.jsonl"
        write_lines(folder / files["shots"], shots)
        settings |= {"num_fewshot": 2, "fewshot_split": "shots"}
    return write_settings(folder / f"{name}.yaml", {**settings, "dataset_kwargs": {"data_files": files}, **changes})


def write_lines(path: Path, documents: Documents) -> Path:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


def write_settings(path: Path, settings: Mapping[str, Any]) -> Path:
    """YAML; text that begins with !function becomes the harness's tag of that name."""
    text = yaml.safe_dump({key: value for key, value in settings.items() if value is not None}, sort_keys=False)
    path.write_text(re.sub(r"'!function ([\w.]+)'", r"!function \1", text))
    return path
