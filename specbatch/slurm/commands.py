"""Runs Slurm's commands: temporary failures are retried, others are reported in Slurm's words, and nothing is submitted
twice.

Slurm's environment variables override what a script says, so the commands do not get them: submitting inside of a job,
or with variables for other jobs, has the same result as elsewhere.
"""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from specbatch.errors import RunError, UserError

DEADLINE_S = 120.0
"""Seconds for which a command is retried. A restarted controller answers within a minute."""
ATTEMPT_S = 60.0
"""Seconds that one call may take: longer than Slurm's own timeouts."""
FIRST_DELAY_S, LONGEST_DELAY_S = 0.25, 15.0
TOKEN_PREFIX = "specbatch:"

_KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER")
"""Variables that say where the cluster is; all other variables of Slurm describe a job."""
_OF_JOBS = re.compile(r"(SLURM|SLURMD|SBATCH|SRUN|SALLOC|SQUEUE|SACCT|SINFO|SCONTROL|PMI|PMIX)_")
_PASSES = re.compile(
    r"timed? ?out|unable to contact slurm controller|connection (refused|reset)|connect failure|connection failure|"
    r"zero bytes were transmitted|transport endpoint is not connected|backup controller|in standby|"
    r"temporarily (unable|unavailable)|try again|rate limit|message receive failure|"
    r"persistent connection|talking to the database|unable to contact slurmdbd|slurmdbd is down|no route to host",
    re.I,
)
"""Matches Slurm's messages about temporary failures."""


class SlurmError(RunError):
    """A command of Slurm failed for good.

    Attributes:
        words: Slurm's own message.
        passing: whether the failure was of a temporary kind, but lasted too long.
    """

    def __init__(self, message: str, words: str, passing: bool) -> None:
        super().__init__(message)
        self.words, self.passing = words, passing


class SlurmRefused(UserError):
    """Slurm rejected the job.

    Attributes:
        words: Slurm's own message.
    """

    def __init__(self, message: str, words: str) -> None:
        super().__init__(message)
        self.words = words


def environment() -> dict[str, str]:
    """Return the environment for Slurm's commands: that of this process without variables about jobs, and with the
    language and time format that are parsed here."""
    kept = {name: value for name, value in os.environ.items() if name in _KEPT or not _OF_JOBS.match(name)}
    return kept | {"LC_ALL": "C", "SLURM_TIME_FORMAT": "standard"}


def submit(script: Path, options: Iterable[str] = (), token: str = "", deadline_s: float = DEADLINE_S) -> int:
    """Submit a script, exactly once.

    A controller may accept a job although its answer gets lost. So the job has a token, and after any failure except a
    rejection it is searched before it is submitted again.

    Args:
        options: further options of sbatch, which override those in the script.
        token: result of `new_token`, if others should find the job by it; a new one if empty.

    Returns:
        id of the job; of its first component, if it has several.

    Raises:
        SlurmRefused: Slurm rejects it.
        SlurmError: Slurm could not be reached; nothing was submitted, as far as can be known.
        UserError: there is no Slurm here.
    """
    token = token or new_token()
    command = ["sbatch", "--parsable", f"--comment={token}", *options, script.name]
    for attempt, last in enumerate(_attempts(deadline_s)):
        if attempt and (found := find(token)) is not None:
            return found
        out, words, code = _once(command, cwd=script.parent)
        answer = re.search(r"^(\d+)(;\S+)?$", out, re.M)
        if answer and code == 0:
            # An earlier call that timed out may have succeeded after all, so there may be an older job.
            return (find(token) if attempt else None) or int(answer[1])
        if code is not None and code > 0 and not _PASSES.search(words):
            raise _refused(script, words)
        if last:
            raise _out_of_reach("sbatch", words, deadline_s)
    raise AssertionError("unreachable")


