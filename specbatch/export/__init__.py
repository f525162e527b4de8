"""Exports a snapshot's draft as a Hugging Face directory that SGLang, vLLM and speculators load.

One directory works for all three; with a trained embedding only for SGLang and vLLM, because speculators does not
support it. SGLang silently ignores unknown names and initialises missing parameters at random, so everything is checked
here before the directory gets its name.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

from specbatch import __version__
from specbatch.config import load_config
from specbatch.drafts.base import algorithm_of
from specbatch.drafts.sglang import REPAIRED
from specbatch.errors import RunError, UserError
from specbatch.evaluation.history import best_step, evaluations
from specbatch.export.card import ABOUT, model_card
from specbatch.metrics_lines import read_metrics
from specbatch.rundir import RunDir
from specbatch.snapshot.durable_file import sync_folder
from specbatch.snapshot.manifest import DamagedSnapshot, snapshot_path, snapshots
from specbatch.target import fingerprint, read_target

logger = logging.getLogger(__name__)


def export(run_dir: RunDir, step: int | None = None, out: Path | None = None, *, best: bool = False) -> Path:
    """Write the draft of a snapshot.

    Args:
        step: step of the snapshot. Default: the newest readable one.
        out: the directory. Default: the run's ``export``. An existing export is replaced once the new one is complete.
        best: use the snapshot that evaluations during training found best; can't be combined with ``step``.

    Returns:
        the directory: ``config.json``, ``model.safetensors`` (bfloat16), ``specbatch.json`` and ``README.md``.

    Raises:
        UserError: there is no such snapshot, or the directory contains something else.
        RunError: the snapshot is damaged, or engines could not load its draft; names the tensor.
    """
    from specbatch.export.checkpoint import save

    out = run_dir.export if out is None else out
    if out.exists() and not (out / ABOUT).exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists but is not a draft that specbatch wrote; give another directory, or remove it")
    config = load_config(run_dir.config)
    target = read_target(config.target.path)
    step, stored = _read(run_dir, _best(run_dir) if best else step)
    algorithm = algorithm_of(config, target)
    tensors = algorithm.files.checkpoint(stored, f"step {step}")
    draft_tokens = config.evaluate.draft_tokens
    # A hub name stays as the user gave it, since it is valid on other machines, too.
    name = str(target.path) if Path(config.target.path).expanduser().is_dir() else config.target.path
    about = {
        "specbatch": __version__,
        "run": config.run.name or run_dir.root.resolve().name,
        "step": step,
        "algorithm": algorithm.name,
        "title": algorithm.title,
        "note": algorithm.note,
        "serve": {engine: algorithm.files.serve(engine, draft_tokens) for engine in ("sglang", "vllm")},
        "sglang_needs_specbatch": target.architecture in REPAIRED,
        "target": name,
        "target_fingerprint": fingerprint(target),
        "draft_tokens": draft_tokens,
        "training_accuracy": _accuracy(run_dir, step),
        "heldout": evaluations(run_dir.metrics).get(step),
    }
    settings = algorithm.files.hf_config(tensors, target_name=name, draft_tokens=draft_tokens)
    out.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        made.chmod(0o755)
        save(tensors, made / "model.safetensors")
        _write(made / "config.json", json.dumps(settings, indent=2) + "\n")
        _write(made / ABOUT, json.dumps(about, indent=2) + "\n")
        _write(made / "README.md", model_card(about, settings))
        sync_folder(made)
        _put_in_place(made, out)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    logger.info("exported step=%d draft=%s tensors=%d", step, out, len(tensors))
    return out


def _read(run_dir: RunDir, step: int | None) -> tuple[int, dict]:
    """Return the tensors of the requested snapshot, or of the newest readable one."""
    from specbatch.export.checkpoint import read_draft

    there = snapshots(run_dir.snapshots)
    if step is not None and step not in there:
        raise UserError(f"{run_dir.snapshots} has no snapshot of step {step}; it has {there or 'none at all'}")
    if not there:
        raise UserError(f"{run_dir.snapshots} has no snapshot yet; wait for the run's first one")
    if step is not None:
        return step, read_draft(snapshot_path(run_dir.snapshots, step))
    for candidate in reversed(there):
        try:
            return candidate, read_draft(snapshot_path(run_dir.snapshots, candidate))
        except DamagedSnapshot as error:
            logger.error("snapshot refused, using the previous one step=%d why=%s", candidate, error)
    raise RunError(f"none of the snapshots in {run_dir.snapshots} can be read: see the log for what is damaged")


def _best(run_dir: RunDir) -> int:
    there = snapshots(run_dir.snapshots)
    step = best_step(run_dir.metrics, there)
    if step is None:
        raise UserError(
            f"{run_dir.root}: no evaluation was made after the steps of its snapshots ({there or 'none yet'}): set "
            "training.evaluate_interval_steps to snapshot.interval_steps or a divisor of it"
        )
    return step


def _accuracy(run_dir: RunDir, step: int) -> list[float | None] | None:
    """Return the draft's accuracy in each term of the loss, as training measured it at that step."""
    lines = reversed(read_metrics(run_dir.metrics))
    return next((line.accuracy for line in lines if line.step == step), None)


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    path.chmod(0o644)


def _put_in_place(made: Path, out: Path) -> None:
    """Rename a finished directory to its final name, and only then remove what was there before."""
    old = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.old."))
    if out.exists():
        out.rename(old / out.name)
    made.rename(out)
    sync_folder(out.parent)
    shutil.rmtree(old)
