"""The command line: its output, exit codes and messages."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

from marlin_cy import __version__, available_backends, cli
from marlin_cy.commands import doctor, output, run
from marlin_cy.cpu.layer_measurement import ERROR_BOUNDS

BUILT_IN = files("marlin_cy") / run.BUILT_IN
RUN_KEYS = {
    "version",
    "checkpoint",
    "backend",
    "isa",
    "threads",
    "compute_dtype",
    "activations",
    "load_seconds",
    "without_shared_expert",
    "read_bandwidth_bytes_per_second",
    "error_bound",
    "layers",
    "failures",
    "ok",
}
DOCTOR_KEYS = {"version", "cpu", "isa", "threads", "openmp", "memory", "backends", "opencl", "versions", "ok"}
ESCAPE = "\x1b"


needs_opencl = pytest.mark.skipif(
    available_backends()["opencl"] is not None, reason=str(available_backends()["opencl"])
)


WHOLE_COMMAND = "-m", "marlin_cy"
QUICK_COMMAND = (str(Path(__file__).with_name("quick_command.py")),)
"""The command without its measurement of bandwidth."""


def start(*arguments, command=WHOLE_COMMAND, **environment):
    """The command in a process of its own, with colours neither asked for nor forbidden."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "NO_COLOR")}
    return subprocess.run(
        [sys.executable, *command, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=inherited | environment,
        timeout=120,
    )


def assert_refused(code, captured, *words):
    """Exit code 1, a message with these words, no traceback, and nothing on stdout."""
    assert code == 1
    assert captured[0] == ""
    assert captured[1].startswith("marlin-cy: error: ")
    assert "Traceback" not in captured[1]
    for word in words:
        assert word in captured[1]


@pytest.fixture
def checkpoint_without_activations(tmp_path):
    """The built-in checkpoint, less its recorded activations."""
    return shutil.copytree(BUILT_IN, tmp_path / "checkpoint", ignore=shutil.ignore_patterns("recorded"))


@pytest.fixture
def save_activations(tmp_path):
    """A function that saves the recorded activations, some of them replaced, and returns the file."""

    def save(**replaced):
        tensors = load_file(BUILT_IN / run.ACTIVATIONS_FILE)
        for name, array in replaced.items():
            name = name.replace("__", ".")
            if array is None:
                del tensors[name]
            else:
                tensors[name] = array
        save_file(tensors, tmp_path / "activations.safetensors")
        return tmp_path / "activations.safetensors"

    return save


@pytest.mark.sampled(1)
@pytest.mark.parametrize("compute_dtype", sorted(ERROR_BOUNDS))
def test_run_built_in_json(compute_dtype):
    done = start("run", "--json", "--compute-dtype", compute_dtype, command=QUICK_COMMAND)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert report.keys() == RUN_KEYS
    assert report["ok"] is True
    assert report["failures"] == []
    assert [layer["layer"] for layer in report["layers"]] == [0, 1, 2, 3]
    for layer in report["layers"]:
        assert layer["relative_error"] <= ERROR_BOUNDS[compute_dtype]
        assert layer["finite"] is True
        assert (layer["num_experts"], layer["hidden_size"], layer["intermediate_size"]) == (8, 256, 256)
        assert (layer["top_k"], layer["tokens"]) == (2, 128)
        assert 1 <= layer["experts_hit"] <= 8
        assert layer["repeats"] >= 5
        rate = layer["weight_bytes"] / layer["seconds"]
        assert layer["weight_bytes_per_second"] == pytest.approx(rate)
        assert layer["read_share"] == pytest.approx(rate / report["read_bandwidth_bytes_per_second"])


def test_run_built_in_table():
    done = start("run", "--threads", "1", "--repeat", "2")
    assert done.returncode == 0, done.stderr
    assert ESCAPE not in done.stdout
    assert len(re.findall(r"^ *\d +8 × 256 → 256 +2 +128 .*%$", done.stdout, re.MULTILINE)) == 4
    assert "all layers within it" in done.stdout


def test_run_says_threads_and_repeats(capsys, quick_bandwidth):
    assert cli.main(["run", "--json", "--threads", "1", "--repeat", "3"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["threads"] == 1
    assert [layer["repeats"] for layer in report["layers"]] == [3] * 4
    assert report["read_bandwidth_bytes_per_second"] == 10e9


@pytest.mark.parametrize(("tokens", "expected"), [("1", 1), ("100", 100), ("1000", 128)])
def test_run_on_the_first_tokens(capsys, quick_bandwidth, tokens, expected):
    assert cli.main(["run", "--json", "--repeat", "1", "--tokens", tokens]) == 0
    for layer in json.loads(capsys.readouterr().out)["layers"]:
        assert layer["tokens"] == expected
        assert layer["experts_hit"] <= expected * layer["top_k"]


def test_run_without_recorded_activations(capsys, quick_bandwidth, checkpoint_without_activations):
    assert cli.main(["run", str(checkpoint_without_activations), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert "random" in report["activations"]
    assert [layer["relative_error"] for layer in report["layers"]] == [None] * 4
    assert [layer["tokens"] for layer in report["layers"]] == [128] * 4
    assert cli.main(["run", str(checkpoint_without_activations), "--tokens", "3"]) == 0
    assert len(re.findall(r" 2 +3 +— ", capsys.readouterr().out)) == 4


def test_run_fails_when_the_error_bound_is_exceeded(capsys, quick_bandwidth, save_activations):
    recorded = load_file(BUILT_IN / run.ACTIVATIONS_FILE)["layers.2.moe_output"]
    activations = save_activations(layers__2__moe_output=recorded * np.float32(1.01))
    assert cli.main(["run", "--activations", str(activations), "--json"]) == 1
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["ok"] is False
    assert len(report["failures"]) == 1
    assert err == f"marlin-cy: error: {report['failures'][0]}\n"
    assert re.search(r"layer 2: relative error 0\.0(10|099), expected at most 0\.0002$", report["failures"][0])


def test_run_fails_when_the_output_is_not_finite(capsys, quick_bandwidth, save_activations):
    hidden_states = load_file(BUILT_IN / run.ACTIVATIONS_FILE)["layers.1.hidden_states"]
    hidden_states[5, 7] = np.nan
    activations = save_activations(layers__1__hidden_states=hidden_states)
    assert cli.main(["run", "--activations", str(activations), "--json"]) == 1
    out, err = capsys.readouterr()
    assert [layer["finite"] for layer in json.loads(out)["layers"]] == [True, False, True, True]
    assert "layer 1: the output has NaN or infinity" in err


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("layers__3__moe_output", None, ["layers.3.moe_output", "missing"]),
        ("layers__0__hidden_states", np.zeros((128, 255), np.float32), ["layers.0.hidden_states", "(128, 255)"]),
        ("layers__0__hidden_states", np.zeros((0, 256), np.float32), ["layers.0.hidden_states", "(0, 256)"]),
        ("layers__1__router_logits", np.zeros((127, 8), np.float32), ["layers.1.router_logits", "(127, 8)"]),
        ("layers__1__router_logits", np.zeros((128, 8), np.int32), ["layers.1.router_logits", "int32"]),
    ],
)
def test_run_refuses_bad_activations(capsys, quick_bandwidth, save_activations, name, array, words):
    activations = save_activations(**{name: array})
    code = cli.main(["run", "--activations", str(activations)])
    assert_refused(code, capsys.readouterr(), str(activations), *words)


def test_run_refuses_a_folder_that_is_not_there(tmp_path):
    missing = tmp_path / "no such folder"
    done = start("run", str(missing))
    assert_refused(done.returncode, (done.stdout, done.stderr), str(missing))


def test_run_refuses_an_activations_file_that_is_not_there(capsys, quick_bandwidth, tmp_path):
    code = cli.main(["run", "--activations", str(tmp_path / "none.safetensors")])
    assert_refused(code, capsys.readouterr(), "none.safetensors")


def test_run_refuses_a_backend_that_is_missing(tmp_path):
    done = start("run", "--backend", "opencl", OCL_ICD_VENDORS=str(tmp_path / "none"))
    assert_refused(done.returncode, (done.stdout, done.stderr), "backend 'opencl'", "pip install")


@needs_opencl
def test_run_on_opencl_json(capsys):
    options = "--json", "--tier", "portable", "--repeat", "2", "--tokens", "16"
    assert cli.main(["run", "--backend", "opencl", *options]) == 0
    report = json.loads(capsys.readouterr().out)
    cpu_keys = {"isa", "threads", "compute_dtype", "read_bandwidth_bytes_per_second"}
    own_keys = {"device", "platform", "driver", "tier", "copy_bandwidth_bytes_per_second"}
    assert report.keys() == RUN_KEYS - cpu_keys | own_keys
    assert (report["ok"], report["backend"], report["tier"]) == (True, "opencl", "portable")
    assert report["copy_bandwidth_bytes_per_second"] > 1e8
    assert [layer["layer"] for layer in report["layers"]] == [0, 1, 2, 3]
    for layer in report["layers"]:
        assert layer["relative_error"] <= report["error_bound"] == 1e-5
        assert layer["tokens"] == 16
        assert 1 <= layer["experts_hit"] <= 8
        assert 0 < layer["kernel_seconds"] <= layer["seconds"]
        assert 0 < layer["device_seconds"] <= layer["seconds"]
        rate = layer["weight_bytes"] / layer["device_seconds"]
        assert layer["weight_bytes_per_second"] == pytest.approx(rate)
        assert layer["copy_share"] == pytest.approx(rate / report["copy_bandwidth_bytes_per_second"])


@pytest.mark.sweep
@needs_opencl
def test_run_on_opencl_table(capsys):
    assert cli.main(["run", "--backend", "opencl", "--repeat", "2", "--tokens", "3", "--device", "0"]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"^ *\d +8 × 256 → 256 +2 +3 .*%$", out, re.MULTILINE)) == 4
    assert "on opencl (" in out
    assert "all layers within it" in out


@pytest.mark.sweep
@needs_opencl
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_run_on_opencl_bounds_errors_by_dtype(capsys, save_activations, dtype):
    recorded = load_file(BUILT_IN / run.ACTIVATIONS_FILE)
    halved = {name.replace(".", "__"): array.astype(dtype) for name, array in recorded.items()}
    activations = save_activations(**halved)
    assert cli.main(["run", "--backend", "opencl", "--json", "--repeat", "1", "--activations", str(activations)]) == 0
    assert json.loads(capsys.readouterr().out)["error_bound"] == {np.float16: 1e-3}.get(dtype, 5e-3)


@pytest.mark.sweep
@needs_opencl
def test_run_on_opencl_fails_when_the_error_bound_is_exceeded(capsys, save_activations):
    recorded = load_file(BUILT_IN / run.ACTIVATIONS_FILE)["layers.2.moe_output"]
    activations = save_activations(layers__2__moe_output=recorded * np.float32(1.01))
    assert cli.main(["run", "--backend", "opencl", "--repeat", "1", "--activations", str(activations)]) == 1
    out, err = capsys.readouterr()
    assert "exceeded" in out
    assert re.search(r"^marlin-cy: error: layer 2: relative error 0\.0(10|099)", err)


@needs_opencl
def test_run_refuses_an_opencl_device_that_is_not_there(capsys):
    code = cli.main(["run", "--backend", "opencl", "--device", "abacus"])
    assert_refused(code, capsys.readouterr(), "device: got 'abacus'")


def test_run_refuses_an_unknown_isa():
    done = start("run", MARLIN_CY_ISA="z80")
    assert_refused(done.returncode, (done.stdout, done.stderr), "MARLIN_CY_ISA", "'z80'")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["walk"],
        ["run", "--threads", "0"],
        ["run", "--threads", "two"],
        ["run", "--repeat", "-1"],
        ["run", "--tokens", "1.5"],
        ["run", "--compute-dtype", "int4"],
        ["run", "--backend", "abacus"],
        ["run", "--backend", "opencl", "--threads", "2"],
        ["run", "--backend", "opencl", "--compute-dtype", "int16"],
        ["run", "--tier", "portable"],
        ["run", "--device", "0"],
        ["run", "--backend", "opencl", "--tier", "warp"],
        ["run", "one", "two"],
        ["doctor", "--loud"],
    ],
    ids=" ".join,
)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "usage: marlin-cy" in err


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"marlin-cy {__version__}\n"


