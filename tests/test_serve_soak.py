"""Many clients, good and bad, for a long time: answers stay right and memory stays flat.

The sweep sends a few hundred requests. For the whole of it::

    MARLIN_CY_SOAK_REQUESTS=10000 .venv/bin/python -m pytest -n 0 -m sweep tests/test_serve_soak.py
"""

import collections
import json
import os
import queue
import random
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

for name in ("tokenizers", "jinja2", "uvicorn", "starlette", "pydantic", "prometheus_client"):
    pytest.importorskip(name, reason=f"{name} is not installed")

from served import Process, built_in  # noqa: E402

from marlin_cy.decoder.generate import generate  # noqa: E402
from marlin_cy.decoder.load import load_model  # noqa: E402

REQUESTS = int(os.environ.get("MARLIN_CY_SOAK_REQUESTS", 300))
CLIENTS = 12
SAMPLES = 20
MOST_GROWTH = 8 << 20
"""Bytes by which memory may grow in the second half: the allocator's pools and the lists of kept sequences vary."""

PATH = "/v1/completions"
CASES = [
    {"prompt": prefix + end, "max_tokens": tokens, "temperature": temperature, "seed": seed}
    for prefix in ("def quicksort(values):\n" * 3, "")
    for end in ("import ", "class A:", "x" * 50)
    for tokens, temperature, seed in ((1, 0, 0), (12, 0.9, 1), (40, 1.2, 2), (90, 0, 3))
]


def expected_texts():
    """The text of each case, by a model that is not served."""
    model = load_model(built_in(), num_threads=1, context_length=512)
    texts = []
    for case in CASES:
        options = {name: case[name] for name in ("temperature", "seed")}
        pieces = generate(model, case["prompt"], max_new_tokens=case["max_tokens"], **options)
        texts.append("".join(piece.text for piece in pieces))
    return texts


class Client:
    """Sends requests of one kind after the other, and says what was wrong."""

    def __init__(self, process, texts, seed):
        self._process, self._texts, self._random = process, texts, random.Random(seed)
        self.kinds = [getattr(self, name) for name in dir(self) if name.startswith("kind_")]

    def run(self, numbers, faults, done):
        """Send a request for each number of a queue."""
        while True:
            try:
                numbers.get_nowait()
            except queue.Empty:
                return
            kind = self._random.choice(self.kinds)
            try:
                kind()
            except Exception as error:
                faults.append(f"{kind.__name__}: {type(error).__name__}: {error}")
            done[kind.__name__] += 1

    def case(self):
        index = self._random.randrange(len(CASES))
        return CASES[index], self._texts[index]

    def kind_whole(self):
        case, right = self.case()
        connection, response = self._process.ask(PATH, case)
        document = json.loads(response.read())
        connection.close()
        assert response.status == 200, document
        assert document["choices"][0]["text"] == right

    def kind_stream(self, pause=0.0):
        case, right = self.case()
        connection, response = self._process.ask(PATH, {**case, "stream": True})
        text, last = "", b""
        for line in response:
            time.sleep(pause)
            last = line.strip() or last
            if line.startswith(b"data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
        connection.close()
        assert last == b"data: [DONE]"
        assert text == right

    def kind_slow(self):
        self.kind_stream(pause=0.005)

    def kind_two(self):
        case, right = self.case()
        connection, response = self._process.ask(PATH, {**case, "n": 2})
        choices = json.loads(response.read())["choices"]
        connection.close()
        assert len(choices) == 2
        assert choices[0]["text"] == right

    def kind_vanish(self):
        connection = self._process.send(PATH, {**self.case()[0], "stream": self._random.random() < 0.5})
        connection.close()

    def kind_cancel(self):
        connection, response = self._process.ask(PATH, {**self.case()[0], "stream": True, "n": 2})
        for _ in range(self._random.randrange(6)):
            response.readline()
        connection.close()

    def kind_garbage(self):
        with socket.create_connection(("127.0.0.1", self._process.port)) as client:
            try:
                client.sendall(self._random.randbytes(self._random.randrange(1, 3000)))
                if self._random.random() < 0.5:
                    client.settimeout(0.1)
                    client.recv(100)
            except OSError:
                pass

    def kind_half(self):
        data = json.dumps(self.case()[0]).encode()
        head = (
            f"POST {PATH} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        data = head.encode() + data
        with socket.create_connection(("127.0.0.1", self._process.port)) as client:
            client.sendall(data[: self._random.randrange(len(data))])

    def kind_refused(self):
        bodies = ({"prompt": ""}, {"prompt": "a", "n": -1}, {"prompt": "a" * 600}, [], {"prompt": "a", "x": 1})
        connection, response = self._process.ask(PATH, self._random.choice(bodies))
        document = json.loads(response.read())
        connection.close()
        assert response.status == 400, document


def memory_of(process):
    """``(resident bytes, open files)`` of a process."""
    folder = Path("/proc") / str(process.pid)
    pages = int((folder / "statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(list((folder / "fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc, for memory")
@pytest.mark.sweep
def test_many_clients():
    seed = int(os.environ.get("MARLIN_CY_TEST_SEED", "1"))
    print(f"MARLIN_CY_TEST_SEED={seed}")
    texts, faults, done, samples = expected_texts(), [], collections.Counter(), []
    options = ["--context-length", 512, "--cache-tokens", 1024, "--max-sequences", 6, "--max-waiting", 100]
    with Process(*options) as process:
        for part in range(SAMPLES):
            numbers = queue.SimpleQueue()
            for number in range(REQUESTS * part // SAMPLES, REQUESTS * (part + 1) // SAMPLES):
                numbers.put(number)
            clients = [Client(process, texts, seed * 10**6 + part * 1000 + number) for number in range(CLIENTS)]
            threads = [threading.Thread(target=client.run, args=(numbers, faults, done)) for client in clients]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            wait_until_idle(process)
            samples.append(memory_of(process.process))
        process.signal(signal.SIGTERM)
        code, said = process.end()
    print("requests:", dict(done))
    print("memory, MB, and files:", [(round(size / 1e6, 1), files) for size, files in samples])
    assert not faults, (len(faults), faults[:5])
    assert sum(done.values()) == REQUESTS
    half = samples[SAMPLES // 2 :]
    assert half[-1][0] - half[0][0] < MOST_GROWTH
    assert half[-1][1] <= half[0][1] + 2
    assert code == 0
    assert "Traceback" not in said, said


def wait_until_idle(process):
    """Wait until no text is written, as clients that have gone are noticed soon."""
    deadline = time.monotonic() + 30
    while True:
        connection, response = process.ask("/metrics")
        values = dict(line.rsplit(" ", 1) for line in response.read().decode().splitlines() if line[0] != "#")
        connection.close()
        if float(values["marlin_cy_running"]) == float(values["marlin_cy_waiting"]) == 0:
            return
        assert time.monotonic() < deadline, "texts whose clients have gone are still written"
        time.sleep(0.02)
