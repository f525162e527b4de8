"""Recorded steps of a run, trained again: to see whether the same comes out, or to train a new draft on them.

The ranks are torchtitan's, started by torch's launcher on this machine; no engine, no store and no Slurm is there.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from specbatch.config import Config, dump_config, load_config
from specbatch.config.change import changes, refuse_fixed
from specbatch.errors import RunError, UserError
from specbatch.rundir import RunDir, read_json, write_json, write_whole
from specbatch.snapshot.folder import whole_snapshots
from specbatch.snapshot.recording import RecordedStep, recorded_steps
from specbatch.target import read_target
from specbatch.training import EXIT_FINAL, EXIT_USER
from specbatch.training.budget import check_memory, check_ranks
from specbatch.training.metrics_file import last_step as newest_step
from specbatch.training.replay_rank import Order, log_path

CAPTURED_WITH = ("target", "data", "draft.aux_layers", "training.packs_per_step", "training.tokens_per_pack")
"""Sections and fields that what was recorded depends on."""


def replay(
    run_dir: RunDir, start: int | None = None, count: int | None = None, ranks: int | None = None
) -> list[dict[str, Any]]:
    """Train recorded steps again.

    Args:
        start: step of the snapshot to begin with, 0 for the first weights; the first that recorded steps follow, if not
            given.
        count: how many steps; all that follow, if not given.
        ranks: trainer processes; as many as recorded, if not given, which is what makes the same losses. As many train
            a pack together as then, where their number allows that, else none.

    Returns:
        of each step: ``step``, ``same`` (to the last bit), ``loss``, ``recorded`` (loss), ``apart``, ``relative``,
        ``different`` (what is not the same of it), ``packs`` (of rank 0, whose result is not the same).

    Raises:
        UserError: there is no such snapshot or recording.
        RunError: training failed; with the log's last words.
    """
    first, count = _which(run_dir, start, count)
    recorded, together = _ranks(run_dir, first)
    ranks = ranks or recorded
    together = 1 if ranks % together else together
    config = load_config(run_dir.config)
    config.training.ranks, config.training.context_parallel = ranks, together
    check_ranks(config)
    with tempfile.TemporaryDirectory(prefix="specbatch-replay-") as folder:
        verdicts = Path(folder) / "verdicts.jsonl"
        order = Order(str(run_dir.root), folder, first, count, verdicts=str(verdicts), together=together)
        train(order, Path(folder), ranks)
        return [json.loads(line) for line in verdicts.read_text(encoding="utf-8").splitlines()]


class Source(msgspec.Struct, frozen=True):
    """Which recorded steps a new draft is trained on: ``recording.json`` of its run directory."""

    run: str
    """The run that was recorded."""
    first: int
    count: int


def begin_anew(run_dir: RunDir, out: RunDir, overrides: Sequence[str]) -> tuple[Config, Source]:
    """Write the run directory of a new draft that is trained on the recorded steps of a run, in their order,
    ``training.epochs`` times (once, if not given). Where such a training was broken off, it goes on.

    Args:
        out: the new draft's.
        overrides: settings other than the run's.

    Raises:
        UserError: nothing is recorded, or a setting can't work, or can't be another one than when it was.
    """
    given = ["--training.epochs=1", "--training.max_steps=null", *overrides]
    return _begin(run_dir, out, load_config(run_dir.config, given))


def go_on_anew(out: RunDir, overrides: Sequence[str]) -> tuple[Config, Source]:
    """Make ready to go on with a training that `begin_anew` began. Raises as that.

    Args:
        overrides: settings that are different from now on.
    """
    source = msgspec.json.decode(out.recording.read_bytes(), type=Source)
    return _begin(RunDir(Path(source.run)), out, load_config(out.config, overrides))


def last_step(config: Config, source: Source) -> int:
    """Optimizer steps of a new draft's training."""
    most = source.count * config.training.epochs
    return min(most, config.training.max_steps or most)


def _which(run_dir: RunDir, start: int | None, count: int | None) -> tuple[int, int]:
    """The first recorded step to train, and how many."""
    recorded, saved = recorded_steps(run_dir.recordings), [0, *whole_snapshots(run_dir.snapshots)]
    told = f"it recorded the steps {recorded or 'none'} and has snapshots of the steps {saved[1:] or 'none'}"
    if start is None:
        start = next((step for step in saved if step + 1 in recorded), None)
        if start is None:
            raise UserError(f"{run_dir.root}: no recorded step follows a snapshot: {told}; see snapshot.record")
    if start not in saved:
        raise UserError(f"--from: there is no snapshot of step {start} in {run_dir.root}: {told}")
    most = _following(recorded, start + 1)
    if not most or (count or 1) > most:
        raise UserError(f"--steps: {most} recorded steps follow step {start} in {run_dir.root}: {told}")
    return start + 1, count or most


