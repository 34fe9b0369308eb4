"""`pdserve explain` over HTTP: one of several replicas knows the request, and nobody else."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cluster.errors import EnvironmentProblem
from deploy.cli import main
from deploy.explain import UnknownRequest, fetch_explanation

FOUND = {
    "request": "r",
    "external": "cmpl-mine-0",
    "prompt_tokens": 3,
    "max_tokens": 9,
    "slo_class": "",
    "tenant": "",
    "ttft_bound_s": None,
    "tpot_bound_s": 0.02,
    "choices": [
        {"after_s": 0.0, "prefill": "prefill-0", "decode": "decode-1", "link": "node", "reason": "fewest"}
    ],
    "outcome": None,
}


class Replicas(BaseHTTPRequestHandler):
    """Two ingresses behind one address, in turn: the second knows `a/b`."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        turn = len(self.asked) % 2
        knows = turn == 0 and self.path.endswith("/a%2Fb")
        self.send_response(200 if knows else 404)
        if not self.path.startswith("/pdserve/decisions/no-header"):
            self.send_header("x-pdserve-ingress", f"ingress-{turn}")
            self.send_header("x-pdserve-ingresses", "2")
        body = json.dumps(FOUND if knows else {}).encode()
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Replicas.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Replicas)
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    serving.join()
    server.server_close()


def test_every_replica_is_asked_until_one_knows(url: str) -> None:
    assert fetch_explanation(url, "a/b") == FOUND
    assert Replicas.asked == ["/pdserve/decisions/a%2Fb"] * 2


def test_none_of_them_knows(url: str) -> None:
    with pytest.raises(UnknownRequest, match=r"no ingress knows a request 'c' \(2 asked\)"):
        fetch_explanation(url, "c")
    assert len(Replicas.asked) == 2


@pytest.mark.parametrize("name", ["no-header"])
def test_another_server_is_no_cluster(url: str, name: str) -> None:
    with pytest.raises(EnvironmentProblem, match="no pdserve cluster answers at"):
        fetch_explanation(url, name)


def test_nobody_answers() -> None:
    with pytest.raises(EnvironmentProblem, match="no pdserve cluster answers at"):
        fetch_explanation("http://127.0.0.1:9", "a")


def test_the_command(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "a/b", "--url", url]) == 0
    assert capsys.readouterr().out == (
        "request cmpl-mine-0: 3 prompt tokens, at most 9 of output; SLO TPOT 20 ms\n"
        "  prefill-0, decode-1 on its node: fewest\n"
        "  under way\n"
    )
    assert main(["explain", "a/b", "--url", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == FOUND
    assert main(["explain", "c", "--url", url]) == 1
    assert "give the id that the API answered with" in capsys.readouterr().err
