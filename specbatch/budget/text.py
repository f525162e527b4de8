"""A budget in words."""

from __future__ import annotations

from specbatch.budget import Budget


def lines(budget: Budget) -> list[str]:
    """One finding a line, its name in front."""
    work, layout, times = budget.work, budget.layout, budget.times
    plan, steps = work.plan, work.steps
    share = work.loss_tokens / work.tokens
    live = ", ".join(f"{count / work.tokens:.0%}" for count in work.live)
    ahead = layout.room_bytes * steps // max(1, work.bytes)
    rows = [
        ("corpus", f"{work.samples:,} samples, {work.tokens:,} tokens, {work.loss_tokens:,} loss tokens ({share:.0%})"),
        ("steps", f"{steps:,} of {plan.packs_per_step} packs, {work.tokens / steps:,.0f} tokens each on average"),
        ("live columns", f"{live} of the tokens, by unrolled step"),
        (
            "hidden states",
            f"{size(work.full_token_bytes)} a token, {size(work.bytes / work.tokens)} of it stored on average, "
            f"{size(work.bytes / steps)} a step, {size(work.largest_step_bytes)} the largest; {size(work.bytes)}",
        ),
        ("store", f"{size(layout.room_bytes)} in {layout.ranks} ranks: about {ahead:,} steps"),
    ]
    if work.heldout_packs:
        rows.append(
            (
                "held out",
                f"{work.heldout_packs} packs, {work.heldout_tokens:,} tokens, {size(work.heldout_bytes)} in the ranks' "
                f"memory; {layout.evaluations} evaluations",
            )
        )
    rows += [
        ("engine", f"{flops(work.engine_flops)}, {flops(work.engine_flops / max(1, work.captured_tokens))} a token"),
        ("", f"{times.engine_tokens_per_s:,.0f} tokens/s each ({budget.rates.engine.source})"),
        ("trainer", f"{flops(work.trainer_flops)}, {flops(work.trainer_flops / work.tokens)} a token"),
        ("", f"{times.trainer_tokens_per_s:,.0f} tokens/s of all ranks ({budget.rates.rank.source})"),
        (
            "memory",
            f"{size(sum(budget.rank_bytes.values()))} of a GPU for a rank: "
            + ", ".join(f"{size(count)} {kind}" for kind, count in budget.rank_bytes.items() if count),
        ),
        (
            "balance",
            f"{times.engines_per_rank * layout.ranks:.2f} engines keep {layout.ranks} ranks busy; there are "
            f"{layout.engines}: {_slower(budget)}",
        ),
        (
            "time",
            f"{duration(times.total_s)} of training, {times.device_hours:,.2f} hours of all {layout.devices} devices",
        ),
        (
            "",
            f"engines {duration(times.engines_s)}, ranks {duration(times.ranks_s)}, {duration(times.fill_s)} before "
            "the first step",
        ),
    ]
    return [f"{name:15}{text}" for name, text in rows]


def _slower(budget: Budget) -> str:
    if not budget.times.overlap:
        return "but the store does not hold two steps, so both take turns: raise store.bytes_per_rank"
    if budget.times.engines_s > budget.times.ranks_s:
        return "ranks will wait for engines"
    return "engines will wait for ranks"


def size(count: float) -> str:
    """Bytes in binary units."""
    for unit, shift in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << shift:
            return f"{count / (1 << shift):.1f} {unit}"
    return f"{count:.0f} bytes"


def flops(count: float) -> str:
    """Operations in decimal units."""
    for unit, scale in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count / 1e6:,.1f} MFLOP"


def duration(seconds: float) -> str:
    """``3:05 h``, ``4.2 min`` or ``12 s``."""
    if seconds >= 3600:
        return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