def test_interrupt(capsys, monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "execute", interrupted)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "marlin-cy: interrupted\n"


@pytest.mark.skipif(os.name != "posix", reason="pipes close otherwise here")
def test_reader_that_has_gone():
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(
            [sys.executable, *QUICK_COMMAND, "doctor", "--json"],
            stdout=write_end,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    finally:
        os.close(write_end)
    assert done.returncode == 141
    assert done.stderr == ""


def test_doctor_json():
    done = start("doctor", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert found.keys() == DOCTOR_KEYS
    assert found["version"] == __version__
    assert found["cpu"].keys() == {"model", "architecture"}
    assert found["isa"]["chosen"] in [isa["name"] for isa in found["isa"]["isas"] if isa["available"]]
    assert found["isa"]["reason"]
    assert found["threads"].keys() == {"default", "affinity", "cpu_quota", "omp_num_threads"}
    assert found["threads"]["default"] >= 1
    assert isinstance(found["openmp"]["enabled"], bool)
    assert found["memory"].keys() == {"bandwidth_one_thread", "bandwidth_all_threads", "transparent_huge_pages"}
    assert found["memory"]["bandwidth_one_thread"] > 1e8
    assert found["backends"].keys() == {"cpu", "opencl"}
    assert found["backends"]["cpu"] is None
    assert found["versions"].keys() == {"python", "numpy", "ml_dtypes", "safetensors", "marlin_cy"}
    assert found["ok"] is True


def test_doctor_tables():
    done = start("doctor", command=QUICK_COMMAND, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert ESCAPE not in done.stdout
    for words in ("CPU", "threads", "OpenMP", "memory read, one thread", "transparent huge pages", "backend", "numpy"):
        assert words in done.stdout
    assert re.search(r"^generic .*yes", done.stdout, re.MULTILINE)
    assert re.search(r"^opencl +(yes|no +\S)", done.stdout, re.MULTILINE)
    assert "OMP_NUM_THREADS 1" in done.stdout


def test_doctor_speaks_of_an_unknown_isa(capsys, monkeypatch, quick_bandwidth):
    monkeypatch.setenv("MARLIN_CY_ISA", "z80")
    assert cli.main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["isa"]["chosen"] is None
    assert "'z80'" in found["isa"]["reason"]
    assert found["isa"]["isas"]
    assert found["ok"] is False
    assert cli.main(["doctor"]) == 1
    assert "Chosen: none, environment variable MARLIN_CY_ISA" in capsys.readouterr().out


def test_doctor_speaks_when_nothing_was_compiled(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "marlin_cy.cpu", None)  # an ImportError when it is imported
    monkeypatch.setattr("marlin_cy.opencl.availability", lambda: "no kernels")
    assert cli.main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == DOCTOR_KEYS
    assert (found["isa"], found["openmp"], found["ok"]) == (None, None, False)
    assert cli.main(["doctor"]) == 1
    assert "marlin_cy.cpu cannot be imported" in capsys.readouterr().out


def test_progress_of_a_long_load(monkeypatch):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(output, "console", lambda stream: terminal)
    monkeypatch.setattr(output, "PROGRESS_AFTER_SECONDS", 0.0)
    with output.LoadProgress() as progress:
        progress.parts = 2
        for progress.finished in range(2):
            progress(1, 2, f"layer {progress.finished}")
    drawn = terminal.file.getvalue()
    assert "loading layer 0" in drawn
    assert "loading layer 1" in drawn


def test_no_progress_of_a_short_load(monkeypatch):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(output, "console", lambda stream: terminal)
    with output.LoadProgress() as progress:
        progress(1, 1, "layer 0")
    assert terminal.file.getvalue() == ""


@pytest.mark.parametrize(
    ("text", "state"), [("always [madvise] never\n", "madvise"), ("[never] always\n", "never"), ("on\n", None)]
)
def test_huge_pages_state(tmp_path, monkeypatch, text, state):
    (tmp_path / "enabled").write_text(text)
    monkeypatch.setattr(doctor, "HUGE_PAGES", tmp_path / "enabled")
    assert doctor.huge_pages_state() == state


def test_huge_pages_state_without_the_setting(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "HUGE_PAGES", tmp_path / "enabled")
    assert doctor.huge_pages_state() is None


def test_cpu_model(tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel\t\t: 1\nmodel name\t: A Fine CPU @ 3 GHz\n")
    monkeypatch.setattr(doctor, "CPU_INFO", tmp_path / "cpuinfo")
    assert doctor.cpu_model() == "A Fine CPU @ 3 GHz"
