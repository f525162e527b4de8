"""The page over HTTP, while the run goes on."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import threading

import pytest

from specbatch.report.document import document
from specbatch.report.live import LiveServer
from specbatch.report.reading import read_run
from tests.report.synthetic import make_run


@pytest.fixture
def served(tmp_path):
    run = make_run(tmp_path / "a", 40)
    server = LiveServer(lambda: document([read_run(run.root)]))
    server.fresh_s = 0.0
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield run, server
    server.shutdown()
    thread.join()
    server.server_close()


def ask(server, path, host=""):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request("GET", path, headers={"Host": host or f"127.0.0.1:{server.server_port}"})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_the_page_is_served_and_its_data_are_newer_each_time(served):
    run, server = served
    status, text = ask(server, f"/{server.secret}/")
    assert status == 200
    assert "connect-src 'self'" in text
    with run.metrics.open("a") as file:
        file.write(json.dumps({"step": 41, "loss": 3.0, "tokens": 5, "seconds": 1.0}) + "\n")
    status, text = ask(server, f"/{server.secret}/data.json")
    assert (status, json.loads(text)["runs"][0]["step"], json.loads(text)["live"]) == (200, 41, "data.json")


def test_strangers_get_nothing(served):
    _, server = served
    assert server.server_address[0] == "127.0.0.1"
    assert ask(server, "/")[0] == 404
    assert ask(server, "/wrong/data.json")[0] == 404
    assert ask(server, f"/{server.secret}/", host="evil.example")[0] == 404
    assert ask(server, f"/{server.secret}/../config.yaml")[0] == 404


def test_a_file_that_is_damaged_for_a_moment_ends_nothing(served):
    run, server = served
    whole = run.status.read_text()
    run.status.write_text("{")
    status, text = ask(server, f"/{server.secret}/")
    assert status == 503
    assert "status.json: is not JSON" in text
    run.status.write_text(whole)
    assert ask(server, f"/{server.secret}/")[0] == 200


def test_the_command_prints_the_address_and_the_ssh_line_and_ends_with_ctrl_c(tmp_path):
    make_run(tmp_path / "a", 40)
    command = subprocess.Popen(
        [sys.executable, "-m", "specbatch", "report", "--live", str(tmp_path / "a")], stdout=subprocess.PIPE, text=True
    )
    lines = [command.stdout.readline().strip() for _ in range(3)]
    port = lines[0].split(":")[2].split("/")[0]
    assert lines[0].startswith("http://127.0.0.1:")
    assert f"ssh -N -L {port}:127.0.0.1:{port} " in lines[1]
    command.send_signal(signal.SIGINT)
    assert command.wait(timeout=30) == 130
