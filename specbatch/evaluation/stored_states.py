"""The evaluation of a draft that SGLang can't run here: the best one during training, from stored states.

Held-out packs were replayed as greedy decoding would proceed, with the target's own states
(`specbatch.evaluation.replayed`). ``evaluation.json`` says that nothing was decoded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specbatch.config import Config
from specbatch.drafts.base import Algorithm
from specbatch.drafts.sglang import CPU_ALGORITHMS
from specbatch.errors import UserError
from specbatch.evaluation.history import best_step, evaluations
from specbatch.evaluation.statistics import DEFINITION, acceptance_length, acceptance_rate
from specbatch.rundir import RunDir


def runs_on_cpu(algorithm: Algorithm, draft_tokens: int) -> bool:
    """Whether SGLang runs an algorithm's drafts on a machine without an accelerator."""
    served = algorithm.files.serve("sglang", draft_tokens)
    return served is None or served["speculative_algorithm"] in CPU_ALGORITHMS


def check_measurable(config: Config, algorithm: Algorithm) -> None:
    """Check that a draft can be measured on a machine without an accelerator.

    Raises:
        UserError: neither SGLang nor the training will measure it.
    """
    if config.training.evaluate_interval_steps or runs_on_cpu(algorithm, config.evaluate.draft_tokens):
        return
    raise UserError(
        f"draft.algorithm: SGLang does not run drafts of {algorithm.title} on a CPU; set "
        "training.evaluate_interval_steps, so that the draft is measured from stored states, or evaluate.prompts: 0"
    )


def measured_from_stored_states(run_dir: RunDir, algorithm: Algorithm, draft: Path) -> dict[str, Any]:
    """The best evaluation during training, with keys as in ``evaluation.json``.

    Raises:
        UserError: there was none.
    """
    known = evaluations(run_dir.metrics)
    step = best_step(run_dir.metrics, [step for step, found in known.items() if sum(found["accepted"])])
    if step is None:
        raise UserError(
            f"{run_dir.metrics}: no evaluation during training, and SGLang does not run drafts of {algorithm.title} on "
            "a CPU; set training.evaluate_interval_steps"
        )
    histogram = known[step]["accepted"]
    draft_tokens = len(histogram) - 1
    return {
        "acceptance_length": acceptance_length(histogram),
        "acceptance_length_definition": DEFINITION,
        "acceptance_rate": acceptance_rate(histogram, draft_tokens),
        "draft_tokens": draft_tokens,
        "verify_steps": sum(histogram),
        "accepted_histogram": histogram,
        "training_accuracy": known[step]["accuracy"][:draft_tokens],
        "step": step,
        "device": "cpu",
        "draft": str(draft),
        "target": str(algorithm.target.path),
        "note": (
            f"nothing was decoded: SGLang does not run drafts of {algorithm.title} on a CPU, so this is what greedy "
            f"drafting along the held-out packs' stored states accepted at step {step}"
        ),
        "warnings": [],
    }
