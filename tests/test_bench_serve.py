"""``python -m bench serve``: every part is measured, and bars are judged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

for name in ("tokenizers", "jinja2", "uvicorn", "starlette", "pydantic", "prometheus_client"):
    pytest.importorskip(name, reason=f"{name} is not installed")

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # bench is not installed

from served import Serving, built_in  # noqa: E402

from bench.models import serve_clients  # noqa: E402
from bench.models.serve import judge  # noqa: E402
from marlin_cy.decoder.load import load_model  # noqa: E402

SPREAD = {"median", "p10", "p90"}


@pytest.mark.sweep
def test_every_part_is_measured(tmp_path):
    output = tmp_path / "result.json"
    command = [sys.executable, "-m", "bench", "serve", "--quick", "--threads", "1", "--output", str(output)]
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    document = json.loads(output.read_text())
    assert document["mode"] == "serve"
    figures = document["figures"]
    assert set(figures) == {"throughput", "first-token", "lone"}
    for found in (
        *figures["throughput"]["tokens_per_second"].values(),
        figures["throughput"]["share"],
        figures["first-token"]["seconds"],
        *figures["lone"]["ms"].values(),
    ):
        assert found.keys() == SPREAD
        assert 0 < found["p10"] <= found["median"] <= found["p90"]
    assert [line["line"] for line in document["show"]] == ["1", "2", "3"]
    for line in document["show"]:
        assert line["measured"] is not None
        assert line["what"] in done.stdout


def test_bars():
    figure = {"median": 0.95, "p10": 0.9, "p90": 1.0}
    lines = judge({"throughput": {"share": figure}, "lone": {"added_ms": {**figure, "median": 5.5}}})
    assert [line["passed"] for line in lines] == [True, False, None]
    assert lines[2]["skipped"] == "not measured"


def test_an_answer_that_is_not_as_long_as_asked_for():
    with Serving(load_model(built_in(), num_threads=1, context_length=64), max_sequences=1, max_waiting=0) as serving:
        assert serve_clients.whole_seconds(serving.port, [1, 2], 3) > 0
        with pytest.raises(ValueError, match="got an answer of 62 tokens, expected 100"):
            serve_clients.whole_seconds(serving.port, [1, 2], 100)
        with pytest.raises(ValueError, match="a client fails: ValueError: the server answers 400"):
            serve_clients.run_clients(serving.port, [[]], 3)
        assert serve_clients.first_token_seconds(serving.port, [[1, 2]])[0] > 0
