"""A shard of answers as a Parquet file that `data`, `datasets` and pyarrow read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec

AS_TEXT = ("tools", "chat_template_kwargs")
"""Columns whose objects differ from row to row; they are stored as JSON text, which `data` accepts."""


def write_parquet(path: Path, rows: list[bytes]) -> None:
    """Write JSON objects as one file, atomically."""
    import pyarrow
    import pyarrow.parquet

    decoded = [_flat(msgspec.json.decode(row)) for row in rows]
    names = dict.fromkeys(["messages", *(name for row in decoded for name in row)])
    columns = {name: _column([row.get(name) for row in decoded]) for name in names}
    beside = path.with_name(f".{path.name}.new")
    pyarrow.parquet.write_table(pyarrow.table(columns), beside, compression="zstd")
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(beside, path)


def _column(values: list[Any]) -> Any:
    """Return the values with their common type; as JSON text if they have none."""
    import pyarrow

    try:
        return pyarrow.array(values)
    except (pyarrow.ArrowException, OverflowError):
        return pyarrow.array([None if value is None else json.dumps(value, ensure_ascii=False) for value in values])


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row whose columns have the same types as those of other rows."""
    flat = {
        name: json.dumps(value, ensure_ascii=False) if name in AS_TEXT or value in ({}, []) else value
        for name, value in row.items()
    }
    flat["messages"] = [_flat_message(message) for message in row["messages"]]
    return flat


def _flat_message(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not calls:
        return message
    return {
        **message,
        "tool_calls": [
            {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
            for call in calls
        ],
    }
