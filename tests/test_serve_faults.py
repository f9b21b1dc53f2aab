"""Clients that vanish, wait or read slowly, full queues, failures, and the end of a server."""

import json
import socket
import threading
import time

import numpy as np
import pytest

for name in ("tokenizers", "jinja2", "uvicorn", "starlette", "pydantic", "prometheus_client"):
    pytest.importorskip(name, reason=f"{name} is not installed")

from served import Serving, built_in  # noqa: E402

from marlin_cy.decoder.load import load_model  # noqa: E402
from marlin_cy.errors import DeviceError  # noqa: E402
from marlin_cy.serve import api  # noqa: E402
from marlin_cy.serve.answer import Answer  # noqa: E402

COMPLETIONS = "/v1/completions"
LONG = {"prompt": "a", "max_tokens": 1000, "ignore_eos": True, "temperature": 1.0}
SHORT = {"prompt": "b", "max_tokens": 3, "temperature": 0}


@pytest.fixture
def model():
    return load_model(built_in(), num_threads=1, context_length=1024, cache_tokens=8192)


@pytest.fixture
def gate(model, monkeypatch):
    """An event: while it is not set, the model does not compute."""
    event, forward = threading.Event(), model.forward_batch

    def held(pairs):
        assert event.wait(60)
        return forward(pairs)

    monkeypatch.setattr(model, "forward_batch", held)
    event.set()
    yield event
    event.set()


def send(serving, body):
    """A connection on which a request was sent, and no answer was read."""
    connection = serving.connect()
    connection.request("POST", COMPLETIONS, json.dumps(body), {"Content-Type": "application/json"})
    return connection


# ---------------------------------------------------------------------------------------------
# Clients


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_vanishes_ends_its_request(model, gate, stream):
    with Serving(model) as serving:
        expected = serving.document(COMPLETIONS, SHORT)["choices"]
        gate.clear()
        gone = send(serving, {**LONG, "stream": stream})
        serving.wait(lambda counts: counts.running == 1)
        waiting = [send(serving, SHORT) for _ in range(2)]
        gone.close()
        gate.set()
        for connection in waiting:
            assert json.loads(connection.getresponse().read())["choices"] == expected
            connection.close()
        serving.wait(lambda counts: counts[:2] == (0, 0))
        assert serving.counts.computed < 500, "the request did not run to its end"
        assert 'outcome="gone"} 1.0' in serving.ask("/metrics")[2].decode()


def test_a_client_that_vanishes_while_it_waits(model, gate):
    with Serving(model, max_sequences=1) as serving:
        gate.clear()
        first = send(serving, SHORT)
        serving.wait(lambda counts: counts.running == 1)
        gone = send(serving, {**LONG, "n": 3})
        serving.wait(lambda counts: counts.waiting == 3)
        gone.close()
        gate.set()
        assert first.getresponse().status == 200
        first.close()
        serving.wait(lambda counts: counts[:2] == (0, 0))


def test_clients_that_send_no_requests(model):
    """Garbage, halves of requests, and nothing: others are served, and the server ends."""
    half = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    with Serving(model) as serving:
        clients = []
        for data in (b"\x16\x03\x01garbage\r\n\r\n", b"GET", half, b"", b"A" * 200000, half):
            client = socket.create_connection(("127.0.0.1", serving.port))
            try:
                client.sendall(data)
            except OSError:  # the server has had enough
                assert len(data) > 1000
            clients.append(client)
        assert serving.document(COMPLETIONS, SHORT)["usage"]["completion_tokens"] == 3
        for client in clients:
            client.close()
        serving.wait(lambda counts: counts[:2] == (0, 0))


def test_a_body_that_does_not_come(model, monkeypatch):
    monkeypatch.setattr(api, "BODY_SECONDS", 0.1)
    with Serving(model) as serving:
        connection = serving.connect()
        connection.putrequest("POST", COMPLETIONS)
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", "100")
        connection.endheaders(b"{")
        response = connection.getresponse()
        assert response.status == 408
        assert "not complete" in json.loads(response.read())["error"]["message"]
        connection.close()