def check(script: Path, options: Iterable[str] = ()) -> str:
    """Have Slurm check a script without submitting it (``sbatch --test-only``).

    Returns:
        Slurm's message about when and where it could start.

    Raises:
        the same as `submit`.
    """
    try:
        _, words = _tried(["sbatch", "--test-only", *options, script.name], DEADLINE_S, cwd=script.parent)
    except SlurmError as error:
        if error.passing:
            raise
        raise _refused(script, error.words) from error
    return words


def new_token() -> str:
    """Return a new token by which a submission is found."""
    return TOKEN_PREFIX + secrets.token_hex(8)


def find(token: str) -> int | None:
    """Return this user's job with a token: queued, running or just ended; None if there is none.

    If there are several, the controller accepted a job late, after its submission was repeated: the oldest is returned,
    and the others are cancelled.

    Raises:
        SlurmError: Slurm could not be reached.
    """
    found = set()
    for row in squeue("--me", "--states=all", "--format=%i|%k").splitlines():
        shown, _, comment = row.partition("|")
        number = re.match(r"\d+", shown)
        if comment.strip() == token and number:
            found.add(int(number[0]))
    if not found:
        return None
    oldest, *others = sorted(found)
    if others:
        scancel(*map(str, others))
    return oldest


def squeue(*options: str, deadline_s: float = DEADLINE_S) -> str:
    """Return squeue's output without header; empty for a job that Slurm has forgotten. Raises the same as
    `scontrol`."""
    try:
        out, _ = _tried(["squeue", "--noheader", "--all", *options], deadline_s)
    except SlurmError as error:
        if "Invalid job id" in error.words:
            return ""
        raise
    return out


def sacct(*options: str, deadline_s: float = DEADLINE_S) -> str | None:
    """Return sacct's output; None if the cluster has no accounting. Raises the same as `scontrol`."""
    try:
        out, _ = _tried(["sacct", *options], deadline_s)
    except SlurmError as error:
        if "accounting storage is disabled" in error.words:
            return None
        raise
    return out


def scontrol(*words: str, deadline_s: float = DEADLINE_S) -> str:
    """Return scontrol's output.

    Raises:
        SlurmError: it failed, or Slurm could not be reached in time.
        UserError: there is no Slurm here.
    """
    return _tried(["scontrol", *words], deadline_s)[0]


def sinfo(*options: str, deadline_s: float = DEADLINE_S) -> str:
    """Return sinfo's output without header. Raises the same as `scontrol`."""
    return _tried(["sinfo", "--noheader", "--all", *options], deadline_s)[0]


def scancel(*words: str, deadline_s: float = DEADLINE_S) -> None:
    """Cancel or signal jobs; a job that has ended is not an error. Raises the same as `scontrol`."""
    try:
        _tried(["scancel", *words], deadline_s)
    except SlurmError as error:
        if not re.search(r"Invalid job id|already completing or completed", error.words):
            raise


def sacctmgr(*words: str, deadline_s: float = DEADLINE_S) -> str | None:
    """Return sacctmgr's output, fields separated by ``|``; None if the cluster has no accounting. Raises the same as
    `scontrol`."""
    try:
        return _tried(["sacctmgr", "--noheader", "--parsable2", *words], deadline_s)[0]
    except SlurmError as error:
        if re.search(r"not running a supported accounting_storage|accounting storage is disabled", error.words):
            return None
        raise


def _tried(command: list[str], deadline_s: float, cwd: Path | None = None) -> tuple[str, str]:
    """Return output and messages of a command that may be called any number of times."""
    for last in _attempts(deadline_s):
        out, words, code = _once(command, cwd)
        if code == 0:
            return out, words
        if code is not None and not _PASSES.search(words):
            raise SlurmError(f"`{' '.join(command)}` failed: {words or f'exit code {code}'}", words, passing=False)
        if last:
            raise _out_of_reach(command[0], words, deadline_s)
    raise AssertionError("unreachable")


