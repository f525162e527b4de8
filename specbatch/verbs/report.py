"""``specbatch report``."""

from __future__ import annotations

import argparse
from pathlib import Path

from specbatch.errors import UserError
from specbatch.verbs.options import plain_verb, run_dir_of


def report(arguments: list[str]) -> int:
    """Write one HTML page about runs: curves, where the time went, what is not normal, what the draft proposes."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="Run directories; several are compared.")
        parser.add_argument(
            "--output", type=Path, metavar="FILE",
            help="File to write; if not given, report.html in the run directory, or here for several runs.",
        )  # fmt: skip
        parser.add_argument(
            "--live", action="store_true", help="Serve the page on this host, always up to date, until Ctrl-C."
        )
        parser.add_argument("--port", type=int, default=0, help="Port for --live; any free one if not given.")

    options = plain_verb(report, arguments, add)
    if options.port and not options.live:
        raise UserError("--port: belongs to --live")
    if options.output and options.live:
        raise UserError("--output: --live writes no file; leave one of them out")
    for path in options.runs:
        run_dir_of(path)
    if options.live:
        return _serve(options.runs, options.port)
    from specbatch.report.page import page
    from specbatch.report.read import read_report
    from specbatch.rundir import write_whole

    output = options.output or (options.runs[0] if len(options.runs) == 1 else Path()) / "report.html"
    found = read_report(options.runs)
    data = page(found).encode()
    try:
        write_whole(output, data)
    except OSError as error:
        raise UserError(f"{output}: can't be written: {error.strerror}; name another place with --output") from error
    for run in found["runs"]:
        for finding in run["findings"]:
            print(f"{run['name']}: {finding['what']} {finding['do']}")
    print(f"{output}: {len(data) / 1e6:.2f} MB, opens in any browser")
    return 0


def _serve(runs: list[Path], port: int) -> int:
    from specbatch.report.live import LiveServer
    from specbatch.report.read import read_report

    try:
        server = LiveServer(lambda: read_report(runs), port)
    except OSError as error:
        raise UserError(f"--port: {port}: {error.strerror}; leave it out for any free one") from error
    with server:
        print(f"{server.url}\nfrom another machine, first: {server.tunnel}\nCtrl-C ends it", flush=True)
        server.serve_forever()
    return 0
