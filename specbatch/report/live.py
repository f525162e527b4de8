"""``specbatch report --live``: serves the page over HTTP, only on the loopback interface of this host.

Other users of a login node reach its loopback interface, too, so the address has a secret part, and a request that
names another host, as a page elsewhere might bring a browser to send, is refused.
"""

from __future__ import annotations

import getpass
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from specbatch.report.document import Document
from specbatch.report.page import as_json, page

LOOPBACK = "127.0.0.1"
FRESH_S = 5.0
"""Seconds for which a report is cached, because reading a long run takes seconds."""


class LiveServer(ThreadingHTTPServer):
    """Serves a report that is read again on request.

    Args:
        read: reads the runs.
        port: port to listen on; 0 for any free one.
    """

    daemon_threads = True

    def __init__(self, read: Callable[[], Document], port: int = 0) -> None:
        super().__init__((LOOPBACK, port), _Handler)
        self.secret = secrets.token_urlsafe(16)
        self.fresh_s = FRESH_S
        """Seconds for which a report is cached."""
        self._read, self._lock = read, threading.Lock()
        self._found: Document | None = None
        self._read_at = 0.0

    @property
    def url(self) -> str:
        """Address of the page on this host."""
        return f"http://{LOOPBACK}:{self.server_port}/{self.secret}/"

    @property
    def tunnel(self) -> str:
        """The command that brings the page's port to the user's own machine."""
        port = self.server_port
        return f"ssh -N -L {port}:{LOOPBACK}:{port} {_user()}@{socket.gethostname()}"

    def document(self) -> Document:
        """The report, at most ``fresh_s`` seconds old when it is asked for."""
        with self._lock:
            if self._found is None or time.monotonic() - self._read_at > self.fresh_s:
                self._found = self._read()
                self._read_at = time.monotonic()
            return self._found


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        # This happens in containers without an entry for this user.
        return str(os.getuid())


class _Handler(BaseHTTPRequestHandler):
    server: LiveServer

    def do_GET(self) -> None:
        """Answer with the page or with newer data."""
        host = self.headers.get("Host", "").rpartition(":")[0]
        folder = f"/{self.server.secret}/"
        if host not in (LOOPBACK, "localhost") or self.path not in (folder, f"{folder}data.json"):
            self.send_error(404)
            return
        try:
            found = self.server.document()
        except Exception as error:  # shown instead of the page; the next request may find whole files
            self.send_error(503, explain=str(error))
            return
        if self.path == folder:
            self._send("text/html", page(found, live="data.json"))
        else:
            self._send("application/json", as_json({**found, "live": "data.json"}))

    def _send(self, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Do nothing: the terminal shows only the address."""
