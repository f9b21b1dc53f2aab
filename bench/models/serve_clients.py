"""Clients of a server, for ``python -m bench serve``."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from typing import Any

__all__ = ["first_token_seconds", "run_clients", "whole_seconds"]

TIMEOUT_SECONDS = 600
PATH = "/v1/completions"


def run_clients(port: int, prompts: Sequence[Sequence[int]], tokens: int) -> float:
    """Seconds in which a client for each prompt gets its answer of so many tokens, as a stream."""
    start, _ = _together(port, prompts, tokens)
    return time.perf_counter() - start


def first_token_seconds(port: int, prompts: Sequence[Sequence[int]]) -> list[float]:
    """Seconds until the first token of each of several clients that begin together."""
    start, firsts = _together(port, prompts, 1)
    return [first - start for first in firsts]


def whole_seconds(port: int, prompt: Sequence[int], tokens: int) -> float:
    """Seconds of a single request, from its connection to the last byte of its answer.

    The client's own work, its JSON, is outside. Its HTTP is read by hand: ``http.client`` would take a millisecond.
    """
    body = json.dumps(_body(prompt, tokens, stream=False)).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
    data = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    answer = bytearray()
    start = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_SECONDS) as connection:
        connection.sendall(data)
        while part := connection.recv(1 << 16):
            answer += part
        seconds = time.perf_counter() - start
    status, _, text = answer.partition(b"\r\n\r\n")
    if not status.startswith(b"HTTP/1.1 200 "):
        raise ValueError(f"the server answers {answer.decode()}")
    _check(json.loads(text)["usage"]["completion_tokens"], tokens)
    return seconds


def _together(port: int, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[float, list[float]]:
    """The time when all clients begin, and the times of their first tokens."""
    firsts = [0.0] * len(prompts)
    faults: list[BaseException] = []
    ready = threading.Barrier(len(prompts) + 1)

    def client(number: int) -> None:
        ready.wait()
        try:
            firsts[number] = _stream(port, prompts[number], tokens)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    ready.wait()
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    if faults:
        raise ValueError(f"a client fails: {type(faults[0]).__name__}: {faults[0]}")
    return start, firsts


def _stream(port: int, prompt: Sequence[int], tokens: int) -> float:
    """Read a stream to its end; the time of its first token."""
    first, written = 0.0, 0
    with _asking(port, prompt, tokens) as response:
        for line in response:
            if line.startswith(b'data: {"error"'):
                raise ValueError(line.decode())
            if line.startswith(b"data: {"):
                first = first or time.perf_counter()
                written = (json.loads(line[6:]).get("usage") or {}).get("completion_tokens", written)
    _check(written, tokens)
    return first


@contextmanager
def _asking(port: int, prompt: Sequence[int], tokens: int) -> Iterator[HTTPResponse]:
    """The stream that answers a request, on a connection of its own."""
    body = json.dumps(_body(prompt, tokens, stream=True))
    connection = HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_SECONDS)
    try:
        connection.request("POST", PATH, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"the server answers {response.status}: {response.read().decode()}")
        yield response
    finally:
        connection.close()


def _body(prompt: Sequence[int], tokens: int, *, stream: bool) -> dict[str, Any]:
    body: dict[str, Any] = {"prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return body | {"stream": True, "stream_options": {"include_usage": True}} if stream else body


def _check(written: int, tokens: int) -> None:
    if written != tokens:
        raise ValueError(f"the server: got an answer of {written} tokens, expected {tokens}")
