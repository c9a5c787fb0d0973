"""The README.md of an output: front matter that the hub understands, parents, recipe, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from modelglue.checkpoint.protocol import Checkpoint


def model_card(checkpoint: Checkpoint, recipe: str, references: Mapping[str, str]) -> str:
    """The card's text; a function of recipe and models, so equal recipes give equal cards, whatever the folder is called.

    `references`: how the recipe in the folder calls a model, where that is not what the checkpoint calls it.
    """
    description = checkpoint.describe()
    sources = checkpoint.sources()
    named = [str(source.describe().get("model")) for source in sources]
    models = list(dict.fromkeys(references.get(name, name) for name in named))
    hub = list(dict.fromkeys(source.hub_id for source in sources if source.hub_id is not None))
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["merge", "modelglue"]}
    if hub:
        front = {"base_model": hub, "base_model_relation": "merge", **front}
    method = description.get("method", "copy")
    rows = "\n".join(f"| `{model}` |" for model in models)
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# Merged model

Made with modelglue by the method `{method}` from:

| model |
|---|
{rows}

The recipe. Paths in it are seen from this folder; `modelglue merge modelglue_recipe.yaml ../again`, called here, gives these
same bytes again:

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
