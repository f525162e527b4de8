"""``specbatch regenerate``."""

from __future__ import annotations

import sys
import time

from specbatch.verbs.options import about, log_to_stderr

PROGRESS_S = 5.0


def regenerate(arguments: list[str]) -> int:
    """Have the target write the answers of conversations anew, for a draft to learn from."""
    from specbatch.config.options import options_of, parse_options, parser
    from specbatch.regenerate import Regenerate

    if any(word in ("-h", "--help") for word in arguments):
        fields = options_of(Regenerate)
        shown = parser("specbatch regenerate", f"{about(regenerate)}.", {"options": ("", fields)})
        shown.usage = "specbatch regenerate --target DIR --input FILE --output FILE [--OPTION VALUE ...]"
        shown.print_help()
        return 0
    options = parse_options(Regenerate, arguments)
    from specbatch.inference.arguments import refuse_unknown

    refuse_unknown(options.sglang, "sglang")
    log_to_stderr()
    from specbatch.regenerate import regenerate as generate

    summary = generate(options, _Rate())
    for reason, count in summary.skipped.items():
        print(f"skipped {count}: {reason}", file=sys.stderr)
    print(f"{summary.written} conversations of {summary.rows} rows in {options.output}")
    return 0


class _Rate:
    """Tells on stderr, now and then, how far the work is."""

    def __init__(self) -> None:
        self._told = time.monotonic()

    def __call__(self, done: int, total: int, tokens_per_s: float) -> None:
        if done < total and time.monotonic() - self._told < PROGRESS_S:
            return
        self._told = time.monotonic()
        print(f"{done} of {total} rows, {tokens_per_s:.0f} tokens/s", file=sys.stderr)
