"""The data: samples fit into packs, positions and engines, and held-out data are not trained on."""

from __future__ import annotations

from pathlib import Path

from specbatch.config import Config
from specbatch.errors import UserError
from specbatch.inference.arguments import RESERVED_TOKENS
from specbatch.target import TargetShape


def check_lengths(config: Config, shape: TargetShape) -> None:
    """Check that the longest samples fit into packs, the target's positions and the engines.

    Raises:
        UserError: they don't.
    """
    longest, pack = config.data.max_tokens, config.training.tokens_per_pack
    if longest > pack:
        raise UserError(
            f"training.tokens_per_pack: {pack} is less than data.max_tokens: {longest}, so packs could not hold the "
            f"longest samples; set training.tokens_per_pack: {longest} or data.max_tokens: {pack}"
        )
    if longest > shape.max_positions:
        raise UserError(
            f"data.max_tokens: {longest} is more than the target's {shape.max_positions} positions; set "
            f"data.max_tokens: {shape.max_positions}"
        )
    # A sample's last token is not captured.
    context, needed = config.inference.sglang.get("context_length"), longest - 1 + RESERVED_TOKENS
    if isinstance(context, int) and context < needed:
        raise UserError(
            f"inference.sglang.context_length: {context} is too little for data.max_tokens: {longest}, since SGLang "
            f"keeps {RESERVED_TOKENS} positions for itself; set at least {needed}, or remove it"
        )
    if isinstance(context, int) and context > max(shape.max_positions, needed):
        raise UserError(
            f"inference.sglang.context_length: {context} is more than the target's {shape.max_positions} positions; "
            f"set {shape.max_positions}, or remove it"
        )
    pool = config.inference.sglang.get("max_total_tokens")
    if isinstance(pool, int) and pool < longest:
        raise UserError(
            f"inference.sglang.max_total_tokens: {pool} is less than data.max_tokens: {longest}, so the longest "
            f"samples could not be computed; set at least {longest}"
        )


def check_weights(config: Config) -> None:
    """Check that each entry of the training data has a weight, if any has.

    Raises:
        UserError: some have none.
    """
    weights, entries = config.data.weights, config.data.train
    if weights and len(weights) != len(entries):
        raise UserError(
            f"data.weights: {len(weights)} weights for {len(entries)} entries of data.train; write each next to its "
            "entry: {path: a.jsonl, weight: 2}"
        )


def check_apart(config: Config) -> None:
    """Check that no held-out data are training data, too.

    Raises:
        UserError: some are.
    """
    both = next(
        (name for name in config.data.heldout if any(_within(name, train) for train in config.data.train)), None
    )
    if both:
        raise UserError(
            f"data.heldout: {both} is in data.train, too, so the draft would be evaluated on its training data; "
            "keep some conversations apart"
        )


def _within(name: str, other: str) -> bool:
    """Return whether a file, directory or data set is the same as another one or inside it, following links."""
    if name == other:
        return True
    inner, outer = Path(name).expanduser(), Path(other).expanduser()
    if not (inner.exists() and outer.exists()):
        return False
    inner, outer = inner.resolve(), outer.resolve()
    # Hidden files are never read as data.
    return inner.is_relative_to(outer) and not any(part.startswith(".") for part in inner.relative_to(outer).parts)
