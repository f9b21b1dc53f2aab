"""``python -m bench`` on this library alone: commands run, and save the documents that bench/README.md describes."""

import ast
import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import marlin_cy
from marlin_cy import available_backends

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # bench is not installed

from bench.__main__ import main  # noqa: E402
from bench.commands import COMMANDS  # noqa: E402
from bench.cpu.before_after import WORKER, Side  # noqa: E402

SPREAD = {"median", "p10", "p90"}


needs_opencl = pytest.mark.skipif(
    available_backends()["opencl"] is not None, reason=str(available_backends()["opencl"])
)


def bench(*arguments, timeout=120):
    command = [sys.executable, "-m", "bench", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def run_quickly(tmp_path, command, *arguments):
    output = tmp_path / "result.json"
    finished = bench(*command.split(), "--quick", "--output", output, *arguments)
    assert finished.returncode == 0, finished.stderr
    return json.loads(output.read_text())


def run_bench(tmp_path, command, *arguments):
    document = run_quickly(tmp_path, command, "--no-torch", *arguments)
    assert document["machine"]["threads"] >= 1
    assert document["machine"]["isa"]
    return document


def test_sweep_measures_products_and_layers(tmp_path):
    document = run_bench(tmp_path, "sweep", "--compute-dtypes", "int8")
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
    lines = {line["line"]: line for line in run_bench(tmp_path, "show", "--threads", "1")["show"]}
    assert set(lines) == {"1", "2", "3", "4", "5", "6", "7a", "7b", "8", "9a", "9b", "10", "11", "12", "13a", "13b"}
    for line in lines.values():
        assert (line["measured"] is None) == (line["passed"] is None) == (line["skipped"] is not None)
    # These do not depend on the speed of the machine.
    assert all(lines[line]["passed"] for line in ("9a", "9b", "11"))
    assert lines["3"]["skipped"] == lines["4"]["skipped"] == "left out"


@pytest.mark.sampled(1)
@pytest.mark.parametrize("command, kind", [("products", "gemm"), ("layers", "layer")])
def test_a_sweep_can_be_of_products_or_of_layers_alone(tmp_path, command, kind):
    document = run_bench(tmp_path, command, "--compute-dtypes", "int8")
    assert {row["kind"] for row in document["results"]} == {kind}


@pytest.mark.sweep
@needs_opencl
def test_opencl_sweep_measures_products_and_layers(tmp_path):
    document = run_quickly(tmp_path, "opencl sweep", "--tiers", "portable")
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


@pytest.mark.sweep
@needs_opencl
def test_opencl_show_has_every_part(tmp_path):
    document = run_quickly(tmp_path, "opencl show", "--tiers", "best,portable")
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


@pytest.mark.sweep
@needs_opencl
def test_opencl_show_of_a_part(tmp_path):
    document = run_quickly(tmp_path, "opencl show", "--only", "2", "--tokens", "4", "--launches", "5")
    assert {(cell["tokens"], cell["launches"]) for cell in document["gemm"]} == {(4, 5)}
    assert len({cell["shape"] for cell in document["gemm"]}) == 1
    assert document["layer"] == document["host"] == document["compile"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep", "--models", "gpt"], "--models: got gpt, expected some of qwen3"),
        (["show", "--isa", "mmx"], "isa: got 'mmx'"),
        (["products", "--threads", "100000"], "--threads: got 100000"),
        (["layers", "--cpus", "0", "--threads", "2"], "--threads: got 2, expected at most the number of --cpus"),
        (["opencl", "sweep", "--threads", "2"], "unrecognized arguments: --threads 2"),
        (["show", "--tiers", "portable"], "unrecognized arguments: --tiers portable"),
        (["opencl", "show", "--only", "4"], "--only: got 4, expected some of 1, 2, 3, layer"),
        (["opencl"], "invalid choice: 'opencl'"),
        (["nothing"], "invalid choice: 'nothing'"),
        (["models", "--only", "nap"], "--only: got nap, expected some of pack, open, memory, speed"),
        (["before-after"], "required: --before"),
    ],
)
@pytest.mark.sampled(2)
def test_wrong_options_are_refused(arguments, message):
    finished = bench(*arguments)
    assert finished.returncode == 2
    assert message in finished.stderr


@pytest.mark.sweep
def test_whole_models(tmp_path):
    """The parts that need no PyTorch, on a model of one layer."""
    output = tmp_path / "result.json"
    options = ["--only", "pack,open", "--layers", "1", "--packed-layers", "1", "--rounds", "1", "--folder", tmp_path]
    finished = bench("models", *options, "--output", output, timeout=300)
    assert finished.returncode == 0, finished.stderr
    document = json.loads(output.read_text())
    assert document["machine"]["threads"] >= 1
    assert [line["unit"] for line in document["show"]] == ["GB/s", "s", "s"]
    assert all(line["measured"] > 0 for line in document["show"])


