"""The chat template of the output."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modelglue.checkpoint.protocol import Checkpoint, SideFile, file_bytes
from modelglue.checkpoint.vocabulary.tokens import VOCABULARY_FILES, json_text, object_of
from modelglue.errors import RecipeError, UserError, did_you_mean

TEMPLATE_FILE, CONFIG_FILE, PROCESSOR_FILE = "chat_template.jinja", "tokenizer_config.json", "chat_template.json"
#: characters that a literal template has at least
_SHORTEST = 20

#: the public prompt formats, one line of Jinja each
TEMPLATES: Mapping[str, str] = {
    "alpaca": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'assistant' %}{{ '### Response:\\n' + message['content'] + eos_token }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "exaone": (
        "{% for message in messages %}"
        "{% if loop.first and message['role'] != 'system' %}{{ '[|system|][|endofturn|]\\n' }}{% endif %}"
        "{{ '[|' + message['role'] + '|]' + message['content'] }}"
        "{% if message['role'] == 'user' %}{{ '\\n' }}{% else %}{{ '[|endofturn|]\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "mistral": (
        "{% if messages and messages[0]['role'] == 'system' %}"
        "{% set system = messages[0]['content'] + '\\n\\n' %}{% set turns = messages[1:] %}"
        "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
        "{{ bos_token }}{% for message in turns %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
}


@dataclass(frozen=True)
class ChatTemplate:
    """Side files of the output that change for its chat template."""

    files: Mapping[str, SideFile] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def chat_template(models: Sequence[Checkpoint], output: Checkpoint, value: str) -> ChatTemplate:
    """Give `output` the template that `value` names: `auto` (the one that most of `models` have, the first of equally frequent ones;
    the output's own if none has any), a built-in format, or a literal Jinja template.

    It is written where the output keeps its template now, else into tokenizer_config.json. Raises RecipeError for any other value.
    """
    template = _majority(models) if value == "auto" else TEMPLATES.get(value) or _literal(value)
    if not any(name in output.files for name in VOCABULARY_FILES):
        return ChatTemplate({}, (f"chat_template: {_short(value)} has no effect, because the output has no tokenizer.",))
    if template is None:
        return ChatTemplate()
    return ChatTemplate(_written(output.files, template))


def template_of(files: Mapping[str, SideFile]) -> str | None:
    """The default template among the files of a tokenizer, None if it has none."""
    if TEMPLATE_FILE in files:
        try:
            return file_bytes(files[TEMPLATE_FILE]).decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{files[TEMPLATE_FILE]!s}: is not UTF-8 text. Restore the file.") from error
    for name in (CONFIG_FILE, PROCESSOR_FILE):
        found = (object_of(files, name) or {}).get("chat_template")
        if isinstance(found, list):
            found = next((entry.get("template") for entry in found if isinstance(entry, Mapping) and entry.get("name") == "default"), None)
        if isinstance(found, str):
            return found
    return None


def _majority(models: Sequence[Checkpoint]) -> str | None:
    found = [template.strip() for model in models if (template := template_of(model.files)) is not None and template.strip()]
    if not found:
        return None
    counts = Counter(found)
    return max(counts, key=lambda template: counts[template])  # of equal counts the one that was seen first


def _literal(value: str) -> str:
    if len(value) < _SHORTEST or "{" not in value:
        raise RecipeError(
            f"chat_template: {_short(value)} is neither auto, nor a built-in format ({', '.join(TEMPLATES)}), nor a Jinja template of at "
            f"least {_SHORTEST} characters.{did_you_mean(value, ['auto', *TEMPLATES])}"
        )
    import jinja2

    try:  # transformers knows a tag of its own, which marks what the assistant says
        plain = re.sub(r"\{%(-?)\s*(end)?generation\s*(-?)%\}", "", value)
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except jinja2.TemplateSyntaxError as error:
        raise RecipeError(f"chat_template: is not valid Jinja, line {error.lineno}: {error.message}.") from error
    return value


def _written(files: Mapping[str, SideFile], template: str) -> dict[str, SideFile]:
    changed: dict[str, SideFile] = {}
    if TEMPLATE_FILE in files and file_bytes(files[TEMPLATE_FILE]) != template.encode():
        changed[TEMPLATE_FILE] = template.encode()
    for name in (CONFIG_FILE, PROCESSOR_FILE):
        value = object_of(files, name)
        if value is None or (value.get("chat_template") is None and (name == PROCESSOR_FILE or TEMPLATE_FILE in files)):
            continue
        new = _replaced(value.get("chat_template"), template)
        if new != value.get("chat_template"):
            changed[name] = json_text({**value, "chat_template": new})
    if TEMPLATE_FILE not in files and CONFIG_FILE not in files:
        changed[TEMPLATE_FILE] = template.encode()
    return changed


def _replaced(old: Any, template: str) -> Any:
    """A list of named templates keeps the others."""
    if not isinstance(old, list):
        return template
    return [{"name": "default", "template": template}, *(entry for entry in old if not _is_default(entry))]


def _is_default(entry: Any) -> bool:
    return isinstance(entry, Mapping) and entry.get("name") == "default"


def _short(value: str) -> str:
    return repr(value if len(value) <= 60 else f"{value[:57]}...")
