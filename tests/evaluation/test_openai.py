"""The HTTP client against a server of this process, recorded and replayed."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lowtide.core.errors import ConfigError, DataError, EndpointError, EndpointTimeoutError
from lowtide.evaluation.models.openai import Endpoint, OpenAiModel
from lowtide.evaluation.models.opening import open_model
from lowtide.evaluation.models.protocol import Continuation, Generation
from lowtide.evaluation.models.transport import (
    RecordingTransport,
    ReplayTransport,
    UrlTransport,
)


class Server(ThreadingHTTPServer):
    """Echoes, with a log-probability of -len(word) for each word; does what `plan` says first."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan: list[Any] = []
        self.seen: list[tuple[str, dict[str, Any], dict[str, str]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, body, dict(self.headers)))
        step = self.server.plan.pop(0) if self.server.plan else None
        if step == "hang":
            time.sleep(1.0)
            return
        if step == "break":
            self.connection.close()
            return
        status, headers, said = step if isinstance(step, tuple) else (200, {}, None)
        if said is None:
            said = json.dumps(answer(self.path, body))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(said.encode())

    def log_message(self, *_: Any) -> None:
        pass


def answer(path: str, body: dict[str, Any]) -> dict[str, Any]:
    if path.endswith("/chat/completions"):
        content = body["messages"][0]["content"]
        return {"choices": [{"message": {"role": "assistant", "content": f"You said {content}"}}]}
    if not body.get("echo"):
        return {"choices": [{"text": f" after {body['prompt']}"}]}
    offsets, scores, best, at = [], [], [], 0
    for n, word in enumerate(body["prompt"].split(" ")):
        offsets.append(at)
        scores.append(None if n == 0 else -float(len(word)))
        best.append(None if n == 0 else {word: -float(len(word))} if word != "worse" else {"x": -1})
        at += len(word) + (n > 0 or 1)
    offsets = [max(0, o - 1) if o else 0 for o in offsets]  # " word" begins at its space
    offsets.append(len(body["prompt"]))
    scores.append(-99.0)
    best.append({"generated": -99.0})
    return {"choices": [{"text": body["prompt"], "logprobs": {
        "text_offset": offsets, "token_logprobs": scores, "top_logprobs": best}}]}  # fmt: skip


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


def model(server: Server, transport: Any = None, pauses: Any = None, **options: Any) -> OpenAiModel:
    endpoint = Endpoint(url=server.url, model="m", **{"timeout_s": 5.0, **options})
    return OpenAiModel(endpoint, transport, sleep=(pauses if pauses is not None else []).append)