# ---------------------------------------------------------------------------------------------
# The commands


def test_list_names_every_command_and_peer(capsys):
    assert main(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {"compare", "show", "before-after", "opencl show"} <= listed["commands"].keys()
    for peer in listed["peers"]:
        assert (peer["version"] is None) == (peer["missing"] is not None), peer
    assert "numpy_dense" in {peer["name"] for peer in listed["peers"]}


def test_documented_commands_exist():
    for page in (ROOT / "bench").glob("*.md"):
        for words in re.findall(
            r"python -m bench ([a-z][a-z-]*(?: (?:products|layers|sweep|show)\b)?)", page.read_text()
        ):
            assert words in COMMANDS, f"{page.name}: {words}"


@pytest.mark.parametrize("command", ["compare", "sweep", "show", "cost", "models", "before-after", "opencl show"])
@pytest.mark.sampled(3)
def test_every_command_has_a_help_text(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    assert f"usage: python -m bench {command}" in capsys.readouterr().out


def test_importing_a_command_loads_no_openmp_runtime():
    """The runtime counts CPUs when it is loaded, and ``--threads`` restricts them after the import."""
    program = (
        "import importlib; from bench.commands import COMMANDS; from bench.common.machine import openmp_runtimes\n"
        "for command in COMMANDS.values(): importlib.import_module(command.module)\n"
        "print(openmp_runtimes())"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    finished = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert finished.stdout.strip() == "[]", finished.stderr


# ---------------------------------------------------------------------------------------------
# Two builds


def compare_builds(tmp_path, *arguments):
    output = tmp_path / "result.json"
    folder = str(Path(marlin_cy.__file__).parents[1])
    sides = ["--before", sys.executable, "--before-path", folder, "--after-path", folder]
    finished = bench("before-after", *sides, "--quick", "--output", output, *arguments)
    assert finished.returncode == 0, finished.stderr
    return json.loads(output.read_text()), finished.stdout


@pytest.mark.sweep
def test_a_build_beside_itself(tmp_path):
    document, printed = compare_builds(tmp_path)
    assert {side["folder"] for side in document["sides"].values()} == {str(Path(marlin_cy.__file__).parent)}
    cases = document["cases"]
    assert len({case["name"] for case in cases}) == len(cases)
    assert {(case["part"], case["compute_dtype"]) for case in cases} == {
        (part, dtype) for part in ("overhead", "product", "routed", "layer") for dtype in ("int16", "int8")
    }
    for case in cases:
        assert case["same_bits"], case["name"]
        assert case["rounds"] == 2
        assert case["ratio"].keys() == case["us"]["before"].keys() == SPREAD
        low, high = case["ratio_interval"]
        assert 0 < low <= case["ratio"]["median"] <= high
        assert case["passed"] == (case["ratio"]["median"] >= document["least"])
        assert case["name"] in printed


@pytest.mark.sweep
def test_other_starts_and_a_part_of_the_cases(tmp_path):
    options = "--only=overhead", "--compute-dtypes=int8", "--rounds=3", "--starts=2", "--threads=1", "--isa=generic"
    document, printed = compare_builds(tmp_path, *options, "--json")
    assert json.loads(printed) == document
    (case,) = document["cases"]
    assert case["rounds"] == document["timing"]["rounds"] == 4, "as many in each start"


@pytest.mark.parametrize(
    "before, message", [("/nonexistent", "--before: got '/nonexistent'"), ("/bin/true", "--before: its process ended")]
)
def test_a_side_that_cannot_run_is_an_error(before, message):
    finished = bench("before-after", "--before", before, "--quick")
    assert finished.returncode == 2
    assert message in finished.stderr


def test_a_request_that_fails_is_an_error():
    with contextlib.closing(Side("before", sys.executable, str(Path(marlin_cy.__file__).parents[1]))) as side:
        case = {"kind": "product", "stack": [1, 32, 8, 32], "experts_per_call": 1, "rows": 1}
        common = {"compute_dtype": "int16", "threads": 1}
        with pytest.raises(ValueError, match="--before: ValueError: isa: got 'mmx'"):
            side.make({**case, **common, "isa": "mmx"}, 1e-3)
        assert len(side.make({**case, **common, "isa": "generic"}, 1e-3)) == 64
        assert side() > 0


def test_the_worker_of_a_build_imports_nothing_but_public_names():
    """The build before may be older than this repository."""
    tree = ast.parse(WORKER.read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    top_level = {name.split(".")[0] for name in imported}
    assert top_level - set(sys.stdlib_module_names) == {"numpy", "ml_dtypes", "marlin_cy"}
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_package(node.value)}
    assert names - {"__file__", "__version__"} <= set(marlin_cy.__all__)


def is_package(node):
    return getattr(node, "attr", getattr(node, "id", None)) in ("_package", "marlin_cy")
