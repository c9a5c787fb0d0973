"""The README.md of an output: front matter that the hub understands, parents, recipe, and how to load it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from modelglue.checkpoint.protocol import Checkpoint

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def parents(description: dict[str, Any]) -> list[str]:
    """Every model reference of a description, in order, once."""
    return list(dict.fromkeys(_references(description)))


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, child in value.items():
            if key in ("model", "base") and isinstance(child, str):
                yield child
            else:
                yield from _references(child)
    elif isinstance(value, list):
        for child in value:
            yield from _references(child)


def model_card(checkpoint: Checkpoint, recipe: str, name: str) -> str:
    """The card's text; a function of the recipe alone, so equal recipes give equal cards."""
    description = checkpoint.describe()
    models = parents(description)
    hub = [model.partition("@")[0] for model in models if _HUB_ID.fullmatch(model) and not model.startswith(".")]
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["merge", "modelglue"]}
    if hub:
        front = {"base_model": hub, "base_model_relation": "merge", **front}
    method = description.get("method", "copy")
    rows = "\n".join(f"| `{model}` |" for model in models)
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {name}

Made with modelglue by the method `{method}` from:

| model |
|---|
{rows}

The recipe, which gives these same bytes again (`modelglue merge modelglue_recipe.yaml out/`):

```yaml
{recipe.strip()}
```

To load it:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
"""
