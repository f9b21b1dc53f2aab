"""The benchmark runs, and its JSON has what bench/README.md says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from marlin_cy import available_backends

SCRIPT = Path(__file__).parents[1] / "bench" / "bench_gemm.py"
SPREAD = {"median", "p10", "p90"}


needs_opencl = pytest.mark.skipif(
    available_backends()["opencl"] is not None, reason=str(available_backends()["opencl"])
)


def run_quickly(tmp_path, *arguments):
    output = tmp_path / "result.json"
    command = [sys.executable, SCRIPT, "--quick", "--output", output, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    return json.loads(output.read_text())


def run_bench(tmp_path, *arguments):
    document = run_quickly(tmp_path, "--no-torch", *arguments)
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


@needs_opencl
def test_opencl_sweep_measures_products_and_layers(tmp_path):
    document = run_quickly(tmp_path, "--backend", "opencl", "--tiers", "portable")
    assert document["machine"]["device"]
    assert document["copy_bytes_per_second"] > 1e8
    assert {(row["kind"], row.get("projection"), row["rows"]) for row in document["results"]} == {
        (kind, projection, rows)
        for kind, projection in (("gemm", "gate_up"), ("gemm", "down"), ("layer", None))
        for rows in (1, 16)
    }
    for row in document["results"]:
        assert row["tier"] == "portable"
        assert row["us"].keys() == SPREAD
        assert row["us"]["median"] > 0
        assert row["gbps"] > 0
        assert row["gflops"] > 0


@needs_opencl
def test_opencl_show_has_every_part(tmp_path):
    document = run_quickly(tmp_path, "--backend", "opencl", "--show", "--tiers", "best,portable")
    tiers = document["machine"]["tiers"]
    assert "portable" in tiers
    cells = document["gemm"]
    assert len({(cell["shape"], cell["tokens"], cell["tier"]) for cell in cells}) == len(cells) == 9 * len(tiers)
    for cell in cells:
        assert cell["checks"]["error"], cell
        assert cell["launches"] >= 5
        assert cell["us"]["median"] > 0
        assert cell["cuda_marlin_us"] is None
    for layer in document["layer"]:
        assert layer["us"] >= layer["products_us"] > 0
        parts = {part for label in layer["labels_us"] for part in label.split(", ")}  # of launches that do several
        assert {"route", "align", "gate_up", "down", "combine"} <= parts
    assert [one["tokens"] for one in document["layer"]] == [1, 16]
    assert {one["tier"] for one in document["host"]} == set(tiers)
    assert [one["state"] for one in document["compile"]] == ["empty cache", "binaries on disk"]
    for one in document["compile"]:
        assert one["second call"] < one["first call"]


@needs_opencl
def test_opencl_show_of_a_part(tmp_path):
    document = run_quickly(tmp_path, "--backend", "opencl", "--show", "--only", "2", "--tokens", "4", "--launches", "5")
    assert {(cell["tokens"], cell["launches"]) for cell in document["gemm"]} == {(4, 5)}
    assert len({cell["shape"] for cell in document["gemm"]}) == 1
    assert document["layer"] == document["host"] == document["compile"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "gpt"], "--models: got gpt, expected qwen3"),
        (["--isa", "mmx"], "isa: got 'mmx'"),
        (["--threads", "100000"], "--threads: got 100000"),
        (["--backend", "opencl", "--threads", "2"], "--threads: not with --backend opencl"),
        (["--tiers", "portable"], "--tiers: not with --backend cpu"),
        (["--backend", "opencl", "--only", "4"], "--only: got 4, expected 1, 2, 3, layer"),
    ],
)
def test_wrong_options_are_refused(arguments, message):
    finished = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 2
    assert message in finished.stderr


def test_whole_models(tmp_path):
    """The parts that need no PyTorch, on a model of one layer."""
    output = tmp_path / "result.json"
    options = ["--only", "pack,open", "--layers", "1", "--packed-layers", "1", "--rounds", "1", "--folder", tmp_path]
    script = SCRIPT.with_name("bench_models.py")
    finished = subprocess.run(
        [sys.executable, script, *options, "--output", output], capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    document = json.loads(output.read_text())
    assert document["machine"]["threads"] >= 1
    assert [line["unit"] for line in document["show"]] == ["GB/s", "s", "s"]
    assert all(line["measured"] > 0 for line in document["show"])
