"""How the process of a trainer rank ends."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn

log = logging.getLogger(__name__)


def end_with(work: Callable[[], int]) -> NoReturn:
    """Run ``work`` and end the process with the exit code that it returns, or log its exception and end with 1.

    The interpreter's own shutdown is skipped: there, threads of libraries abort the process now and then.
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
