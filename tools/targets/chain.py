"""Takes one target through the whole chain of real parts, and records the result of each stage."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from specbatch.config import load_config
from specbatch.errors import RunError, UserError
from specbatch.inference.resolution import check_engine
from specbatch.inference.server import RequestRefused
from specbatch.metrics_lines import read_metrics
from specbatch.planning import Known, budget
from specbatch.rundir import RunDir
from specbatch.status_file import is_complete, read_status
from specbatch.target import read_target
from tools.targets.checkpoints import ARCHITECTURES, EOS, LAST_FILE, TEXT, make_checkpoint
from tools.targets.decoding import ANSWER_TOKENS, PROMPTS, Drafting
from tools.targets.truth import architecture_of, compare_rows, greedy, load_truth, pixels

STEPS = 2
GPU = "h100"
TIMEOUT_S = 300.0
ROUNDING = 2.0**-7
"""Allowed difference: rows are float32 states rounded to bfloat16, each by at most 2^-8 of its value."""
ERRORS = (
    "AssertionError", "AttributeError", "ImportError", "KeyError", "ModuleNotFoundError", "NotImplementedError",
    "RuntimeError", "TypeError", "ValueError", "NameError",
)  # fmt: skip


@dataclass
class Row:
    """The results of one target."""

    name: str
    architecture: str = ""
    right: bool = False
    difference: float | None = None
    """Largest relative difference of a captured row from what transformers computes."""
    losses: tuple[float | None, ...] = ()
    """Losses of the training steps."""
    identical: str = ""
    """Number of answers that the draft does not change, of all answers."""
    seconds: float = 0.0
    """Seconds of the chain, or of its rest if a part existed already."""
    why: str = ""
    """Why it failed, or what was checked instead of the rest."""


def run_chain(name: str, folder: Path) -> Row:
    """Make a tiny target and take it through reading, planning, capturing, training, export and decoding.

    Args:
        folder: folder for all files; an existing complete target, or run with its export, is reused.
    """
    started, row, target = time.monotonic(), Row(name), folder / "target"
    if not (target / LAST_FILE).exists():
        make_checkpoint(name, target)
    row.why = _follow(row, target, folder)
    row.right, row.seconds = not row.why, time.monotonic() - started
    return row


def _follow(row: Row, target: Path, folder: Path) -> str:
    """Fill a row stage by stage; return what was wrong, empty if nothing was."""
    row.architecture = architecture_of(target)
    config = _write_config(folder, target, images=ARCHITECTURES[row.name].images)
    try:
        budget(load_config(config), Known())
    except (UserError, RunError) as error:
        return str(error)
    run = folder / "run"
    whole = (run / "export").is_dir() and is_complete(RunDir(run))
    ran = None if whole else _specbatch("run", "--config", str(config))
    if ran is not None and ran.returncode:
        why = _why(run) or _last_line(ran)
        return f"{why}; checked instead: read, planned{_resolved(config, target)}{_prefilled(target)}"
    row.losses = tuple(line.loss for line in read_metrics(RunDir(run).metrics))
    with ThreadPoolExecutor(1) as pool, Drafting(run, target, folder / "decoding.log") as drafting:
        # SGLang's imports take as long as this computation.
        starting = pool.submit(drafting.start)
        model = load_truth(target)
        row.difference = compare_rows(run, target, model)
        expected = [
            greedy(model, prompt.tolist(), ANSWER_TOKENS, EOS, pixels(target, images))
            for prompt, images in zip(drafting.prompts, drafting.images, strict=True)
        ]
        try:
            starting.result()
            answers = drafting.answers()
        except (RunError, RequestRefused) as error:
            said = _first_error([drafting.log]) or str(error).splitlines()[0]
            return f"trained and exported, but SGLang does not decode with the draft: {said}"
    same = sum(answer == plain for answer, plain in zip(answers, expected, strict=True))
    row.identical = f"{same}/{len(expected)}"
    problems = {
        f"rows differ from transformers by {row.difference:.2g}": row.difference > ROUNDING,
        f"losses are {row.losses}": len(row.losses) != STEPS or not np.isfinite(row.losses).all(),
        "answers with the draft are not the target's own": same != len(expected),
    }
    return "; ".join(problem for problem, there in problems.items() if there)


def _resolved(config: Path, target: Path) -> str:
    """Describe how SGLang resolves an engine's arguments for a GPU that need not exist; empty if not asked."""
    on_gpu = load_config(config, [f"--inference.gpu={GPU}"])
    try:
        return "" if check_engine(on_gpu, read_target(str(target))) else f", SGLang settles its arguments for an {GPU}"
    except UserError as error:
        return f", and for an {GPU}: {error}"


