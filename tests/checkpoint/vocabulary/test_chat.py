"""Which chat template the output gets, and where it stands."""

from __future__ import annotations

import json
from typing import Any

import jinja2
import pytest

from modelglue.checkpoint import TensorsCheckpoint, file_bytes
from modelglue.checkpoint.vocabulary import TEMPLATES, chat_template
from modelglue.errors import RecipeError
from tests.checkpoint.vocabulary.models import model

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "Why?"}]
SYSTEM = [{"role": "system", "content": "Be kind."}, *TALK]


def of(seed: int, template: Any = None, **files: bytes) -> TensorsCheckpoint:
    config = {"eos_token": "</s>", **({} if template is None else {"chat_template": template})}
    named = {name.replace("_dot_", "."): data for name, data in files.items()}
    return model("ab", seed=seed, files={"tokenizer_config.json": json.dumps(config).encode(), **named})


@pytest.mark.parametrize(
    ("name", "messages", "prompt", "text"),
    [
        ("chatml", TALK[:1], True, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        ("chatml", SYSTEM[:2], False, "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"),
        (
            "llama3", SYSTEM[:2], True,
            "<B><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("mistral", TALK, False, "<B>[INST] Hi [/INST] Ho<E>[INST] Why? [/INST]"),
        ("mistral", SYSTEM, True, "<B>[INST] Be kind.\n\nHi [/INST] Ho<E>[INST] Why? [/INST]"),
        ("alpaca", SYSTEM[:2], True, "<B>Be kind.\n\n### Instruction:\nHi\n\n### Response:\n"),
        ("alpaca", TALK, False, "<B>### Instruction:\nHi\n\n### Response:\nHo<E>### Instruction:\nWhy?\n\n"),
        ("exaone", TALK[:2], True, "[|system|][|endofturn|]\n[|user|]Hi\n[|assistant|]Ho[|endofturn|]\n[|assistant|]"),
        ("exaone", SYSTEM[:2], False, "[|system|]Be kind.[|endofturn|]\n[|user|]Hi\n"),
    ],
)  # fmt: skip
def test_built_in_formats(name: str, messages: list[dict[str, str]], prompt: bool, text: str) -> None:
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined).from_string(TEMPLATES[name])
    assert template.render(messages=messages, add_generation_prompt=prompt, bos_token="<B>", eos_token="<E>") == text
    made = chat_template([], of(1), name).files["tokenizer_config.json"]
    assert json.loads(file_bytes(made)) == {"eos_token": "</s>", "chat_template": TEMPLATES[name]}


def test_auto_takes_the_most_frequent_and_of_equals_the_first() -> None:
    def chosen(*templates: Any) -> Any:
        files = chat_template([of(number, one) for number, one in enumerate(templates)], of(9), "auto").files
        return json.loads(file_bytes(files["tokenizer_config.json"]))["chat_template"] if files else None

    assert chosen("x", "y", " y\n") == "y"
    assert chosen("x", "y") == "x"
    assert chosen("y", "x", None) == "y"
    assert chosen(None, " ", None) is None
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert chosen(named, "x", "d") == "d"
    assert chosen([{"name": "tool_use", "template": "t"}]) is None


def test_auto_keeps_what_is_there() -> None:
    """The donor's own template, spaces and all, if it is the chosen one up to blanks: nothing is written."""
    donor = of(1, "{{ same }}")
    assert chat_template([donor, donor], donor, "auto").files == {}


def test_it_stands_where_the_output_keeps_it() -> None:
    jinja = of(1, chat_template_dot_jinja=b"old")
    assert chat_template([], jinja, "chatml").files == {"chat_template.jinja": TEMPLATES["chatml"].encode()}
    both = of(1, "old", chat_template_dot_jinja=b"old", chat_template_dot_json=b'{"chat_template": "old"}')
    found = chat_template([], both, "chatml").files
    assert sorted(found) == ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"]
    assert json.loads(file_bytes(found["chat_template.json"])) == {"chat_template": TEMPLATES["chatml"]}
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    found = chat_template([], of(1, named), "chatml").files
    assert json.loads(file_bytes(found["tokenizer_config.json"]))["chat_template"] == [
        {"name": "default", "template": TEMPLATES["chatml"]}, named[1],
    ]  # fmt: skip
    assert chat_template([], model("ab"), "chatml").files == {"chat_template.jinja": TEMPLATES["chatml"].encode()}


def test_auto_reads_templates_from_every_place() -> None:
    jinja, processor = of(1, "z", chat_template_dot_jinja=b"j\n"), of(2, chat_template_dot_json=b'{"chat_template": "j"}')
    found = chat_template([of(3, "z"), jinja, processor], of(4), "auto").files
    assert json.loads(file_bytes(found["tokenizer_config.json"]))["chat_template"] == "j"


def test_literal_templates_are_checked() -> None:
    text = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    found = chat_template([], of(1), text).files
    assert json.loads(file_bytes(found["tokenizer_config.json"]))["chat_template"] == text
    with pytest.raises(RecipeError, match=r"'chatlm' is neither auto, nor a built-in format \(alpaca, .*Did you mean 'chatml'"):
        chat_template([], of(1), "chatlm")
    with pytest.raises(RecipeError, match="nor a Jinja template of at least 20 characters"):
        chat_template([], of(1), "no variable in this long text at all")
    with pytest.raises(RecipeError, match="is not valid Jinja, line 2: "):
        chat_template([], of(1), "{% for m in messages %}\n{% endif %}")


def test_without_a_tokenizer_it_has_no_effect_and_that_is_said() -> None:
    bare = model("ab", files={"tokenizer.json": None})
    found = chat_template([of(1, "x")], bare, "chatml")
    assert found.files == {}
    assert found.warnings == ("chat_template: 'chatml' has no effect, because the output has no tokenizer.",)
