"""The layers of the target that a draft reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from specbatch.config import load_config
from specbatch.drafts.base import algorithm_of
from specbatch.errors import UserError
from specbatch.target import read_target


def config_of(target: Path, tmp_path: Path, *overrides: str) -> Any:
    path = tmp_path / "a.yaml"
    path.write_text(f"run: {{dir: r}}\ntarget: {{path: '{target}'}}\ndata: {{train: [a]}}\n")
    return load_config(path, overrides)


@pytest.mark.parametrize(
    ("layers", "want"), [(4, (0, 1, 2)), (5, (0, 1, 3)), (6, (0, 2, 4)), (30, (1, 14, 26)), (61, (1, 29, 57))]
)
def test_three_distinct_layers_below_the_last_are_chosen(variant, tmp_path, layers, want):
    folder = variant(lambda config: config.update(num_hidden_layers=layers))
    shape, config = read_target(folder), config_of(folder, tmp_path)
    assert algorithm_of(config, shape).contract.layers == want
    assert algorithm_of(config, shape).contract.widths == {"aux": 3 * shape.hidden, "last": shape.hidden}


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_target_too_shallow_for_three_layers_is_refused(variant, tmp_path, layers):
    folder = variant(lambda config: config.update(num_hidden_layers=layers))
    with pytest.raises(UserError, match=r"draft\.aux_layers: .* has only \d layers"):
        algorithm_of(config_of(folder, tmp_path), read_target(folder)).contract  # noqa: B018


def test_layers_that_are_named_are_taken(tiny_target, tmp_path):
    config = config_of(tiny_target, tmp_path, "--draft.aux_layers", "[0, 1, 4]")
    assert algorithm_of(config, read_target(tiny_target)).contract.layers == (0, 1, 4)