def _prefilled(target: Path) -> str:
    """Describe the result of a prefill by SGLang's class alone; empty if it can't compute on a CPU."""
    command = [sys.executable, "-m", "tools.targets.prefill", str(target)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    told: dict[str, Any] = {}
    for line in ended.stdout.splitlines():
        told = json.loads(line) if line.startswith("{") else told
    if "difference" not in told:
        return ""
    proved = f"the probe says: {told['problem']}" if told["problem"] else "the probe verifies what is captured"
    return f", a prefill's rows differ from transformers by {max(told['difference'].values()):.1e}, {proved}"


def _write_config(folder: Path, target: Path, *, images: bool) -> Path:
    words = TEXT.read_text(encoding="utf-8").split()
    for kind, count in (("train", 16), ("heldout", PROMPTS)):
        first = 0 if kind == "train" else 1000
        rows: list[dict[str, Any]] = [
            {"messages": [_said("user", words[at : at + 8]), _said("assistant", words[at + 8 : at + 24])]}
            for at in range(first, first + 24 * count, 24)
        ]
        # Those without images between them show that both are computed together.
        for number, row in enumerate(rows if images else ()):
            if number % 4 != 3:
                row["messages"][0]["content"] = _with_images(folder, row["messages"][0]["content"], first + number)
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config: dict[str, Any] = {
        "run": {"dir": str(folder / "run"), "stall_timeout_s": 200, "max_restarts": 0},
        "target": {"path": str(target), "dtype": "float32"},
        "data": {
            "train": [str(folder / "train.jsonl")], "heldout": [str(folder / "heldout.jsonl")],
            "max_tokens": 256 if images else 128, "workers": 1, "cache_dir": str(folder / "cache"), "images": images,
        },
        "draft": {"ttt_steps": 2, "vocab_size": None},
        "training": {
            "threads": 1, "tokens_per_pack": 256, "packs_per_step": 1, "max_steps": STEPS, "warmup_steps": 1,
            "dtype": "float32", "max_restarts": 0,
        },
        "inference": {"threads": 1, "max_restarts": 0, "deterministic": True},
        "store": {"bytes_per_rank": "32MiB"},
        "snapshot": {"interval": 1, "record": STEPS},
        "evaluate": {"prompts": 0},
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))
    return path


def _said(role: str, words: list[str]) -> dict[str, str]:
    return {"role": role, "content": " ".join(words)}


def _with_images(folder: Path, text: str, number: int) -> list[dict[str, Any]]:
    """Return a content with one or two seeded images: a file next to the conversations, and a data URL."""
    noise, encoded = np.random.default_rng(number), []
    for _ in range(1 + number % 2):
        height, width = noise.integers(20, 200, 2)
        file = io.BytesIO()
        PIL.Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, "PNG")
        encoded.append(file.getvalue())
    (folder / f"{number}.png").write_bytes(encoded[0])
    parts: list[dict[str, Any]] = [{"type": "image", "image": f"{number}.png"}, {"type": "text", "text": text}]
    for content in encoded[1:]:
        url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return parts


def _specbatch(*arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            [sys.executable, "-m", "specbatch", *arguments],
            capture_output=True, text=True, check=False, timeout=TIMEOUT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(arguments, 1, "", f"it took longer than {TIMEOUT_S:g} s")


def _last_line(ended: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in (ended.stderr + ended.stdout).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "specbatch:" in line), lines[-1] if lines else "no word")


def _why(run: Path) -> str:
    """Return what ended the run, and the most informative line of an engine's log."""
    status = read_status(RunDir(run).status)
    if status is None:
        return ""
    first = status.why.partition("\n")[0]
    error = _first_error(sorted(run.glob("attempts/*/logs/*engine*")))
    return f"{first[:300]}{'; SGLang: ' + error if error else ''}"


def _first_error(logs: Iterable[Path]) -> str:
    """Return the first line of SGLang's logs that names an exception; empty if there is none."""
    for log in logs:
        for line in log.read_text(errors="replace").splitlines():
            if line.strip().startswith(ERRORS):
                return line.strip()[:200]
    return ""
