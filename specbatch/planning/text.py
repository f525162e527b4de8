"""Formats a budget as text."""

from __future__ import annotations

from specbatch.planning import Budget
from specbatch.units import bytes_text, count_text


def lines(budget: Budget) -> list[str]:
    """Return one line per finding, which begins with its name."""
    work, layout, times = budget.work, budget.layout, budget.times
    plan, steps = work.plan, work.steps
    share = work.loss_tokens / work.tokens
    live = ", ".join(f"{count / work.tokens:.0%}" for count in work.live)
    ahead = layout.room_bytes * steps // max(1, work.bytes)
    rows = [
        ("corpus", f"{work.samples:,} samples, {work.tokens:,} tokens, {work.loss_tokens:,} loss tokens ({share:.0%})"),
        ("steps", f"{steps:,} of {plan.packs_per_step} packs, {work.tokens / steps:,.0f} tokens each on average"),
        (work.computed, f"{live} of the tokens, by term of the loss"),
        (
            "hidden states",
            f"{bytes_text(work.full_token_bytes)} a token, {bytes_text(work.bytes / work.tokens)} of it stored on "
            f"average, {bytes_text(work.bytes / steps)} a step, {bytes_text(work.largest_step_bytes)} the largest; "
            f"{bytes_text(work.bytes)}",
        ),
        ("store", f"{bytes_text(layout.room_bytes)} in {layout.ranks} ranks: about {ahead:,} steps"),
    ]
    if work.heldout_packs:
        rows.append(
            (
                "held out",
                f"{work.heldout_packs} packs, {work.heldout_tokens:,} tokens, {bytes_text(work.heldout_bytes)} in the "
                f"ranks' memory; {layout.evaluations} evaluations",
            )
        )
    rows += [
        *zip(["draft", *[""] * len(budget.draft)], budget.draft, strict=False),
        (
            "target",
            f"{count_text(work.active_weights)} weights compute a token, most of them stored as {work.weight_format}",
        ),
        ("engine", f"{flops(work.engine_flops)}, {flops(work.engine_flops / max(1, work.captured_tokens))} a token"),
        ("", f"{times.engine_tokens_per_s:,.0f} tokens/s each ({budget.rates.engine.source})"),
        ("trainer", f"{flops(work.trainer_flops)}, {flops(work.trainer_flops / work.tokens)} a token"),
        ("", f"{times.trainer_tokens_per_s:,.0f} tokens/s of all ranks ({budget.rates.rank.source})"),
        (
            "memory",
            f"{bytes_text(sum(budget.rank_bytes.values()))} of a GPU for a rank: "
            + ", ".join(f"{bytes_text(count)} {kind}" for kind, count in budget.rank_bytes.items() if count),
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
        *_cost(budget),
        (
            "",
            f"engines {duration(times.engines_s)}, ranks {duration(times.ranks_s)}, {duration(times.fill_s)} before "
            "the first step",
        ),
    ]
    return [f"{name:15}{text}" for name, text in rows]


def _cost(budget: Budget) -> list[tuple[str, str]]:
    """Return the cost of a job's nodes while it trains."""
    nodes, charge = budget.layout.nodes, budget.layout.charge
    if not nodes:
        return []
    hours = nodes * budget.times.total_s / 3600
    charged = f", charged as {hours * charge:,.1f}" if charge != 1 else ""
    return [("", f"{hours:,.1f} node-hours of {nodes} nodes{charged}, plus the start of its components")]


def _slower(budget: Budget) -> str:
    if not budget.times.overlap:
        return "but the store can't hold two steps, so both take turns: raise store.bytes_per_rank"
    if budget.times.engines_s > budget.times.ranks_s:
        return "ranks will wait for engines"
    return "engines will wait for ranks"


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