def test_texts_are_generated(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    options = Generation(max_tokens=7, stop=("!",), temperature=0.5, seed=3)
    assert model(server).generate(["one", "two! three"], options) == [" after one", " after two"]
    path, body, headers = server.seen[0]
    assert path == "/v1/completions"
    assert body == {
        "model": "m", "max_tokens": 7, "temperature": 0.5, "seed": 3, "stop": ["!"],
        "prompt": "one",
    }  # fmt: skip
    assert headers["Authorization"] == "Bearer secret-key"
    assert model(server, api="chat").generate(["hi"], Generation()) == ["You said hi"]


def test_likelihoods_are_read_from_the_echo(server: Server) -> None:
    found = model(server).loglikelihood(
        [Continuation("The sky is", " dark blue"), Continuation("It is", " worse")]
    )
    assert [tuple(each) for each in found] == [(-8.0, 2, True), (-5.0, 1, False)]
    with pytest.raises(DataError, match="give it a context"):
        model(server).loglikelihood([Continuation("", "word")])
    with pytest.raises(DataError, match="a chat endpoint"):
        model(server, api="chat").loglikelihood([Continuation("a", "b")])


def test_errors_that_pass_are_waited_for(server: Server) -> None:
    pauses: list[float] = []
    server.plan = [(503, {}, "busy"), (429, {"Retry-After": "7"}, "slow down"), (500, {}, "")]
    assert model(server, pauses=pauses).generate(["x"], Generation()) == [" after x"]
    assert len(server.seen) == 4
    assert 0.5 <= pauses[0] <= 1.0
    assert pauses[1] == 7.0
    assert 2.0 <= pauses[2] <= 4.0


@pytest.mark.parametrize(
    ("plan", "said", "requests"),
    [
        ([(401, {}, "no key")], r"status 401: no key; put a valid key into \$OPENAI_API_KEY", 1),
        ([(404, {}, "?")], "check the URL and the model's name", 1),
        ([(400, {}, "bad")], "status 400: bad", 1),
        ([(429, {"Retry-After": "900"}, "tomorrow")], "status 429: tomorrow", 1),
        ([(503, {}, "busy")] * 9, "status 503 after 3 tries", 3),
        ([(200, {}, "<html>")], "the answer has no choice", 1),
        ([(200, {}, '{"choices": []}')], "the answer has no choice", 1),
        ([(200, {}, '{"choices": [{"text": 3}]}')], "the answer's text is 3", 1),
        ([(200, {}, '{"choices": [{"message": {}}]}')], 'has no "text"', 1),
        ([(302, {"Location": "http://127.0.0.1:1/"}, "")], "status 302", 1),
        (["break"] * 9, "the connection broke|no connection", 3),
    ],
)
def test_refusals_are_typed_and_say_what_to_do(
    server: Server, plan: list[Any], said: str, requests: int
) -> None:
    server.plan = plan
    with pytest.raises(EndpointError, match=said):
        model(server, retries=2).generate(["x"], Generation())
    assert len(server.seen) == requests


def test_silence_ends_in_time(server: Server) -> None:
    server.plan = ["hang", "hang"]
    with pytest.raises(EndpointTimeoutError, match=r"no answer within 0.2 s"):
        model(server, timeout_s=0.2, retries=1).generate(["x"], Generation())
    closed = Endpoint(url="http://127.0.0.1:9/v1", model="m", retries=0)
    with pytest.raises(EndpointError, match="is the server up"):
        OpenAiModel(closed).generate(["x"], Generation())


def test_what_is_recorded_is_replayed_without_a_server(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    path = tmp_path / "talk.jsonl"
    server.plan = [(503, {"Set-Cookie": "a"}, "busy"), None]
    first = model(server, RecordingTransport(UrlTransport(), path))
    requests = [Continuation("The sky is", " dark blue")]
    said = first.generate(["x"], Generation()), first.loglikelihood(requests)
    assert len(path.read_text().splitlines()) == 3
    assert "secret-key" not in path.read_text()
    seen = len(server.seen)
    pauses: list[float] = []
    again = model(server, ReplayTransport(path), pauses)
    assert (again.generate(["x"], Generation()), again.loglikelihood(requests)) == said
    assert len(pauses) == 1
    assert len(server.seen) == seen
    assert again.fingerprint() == first.fingerprint()
    with pytest.raises(EndpointError, match="was not recorded"):
        again.generate(["y"], Generation())
    path.write_text("{}\n")
    with pytest.raises(DataError, match="holds no recorded requests"):
        ReplayTransport(path)


def test_models_are_opened_by_what_the_command_line_says(server: Server) -> None:
    opened = open_model("openai:m", url=server.url)
    assert opened.name == "m"
    assert opened.generate(["x"], Generation()) == [" after x"]
    assert open_model("python:tests.evaluation.fakes:cli_model").name == "scripted"
    for spelled, url, said in [
        ("m", None, "allowed is hf:..."), ("openai:m", None, "these need it"),
        ("hf:x", "http://a", "these need it"), ("openai:m", "ftp://x", "allowed is http://"),
        ("python:none:x", None, "cannot be called"), ("python:math:none", None, "cannot be called"),
        ("python:tests.evaluation.fakes:not_a_model", None, "returned int"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            open_model(spelled, url=url)
    assert math.isfinite(open_model("python:tests.evaluation.fakes:cli_model").loglikelihood(
        [Continuation("a", "b")])[0].total)  # fmt: skip