def _following(steps: list[int], first: int) -> int:
    """How many steps follow each other without a gap."""
    count = 0
    while first + count in steps:
        count += 1
    return count


def _ranks(run_dir: RunDir, step: int) -> tuple[int, int]:
    """How many ranks trained a recorded step, and how many of them each pack together."""
    recorded = RecordedStep(run_dir.recordings, step)
    ranks, together = recorded.about[0].ranks, recorded.together
    recorded.close()
    return ranks, together


def _begin(run_dir: RunDir, out: RunDir, config: Config) -> tuple[Config, Source]:
    if not run_dir.config.exists():
        raise UserError(f"{run_dir.root}: the run that was recorded is not there any more")
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(out.root)))
    source = _source(run_dir, out)
    _refuse(load_config(run_dir.config), config)
    if out.config.exists():
        refuse_fixed(changes(load_config(out.config), config), config.training.schedule, newest_step(out.metrics))
    check_ranks(config)
    check_memory(config, read_target(config.target.path))
    out.root.mkdir(parents=True, exist_ok=True)
    write_json(out.recording, msgspec.to_builtins(source))
    write_json(out.corpus, read_json(run_dir.corpus))
    write_whole(out.config, dump_config(config).encode())
    return config, source


def _source(run_dir: RunDir, out: RunDir) -> Source:
    """The recorded steps that the training was begun with; all that follow each other, for a new one."""
    steps = recorded_steps(run_dir.recordings)
    if not out.config.exists():
        if not steps:
            raise UserError(f"{run_dir.root}: has no recorded steps; record some with snapshot.record")
        return Source(str(run_dir.root), steps[0], _following(steps, steps[0]))
    known = read_json(out.recording)
    if known is None or known["run"] != str(run_dir.root):
        raise UserError(f"run.dir: {out.root} is another run; give another run.dir")
    source = msgspec.convert(known, Source)
    gone = [step for step in range(source.first, source.first + source.count) if step not in steps]
    if gone:
        raise UserError(
            f"{run_dir.root}: the recorded steps {gone}, on which the draft in {out.root} is trained, are not there "
            "any more (a run keeps its last ones only); give another run.dir"
        )
    return source


def _refuse(recorded: Config, config: Config) -> None:
    """Refuse settings that what was recorded depends on."""
    wrong = [
        change
        for change in changes(recorded, config)
        if change.field in CAPTURED_WITH or change.field.partition(".")[0] in CAPTURED_WITH
    ]
    if wrong:
        named = "; ".join(f"{change.field} was {change.was} and would be {change.now}" for change in wrong)
        raise UserError(f"{wrong[0].field}: what is recorded depends on it: {named}; leave it out")


def train(order: Order, folder: Path, ranks: int) -> None:
    """Run all ranks to their end.

    Args:
        folder: for the order.

    Raises:
        UserError: what a rank says the user can mend.
        RunError: training failed; with the log's last words.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    path = folder / "order.json"
    path.write_bytes(msgspec.json.encode(order))
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=ranks, run_id="replay", rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0", max_restarts=0, monitor_interval=0.2, local_addr="127.0.0.1",
        # All others are Python's. Torch's launcher has to have one of its own.
        signals_to_handle="SIGQUIT",
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-m", "specbatch.training.replay_rank", str(path))
    except ChildFailedError as error:
        raise _explained(error.failures, Path(order.logs)) from error


def _explained(failures: dict[int, Any], logs: Path) -> RunError | UserError:
    """What a rank says of its end: of one that knows why, else of any."""
    codes = {rank: failure.exitcode for rank, failure in failures.items()}
    known = [rank for rank, code in codes.items() if code in (EXIT_USER, EXIT_FINAL)]
    rank = (known or list(codes))[0]
    path = log_path(logs, rank)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    words = lines[-1] if known and lines else "\n".join([f"rank {rank} ended with code {codes[rank]}", *lines[-20:]])
    return UserError(words) if codes[rank] == EXIT_USER else RunError(words)