def _attempts(deadline_s: float) -> Iterator[bool]:
    """Wait between attempts, twice as long each time; yield whether the attempt is the last."""
    until, delay = time.monotonic() + deadline_s, FIRST_DELAY_S
    while (left := until - time.monotonic()) > 0:
        yield False
        time.sleep(min(delay, max(0.0, left)))
        delay = min(2 * delay, LONGEST_DELAY_S)
    yield True


def _once(command: list[str], cwd: Path | None = None) -> tuple[str, str, int | None]:
    """Return output, messages and exit code of one call; the exit code is None if it took too long.

    Raises:
        UserError: there is no such command here, or no cluster that it belongs to.
    """
    try:
        ran = subprocess.run(
            command,
            cwd=cwd,
            env=environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ATTEMPT_S,
            check=False,
        )
    except FileNotFoundError as error:
        if cwd is not None and not cwd.is_dir():
            raise
        raise UserError(
            f"no Slurm here: `{command[0]}` is not in PATH; go to a login node of the cluster, or load its Slurm "
            "module; `specbatch run` trains on this machine, without Slurm"
        ) from error
    except subprocess.TimeoutExpired:
        return "", f"no answer within {ATTEMPT_S:.0f} s", None
    words = _words(ran.stderr)
    if ran.returncode and "establish a configuration source" in words:
        raise UserError(
            f"no cluster here: `{command[0]}` is installed, but finds no Slurm configuration; go to a login "
            "node, or set SLURM_CONF; `specbatch run` trains on this machine, without Slurm"
        )
    return ran.stdout, words, ran.returncode


def _words(stderr: str) -> str:
    """Return Slurm's message in one line, without the names of its commands and functions."""
    lines = [
        re.sub(r"^(\w+: )?(error: |fatal: )?(allocation failure: )?", "", line).strip() for line in stderr.splitlines()
    ]
    return "; ".join(dict.fromkeys(line for line in lines if line and not line.startswith('Try "')))


def _out_of_reach(command: str, words: str, deadline_s: float) -> SlurmError:
    said = f"Slurm did not answer `{command}` for {deadline_s:.0f} s: {words or 'it said nothing'}"
    return SlurmError(f"{said}; try again later, and ask the cluster's administrators if it lasts", words, passing=True)


_REMEDIES = {
    r"account": "set slurm.account to one of yours: `sacctmgr show associations user=$USER format=account,partition` "
    "lists them",
    r"partition name|invalid partition|partition specified": "set slurm.partition, or the component's, to one that "
    "`sinfo --summarize` lists",
    r"group not permitted": "set slurm.partition to one that your group may use",
    r"time limit": "set slurm.time to less than the partition's, which `sinfo --format='%P %l'` shows",
    r"qos specification": "set slurm.qos to one of yours: `sacctmgr show associations user=$USER format=account,qos`",
    r"qos policy|accounting.*policy": "ask for less time or fewer nodes, wait for your other jobs, or set slurm.qos",
    r"feature specification": "set the component's constraint to a feature that `sinfo --format='%P %f'` shows",
    r"generic resource|gres": "see `sinfo --format='%P %G'` for the GPUs of a node, and slurm.gpus for how this "
    "cluster expects them to be requested",
    r"node count": "ask for fewer nodes: `sinfo --summarize` shows how many a partition has",
    r"node configuration|more processors|memory spec": "ask for no more GPUs, CPUs and memory per node than its nodes "
    "have: `sinfo --Node --long` shows them",
    r"unrecognized option|invalid option": "this cluster's sbatch does not know it: set that directive to null",
    r"het": "where heterogeneous jobs are not allowed, set slurm.layout: single",
}
"""Remedies for rejections, by Slurm's message."""


def _refused(script: Path, words: str) -> SlurmRefused:
    remedy = next((text for found, text in _REMEDIES.items() if re.search(found, words, re.I)), "")
    remedy = remedy or f"change the configuration, or see what it requests in {script.name}"
    return SlurmRefused(f"Slurm rejects the job: {words or 'without a reason'}; {remedy}", words)
