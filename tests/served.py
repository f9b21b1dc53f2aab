"""Models and requests for the tests of serving."""

import json
import os
import subprocess
import sys
import threading
import time
from http.client import HTTPConnection
from importlib.resources import files

import numpy as np
from fake_model import FakeModel

from marlin_cy.commands.options import BUILT_IN
from marlin_cy.decoder.cache import CacheFull, pages_of
from marlin_cy.decoder.generate import new_writer, tokenizer_of
from marlin_cy.decoder.sampling import SamplingParams
from marlin_cy.serve.request import Request
from marlin_cy.serve.server import Server, listen, open_socket
from marlin_cy.serve.service import Service

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"


class FullModel(FakeModel):
    """A small model whose cache can be full. Sequences share no pages."""

    def forward_batch(self, pairs, *, all_logits=False):
        pairs = list(pairs)
        needed = sum(pages_of(len(one.tokens) + len(tokens)) - pages_of(len(one.tokens)) for one, tokens in pairs)
        if needed * 16 > self.free_tokens:
            raise CacheFull("cache: full")
        return super().forward_batch(pairs, all_logits=all_logits)


def built_in():
    """The folder of the built-in model."""
    return files("marlin_cy") / BUILT_IN


def chat_folder(path):
    """The built-in model with a chat template, in a new folder."""
    path.mkdir()
    for file in built_in().iterdir():
        if file.name != "tokenizer_config.json":
            (path / file.name).symlink_to(file)
    config = json.loads((built_in() / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return path


def request_for(model, prompt, max_new_tokens=None, *, top_scores=None, **sampling):
    """A request for the continuation of a text or of tokens."""
    tokenizer = tokenizer_of(model)
    tokens = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    params = SamplingParams(**sampling)
    writer = new_writer(model, tokenizer, tokens, params, max_new_tokens, continues=True)
    return Request(tokens, writer, top_scores=top_scores)


def run(scheduler, arrivals=(), *, limit=10000):
    """Step until all requests have ended; gives the outputs of each request.

    Parameters
    ----------
    scheduler
    arrivals : mapping of int to list of Request
        By the number of the step before which they are submitted.
    """
    arrivals = dict(arrivals)
    outputs = {}
    for step in range(limit):
        if step in arrivals:
            scheduler.submit(arrivals.pop(step))
        if not scheduler.open and not arrivals:
            return outputs
        for output in scheduler.step():
            outputs.setdefault(output.request, []).append(output)
    raise AssertionError(f"requests have not ended after {limit} steps")


def text_of(outputs):
    """The text, the tokens and the reason of the end of a request's outputs."""
    pieces = [output.piece for output in outputs]
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    return "".join(piece.text for piece in pieces), [t for piece in pieces for t in piece.tokens], pieces[-1][2]


def watched(request):
    """Keep the logits that a request's writer gets, as ``request.rows``."""
    request.rows, write = [], request.writer.write

    def keep(logits, position):
        request.rows.append(logits.view(np.int32).copy())
        return write(logits, position)

    request.writer.write = keep
    return request


# ---------------------------------------------------------------------------------------------
# HTTP


class Serving:
    """A server in a thread of this process; use it as a context manager.

    Parameters
    ----------
    model : object
    api_key : str, optional
    **limits
        ``max_sequences`` and ``max_waiting``.
    """

    def __init__(self, model, api_key=None, *, name="tiny", **limits):
        self.service = Service(model, name, **{"max_sequences": 4, "max_waiting": 8, **limits})
        self._bound = open_socket("127.0.0.1", 0)
        self.port = self._bound.getsockname()[1]
        self.server = Server(self.service, api_key)
        self._thread = threading.Thread(target=self.server.serve_on, args=(self._bound,))

    def __enter__(self):
        listen(self._bound)
        self._thread.start()
        while not self.server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)
        return self

    def __exit__(self, *error):
        self.server.should_exit = True
        self.server.force_exit = error[0] is not None
        self._thread.join(60)
        assert not self._thread.is_alive()
        self._bound.close()

    @property
    def counts(self):
        return self.service.engine.scheduler.counts()

    def connect(self):
        return HTTPConnection("127.0.0.1", self.port, timeout=60)

    def ask(self, path, body=None, *, method=None, headers=None):
        """``(status, headers, contents)`` of the answer to a body, which is sent as JSON unless it is bytes."""
        connection = self.connect()
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {**({} if data is None else {"Content-Type": "application/json"}), **(headers or {})}
        try:
            connection.request(method or ("GET" if data is None else "POST"), path, data, headers)
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        kind = response.getheader("content-type", "")
        return response.status, response.headers, json.loads(text) if kind.startswith("application/json") else text

    def document(self, path, body=None, **options):
        """The JSON of a request that succeeds."""
        status, _, document = self.ask(path, body, **options)
        assert status == 200, document
        return document

    def stream(self, path, body):
        """The events of a stream, up to the last."""
        _, _, text = self.ask(path, {**body, "stream": True})
        *events, end = text.decode().split("\n\n")
        assert end == ""
        assert events[-1] == "data: [DONE]"
        return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]

    def wait(self, condition, seconds=30):
        """Wait until a condition of the counts holds."""
        deadline = time.monotonic() + seconds
        while not condition(self.counts):
            assert time.monotonic() < deadline, self.counts
            time.sleep(0.005)


class Process:
    """The command in a process of its own, on a free port; use it as a context manager."""

    def __init__(self, *arguments, **environment):
        command = [sys.executable, "-m", "marlin_cy", "serve", *map(str, arguments), "--port", "0", "--threads", "1"]
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive", **environment}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.said = []
        for line in self.process.stderr:
            self.said.append(line)
            if "serving at" in line:
                self.port = int(line.split(";")[0].rsplit(":", 1)[1])
                break

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()

    def send(self, path, body=None, **headers):
        """A connection on which a request was sent."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"Content-Type": "application/json", **headers}
        connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body), headers)
        return connection

    def ask(self, path, body=None, **headers):
        """A connection, and the response to a request."""
        connection = self.send(path, body, **headers)
        return connection, connection.getresponse()

    def signal(self, number):
        self.process.send_signal(number)

    def end(self):
        """The exit code, and what was said on stderr."""
        _, rest = self.process.communicate(timeout=60)
        return self.process.returncode, "".join(self.said) + rest
