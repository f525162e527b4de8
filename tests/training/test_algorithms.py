"""Every draft algorithm that can be configured has all that its interface asks for."""

from __future__ import annotations

import subprocess
import sys
from typing import get_args, get_type_hints

import pytest

from specbatch.config import Draft
from specbatch.training.drafts import ALGORITHMS, Files, Training, files, training


def test_what_can_be_configured_is_what_there_is():
    assert get_args(get_type_hints(Draft)["algorithm"]) == ALGORITHMS


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("interface", "module"), [(Training, training), (Files, files)])
def test_an_algorithm_has_all_of_its_interface(algorithm, interface, module):
    asked = {name for name in [*vars(interface), *interface.__annotations__] if not name.startswith("_")}
    assert len(asked) >= 4
    assert [name for name in sorted(asked) if not hasattr(module(algorithm), name)] == []


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_draft_can_be_asked_what_trainer_and_evaluation_ask(algorithm):
    draft = training(algorithm).Draft
    for method in ("forward", "evaluate", "initialize", "calibrate"):
        assert callable(getattr(draft, method))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_its_files_are_known_without_torch(algorithm):
    code = f"import specbatch.training.drafts as d, sys; d.files('{algorithm}'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
