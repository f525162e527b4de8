"""A run on a cluster whose target only answers prompts: its user cancels it and goes on, engines join and are lost, and
each prompt gets one answer, the same as on one machine.

Both runs are played side by side; each test looks at them after their end.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from specbatch.slurm.jobs import read_jobs
from tests.cluster.runs import Local, Run, play
from tests.smalltalk import write_smalltalk
from tests.tiny_target import make_tiny_target
from tools.lab import Lab

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROWS, ROWS_PER_SHARD = 420, 150
# An engine answers one prompt at a time, so that the last bits of its logits do not depend on others.
REGENERATE = f"max_new_tokens: 24, unfinished: keep, batch_size: 1, rows_per_shard: {ROWS_PER_SHARD}"
SLURM = "partition: preempt, time: '30', signal_s: 60, head: {mem: 1G}, inference: {mem: 4G}"
ENOUGH = 5
"""Answers of an engine that works."""
Events = Iterator[Callable[[], bool]]
"""Conditions that have to become true before the next event."""


class Answers(Run):
    """A run that answers prompts, as a job of a head and an engine."""

    told = logged = ""
    """What `status` and `logs` printed while it answered."""

    def __init__(self, lab: Lab, folder: Path, name: str) -> None:
        super().__init__(lab, folder, name, f"{{{SLURM}, extra: {{exclude: 'node[16-27]'}}}}")
        text = self.config.read_text().replace("max_tokens: 256", f"max_tokens: 256, regenerate: {{{REGENERATE}}}")
        # A lost engine is to be noticed while there are still prompts.
        text = text.replace("heartbeat_s: 2", "heartbeat_s: 1")
        self.config.write_text(text)

    def submit(self) -> Callable[[], bool]:
        return self.doing("submit", "--config", str(self.config), "--run.goal", "answers")

    def begun(self, attempt: int) -> Callable[[], bool]:
        """Whether an engine can join an attempt."""
        return self.run_dir.rendezvous(attempt).exists

    def two_work(self, attempt: int) -> Callable[[], bool]:
        """Whether its own and an added engine work in an attempt; they are to do so before all is answered."""

        def look() -> bool:
            assert not self.ended(), self
            status = self.status()
            work = {each["name"].split("-")[0] for each in status.get("engines", []) if each["packs"] >= ENOUGH}
            return status.get("attempt") == attempt and work == {"engine", "added"}

        return look

    def lost_claims(self) -> list[int]:
        """The claims of added engines that fell silent in the newest attempt."""
        return [claim for event in self.added() if event["event"] == "silent" for claim in event["claims"]]

    def shards(self) -> dict[str, bytes]:
        """Return its files of answers."""
        return {path.name: path.read_bytes() for path in sorted(self.run_dir.answers.iterdir())}


class Alone(Answers, Local):
    """The same on one machine, without Slurm."""

    def submit(self) -> Callable[[], bool]:
        return self.doing("regenerate", "--config", str(self.config))


def undisturbed(run: Answers) -> Events:
    """Do nothing."""
    yield run.ended


def engines_lost(run: Answers) -> Events:
    """Its user cancels it and goes on; an engine joins from another job. A job of higher priority takes the node of the
    run's own engine, and later the other one's node loses its power."""
    root = str(run.run_dir.root)
    yield run.begun(1)
    yield run.doing("cancel", root)
    yield run.ended
    assert run.state() == "cancelled", run
    yield run.doing("resume", root)
    yield run.begun(2)
    where = ["--partition=preempt", "--exclude=node[1-21,23-27]", "--mem=4G", "--time=20"]
    yield run.doing("scale", root, "--engines", "+1", *where)
    yield run.two_work(2)
    run.lab.preempt(run.node("inference"), seconds=1)
    yield run.two_work(3)
    run.told = run.specbatch("status", root)
    run.lab.kill_node(run.added_node())
    run.logged = run.specbatch("logs", root)
    yield lambda: bool(run.lost_claims())
    # Slurm would queue it again, for a node that does not come back.
    yield run.doing("scale", root, "--engines", "-1")
    yield run.ended


@pytest.fixture(scope="module")
def played(lab: Lab) -> Iterator[tuple[Answers, Answers]]:
    """The run on the cluster and the one on one machine, after their end; all nodes are well again afterwards."""
    path = lab.state.home / "answers"
    path.mkdir()
    write_smalltalk(path, ROWS, 20, 50)
    make_tiny_target(path / "tiny")
    for place in [path, *path.rglob("*")]:
        os.chown(place, lab.state.uid, lab.state.uid)
    run, alone = Answers(lab, path, "engines lost"), Alone(lab, path, "alone")
    stories: dict[Run, Callable[..., Events]] = {run: engines_lost, alone: undisturbed}
    play(stories, 500.0, 2)
    yield run, alone
    lab.restore_node(*lab.state.names)


Played = tuple[Answers, Answers]


def test_whatever_happens_to_its_engines_each_prompt_has_the_answer_that_it_has_on_one_machine(played: Played):
    run, alone = played
    assert not alone.failure, alone.failure
    assert not run.failure, run.failure
    assert run.shards() == alone.shards()
    assert list(run.shards()) == [f"{number:05d}.jsonl" for number in range(-(-ROWS // ROWS_PER_SHARD))]
    asked = [json.loads(line) for line in (run.folder / "talks.jsonl").read_text().splitlines()]
    answered = [json.loads(line) for shard in run.shards().values() for line in shard.splitlines()]
    assert [row["messages"][0] for row in answered] == [row["messages"][0] for row in asked]
    assert len({row["messages"][1]["content"] for row in answered}) > ROWS // 2, "the answers tell prompts apart"
    assert not list((run.run_dir.shards / "open").iterdir())
    counts = [each.status()["answers"] for each in played]
    assert [(count["written"], count["refused"]) for count in counts] == [(ROWS, {})] * 2
    # No answer was counted twice, nor one that was thrown away.
    assert counts[0]["tokens"] == counts[1]["tokens"]


def test_it_goes_on_by_itself_in_the_next_job_and_the_added_engine_with_it(played: Played):
    run, _ = played
    assert run.run_dir.attempts() == [1, 2, 3]
    assert len({run.attempt(number).job for number in run.run_dir.attempts()}) == 3
    first, second, third = (run.last_status(number) for number in run.run_dir.attempts())
    assert first.why == "cancelled by its user"
    assert second.why.endswith("SIGUSR2"), second.why
    assert 0 == first.step < second.step < third.step == ROWS
    (added,) = read_jobs(run.run_dir, "engines")
    for attempt in (2, 3):
        joined = [event["engine"] for event in run.events(attempt) if event["event"] == "engine"]
        assert sorted(re.sub(r"-\w+$", "", name) for name in joined) == [f"added-{added.id}.0", "engine-0"]
    assert run.lost_claims(), "its last engine was lost at work, and the other one answered its prompts"


def test_status_and_logs_tell_what_goes_on_while_it_answers(played: Played):
    run, _ = played
    (added,) = read_jobs(run.run_dir, "engines")
    job, nodes = run.attempt().job, run.attempt().nodes
    after = next(other.id for other in read_jobs(run.run_dir, "run") if other.after == job)
    told = run.told.splitlines()
    assert re.search(rf": running, answering, step \d+ of {ROWS}, attempt 3, job {job}$", told[0]), run.told
    waits = f"continues when job {job} ends"
    assert [line for line in told if line.startswith("  job ")] == [
        f"  job       {job} head: RUNNING on {nodes['head'][0]}, partition preempt",
        f"  job       {job} inference: RUNNING on {nodes['inference'][0]}, partition preempt",
        f"  job       {added.id} added engine 0: RUNNING on node22, partition preempt",
        f"  job       {after} {waits} (head): PENDING (Dependency), partition preempt",
        f"  job       {after} {waits} (inference): PENDING (Dependency), partition preempt",
    ]
    assert "  engines   2 of 2 ready" in told, run.told
    assert re.search(rf"^  answers   \d+ of {ROWS} written; ", run.told, re.M), run.told
    logs = set(re.findall(r"^(\S+) +\| ", run.logged, re.M))
    own = {"head-0", "inference-0", "engine-0", "job"}
    assert logs == own | {f"added-{added.id}-0", f"engine-{added.id}-0", "engines"}
    assert "attempt=3" in run.logged
    assert "attempt=2" not in run.logged


def test_what_its_user_asks_for_is_done_and_said(played: Played):
    run, _ = played
    (added,) = read_jobs(run.run_dir, "engines")
    first, second, last = (run.attempt(number).job for number in run.run_dir.attempts())
    said = {verb: run.config.with_suffix(f".{verb}").read_text() for verb in ("submit", "cancel", "resume", "scale")}
    assert f"job {first}: head on 1 node, inference on 1 node\n" in said["submit"]
    assert f"job {first} ends with the answers so far" in said["cancel"]
    assert f"job {second}: " in said["resume"]
    assert f"1 added engines leave: {added.id}" in said["scale"]
    told = run.specbatch("status", str(run.run_dir.root))
    assert f": completed, step {ROWS} of {ROWS}, attempt 3, job {last}\n" in told
    assert re.search(rf"^  answers   {ROWS} of {ROWS} written; ", told, re.M), told
    assert re.search(r"^  attempt   1: stopped, step 0, .*: cancelled by its user$", told, re.M), told
    assert f"{ROWS} of {ROWS} prompts have an answer\n" in run.run_dir.log.read_text()
