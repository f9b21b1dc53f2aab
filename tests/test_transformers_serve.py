"""``transformers serve`` on models whose layers run packed: ``tests/engines.sh`` runs this."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.resources import files
from pathlib import Path

import pytest

from marlin_cy import cli
from marlin_cy.commands.run import BUILT_IN

pytestmark = pytest.mark.engines

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("transformers", minversion="5.8", reason="transformers 5.8 is not installed")

from transformers import AutoTokenizer  # noqa: E402

from marlin_cy.integrations.transformers import load  # noqa: E402

FOLDER = str(files("marlin_cy") / BUILT_IN)
SECONDS = 300


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answer(port, body):
    """The text of a completion, from its events."""
    data = json.dumps({**body, "stream": True}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", data, {"Content-Type": "application/json"}
    )
    text = ""
    with urllib.request.urlopen(request, timeout=SECONDS) as response:
        for line in response:
            if line.startswith(b"data: {"):
                text += "".join(choice["text"] for choice in json.loads(line[6:])["choices"])
    return text


@pytest.mark.parametrize("batching", [(), ("--continuous-batching", "--attn-implementation", "sdpa")])
def test_a_server(tmp_path, batching):
    """The text that ``load`` gives: from a packed folder, and with continuous batching from a registered method."""
    pytest.importorskip("fastapi", reason="the packages of transformers' server are not installed")
    folder = FOLDER
    if not batching:
        folder = str(tmp_path / "packed")
        assert cli.main(["pack", FOLDER, folder]) == 0
    else:
        batching = (*batching, "--cb-num-blocks", "64", "--cb-block-size", "16", "--cb-max-batch-tokens", "64")
    port, log = free_port(), tmp_path / "log"
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "marlin_cy.integrations", "transformers", "serve", folder]
    command += ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port), *batching]
    with log.open("w") as output:
        server = subprocess.Popen(command, env={**environment, "PYTHONPATH": path}, stdout=output, stderr=output)
    try:
        end = time.monotonic() + SECONDS
        while True:
            try:
                text = answer(port, {"model": folder, "prompt": "def f(", "max_tokens": 8, "temperature": 0})
                break
            except urllib.error.HTTPError as error:
                raise AssertionError(f"{error.read().decode()}\n{log.read_text()}") from error
            except urllib.error.URLError:  # it does not listen yet
                assert server.poll() is None and time.monotonic() < end, log.read_text()
                time.sleep(0.5)
    finally:
        server.kill()
        server.wait()
    tokenizer, model = AutoTokenizer.from_pretrained(FOLDER), load(FOLDER, dtype="bfloat16", num_threads=1)
    ids = model.generate(**tokenizer("def f(", return_tensors="pt"), max_new_tokens=8, do_sample=False)
    assert text == tokenizer.decode(ids[0, 6:])
