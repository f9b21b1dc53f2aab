"""Models on several processes of mpiexec. Run with tests/mpi.sh."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import edit_json

from marlin_cy.decoder.load import load_model

pytestmark = pytest.mark.mpi

MODEL = files("marlin_cy") / "data" / "tiny-qwen3-moe-gptq-int4"
MPIEXEC = Path(sys.executable).parent / "mpiexec"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # Open MPI refuses root, and more processes than cores, unless told otherwise.
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}
SECONDS = 60


def mpiexec(hosts, *arguments, options=()):
    """The finished process, and its seconds."""
    start = time.monotonic()
    result = subprocess.run(
        [MPIEXEC, *options, "-n", str(hosts), sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, **ENVIRONMENT},
    )
    print(result.stdout, result.stderr)
    return result, time.monotonic() - start


def script(tmp_path, text):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(text))
    return path


def test_bits_of_a_model(tmp_path):
    """Every rank has the logits of one host."""
    run = script(
        tmp_path,
        f"""
        import numpy as np
        from mpi4py import MPI
        from marlin_cy import load_model
        from marlin_cy.distributed import Group

        group = Group(MPI.COMM_WORLD)
        model = load_model({str(MODEL)!r}, group=group, context_length=128)
        logits = [model.forward(range(1, 60), all_logits=True), model.forward([7])[None]]
        np.save({str(tmp_path)!r} + f"/{{group.size}}-{{group.rank}}.npy", np.concatenate(logits))
        """,
    )
    model = load_model(MODEL, context_length=128, num_threads=1)
    expected = np.concatenate([model.forward(range(1, 60), all_logits=True), model.forward([7])[None]])
    for hosts in (1, 2, 3, 4):
        result, _ = mpiexec(hosts, run)
        assert result.returncode == 0
        for rank in range(hosts):
            np.testing.assert_array_equal(np.load(tmp_path / f"{hosts}-{rank}.npy"), expected)


def test_generate():
    """Rank 0 alone prints, and prints the text of one host."""
    command = "-m", "marlin_cy", "generate", "--prompt", "def f(", "--max-new-tokens", "12", "--threads", "1", "--json"
    alone = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True, timeout=SECONDS)
    result, _ = mpiexec(2, *command, "--mpi")
    assert result.returncode == 0
    report = json.loads(result.stdout)
    assert report["tokens"] == json.loads(alone.stdout)["tokens"]
    assert "2 hosts" in report["device"]


def test_bench():
    sizes = "--prompt-tokens", "8", "--new-tokens", "4", "--repeat", "1", "--threads", "1"
    result, _ = mpiexec(2, "-m", "marlin_cy", "bench", "--mpi", *sizes, "--json")
    assert result.returncode == 0
    assert json.loads(result.stdout)["decode_tokens_per_second"] > 0


@pytest.mark.parametrize("signal", ["SIGKILL", "SIGSTOP"])
def test_a_rank_is_lost(tmp_path, signal):
    """The other rank ends within 30 s. The launcher ends it if a process has ended, its own deadline otherwise."""
    run = script(
        tmp_path,
        f"""
        import os, signal, sys
        from mpi4py import MPI
        from marlin_cy import load_model
        from marlin_cy.distributed import Group
        from marlin_cy.errors import GroupError

        group = Group(MPI.COMM_WORLD, timeout=3)
        model = load_model({str(MODEL)!r}, group=group, context_length=128)
        for token in range(1, 100):
            if token == 20 and group.rank == 1:
                os.kill(os.getpid(), signal.{signal})
            try:
                model.forward([token])
            except GroupError as error:
                print(error, flush=True)
                MPI.COMM_WORLD.Abort(1)
        """,
    )
    result, seconds = mpiexec(2, run)
    assert result.returncode != 0
    assert seconds < 30
    if signal == "SIGSTOP":
        assert "rank 0 got no answer from the other hosts within 3 s" in result.stdout


def by_rank(tmp_path, arguments):
    """A script that runs ``generate --mpi`` with the arguments of each rank added."""
    return script(
        tmp_path,
        f"""
        import sys
        from mpi4py import MPI
        from marlin_cy.cli import main

        arguments = {arguments!r}[MPI.COMM_WORLD.rank]
        sys.exit(main(["generate", "--mpi", "--prompt", "def f(", "--threads", "1", *arguments]))
        """,
    )


def test_other_arguments(tmp_path):
    run = by_rank(tmp_path, [["--max-new-tokens", "4"], ["--max-new-tokens", "5"]])
    result, seconds = mpiexec(2, run)
    assert result.returncode != 0 and seconds < 30
    assert "the command line: --max-new-tokens: rank 1 has other values than rank 0" in result.stderr


def test_other_files(tmp_path):
    other = shutil.copytree(MODEL, tmp_path / "other")
    edit_json(other, "config.json", rope_theta=5.0)
    result, seconds = mpiexec(2, by_rank(tmp_path, [[str(MODEL)], [str(other)]]))
    assert result.returncode != 0 and seconds < 30
    assert "config.json: rank 1 has other values than rank 0" in result.stderr


def test_a_missing_folder(tmp_path):
    result, seconds = mpiexec(2, by_rank(tmp_path, [[str(MODEL)], [str(tmp_path / "missing")]]))
    assert result.returncode != 0 and seconds < 30
    assert "rank 1: " in result.stderr and "missing" in result.stderr


def test_more_hosts_than_columns():
    result, seconds = mpiexec(5, "-m", "marlin_cy", "generate", "--mpi", "--prompt", "a", "--threads", "1")
    assert result.returncode != 0 and seconds < 30
    assert "got 5 hosts, expected at most 4" in result.stderr


def test_benchmark(tmp_path):
    output = tmp_path / "result.json"
    command = [sys.executable, "-m", "bench", "mpi", "--quick", "--output", str(output)]
    root = Path(__file__).resolve().parents[1]
    subprocess.run(command, check=True, cwd=root, timeout=SECONDS, env={**os.environ, **ENVIRONMENT})
    figures = json.loads(output.read_text())["figures"]
    assert figures["memory"]["median"] <= 1.05
    assert figures["speedup"]["median"] > 0 and figures["exchange"]["median"] > 0
