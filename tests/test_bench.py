"""The benchmark runs, and its JSON has what bench/README.md says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "bench" / "bench_gemm.py"
SPREAD = {"median", "p10", "p90"}


def run_bench(tmp_path, *arguments):
    output = tmp_path / "result.json"
    command = [sys.executable, SCRIPT, "--quick", "--no-torch", "--output", output, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    document = json.loads(output.read_text())
    assert document["machine"]["threads"] >= 1
    assert document["machine"]["isa"]
    return document


def test_sweep_measures_products_and_layers(tmp_path):
    document = run_bench(tmp_path, "--compute-dtypes", "int8")
    assert {(row["kind"], row.get("projection"), row["rows"]) for row in document["results"]} == {
        (kind, projection, rows)
        for kind, projection in (("gemm", "gate_up"), ("gemm", "down"), ("layer", None))
        for rows in (1, 16)
    }
    for row in document["results"]:
        assert row["compute_dtype"] == "int8"
        assert row["us"].keys() == row["read_share"].keys() == SPREAD
        assert row["gbps"] > 0
        assert row["gflops"] > 0
        assert row["speedup"] == {}


def test_show_has_every_line(tmp_path):
    lines = {line["line"]: line for line in run_bench(tmp_path, "--show", "--threads", "1")["show"]}
    assert set(lines) == {"1", "2", "3", "4", "5", "6", "7a", "7b", "8", "9a", "9b", "10", "11"}
    for line in lines.values():
        assert (line["measured"] is None) == (line["passed"] is None) == (line["skipped"] is not None)
    # These do not depend on the speed of the machine.
    assert all(lines[line]["passed"] for line in ("9a", "9b", "11"))
    assert lines["3"]["skipped"] == lines["4"]["skipped"] == "left out"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "gpt"], "--models: got gpt, expected qwen3"),
        (["--isa", "mmx"], "isa: got 'mmx'"),
        (["--threads", "100000"], "--threads: got 100000"),
    ],
)
def test_wrong_options_are_refused(arguments, message):
    finished = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 2
    assert message in finished.stderr