@pytest.mark.sweep
def test_a_client_that_reads_slowly(model):
    """Its text is complete, what waits for it is merged, and others do not wait for it."""
    with Serving(model) as serving:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", serving.port))
        body = json.dumps({**LONG, "stream": True, "n": 4, "max_tokens": 1000, "seed": 1}).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        client.sendall(head.encode() + body)
        serving.wait(lambda counts: counts.running == 4)
        start = time.monotonic()
        serving.document(COMPLETIONS, SHORT)
        serving.wait(lambda counts: counts[:2] == (0, 0), 120)
        assert time.monotonic() - start < 120
        time.sleep(0.2)
        parts = []
        while part := client.recv(65536):
            parts.append(part)
        client.close()
        received = b"".join(parts).decode()
        assert "data: [DONE]" in received
        whole = serving.document(COMPLETIONS, {**LONG, "n": 4, "seed": 1})
        texts = [""] * 4
        for line in received.splitlines():
            if line.startswith("data: {"):
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                texts[choice["index"]] += choice["text"]
        assert texts == [choice["text"] for choice in whole["choices"]]


# ---------------------------------------------------------------------------------------------
# Limits


def test_a_full_queue(model, gate):
    with Serving(model, max_sequences=1, max_waiting=2) as serving:
        gate.clear()
        running = [send(serving, SHORT) for _ in range(3)]
        serving.wait(lambda counts: counts[:2] == (1, 2))
        status, headers, document = serving.ask(COMPLETIONS, SHORT)
        assert (status, headers["retry-after"]) == (429, "1")
        assert document["error"]["type"] == "rate_limit_error"
        assert document["error"]["code"] == "queue_full"
        assert "3 of at most 3 have not ended" in document["error"]["message"]
        assert serving.ask("/health")[0] == 200
        gate.set()
        for connection in running:
            assert connection.getresponse().status == 200
            connection.close()
        assert serving.ask(COMPLETIONS, SHORT)[0] == 200


# ---------------------------------------------------------------------------------------------
# Failures


def test_a_request_whose_logits_are_not_numbers(model, gate, monkeypatch):
    """It gets an error, and the others their texts."""
    with Serving(model) as serving:
        expected = serving.document(COMPLETIONS, {**SHORT, "max_tokens": 20})["choices"]
        forward = model.forward_batch

        def damaged(pairs):
            rows = forward(pairs)
            return [
                np.full_like(row, np.nan) if tokens[-1] == ord("!") else row
                for (_, tokens), row in zip(pairs, rows, strict=True)
            ]

        monkeypatch.setattr(model, "forward_batch", damaged)
        gate.clear()
        good, whole, stream = (
            send(serving, body)
            for body in (
                {**SHORT, "max_tokens": 20},
                {**LONG, "prompt": "a!"},
                {**LONG, "prompt": "b!", "stream": True},
            )
        )
        gate.set()
        assert json.loads(good.getresponse().read())["choices"] == expected
        response = whole.getresponse()
        assert response.status == 500
        error = json.loads(response.read())["error"]
        assert (error["type"], error["code"]) == ("server_error", "failed")
        assert error["message"] == "position 2: the model's logits have nan for token 0"
        events = stream.getresponse().read().decode().split("\n\n")
        assert json.loads(events[-3].removeprefix("data: "))["error"]["message"] == error["message"]
        assert events[-2] == "data: [DONE]"
        for connection in (good, whole, stream):
            connection.close()


def test_a_device_that_fails_once(model, monkeypatch):
    with Serving(model) as serving:
        expected = serving.document(COMPLETIONS, SHORT)["choices"]
        forward = model.forward_batch

        def fail(pairs):
            monkeypatch.setattr(model, "forward_batch", forward)
            raise DeviceError("the device was lost")

        monkeypatch.setattr(model, "forward_batch", fail)
        status, _, document = serving.ask(COMPLETIONS, SHORT)
        assert (status, document["error"]["message"]) == (500, "the device was lost")
        assert serving.document(COMPLETIONS, SHORT)["choices"] == expected
        assert serving.document("/health")


