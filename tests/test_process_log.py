"""Logs of runs that last for weeks stay short, while their writers go on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from specbatch.process_log import drop_older_half, log_tail


def test_the_older_half_of_a_long_log_is_dropped_and_who_appends_goes_on(tmp_path: Path):
    path = tmp_path / "a.log"
    child = "import sys\nfor line in sys.stdin: print('child', line.strip(), flush=True)"
    with path.open("ab") as file:
        writer = subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=file, text=True)
        file.write(b"".join(b"line %d\n" % n for n in range(2000)))
    size = path.stat().st_size
    drop_older_half(path, size)
    assert path.stat().st_size == size, "it is not longer than it may be"
    drop_older_half(path, 4000)
    lines = path.read_text().splitlines()
    assert lines[0] == "(older lines were dropped)"
    assert lines[1].startswith("line 1")
    assert lines[-1] == "line 1999"
    assert path.stat().st_size < 2100
    writer.communicate("late\n", timeout=20)
    assert path.read_text().splitlines()[-2:] == ["line 1999", "child late"]
    assert log_tail(path, 1, begin=size) == ["child late"], "what began beyond the end is shown all the same"
