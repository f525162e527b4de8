"""Conversations in, the same conversations with the target's own answers out.

A draft learns to propose what the target would say, so it should be trained on what the target said. User and system
turns are kept; each assistant turn is written anew by the target, after what it has said before; a conversation that
ends on a user turn gets its answer. The output's rows stand in the input's order, and the work may be broken off at
any time: the next call goes on behind the last whole row.

An answer that reaches `max_new_tokens` has no end, but a chat template would write one, and it would be trained
although the target never said it. So such a conversation is skipped, or kept with a mark that the corpus heeds.
"""

from __future__ import annotations

from specbatch.regenerate.options import Progress, Regenerate, Summary

__all__ = ["Progress", "Regenerate", "Summary", "regenerate"]


def regenerate(options: Regenerate, progress: Progress | None = None) -> Summary:
    """Writes `options.output`, and in `<output>.skipped.jsonl` the place and the reason of each row left out.

    Args:
        options: what to do.
        progress: called after each row.

    Raises:
        UserError: target or input can't be read, or the output belongs to another call.
        RunError: an engine ended; the same call goes on where this one stopped.
    """
    from specbatch.regenerate.run import run  # what it needs takes a second to import

    return run(options, progress)