def test_a_fault_of_the_engine(model, monkeypatch):
    """Nobody waits for ever: requests fail, and the server says that it is not well."""
    with Serving(model) as serving:
        monkeypatch.setattr(serving.service.engine.scheduler, "_parts", lambda: 1 // 0)
        status, _, document = serving.ask(COMPLETIONS, SHORT)
        assert (status, document["error"]["type"]) == (500, "server_error")
        assert "the engine has failed (ZeroDivisionError" in document["error"]["message"]
        serving.service.engine.close()
        status, _, document = serving.ask(COMPLETIONS, SHORT)
        assert (status, document["error"]["message"]) == (503, "the engine has failed")
        assert serving.ask("/health")[0] == 503
        assert isinstance(serving.service.engine.error, ZeroDivisionError)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_of_the_interface(model, monkeypatch, caplog):
    with Serving(model) as serving:
        monkeypatch.setattr(serving.service, "complete", lambda body: 1 // 0)
        status, _, document = serving.ask(COMPLETIONS, SHORT)
        assert (status, document["error"]["message"]) == (500, "a fault of the server: ZeroDivisionError")
        assert serving.document("/health")


# ---------------------------------------------------------------------------------------------
# The end


def test_the_end_waits_for_texts(model, gate):
    """Those that run, and those that were accepted; new ones find no server."""
    with Serving(model, max_sequences=1) as serving:
        expected = serving.document(COMPLETIONS, SHORT)["choices"]
        gate.clear()
        connections = [send(serving, {**SHORT, "stream": number == 0}) for number in range(3)]
        serving.wait(lambda counts: counts[:2] == (1, 2))
        serving.server.should_exit = True
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", serving.port)).close()
            except OSError:
                break
            assert time.monotonic() < deadline
            time.sleep(0.05)
        gate.set()
        assert connections[0].getresponse().read().decode().endswith("data: [DONE]\n\n")
        for connection in connections[1:]:
            assert json.loads(connection.getresponse().read())["choices"] == expected
        for connection in connections:
            connection.close()


def test_the_end_at_once(model, gate):
    """What runs is cut off, and the cache is free."""
    serving = Serving(model, max_sequences=1)
    with serving:
        gate.clear()
        connections = [send(serving, {**LONG, "stream": True}) for _ in range(2)]
        serving.wait(lambda counts: counts[:2] == (1, 1))
        serving.server.force_exit = True
        gate.set()
    for connection in connections:
        connection.close()
    assert serving.counts[:2] == (0, 0)
    assert model.free_tokens == 8192
    assert not serving.service.engine.running


def test_an_answer_merges_what_waits():
    import asyncio

    from marlin_cy.decoder.writer import Piece
    from marlin_cy.serve.request import Output

    async def main(stream):
        answer = Answer(stream=stream)
        requests = [type("Request", (), {"index": index})() for index in range(2)]
        for request in requests:
            answer.add(request)
        woken = [answer.put(Output(requests[0], Piece(letter, (1,)))) for letter in "abc"]
        assert woken == [stream, False, False], "woken once"
        (part,) = await answer.take()
        assert (part.text, part.tokens, part.finish_reason) == ("abc", 3, None)
        taken = asyncio.ensure_future(answer.take())
        await asyncio.sleep(0)
        assert answer.put(Output(requests[1], Piece("x", (1,), "stop"))) == stream
        assert not answer.ended
        assert answer.put(Output(requests[0], Piece("y", (2,), "length"))) == (not stream)
        answer.wake()
        parts = await taken
        assert [(part.index, part.text, part.finish_reason) for part in parts] == [(1, "x", "stop"), (0, "y", "length")]
        assert await answer.take() == []

    for stream in (False, True):
        asyncio.run(main(stream))
