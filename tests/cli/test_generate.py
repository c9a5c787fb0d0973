"""`modelglue generate`: what is printed where, for models, recipes and mixtures."""

from __future__ import annotations

import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from modelglue.mixture import ExpertSpec, RouterSpec, write_mixture
from tests.cli.conftest import Run
from tests.models.tiny import bigram_model, letters

_ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def _chain(letters_in_order: str) -> dict[str, str]:
    return dict(pairwise(letters_in_order))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`up` writes the alphabet on, `down` writes it backwards; behind `mixture`, prompts with digits go down."""
    folder = tmp_path_factory.mktemp("models")
    for name, chain in (("up", f"{_ALPHABET}\nab"), ("down", f"{_ALPHABET[::-1]}\nzy")):
        bigram_model(_chain(chain), letters()).save_pretrained(folder / name)
        letters().save_pretrained(folder / name)
    experts = [ExpertSpec("up", folder / "up", ("q", "w")), ExpertSpec("down", folder / "down", ("1", "2"))]
    write_mixture(folder / "mixture", experts, RouterSpec(gate_mode="hidden_avg"), encoder=folder / "up")
    return folder


def _stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def test_a_model_prints_its_text(run: Run, models: Path) -> None:
    result = run("generate", models / "up", "xyza", "--max-new-tokens", "3")
    assert (result.code, result.out, result.err) == (0, "bcd\n", "")


def test_several_prompts_in_their_order(run: Run, models: Path) -> None:
    result = run("generate", models / "up", "a", "c", "a", "--max-new-tokens", "2")
    assert (result.code, result.out, result.err) == (0, "bc\nde\nbc\n", "")


@pytest.mark.parametrize(
    ("until", "expected"),
    [(["f"], "bcde"), (["zz", "de"], "bc"), ([r"\n"], _ALPHABET[1:]), (["x", r"y\n"], _ALPHABET[1:-3]), ([], _ALPHABET[1:] + "\nab")],
)
def test_stop_strings(run: Run, models: Path, until: list[str], expected: str) -> None:
    options = [token for stop in until for token in ("--until", stop)]
    assert run("generate", models / "up", "a", *options, "--max-new-tokens", "28").out == expected + "\n"


def test_escapes_in_stop_strings(run: Run, models: Path) -> None:
    """A backslash before anything else is a backslash, as is one before a backslash."""
    assert run("generate", models / "up", "l", "--until", r"\\n", "--max-new-tokens", "4").out == "mnop\n"
    assert run("generate", models / "up", "l", "--until", r"\d", "--until", r"\t", "--max-new-tokens", "4").out == "mnop\n"


def test_which_expert_answered_is_said_beside_the_text(run: Run, models: Path) -> None:
    result = run("generate", models / "mixture", "q", "--max-new-tokens", "2")
    # Rows (<s> + q/2 + w/2) / sqrt 1.5 and the like; the prompt's mean is (<s> + q) / 2.
    up, down = 0.75 / 1.5**0.5, 0.5 / 1.5**0.5
    assert (result.code, result.out, result.err) == (0, "rs\n", f"up (up {up:.3f}, down {down:.3f})\n")
    result = run("generate", models / "mixture", "q", "12q", "", "--max-new-tokens", "1")
    assert result.out == "r\np\n\n"
    assert [line.split(" (")[0] for line in result.err.splitlines()] == ["1: up", "2: down", "3: up"]
    assert result.err.splitlines()[2] == "3: up (the prompt has no token)"


def test_quiet_leaves_the_text_alone(run: Run, models: Path) -> None:
    result = run("generate", models / "mixture", "q" * 90, "--max-new-tokens", "1", "--quiet")
    assert (result.code, result.out, result.err) == (0, "r\n", "")


def test_json_of_a_mixture(run: Run, models: Path) -> None:
    result = run("generate", models / "mixture", "1z1z", "", "--max-new-tokens", "2", "--json")
    assert result.err == ""
    first, second = json.loads(result.out)
    logits = first.pop("logits")
    assert first == {"prompt": "1z1z", "text": "yx", "expert": "down", "weight": 1.0}
    assert list(logits) == ["down", "up"]  # sorted, as all JSON is
    assert logits["down"] > logits["up"]
    assert second == {"prompt": "", "text": "", "expert": "up", "weight": 1.0, "logits": {}}


def test_json_of_a_model(run: Run, models: Path) -> None:
    result = run("generate", models / "up", "a", "--max-new-tokens", "2", "--json")
    assert json.loads(result.out) == [{"prompt": "a", "text": "bc", "expert": None, "weight": None, "logits": None}]


def test_prompts_from_standard_input(run: Run, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _stdin(monkeypatch, b"c\ne\r\n")  # and nothing else ends a line:
    assert run("generate", models / "up", "a", "-", "g", "--max-new-tokens", "1").out == "b\nd\nf\nh\n"
    _stdin(monkeypatch, "a\x0cb\u2028c\n".encode())
    assert run("generate", models / "up", "-", "--max-new-tokens", "1").out == "d\n"


@pytest.mark.parametrize("prompts", [["-"], []])
def test_no_prompt(run: Run, models: Path, monkeypatch: pytest.MonkeyPatch, prompts: list[str]) -> None:
    _stdin(monkeypatch, b"")
    result = run("generate", models / "up", *prompts)
    assert result.code == 2
    assert result.err.startswith("error: no prompt: give at least one")


def test_standard_input_that_is_no_text(run: Run, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _stdin(monkeypatch, b"\xff\xfe")
    result = run("generate", models / "up", "-")
    assert (result.code, result.out) == (2, "")
    assert result.err == "error: standard input: is not utf-8 (invalid start byte). Convert it first.\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\nb\xff\n"), encoding="utf-8", errors="surrogateescape"))
    assert run("generate", models / "up", "-").err == "error: line 2 of standard input: holds bytes that are no UTF-8. Convert it first.\n"


def test_arguments_that_are_no_text(run: Run, models: Path) -> None:
    for command in ("generate", "route"):
        result = run(command, models / "up", "a\udcff")
        assert (result.code, result.out) == (2, "")
        assert result.err == "error: the prompt 'a\\udcff': holds bytes that are no UTF-8. Convert it first.\n"


def test_a_prompt_may_begin_with_a_hyphen_but_a_mistyped_option_is_one(run: Run, models: Path) -> None:
    assert run("generate", models / "up", "- ab", "--max-new-tokens", "1").out == "c\n"
    result = run("generate", models / "up", "a", "--max-new-token", "1")
    assert result.code == 2
    assert "there is no option '--max-new-token'. Did you mean '--max-new-tokens'?" in result.err


def test_cut_prompts_are_said_to_be(run: Run, models: Path) -> None:
    result = run("generate", models / "up", "a" * 90, "a", "--max-new-tokens", "1")
    assert result.out == "b\nb\n"
    assert "warning: only the end of 1 of 2 prompts was read" in " ".join(result.err.split())
    result = run("generate", models / "mixture", "1" * 90, "--max-new-tokens", "1")
    assert "warning: only the end of 1 of 1 prompts was read" in " ".join(result.err.split())


def test_a_recipe_is_merged_in_memory(run: Run, models: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"method: linear\nmodels:\n  - {{model: {models / 'up'}, weight: 0.2}}\n  - {{model: {models / 'down'}, weight: 0.8}}\n"
    )
    assert run("generate", recipe, "c", "--max-new-tokens", "2").out == "ba\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]


@pytest.mark.parametrize("count", ["0", "-3"])
def test_no_tokens_is_a_mistake(run: Run, models: Path, count: str) -> None:
    result = run("generate", models / "up", "a", f"--max-new-tokens={count}")
    assert result.code == 2
    assert result.err == f"error: --max-new-tokens is {count}; allowed is a whole number from 1.\n"


def _empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    (folder / "empty" / "config.json").write_text("{}")
    return folder / "empty"


def _run_folder(folder: Path) -> Path:
    (folder / "run" / "mixture").mkdir(parents=True)
    (folder / "run" / "mixture" / "mixture.json").write_text("{}")
    return folder / "run"


def _damaged(folder: Path) -> Path:
    (folder / "damaged").mkdir()
    (folder / "damaged" / "mixture.json").write_text("{}")
    return folder / "damaged"


def _pickled(folder: Path) -> Path:
    (folder / "pickled").mkdir()
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"")
    return folder / "pickled"


def _no_tokenizer(folder: Path) -> Path:
    bigram_model({}, letters()).save_pretrained(folder / "mute")
    return folder / "mute"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_empty, "empty: is neither a model (it holds no .safetensors file) nor a mixture (it holds no mixture.json)."),
        (_run_folder, "run: is the folder of a run. Give its mixture, "),
        (_damaged, "mixture.json: is not a mixture of this format"),
        (_pickled, "pickled/pytorch_model.bin: is empty. Fetch or write it again."),
        (_no_tokenizer, "mute'): has no tokenizer"),
        (lambda folder: folder / "missing", "missing': no such file or folder."),
    ],
)
def test_what_is_neither_model_nor_mixture(run: Run, tmp_path: Path, make: Any, message: str) -> None:
    result = run("generate", make(tmp_path), "a")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ")
    assert message in result.err


def test_drawn_texts_are_a_function_of_the_seed(run: Run, models: Path) -> None:
    def drawn(*prompts: str, seed: str = "3") -> list[str]:
        options = ["--temperature", "50", "--seed", seed, "--max-new-tokens", "6", "--until", r"\n", "--quiet"]
        result = run("generate", models / "mixture", *prompts, *options)
        assert result.code == 0
        return result.out.splitlines()

    both = drawn("q", "12")
    assert [drawn("q"), drawn("12")] == [both[:1], both[1:]]
    assert drawn("q", "12", seed="4") != both
    assert both[0] != run("generate", models / "mixture", "q", "--max-new-tokens", "6", "--quiet").out.splitlines()[0]


def test_beams_and_what_is_in_memory_change_nothing_where_one_text_is_best(run: Run, models: Path) -> None:
    for options in (["--beams", "3"], ["--residency", "lru:1"], ["--residency", "all", "--dtype", "stored"]):
        assert run("generate", models / "mixture", "q", "1z", "--max-new-tokens", "2", "--quiet", *options).out == "rs\nyx\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--temperature", "-1"], "temperature is -1.0; allowed is 0 (the most probable token) to 100."),
        (["--top-p", "0"], "top_p is 0.0; allowed is a number above 0, up to 1."),
        (["--beams", "0"], "--beams is 0; allowed is a whole number from 1."),
        (["--beams", "2", "--temperature", "1"], "--beams is 2 and --temperature 1: beams are not drawn. Leave one of them out."),
        (["--residency", "lru:1"], "is one model, and --residency says which experts of a mixture are in memory. Leave it out."),
        (["--residency", "some"], "is one model"),
    ],
)
def test_settings_that_mean_nothing(run: Run, models: Path, options: list[str], said: str) -> None:
    result = run("generate", models / "up", "a", *options)
    assert (result.code, result.out) == (2, "")
    assert said in result.err


def test_no_such_residency(run: Run, models: Path) -> None:
    result = run("generate", models / "mixture", "a", "--residency", "lru:0")
    assert (result.code, result.err) == (2, "error: residency is 'lru:0'; allowed is all, lazy or lru:N with N from 1.\n")
