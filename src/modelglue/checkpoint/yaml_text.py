"""Recipes as text. A reference that looks like a number to the reader of recipes is quoted, so that it reads back as text."""

from __future__ import annotations

import re
from typing import Any

import yaml

#: 1e-3: the reader of recipes takes it for a number, YAML 1.1 (which wants 1.0e-3) for text
SHORT_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+")


class _Dumper(yaml.SafeDumper):
    """The safe one, with one more form of numbers to quote text against."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"(?:{SHORT_FLOAT.pattern})$"), list("-+.0123456789"))


def yaml_text(value: Any) -> str:
    """JSON-ready data as YAML, keys in the order given."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True))
