import os
import resource
import subprocess
import sys
import textwrap

import pytest

from specbatch.snapshot.durable_file import DurableFile


def test_what_is_written_is_there(tmp_path):
    with DurableFile(tmp_path / "file") as disk:
        assert disk.write(b"hello world") == 11
        disk.seek(6)
        disk.write(b"there")
        disk.seek(-5, os.SEEK_END)
        assert disk.tell() == 6
        assert disk.read(3) == b"the"
        disk.truncate(9)
        assert disk.bytes == 9
    assert (tmp_path / "file").read_bytes() == b"hello the"


def test_a_failed_write_is_kept_until_the_file_is_closed(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    disk = DurableFile(tmp_path / "file")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        assert disk.write(b"x" * 5000) == 5000
        assert disk.tell() == 5000
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert disk.write(b"more") == 4, "nothing more is written, and nothing raised"
    with pytest.raises(OSError, match="too large"):
        disk.close()
    assert (tmp_path / "file").stat().st_size == 1000


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch, torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from specbatch.snapshot.manifest import whole_snapshots
from specbatch.snapshot.storage import HDF5Writer

folder, hard = Path(sys.argv[1]), resource.getrlimit(resource.RLIMIT_FSIZE)[1]
state = {"a": torch.rand(100, 100), "b": torch.rand(300, 300), "c": torch.rand(100, 100)}
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
for step in (1, 2):
    try:
        dcp.save(state, storage_writer=HDF5Writer(folder / f"step-{step}", step=step), no_dist=True)
    except CheckpointException as error:
        assert isinstance(error.failures[0][0], OSError), error
    else:
        raise AssertionError("no error")
assert whole_snapshots(folder) == []
open_files = [p for p in Path("/proc/self/fd").iterdir() if str(p.resolve()).endswith(".h5")]
assert not open_files, open_files
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
dcp.save(state, storage_writer=HDF5Writer(folder / "step-3", step=3), no_dist=True)
assert whole_snapshots(folder) == [3]
"""


@pytest.mark.light
def test_a_process_survives_a_full_disk_and_saves_again(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(FULL_DISK), str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
