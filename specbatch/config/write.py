"""Writes values as YAML that has the same meaning in YAML 1.1 and 1.2."""

from __future__ import annotations

from typing import Any

import yaml

from specbatch.config.document import Loader
from specbatch.config.rules import Bytes, Interval


class _Dumper(yaml.SafeDumper):
    """PyYAML's dumper, which quotes texts that a reader could interpret as a number, a date or a boolean."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    plain = "tag:yaml.org,2002:str"
    odd = any(
        reader("").resolve(yaml.ScalarNode, value, (True, False)) != plain for reader in (yaml.SafeLoader, Loader)
    )
    return dumper.represent_scalar(plain, value, style="'" if odd and "\n" not in value else None)


_Dumper.add_representer(str, _text)
_Dumper.add_representer(Interval, lambda dumper, value: dumper.represent_scalar("tag:yaml.org,2002:str", str(value)))
_Dumper.add_representer(Bytes, lambda dumper, value: dumper.represent_scalar("tag:yaml.org,2002:str", str(value)))


def to_yaml(value: Any) -> str:
    """Format a value as YAML in block style."""
    return yaml.dump(_lists(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=4096)


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(inner) for key, inner in value.items()}
    return [_lists(inner) for inner in value] if isinstance(value, list | tuple) else value
