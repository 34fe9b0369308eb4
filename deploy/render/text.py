"""Documents as YAML for people: a text of several lines stands there line by line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml


class _Dumper(yaml.SafeDumper):
    pass


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def to_yaml(documents: Sequence[dict[str, Any]]) -> str:
    """One document, or several with `---` before each."""
    text: str = yaml.dump_all(
        documents, Dumper=_Dumper, sort_keys=False, width=110, explicit_start=len(documents) > 1
    )
    return text
