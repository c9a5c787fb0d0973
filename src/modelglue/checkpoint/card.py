"""The README.md of an output: front matter that the hub understands, parents, recipe, and how to load it."""

from __future__ import annotations

from typing import Any

import yaml

from modelglue.checkpoint.protocol import Checkpoint


def model_card(checkpoint: Checkpoint, recipe: str, name: str) -> str:
    """The card's text; a function of recipe and models, so equal recipes give equal cards."""
    description = checkpoint.describe()
    sources = checkpoint.sources()
    models = list(dict.fromkeys(str(source.describe().get("model")) for source in sources))
    hub = list(dict.fromkeys(source.hub_id for source in sources if source.hub_id is not None))
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
