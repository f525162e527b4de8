"""The plugin ends SGLang rather than let it run without being captured."""

from __future__ import annotations

import subprocess
import sys

import pytest

from specbatch.inference.plugin import EXPECTED, mismatch

WRONG = """
import sys
from specbatch.inference import plugin
plugin.EXPECTED[sys.argv[1]] = tuple(sys.argv[2:])
plugin.register()
"""


@pytest.mark.light
def test_all_places_in_the_installed_sglang_are_as_expected() -> None:
    assert [problem for target, names in EXPECTED.items() if (problem := mismatch(target, names))] == []


def test_a_missing_place_and_other_parameters_are_named() -> None:
    assert "missing" in str(mismatch("specbatch.inference.plugin.no_such_function", ()))
    assert "takes ('target', 'names')" in str(mismatch("specbatch.inference.plugin.mismatch", ("batch",)))


@pytest.mark.light
@pytest.mark.parametrize(
    "wrong",
    [
        ["sglang.srt.managers.tp_worker.TpModelWorker.forward_all", "self"],
        ["sglang.srt.managers.tp_worker.TpModelWorker.forward_batch_generation", "self", "batches"],
    ],
)
def test_the_process_ends_when_a_hook_target_is_wrong(wrong: list[str], tmp_path: object) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", WRONG, *wrong],
        env={"SPECBATCH_CAPTURE": "settings", "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert "specbatch: hidden states cannot be captured from this SGLang" in ended.stderr


def test_nothing_is_captured_without_settings() -> None:
    program = (
        "import sys; from specbatch.inference import plugin; plugin.register(); "
        "from sglang.srt.plugins.hook_registry import HookRegistry; sys.exit(plugin.FORWARD in HookRegistry._hooks)"
    )
    assert subprocess.run([sys.executable, "-c", program], env={"PATH": ""}, check=False).returncode == 0
