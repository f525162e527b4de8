"""Checks that the store has room for everything that a run stores at the same time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from specbatch.config import Config
from specbatch.config.rules import Bytes
from specbatch.drafts.base import BYTES_PER_VALUE, Algorithm, CaptureContract, algorithm_of
from specbatch.errors import UserError
from specbatch.target import read_target
from specbatch.units import bytes_text

if TYPE_CHECKING:
    from specbatch.corpus import Corpus
    from specbatch.plan import Plan


def check_first(config: Config, corpus: Corpus, whole: bool) -> None:
    """Check a run before it is queued, when only the first rows of its data are known.

    Args:
        corpus: the samples of these rows.
        whole: whether these are all rows.

    Raises:
        UserError: the store can't hold a step of the plan, or a full step of the first rows.
    """
    from specbatch.corpus import make_plan

    plan, algorithm = make_plan(config, corpus), algorithm_of(config, read_target(config.target.path))
    steps = plan.step_sums(stored_bytes(corpus, algorithm), plan.steps)
    if whole or min(steps[:-1], default=steps[-1]) > store_room(config)[0]:
        check_store(config, plan, corpus, algorithm)


def check_store(
    config: Config, plan: Plan, corpus: Corpus, algorithm: Algorithm, bytes_S: np.ndarray | None = None
) -> None:
    """Check that the store can hold the largest step and each of its objects; else the run would wait forever.

    Args:
        bytes_S: the result of `stored_bytes`, if it is known already.

    Raises:
        UserError: it can't.
    """
    (room, segment), contract = store_room(config), algorithm.contract
    widest = BYTES_PER_VALUE * max(contract.widths.values())
    of_heldout = [sample for pack in plan.heldout for sample in pack.samples]
    for sample in [*np.flatnonzero(plan.lengths * widest > segment).tolist(), *of_heldout]:
        rows = contract.rows(corpus.sample(sample).loss_mask)
        largest = max(BYTES_PER_VALUE * contract.widths[name] * rows[name].size for name in rows)
        if largest > segment:
            raise UserError(
                f"store.bytes_per_rank: {config.store.bytes_per_rank} can't hold objects of more than "
                f"{bytes_text(segment)}, but a sample of {corpus.sample(sample).input_ids.size} tokens needs one of "
                f"{bytes_text(largest)}; set store.bytes_per_rank: {_enough(config, largest)}, or a smaller "
                "data.max_tokens"
            )
    if bytes_S is None:
        bytes_S = stored_bytes(corpus, algorithm)
    heldout = int(bytes_S[of_heldout].sum())
    steps = plan.step_sums(bytes_S, plan.steps)
    step = int(np.argmax(steps + heldout > room)) + 1
    needed = int(steps[step - 1])
    if needed + heldout <= room:
        return
    if needed <= room:
        # Any step may be the first after a restart, which computes the held-out packs again.
        each = _enough(config, -(-(needed + heldout) // config.training.ranks))
        raise UserError(
            f"training.evaluate_packs: {config.training.evaluate_packs} take {bytes_text(heldout)}, which the store "
            f"must hold besides any step, and step {step} takes {bytes_text(needed)}; store.bytes_per_rank: "
            f"{config.store.bytes_per_rank} of training.ranks: {config.training.ranks} hold {bytes_text(room)}; set "
            f"store.bytes_per_rank: {each}, or fewer training.evaluate_packs"
        )
    each = _enough(config, -(-needed // config.training.ranks))
    raise UserError(
        f"store.bytes_per_rank: {config.store.bytes_per_rank} of training.ranks: {config.training.ranks} hold "
        f"{bytes_text(room)}, but the hidden states of step {step} take {bytes_text(needed)}; set "
        f"store.bytes_per_rank: {each}, or a smaller training.packs_per_step"
    )


def stored_bytes(corpus: Corpus, algorithm: Algorithm) -> np.ndarray:
    """Return the bytes of each sample in the store: int64 ``[samples, then held-out samples]``."""
    return np.concatenate([algorithm.costs(masks).bytes_S(algorithm.contract) for masks in corpus.masks(heldout=True)])


def warn_of_store(config: Config, contract: CaptureContract) -> list[str]:
    """Warn if the store may be too small for a full step."""
    room, _ = store_room(config)
    training = config.training
    tokens = training.packs_per_step * training.tokens_per_pack
    most = tokens * contract.bytes_per_token
    if most > room:
        return [
            f"store.bytes_per_rank: {config.store.bytes_per_rank} of training.ranks: {training.ranks} hold "
            f"{bytes_text(room)}, and a full step (training.packs_per_step: {training.packs_per_step} of "
            f"training.tokens_per_pack: {training.tokens_per_pack}) is up to {bytes_text(most)}; if one is too large, "
            "the run ends once the corpus is prepared"
        ]
    return []


def store_room(config: Config) -> tuple[int, int]:
    """Return the bytes that may be in the store at the same time, and in one rank's part of it."""
    from specbatch.transfer.store import usable_bytes

    segment = usable_bytes(config.store.bytes_per_rank)
    return config.training.ranks * segment, segment


def _enough(config: Config, needed: int) -> Bytes:
    """Return the `store.bytes_per_rank` that this many bytes on a rank require, in whole MiB."""
    _, segment = store_room(config)
    mebibytes = needed * config.store.bytes_per_rank / segment / (1 << 20)
    return Bytes((int(mebibytes) + 1) << 20)
