"""Text files as a task: bits per byte."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelglue.errors import UserError
from modelglue.evaluation import ScoreStore, TaskSet, score_text_model
from modelglue.evaluation.text_items import pieces
from modelglue.models import LiveTextModel
from tests.evaluation.task_files import write_settings
from tests.models.tiny import letters, random_model


def write(folder: Path, texts: Sequence[str], **changes: Any) -> Path:
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    write_settings(folder / "text.yaml", {"task": "text", "kind": "bits_per_byte", "files": ["*.txt"], **changes})
    return folder


def direct(model: Any, ids: Sequence[int]) -> float:
    """Natural log probability of all ids but the first, read at once."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([list(ids[:-1])])).logits[0].double().log_softmax(dim=-1)
    return sum(float(logits[place - 1, ids[place]]) for place in range(1, len(ids)))


def test_bits_per_byte_of_pieces(tmp_path: Path) -> None:
    tasks = TaskSet.load(["text"], write(tmp_path, ["hello there\nold friend\n", "good bye\n"], characters=15))
    texts = [item.requests[0].continuation for item in tasks.skills["text"]]
    assert texts == ["hello there\n", "old friend\n", "good bye\n"]
    model, tokenizer = random_model("llama"), letters()
    with ScoreStore(":memory:") as store:
        scores = score_text_model(LiveTextModel(model, tokenizer), "m", tasks, store)
    for item, text in zip(tasks.skills["text"], texts, strict=True):
        bits = -direct(model, tokenizer(text)["input_ids"]) / math.log(2) / len(text)
        assert scores.losses["text"][item.id] == pytest.approx(bits, abs=1e-4)
        assert scores.items["text"][item.id] == pytest.approx(2**-bits, abs=1e-5)
    assert scores.status == "ok"


def test_bytes_are_those_of_utf_8(tmp_path: Path) -> None:
    class Half:
        def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
            return [(-len(text.encode()) * math.log(4), False) for _, text in pairs]

        def generate(self, prompts: Sequence[str], *, until: Sequence[str], max_new_tokens: int) -> list[str]:
            raise AssertionError

    tasks = TaskSet.load(["text"], write(tmp_path, ["äöü €"]))
    with ScoreStore(":memory:") as store:
        scores = score_text_model(Half(), "m", tasks, store)
    assert list(scores.losses["text"].values()) == [pytest.approx(2.0)]
    assert list(scores.items["text"].values()) == [pytest.approx(0.25)]


def test_a_piece_that_is_longer_than_the_model_reads_is_scored_whole() -> None:
    """Every id once: at first with all that is before it, from then on with at least half of what the model reads before it."""
    model, tokenizer = random_model("gpt2", n_positions=16), letters()
    text = "the beginning of this is not lost, and its end is scored as well"
    ids = tokenizer(text)["input_ids"]
    expected = direct(model, ids[:17])
    for start in range(17, len(ids), 8):
        stop = min(start + 8, len(ids))
        expected += direct(model, ids[stop - 17 : stop]) - direct(model, ids[stop - 17 : start])
    live = LiveTextModel(model, tokenizer)
    ((found, _),) = live.loglikelihood([("", text)])
    assert found == pytest.approx(expected, abs=1e-4)
    assert live.truncated == 0


@settings(max_examples=30, deadline=None)
@given(st.text(alphabet="ab \n", max_size=200), st.integers(1, 30))
def test_pieces_are_the_text(text: str, characters: int) -> None:
    found = list(pieces(text, characters))
    assert all(0 < len(piece) <= characters and piece.strip() for piece in found)
    assert "".join("".join(found).split()) == "".join(text.split())


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    for changes, said in (
        ({"files": ["*.md"]}, r"its data is not there: nothing matches '\*\.md' in "),
        ({"characters": 0}, "characters is 0; allowed is a whole number from 1"),
        ({"file": "x"}, "unknown key 'file'"),
    ):
        with pytest.raises(UserError, match=said):
            TaskSet.load(["text"], write(tmp_path, ["x"], **changes))
    with pytest.raises(UserError, match="its files hold no text"):
        TaskSet.load(["text"], write(tmp_path, [" \n"]))
    write(tmp_path, ["x"])
    (tmp_path / "1.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"1\.txt: cannot be read as UTF-8 text"):
        TaskSet.load(["text"], tmp_path)
