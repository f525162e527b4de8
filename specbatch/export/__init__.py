"""A snapshot's draft as a Hugging Face directory that SGLang, vLLM and speculators load.

One directory serves all three; where the embedding was trained, too, the first two: speculators has no place for it.
SGLang drops names that it does not know and starts missing parameters at random, without a word, so everything is
checked here before the directory gets its name.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

from specbatch import __version__
from specbatch.config import load_config
from specbatch.errors import RunError, UserError
from specbatch.evaluations import best_step, evaluations
from specbatch.export.card import ABOUT, model_card
from specbatch.rundir import RunDir
from specbatch.snapshot.disk import sync_folder
from specbatch.snapshot.folder import DamagedSnapshot, snapshot_path, snapshots
from specbatch.target import aux_layers, fingerprint, read_target
from specbatch.training.drafts import files
from specbatch.training.drafts.published import EMBEDDING

logger = logging.getLogger(__name__)


def export(run_dir: RunDir, step: int | None = None, out: Path | None = None, *, best: bool = False) -> Path:
    """Write the draft of a snapshot.

    Args:
        run_dir: of the run.
        step: of which snapshot; the newest that can be read if not given.
        out: the directory; the run's ``export`` if not given. An export that is there is replaced once the new one
            is whole.
        best: take the snapshot that evaluations during training found best; not together with ``step``.

    Returns:
        the directory: ``config.json``, ``model.safetensors`` (bfloat16), ``specbatch.json`` and ``README.md``.

    Raises:
        UserError: if there is no such snapshot, or something else is in the way.
        RunError: if the snapshot is damaged or holds no draft that engines could load; the tensor is named.
    """
    from specbatch.export.checkpoint import draft_tensors, save

    out = run_dir.export if out is None else out
    if out.exists() and not (out / ABOUT).exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there and is no draft that specbatch wrote: give another directory, or remove it")
    config = load_config(run_dir.config)
    target = read_target(config.target.path)
    intermediate = config.draft.intermediate_size or target.intermediate
    step, stored = _read(run_dir, _best(run_dir) if best else step)
    algorithm = config.draft.algorithm
    tensors = draft_tensors(
        stored, target, len(aux_layers(config, target)), intermediate, algorithm=algorithm, where=f"step {step}"
    )
    # The path as the user gave it, if it is a hub's name: another machine knows that, too.
    name = str(target.path) if Path(config.target.path).expanduser().is_dir() else config.target.path
    about = {
        "specbatch": __version__,
        "run": config.run.name or run_dir.root.resolve().name,
        "step": step,
        "algorithm": algorithm,
        "target": name,
        "target_fingerprint": fingerprint(target),
        "draft_tokens": config.evaluate.draft_tokens,
        "training_accuracy": _accuracy(run_dir, step),
        "heldout": evaluations(run_dir.metrics).get(step),
    }
    settings = files(algorithm).draft_config(
        target,
        target_name=name,
        aux_layers=aux_layers(config, target),
        intermediate=intermediate,
        draft_vocab=tensors["lm_head.weight"].shape[0],
        draft_tokens=config.evaluate.draft_tokens,
        own_embedding=EMBEDDING in tensors,
    )
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
    """The tensors of the wanted snapshot, or of the newest that can be read."""
    from specbatch.export.checkpoint import read_draft

    there = snapshots(run_dir.snapshots)
    if step is not None and step not in there:
        raise UserError(f"{run_dir.snapshots} has no snapshot of step {step}; it has {there or 'none at all'}")
    if not there:
        raise UserError(f"{run_dir.snapshots} has no snapshot yet: let the run come to its first one")
    if step is not None:
        return step, read_draft(snapshot_path(run_dir.snapshots, step))
    for candidate in reversed(there):
        try:
            return candidate, read_draft(snapshot_path(run_dir.snapshots, candidate))
        except DamagedSnapshot as error:
            logger.error("snapshot refused, taking the one before step=%d why=%s", candidate, error)
    raise RunError(f"none of the snapshots in {run_dir.snapshots} can be read: see the log for what is damaged")


def _best(run_dir: RunDir) -> int:
    there = snapshots(run_dir.snapshots)
    step = best_step(run_dir.metrics, there)
    if step is None:
        raise UserError(
            f"{run_dir.root}: no evaluation was made after the steps of its snapshots ({there or 'none yet'}): set "
            "training.evaluate_interval_steps, to what snapshot.interval_steps is or a part of it"
        )
    return step


def _accuracy(run_dir: RunDir, step: int) -> list[float | None] | None:
    """What training saw at that step: how often each unrolled step's most likely token was the target's."""
    if not run_dir.metrics.exists():
        return None
    for line in reversed(run_dir.metrics.read_text().splitlines()):
        with contextlib.suppress(json.JSONDecodeError):  # the last line of a run that goes on may be half there
            metrics = json.loads(line)
            if metrics["step"] == step:
                return metrics.get("accuracy")
    return None


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    path.chmod(0o644)


def _put_in_place(made: Path, out: Path) -> None:
    """Give a finished directory its name; what had it before goes only then."""
    old = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.old."))
    if out.exists():
        out.rename(old / out.name)
    made.rename(out)
    sync_folder(out.parent)
    shutil.rmtree(old)
