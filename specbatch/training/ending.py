"""How the process of a trainer rank ends."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn

log = logging.getLogger(__name__)


def end_with(work: Callable[[], int]) -> NoReturn:
    """Work, and end the process with the exit code that it gives, or with 1 and its exception in the log.

    Nothing is left to the interpreter's own end: threads of libraries that it ends abort the process now and then.
    """
    code = 1
    try:
        code = work()
    except Exception:
        log.exception("rank ended")
    finally:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
