"""The user's own function through which rows pass first (``data.transform``)."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from specbatch.errors import UserError

Transform = Callable[[dict[str, Any]], dict[str, Any] | None]


def load_transform(name: str) -> Transform:
    """Return the function that ``module:function`` or ``file.py:function`` names.

    Raises:
        UserError: there is none, or its module can't be loaded.
    """
    module, _, function = name.rpartition(":")
    if not module or not function.isidentifier():
        raise UserError(f"data.transform: {name}: must be module:function or file.py:function")
    try:
        if module.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(module).stem, module)
            assert spec is not None
            assert spec.loader is not None
            loaded = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded)
        else:
            loaded = importlib.import_module(module)
        found = getattr(loaded, function)
    except Exception as error:  # whatever the user's code raises
        raise UserError(f"data.transform: {name} cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise UserError(f"data.transform: {name} is not a function")
    return found


def transform_fingerprint(name: str) -> str:
    """Return a hash of the file that defines the transform; empty without one. Files that it imports are not covered.

    Raises:
        UserError: the same as `load_transform`.
    """
    if not name:
        return ""
    module = name.rpartition(":")[0]
    path = module if module.endswith(".py") else inspect.getsourcefile(load_transform(name))
    if path is None or not Path(path).is_file():
        raise UserError(f"data.transform: {name}: is not defined in a file, so changes to it could not be detected")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
