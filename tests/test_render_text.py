"""Documents as YAML for people."""

from __future__ import annotations

import yaml

from deploy.render.text import to_yaml


def test_lines_stand_as_lines_and_read_back() -> None:
    inner = to_yaml([{"name": "chat", "list": [1, 2]}])
    made = [{"kind": "A", "text": inner}, {"kind": "B"}]
    text = to_yaml(made)
    assert "text: |\n" in text
    assert "\n  name: chat\n" in text
    assert list(yaml.safe_load_all(text)) == made
