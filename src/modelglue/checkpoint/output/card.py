"""The README.md of an output: front matter that the hub understands, parents with their licences, recipe, and how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from modelglue.checkpoint.output.licence import Parent, common_licence, licence_warnings, parents
from modelglue.checkpoint.protocol import Checkpoint

_OWN_CODE = (
    "It needs modelling code of its own, because no class of transformers holds experts that are joined in this way: "
    "`modeling_mixture.py` and `configuration_mixture.py` in this folder, which need torch and transformers and nothing else. "
    "transformers runs them when it is told `trust_remote_code=True`; read them first."
)
#: ending of the class's name -> (what the hub calls the task, transformers' class that loads it)
_TASKS = (
    (r"ForCausalLM|LMHeadModel", "text-generation", "AutoModelForCausalLM"),
    (r"(?:T5|UMT5|MT5|Bart|MBart|Pegasus|Marian|LED|Prophet\w*)ForConditionalGeneration|ForSeq2SeqLM", None, "AutoModelForSeq2SeqLM"),
    (r"(?:Whisper|SpeechT5|Speech2Text)\w*ForConditionalGeneration", "automatic-speech-recognition", "AutoModelForSpeechSeq2Seq"),
    (r"ForConditionalGeneration|ForVision2Seq|ForImageTextToText", "image-text-to-text", "AutoModelForImageTextToText"),
    (r"ForSequenceClassification", "text-classification", "AutoModelForSequenceClassification"),
    (r"ForTokenClassification", "token-classification", "AutoModelForTokenClassification"),
    (r"ForQuestionAnswering", "question-answering", "AutoModelForQuestionAnswering"),
    (r"ForMaskedLM", "fill-mask", "AutoModelForMaskedLM"),
    (r"ForImageClassification", "image-classification", "AutoModelForImageClassification"),
)


def model_card(checkpoint: Checkpoint, recipe: str, references: Mapping[str, str]) -> str:
    """The card's text; a function of recipe and models, so equal recipes give equal cards, whatever the folder is called.

    `references`: how the recipe in the folder calls a model, where that is not what the checkpoint calls it. Never needs the network.
    """
    found = parents(checkpoint, references)
    front = yaml.safe_dump(_front_matter(checkpoint, found), sort_keys=False, allow_unicode=True).strip()
    return f"""---
{front}
---

{_heading(checkpoint)}

{_table(found)}

{_licences(found)}

{_about_recipe(checkpoint)}

```yaml
{recipe.strip()}
```

To load it:

```python
{_loading(checkpoint)}
```
"""


def _about_recipe(checkpoint: Checkpoint) -> str:
    if "training" in checkpoint.describe():
        return (
            "How it was trained, and from what. Paths are seen from this folder; `modelglue verify .` says whether the weights are still "
            "the bytes that were written:"
        )
    return (
        f"The recipe. Paths in it are seen from this folder; `modelglue {_command(checkpoint)} modelglue_recipe.yaml ../again`, "
        "called here, gives\nthese same bytes again, and `modelglue verify .` says whether these are still the bytes that were written:"
    )


def _command(checkpoint: Checkpoint) -> str:
    """Which command the recipe is for."""
    return "mix" if "experts" in checkpoint.describe() else "merge"


def _heading(checkpoint: Checkpoint) -> str:
    described = checkpoint.describe()
    if "training" in described:
        return "# Trained model\n\nTrained further with modelglue from:"
    if "experts" not in described:
        return f"# Merged model\n\nMade with modelglue by the method `{described.get('method', 'copy')}` from:"
    oldest = None if "auto_map" in checkpoint.config else checkpoint.config.get("transformers_version")
    needs = f" Needs transformers {oldest} or later." if oldest else ""
    kind = next(iter(checkpoint.config.get("architectures") or []), "one model")
    code = f"\n\n{_OWN_CODE}\n\n" if "auto_map" in checkpoint.config else " "
    return f"# Mixture of experts\n\n{len(described['experts'])} experts in one `{kind}`.{needs}{code}Made with modelglue from:"


def _front_matter(checkpoint: Checkpoint, found: Sequence[Parent]) -> dict[str, Any]:
    """The hub's fields; a licence only where every parent has it."""
    front: dict[str, Any] = {}
    if hub := list(dict.fromkeys(parent.hub_id for parent in found if parent.hub_id is not None)):
        front = {"base_model": hub, "base_model_relation": "finetune" if "training" in checkpoint.describe() else "merge"}
    front["library_name"] = "transformers"
    if (tag := _task(checkpoint)[0]) is not None:
        front["pipeline_tag"] = tag
    if (licence := common_licence(list(found))) is not None:
        front["license"] = licence.id
        front |= {key: value for key, value in (("license_name", licence.name), ("license_link", licence.link)) if value is not None}
    if "training" in checkpoint.describe():
        return {**front, "tags": ["modelglue"]}
    return {**front, "tags": ["merge", "modelglue", *(["moe"] if _command(checkpoint) == "mix" else [])]}


def _table(found: Sequence[Parent]) -> str:
    """A column of which nothing is known is left out."""
    columns = [("model", [f"`{parent.reference}`" for parent in found])]
    if any(parent.revision for parent in found):
        columns.append(("revision", [f"`{parent.revision}`" if parent.revision else "" for parent in found]))
    if any(parent.record for parent in found):
        columns.append(("record", [f"`{parent.record[:16]}`" if parent.record else "" for parent in found]))
    if any(parent.licence.id for parent in found):
        columns.append(("licence", [str(parent.licence) for parent in found]))
    rows = zip(*(values for _, values in columns), strict=True)
    lines = [[title for title, _ in columns], ["---"] * len(columns), *rows]
    return "\n".join("|" + "|".join(cell if cell == "---" else f" {_cell(cell)} " for cell in line) + "|" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _licences(found: Sequence[Parent]) -> str:
    warnings = licence_warnings(list(found))
    if warnings:
        return "Licences: no legal advice, but read this before you publish the model.\n\n" + "\n".join(f"- {line}" for line in warnings)
    if (licence := common_licence(list(found))) is not None:
        return f"Every parent is under {licence}."
    if all(parent.licence.id is None for parent in found):
        return "No parent names its licence where it lay. Find out whether they may be merged and published before you publish this model."
    return "The parents are under several licences, of which none is known to forbid a merge; each asks to be named."


def _task(checkpoint: Checkpoint) -> tuple[str | None, str]:
    names = checkpoint.config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    for pattern, tag, loader in _TASKS:
        if re.search(rf"(?:{pattern})$", name):
            return tag, loader
    return None, "AutoModel" if name else "AutoModelForCausalLM"


def _loading(checkpoint: Checkpoint) -> str:
    loader, files = _task(checkpoint)[1], checkpoint.files
    reader = "AutoProcessor" if {"processor_config.json", "preprocessor_config.json"} & set(files) else "AutoTokenizer"
    lines = [f"from transformers import {', '.join(sorted([loader, reader]))}", ""]
    trusted = ", trust_remote_code=True" if "auto_map" in checkpoint.config else ""
    lines += [f'model = {loader}.from_pretrained("path/to/this/folder"{trusted})']
    lines += [f'{reader.removeprefix("Auto").lower()} = {reader}.from_pretrained("path/to/this/folder"{trusted})']
    return "\n".join(lines)
