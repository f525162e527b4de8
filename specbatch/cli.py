"""The command line: its verbs, and how their errors become messages and exit codes.

Exit codes: 0 done, 1 failed, 2 a mistake of the user, 75 stopped with a snapshot and to be continued, 130 interrupted.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence

from specbatch import __version__
from specbatch.errors import RunError, UserError
from specbatch.verbs.cancel import cancel
from specbatch.verbs.compare import compare
from specbatch.verbs.data import data
from specbatch.verbs.doctor import doctor
from specbatch.verbs.engine import engine
from specbatch.verbs.evaluate import evaluate
from specbatch.verbs.export import export
from specbatch.verbs.init import init
from specbatch.verbs.inspect import inspect
from specbatch.verbs.logs import logs
from specbatch.verbs.options import Verb, about
from specbatch.verbs.plan import plan
from specbatch.verbs.regenerate import regenerate
from specbatch.verbs.replay import replay
from specbatch.verbs.report import report
from specbatch.verbs.run import resume, run
from specbatch.verbs.scale import scale
from specbatch.verbs.status import status
from specbatch.verbs.submit import submit

FAILED, MISTAKE, INTERRUPTED = 1, 2, 130
VERBS: dict[str, Verb] = {
    verb.__name__: verb
    for verb in (
        init,
        plan,
        doctor,
        submit,
        run,
        resume,
        status,
        report,
        logs,
        cancel,
        scale,
        engine,
        data,
        regenerate,
        export,
        evaluate,
        compare,
        inspect,
        replay,
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            return _dispatch(arguments)
        finally:
            sys.stdout.flush()
    except UserError as error:
        print(f"specbatch: {error}", file=sys.stderr)
        return MISTAKE
    except RunError as error:
        print(f"specbatch: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("specbatch: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader closed our output; without this, Python would fail once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0 if arguments else MISTAKE
    if arguments[0] == "--version":
        print(f"specbatch {__version__}")
        return 0
    verb = arguments[0]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the verbs are {', '.join(VERBS)}"
        raise UserError(f"{verb}: there is no such verb; {hint}")
    return VERBS[verb](arguments[1:])


def _help() -> str:
    lines = [
        "usage: specbatch VERB [OPTIONS]",
        "",
        "Train the draft models of speculative decoding.",
        "",
        *(f"  {name:12}{about(verb)}" for name, verb in VERBS.items()),
        "",
        "`specbatch VERB --help` explains a verb's options; `specbatch --version` prints the version.",
    ]
    return "\n".join(lines)
