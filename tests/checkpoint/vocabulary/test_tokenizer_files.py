"""The tokenizers that a merge makes: transformers loads them, and text is cut as the parents cut it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from modelglue.checkpoint import TensorsCheckpoint, file_bytes
from modelglue.checkpoint.vocabulary import FromModel, TokenPolicy, VocabularyRequest, align, dressed, vocabulary
from tests.checkpoint.vocabulary.models import added, model, trained, with_added

KINDS = ("BPE", "WordPiece", "Unigram", "WordLevel")
CONFIG = b'{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 64}'


def of(tokenizer: Tokenizer, seed: int, files: dict[str, Any] | None = None) -> TensorsCheckpoint:
    return model(tokenizer.to_str().encode(), seed=seed, files={"tokenizer_config.json": CONFIG, **(files or {})}, eos_token_id=2)


def output_of(models: list[TensorsCheckpoint], request: VocabularyRequest | None = None) -> Any:
    alignment = align(models, None, request or VocabularyRequest())
    return dressed(alignment.models[0], config=alignment.config, files=alignment.files), alignment


def loaded(output: Any, folder: Path) -> Any:
    from transformers import AutoTokenizer

    folder.mkdir()
    for name, file in output.files.items():
        (folder / name).write_bytes(file_bytes(file))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": output.config["vocab_size"]}))
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_union_cuts_text_as_its_parents_do(kind: str, tmp_path: Path) -> None:
    """Ordinary tokens of the second model get behind the added ones of the first, and keep their settings, scores and merges."""
    first = with_added(trained(kind, "a", 45), "<|im_start|>", "<|im_end|>")
    second = with_added(trained(kind, "b", 60), "<|tool|>", special=False)
    output, alignment = output_of([of(first, 1), of(second, 2)])
    ids = first.get_vocab()
    for token, _ in sorted(second.get_vocab().items(), key=lambda item: item[1]):
        if token not in ids:
            ids[token] = len(ids)
    assert alignment.warnings == ()
    made = Tokenizer.from_str(output.files["tokenizer.json"].decode())
    assert made.get_vocab() == ids
    found = vocabulary(output)
    assert found is not None
    assert found.ids == ids
    fast = loaded(output, tmp_path / "out")
    assert fast.get_vocab() == ids
    assert len(fast) == output.config["vocab_size"] == len(ids)
    assert fast.eos_token_id == 2
    for text in ("the cat sat on the mat", "<|im_start|>the mat<|im_end|>"):
        assert fast.encode(text, add_special_tokens=False) == first.encode(text, add_special_tokens=False).ids
    assert fast.convert_ids_to_tokens(fast.encode("<|tool|>", add_special_tokens=False)) == ["<|tool|>"]
    word = "lowest" if kind != "BPE" else "widest"
    pieces = fast.convert_ids_to_tokens(fast.encode(word, add_special_tokens=False))
    assert pieces == second.encode(word, add_special_tokens=False).tokens
    assert fast.decode(fast.encode("the cat", add_special_tokens=False)).strip() == "the cat"


@pytest.mark.parametrize("kind", KINDS)
def test_added_tokens_alone_do_not_touch_the_rest(kind: str, tmp_path: Path) -> None:
    plain = trained(kind, "a", 45)
    extended = with_added(trained(kind, "a", 45), "<|x|>", "<|y|>")
    request = VocabularyRequest(tokens={"<|new|>": TokenPolicy(), "<|y|>": TokenPolicy(FromModel(1))}, pad_to_multiple_of=8)
    output, _ = output_of([of(plain, 1), of(extended, 2)], request)
    made, before = json.loads(output.files["tokenizer.json"]), json.loads(plain.to_str())
    assert made["model"] == before["model"]
    assert {key: made[key] for key in made if key not in ("model", "added_tokens")} == {
        key: before[key] for key in before if key not in ("model", "added_tokens")
    }
    size = plain.get_vocab_size()
    fast = loaded(output, tmp_path / "out")
    assert fast.convert_tokens_to_ids(["<|x|>", "<|y|>", "<|new|>"]) == [size, size + 1, size + 2]
    assert output.config["vocab_size"] == -(-(size + 3) // 8) * 8
    assert fast.encode("<|new|>", add_special_tokens=False) == [size + 2]


def test_merges_are_appended_where_both_parts_and_the_result_exist() -> None:
    first, second = trained("BPE", "a", 45), trained("BPE", "b", 60)
    output, _ = output_of([of(first, 1), of(second, 2)])
    made = json.loads(output.files["tokenizer.json"])["model"]
    ours, theirs = (json.loads(one.to_str())["model"] for one in (first, second))
    count = len(ours["merges"])
    assert made["merges"][:count] == ours["merges"]
    assert made["merges"][count:] == [merge for merge in theirs["merges"] if merge not in ours["merges"]]
    assert all(set(merge) | {"".join(merge)} <= made["vocab"].keys() for merge in made["merges"])


def test_merges_keep_the_way_they_are_written() -> None:
    """Older files write "a b"; a part with a space in it can only stand in a list."""
    first, second = (json.loads(trained("BPE", name, size).to_str()) for name, size in (("a", 45), ("b", 60)))
    first["model"]["merges"] = [" ".join(merge) for merge in first["model"]["merges"]]
    a, b = (model(json.dumps(one).encode(), seed=seed) for seed, one in enumerate((first, second), 1))
    made = json.loads(output_of([a, b])[0].files["tokenizer.json"])["model"]["merges"]
    assert all(isinstance(merge, str) for merge in made)
    assert len(made) > len(first["model"]["merges"])
    second["model"]["vocab"].update({"x y": 60, "xx y": 61, "x": 62})
    second["model"]["merges"].append(["x", "x y"])
    b = model(json.dumps(second).encode(), seed=2)
    made = json.loads(output_of([a, b])[0].files["tokenizer.json"])["model"]["merges"]
    assert made[-1] == ["x", "x y"]
    assert made[0] == first["model"]["merges"][0].split(" ")


def test_a_tokenizer_of_another_kind_is_warned_of() -> None:
    output, alignment = output_of([of(trained("BPE", "a", 45), 1), of(trained("WordPiece", "b", 60), 2)])
    assert len(alignment.warnings) == 1
    assert "its tokenizer cuts text differently (WordPiece Whitespace Lowercase instead of BPE ByteLevel)" in alignment.warnings[0]
    Tokenizer.from_str(output.files["tokenizer.json"].decode())


def test_tokens_without_rows_leave_the_tokenizer_with_their_merges(tmp_path: Path) -> None:
    """Five ordinary tokens and an added one too many: their merges go, a lost padding token loses its role, what is left loads."""
    first = with_added(trained("BPE", "a", 45), "<pad>")
    rows = first.get_vocab_size() - 6
    special = b'{"pad_token": "<pad>", "eos_token": "</s>"}'
    cut = model(first.to_str().encode(), rows, seed=1, files={"tokenizer_config.json": CONFIG, "special_tokens_map.json": special})
    alignment = align([cut], None, VocabularyRequest("base"))
    output = dressed(alignment.models[0], config=alignment.config, files=alignment.files)
    assert alignment.models[0] is cut
    fast = loaded(output, tmp_path / "out")
    assert sorted(fast.get_vocab().values()) == list(range(rows))
    assert json.loads(file_bytes(output.files["special_tokens_map.json"])) == {"eos_token": "</s>"}
    assert output.files["tokenizer_config.json"] is cut.files["tokenizer_config.json"]
    assert alignment.warnings[1].endswith(
        "special_tokens_map.json calls '<pad>' its pad_token, which has no row; the output has no pad_token there."
    )
    assert max(fast.encode("the cats sat on the mats")) < rows


def test_the_decoder_of_added_tokens_is_extended() -> None:
    """tokenizer_config.json repeats added tokens under their ids; it is rewritten only if it does."""
    decoder = {"added_tokens_decoder": {"2": {"content": "<t>", "special": True}}, "eos_token": "</s>"}
    a = model("ab", seed=1, added_tokens=[added("<t>", 2)], files={"tokenizer_config.json": json.dumps(decoder).encode()})
    b = model("ab", seed=2, added_tokens=[added("<u>", 2)])
    made = json.loads(align([a, b], None, VocabularyRequest()).files["tokenizer_config.json"])  # type: ignore[arg-type]
    assert made["eos_token"] == "</s>"
    assert list(made["added_tokens_decoder"]) == ["2", "3"]
    assert made["added_tokens_decoder"]["3"] == {
        "content": "<u>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True,
    }  # fmt: skip


# -- without a tokenizer.json -----------------------------------------------------------------------------------------------------


def test_vocab_json_and_merges_txt(tmp_path: Path) -> None:
    def files(name: str, size: int, extra: str) -> dict[str, Any]:
        value = json.loads(trained("BPE", name, size, ["<unk>", "</s>"]).to_str())["model"]
        merges = "".join(f"{a} {b}\n" for a, b in value["merges"])
        return {
            "tokenizer.json": None, "vocab.json": json.dumps(value["vocab"]).encode(), "merges.txt": f"#version: 0.2\n{merges}".encode(),
            "added_tokens.json": json.dumps({extra: len(value["vocab"])}).encode(),
            "tokenizer_config.json": b'{"tokenizer_class": "GPT2Tokenizer", "unk_token": "<unk>", '
            b'"bos_token": "</s>", "eos_token": "</s>"}',
        }  # fmt: skip

    first, second = files("a", 45, "<|x|>"), files("b", 60, "<|y|>")
    size, other = (max(json.loads(one["added_tokens.json"]).values()) for one in (first, second))
    a, b = model({}, size + 1, seed=1, files=first), model({}, other + 1, seed=2, files=second)
    output, alignment = output_of([a, b])
    assert alignment.warnings == ()
    ids = vocabulary(output).ids  # type: ignore[union-attr]
    assert sorted(ids.values()) == list(range(len(ids)))
    assert ids["<|x|>"] == size
    assert json.loads(output.files["added_tokens.json"]) == {"<|x|>": size, "<|y|>": len(ids) - 1}
    assert output.files["merges.txt"].startswith(first["merges.txt"])
    slow = loaded(output, tmp_path / "out")
    assert slow.get_vocab() == ids
    assert slow.convert_ids_to_tokens(slow.encode("widest")) == trained("BPE", "b", 60, ["<unk>", "</s>"]).encode("widest").tokens


def test_vocab_txt(tmp_path: Path) -> None:
    base = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat"]
    config = b'{"tokenizer_class": "BertTokenizer"}'

    def bert(words: list[str], seed: int) -> TensorsCheckpoint:
        text = "".join(f"{word}\n" for word in words).encode()
        return model({}, len(words), seed=seed, files={"tokenizer.json": None, "vocab.txt": text, "tokenizer_config.json": config})

    output, _ = output_of([bert(base, 1), bert([*base[:5], "dog", "the", "##s"], 2)])
    assert output.files["vocab.txt"].decode().split() == [*base, "dog", "##s"]
    fast = loaded(output, tmp_path / "out")
    assert fast.encode("the dogs", add_special_tokens=False) == [5, 7, 8]


def test_a_sentencepiece_model_is_extended_at_its_end() -> None:
    from modelglue.checkpoint.vocabulary.pieces import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Piece, append_pieces, read_pieces

    base = [Piece("<unk>", 0.0, UNKNOWN), Piece("<s>", 0.0, CONTROL), Piece("\u2581the", -1.5), Piece("a", -3.0)]
    trainer = b"\x12\x02\x08\x07"  # another field of the file

    def llama(pieces: list[Piece], seed: int, extra: dict[str, int] | None = None) -> TensorsCheckpoint:
        files: dict[str, Any] = {"tokenizer.json": None, "tokenizer.model": append_pieces(trainer, pieces)}
        if extra:
            files["added_tokens.json"] = json.dumps(extra).encode()
        return model({}, len(pieces) + len(extra or {}), seed=seed, files=files)

    a, b = llama(base, 1, {"<|x|>": 4}), llama([*base[:2], Piece("b", -2.5), base[3]], 2, {"<|y|>": 4})
    output, _ = output_of([a, b])
    assert file_bytes(output.files["tokenizer.model"]).startswith(file_bytes(a.files["tokenizer.model"]))
    assert read_pieces(output.files["tokenizer.model"]) == [
        *base, Piece("<|x|>", 0.0, USER_DEFINED), Piece("b", -2.5, NORMAL), Piece("<|y|>", 0.0, USER_DEFINED),
    ]  # fmt: skip
    assert json.loads(output.files["added_tokens.json"]) == {"<|x|>": 4, "<|y|>": 6}
    assert vocabulary(output).ids["b"] == 5  # type: ignore[union-attr]
    only_added, _ = output_of([llama(base, 1), llama(base, 2, {"<|y|>": 4})])
    assert only_added.files["tokenizer.model"] == a.files["tokenizer.model"]
    assert json.loads(only_added.files["added_tokens.json"]) == {"<|y|>": 4}


def test_a_sentencepiece_model_that_numbers_otherwise_is_left_out() -> None:
    from modelglue.checkpoint.vocabulary.pieces import Piece, append_pieces

    pieces = append_pieces(b"", [Piece("b"), Piece("a")])
    a = model("ab", seed=1, files={"tokenizer.model": pieces, "tekken.json": b"{}"})
    output, alignment = output_of([a, model("abc", seed=2)])
    assert sorted(output.files) == ["tokenizer.json"]
    assert [warning.split(" cannot")[0] for warning in alignment.warnings] == ["tokenizer.model", "tekken.json"]
