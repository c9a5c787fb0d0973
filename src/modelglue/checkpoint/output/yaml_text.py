"""Recipes as text. A reference that looks like a number to the reader of recipes is quoted, so that it reads back as text."""

from __future__ import annotations

import re
from typing import Any

import yaml

#: 1e-3: the reader of recipes takes it for a number, YAML 1.1 (which wants 1.0e-3) for text
SHORT_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+")


class _Dumper(yaml.SafeDumper):
    """The safe one, with one more form of numbers to quote text against, and every value written out where it stands."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _short_lists_on_one_line(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.Node:
    """Layer ranges and gradients read as they are written by people."""
    plain = bool(items) and all(isinstance(item, int | float) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=plain)


_Dumper.add_representer(list, _short_lists_on_one_line)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"(?:{SHORT_FLOAT.pattern})$"), list("-+.0123456789"))


def yaml_text(value: Any) -> str:
    """JSON-ready data as YAML, keys in the order given."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False))
