"""Mail about a run under Slurm, to whom Slurm itself would write. Slurm has no way to send a text of one's own."""

from __future__ import annotations

import getpass
import logging
import shutil
import subprocess
import threading

from specbatch.config import Config

DEADLINE_S = 60.0

logger = logging.getLogger(__name__)


def send_mail(config: Config, subject: str, text: str) -> None:
    """Send a mail with the node's program ``mail``, in the background, if `slurm.extra` asks for mail.

    A node without that program, or a mail that can't be sent, leaves a line in the log.
    """
    extra = config.slurm.extra
    if str(extra.get("mail-type") or "NONE").upper() == "NONE":
        return
    to = str(extra.get("mail-user") or getpass.getuser())
    program = shutil.which("mail")
    if program is None:
        logger.warning("not mailed to=%s subject=%s why=this node has no program named mail", to, subject)
        return
    threading.Thread(target=_send, args=(program, to, subject, text), daemon=True).start()


def _send(program: str, to: str, subject: str, text: str) -> None:
    argv = [program, "-s", subject, to]
    try:
        subprocess.run(argv, input=text, text=True, capture_output=True, timeout=DEADLINE_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("not mailed to=%s subject=%s why=%s", to, subject, error)
