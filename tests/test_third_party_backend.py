"""Backends of other packages: the example of ``docs/adding-a-backend.md``, and faulty packages."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import marlin_cy
from marlin_cy import backends, cli
from marlin_cy.errors import BackendUnavailable

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "docs" / "adding-a-backend.md"
GROUP = "marlin_cy.backends"


def blocks(language):
    """The page's code blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def install(folder, package, entries, **modules):
    """Put an installed package into a folder: its modules, and the metadata that pip writes."""
    for name, code in modules.items():
        (folder / f"{name}.py").write_text(code)
    metadata = folder / f"{package.replace('-', '_')}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = "".join(f"{name} = {value}\n" for name, value in entries)
    (metadata / "entry_points.txt").write_text(f"[{GROUP}]\n{lines}")


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder on the path of imports."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("plugin_"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def abacus(tmp_path_factory):
    """The package that the page describes, installed in a folder."""
    (project,) = blocks("toml")
    ((name, value),) = re.findall(r'^(\w+) = "(\w+:\w+)"$', project, re.MULTILINE)
    (package,) = re.findall(r'^name = "(.*)"$', project, re.MULTILINE)
    assert f'[project.entry-points."{GROUP}"]\n{name} = ' in project
    folder = tmp_path_factory.mktemp("abacus")
    install(folder, package, [(name, value)], marlin_abacus="\n\n".join(blocks("python")))
    return folder


def start(folder, *arguments, **environment):
    """Python in a process of its own, with a folder on its path."""
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": path, **environment},
        cwd=REPOSITORY,
        timeout=500,
    )


class TestThePage:
    def test_code_is_short(self):
        assert sum(len(block.splitlines()) for block in blocks("python")) < 200

    def test_contract(self, abacus):
        """The page's own command: the tests of stacks, linear layers and builders pass."""
        (command,) = (line for block in blocks("sh") for line in block.splitlines() if "pytest" in line)
        variable, _, *arguments = command.split()
        done = start(abacus, *arguments, "-n0", "-q", "-p", "no:cacheprovider", **dict([variable.split("=")]))
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr
        assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 50

    @pytest.mark.sweep
    def test_moe_layers(self, abacus):
        """Routing kinds, activations, shared experts and both ways to choose experts, as on every backend."""
        selected = ["tests/test_moe.py", "-k", "TestLayer and abacus"]
        options = ["-n0", "-q", "-p", "no:cacheprovider"]
        done = start(abacus, "-m", "pytest", *selected, *options, MARLIN_CY_TEST_BACKEND="abacus")
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr
        assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 10

    @pytest.mark.sweep
    def test_commands(self, abacus):
        """The page's own commands."""
        commands = [
            line.split() for block in blocks("sh") for line in block.splitlines() if line.startswith("marlin-cy")
        ]
        assert [command[1] for command in commands] == ["doctor", "run"]
        quick = str(REPOSITORY / "tests" / "quick_command.py")
        doctor, run = (start(abacus, quick, *command[1:]) for command in commands)
        assert doctor.returncode == run.returncode == 0, doctor.stderr + run.stderr
        assert re.search(r"^abacus +yes", doctor.stdout, re.MULTILINE)
        assert "4 MoE layers on abacus" in run.stdout
        assert "all layers within it" in run.stdout

    def test_run_json(self, abacus):
        done = start(
            abacus, "-m", "marlin_cy", "run", "--backend", "abacus", "--json", "--repeat", "2", "--tokens", "9"
        )
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert (report["backend"], report["device"], report["ok"]) == ("abacus", "abacus", True)
        for layer in report["layers"]:
            assert layer["relative_error"] < 1e-5
            assert (layer["tokens"], layer["repeats"]) == (9, 2)
            assert layer["weight_bytes_per_second"] == pytest.approx(layer["weight_bytes"] / layer["seconds"])

    def test_a_packed_folder(self, abacus, tmp_path):
        """A backend that does not override ``stack_from_packed`` gets the weights unpacked."""
        code = """
import sys
import numpy as np
import marlin_cy
from importlib.resources import files
from marlin_cy import cli
source, packed = str(files("marlin_cy") / "data/tiny-qwen3-moe-gptq-int4"), sys.argv[1]
assert cli.main(["pack", source, packed]) == 0
x = np.random.default_rng(0).standard_normal((3, 256)).astype(np.float32)
results = []
for folder in (source, packed):
    with marlin_cy.open_checkpoint(folder, "abacus") as checkpoint:
        layer, ctx = checkpoint.moe_layer(1), checkpoint.backend.new_context()
        results.append(layer(ctx, x, x[:, :8].copy()))
assert np.isfinite(results[0]).all() and (results[0] == results[1]).all()
"""
        done = start(abacus, "-c", code, str(tmp_path / "packed"))
        assert done.returncode == 0, done.stderr

    def test_other_backends_do_not_import_it(self, abacus):
        code = """
import sys
import marlin_cy
from marlin_cy import backends, cli
from marlin_cy.cpu.measure import _bandwidth
_bandwidth.read_bandwidth = lambda num_threads: 10e9
assert "abacus" in backends.backend_names()
marlin_cy.get_backend("cpu")
assert cli.main(["run", "--backend", "cpu", "--threads", "1", "--repeat", "1", "--json"]) == 0
assert "marlin_abacus" not in sys.modules
assert "pyopencl" not in sys.modules
marlin_cy.get_backend("abacus")
assert "marlin_abacus" in sys.modules
"""
        done = start(abacus, "-c", code)
        assert done.returncode == 0, done.stderr


# A subclass of the CPU's backend is a complete backend under another name.
COMPLETE = """
from marlin_cy.cpu import CpuBackend

class Plugin(CpuBackend):
    name = "plugin"
"""


class TestFaults:
    """Each names the backend, its package and the reason. Other backends go on working."""

    FAULTS = {
        "raises ImportError": ("plugin_a:Plugin", "import plugin_not_there", r"cannot be imported \(ModuleNotFound"),
        "raises another error": ("plugin_a:Plugin", "1 / 0", r"cannot be imported \(ZeroDivisionError"),
        "has a syntax error": ("plugin_a:Plugin", "def", r"cannot be imported \(SyntaxError"),
        "lacks the attribute": ("plugin_a:Plugin", "", r"cannot be imported \(AttributeError.*Plugin"),
        "lacks the module": ("plugin_b:Plugin", "", r"cannot be imported \(ModuleNotFoundError.*plugin_b"),
        "is not module:attribute": ("plugin a!", "", r"cannot be imported"),
        "lacks methods": (
            "plugin_a:Plugin",
            "from marlin_cy import Backend\nclass Plugin(Backend):\n    name = 'plugin'\n    def empty(self): pass",
            r"lacks the methods from_host, moe_forward, new_context, new_stack_builder, route, to_host",
        ),
        "is another class": ("plugin_a:Plugin", "class Plugin: pass", "is a class that is not a subclass of"),
        "is no callable": ("plugin_a:Plugin", "Plugin = 3", "is a int, expected a callable"),
    }

    @pytest.mark.parametrize("fault", FAULTS)
    def test_a_package_that_cannot_be_used(self, packages, capsys, fault):
        value, code, reason = self.FAULTS[fault]
        install(packages, "faulty-plugin", [("plugin", value)], plugin_a=code)
        found = marlin_cy.available_backends()
        assert list(found) == ["cpu", "opencl", "plugin"]
        assert found["cpu"] is None
        assert re.search(rf"{re.escape(value)} of package faulty-plugin 1\.0.* ?{reason}", found["plugin"])
        with pytest.raises(BackendUnavailable, match=rf"backend 'plugin': .*{reason}"):
            marlin_cy.get_backend("plugin")
        assert marlin_cy.get_backend("cpu").name == "cpu"
        assert cli.main(["run", "--backend", "plugin", "--beads", "3"]) == 1
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith("marlin-cy: error: backend 'plugin': ")

    def test_a_callable_that_makes_something_else(self, packages):
        install(packages, "faulty-plugin", [("plugin", "plugin_a:make")], plugin_a="def make(): return 3")
        with pytest.raises(BackendUnavailable, match="backend 'plugin': got a int, expected a marlin_cy.Backend"):
            marlin_cy.get_backend("plugin")

    def test_availability(self, packages):
        code = COMPLETE + "    @classmethod\n    def availability(cls): return 'no beads; buy an abacus'"
        install(packages, "plugin", [("plugin", "plugin_a:Plugin")], plugin_a=code)
        assert marlin_cy.available_backends()["plugin"] == "no beads; buy an abacus"
        with pytest.raises(BackendUnavailable, match="backend 'plugin': no beads; buy an abacus"):
            marlin_cy.get_backend("plugin")

    @pytest.mark.parametrize(
        ("body", "reason"),
        [("1 / 0", r"availability\(\) fails \(ZeroDivisionError"), ("return True", r"availability\(\) gives a bool")],
    )
    def test_a_faulty_availability(self, packages, body, reason):
        code = f"{COMPLETE}    @classmethod\n    def availability(cls): {body}"
        install(packages, "plugin", [("plugin", "plugin_a:Plugin")], plugin_a=code)
        assert re.match(reason, marlin_cy.available_backends()["plugin"])

    def test_a_name_declared_twice(self, packages):
        install(
            packages, "plugin-one", [("plugin", "plugin_a:Plugin"), ("other", "plugin_a:Plugin")], plugin_a=COMPLETE
        )
        install(packages, "plugin-two", [("plugin", "plugin_b:Plugin")], plugin_b=COMPLETE)
        found = marlin_cy.available_backends()
        assert (found["cpu"], found["other"]) == (None, None)
        for words in ("plugin-one 1.0 (plugin_a:Plugin)", "plugin-two 1.0 (plugin_b:Plugin)", "uninstall all but one"):
            assert words in found["plugin"]
        with pytest.raises(BackendUnavailable, match="backend 'plugin': declared by"):
            marlin_cy.get_backend("plugin")
        assert marlin_cy.get_backend("other").name == "plugin"

    def test_built_in_names_stay(self, packages):
        install(packages, "usurper", [("cpu", "plugin_a:Plugin"), ("plugin", "plugin_a:Plugin")], plugin_a=COMPLETE)
        with pytest.warns(RuntimeWarning, match="package usurper 1.0 declares a backend 'cpu', which is built in"):
            assert marlin_cy.available_backends()["plugin"] is None
        assert marlin_cy.get_backend("cpu").name == "cpu"

    def test_damaged_metadata(self, packages):
        install(packages, "plugin", [("plugin", "plugin_a:Plugin")], plugin_a=COMPLETE)
        damaged = packages / "damaged-1.0.dist-info"
        damaged.mkdir()
        (damaged / "entry_points.txt").write_bytes(b"[marlin_cy.backends]\n\xff\xfe = x\n")
        with pytest.warns(RuntimeWarning, match="entry points of an installed package cannot be read"):
            assert marlin_cy.available_backends()["plugin"] is None

    def test_unknown_names_are_listed(self, packages):
        install(packages, "plugin", [("plugin", "plugin_a:Plugin")], plugin_a=COMPLETE)
        with pytest.raises(ValueError, match="name: got 'cuda', expected one of 'cpu', 'opencl', 'plugin'"):
            marlin_cy.get_backend("cuda")


# A function with attributes, options of its own, and its own words for a measurement.
FUNCTION = """
from marlin_cy.cpu import CpuBackend
from marlin_cy.command_line import DoctorReport
from marlin_cy.tuning import Choice, TuningResult

class Tuner:
    file = "shelf.json"

    def __init__(self, backend):
        self.place = {"device": f"{backend.beads} beads"}

    def tune(self, shape, tokens, progress):
        best, refused = Choice({"wires": 3}, "3 wires"), [(Choice({"wires": 99}, "99 wires"), "too wide")]
        return [TuningResult(shape, count, count, 2e-6, 1e-6, best, False, 1, refused) for count in tokens]

class Plugin(CpuBackend):
    name = "plugin"

    def __init__(self, beads):
        self.beads = beads

    def context_from_arguments(self, arguments):
        return {"num_threads": 1}

    def describe(self, ctx):
        return f"{self.beads} beads"

    def layer_measurement(self, arguments):
        from marlin_cy.commands.measure import LayerMeasurement

        return LayerMeasurement(self, self.new_context())

def make(beads=10):
    if beads > 100:
        raise ValueError(f"beads: got {beads}, expected at most 100")
    return Plugin(beads)

make.add_arguments = lambda group: group.add_argument("--beads", type=int)
make.from_arguments = lambda arguments: {} if arguments.beads is None else {"beads": arguments.beads}
make.tuner = lambda: Tuner
make.doctor = lambda: DoctorReport({"beads": 10}, True, lambda screen: screen.print("Beads: 10"))
"""


class TestCommandLine:
    @pytest.fixture(autouse=True)
    def plugin(self, packages):
        install(packages, "plugin", [("plugin", "plugin_a:make")], plugin_a=FUNCTION)

    @pytest.mark.parametrize(("options", "beads"), [((), 10), (("--beads", "7"), 7), (("--beads=8",), 8)])
    def test_options(self, capsys, options, beads):
        assert cli.main(["run", "--backend", "plugin", *options, "--repeat", "1", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["device"] == f"{beads} beads"

    def test_an_invalid_option(self, capsys):
        assert cli.main(["run", "--backend", "plugin", "--beads", "101"]) == 1
        assert capsys.readouterr().err == "marlin-cy: error: beads: got 101, expected at most 100\n"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["run", "--beads", "3"], "--beads: only with --backend plugin, got --backend cpu"),
            (["run", "--backend", "plugin", "--tier", "mma"], "--tier: only with --backend opencl, got --backend plug"),
            (["run", "--backend", "plugin", "--cubits", "3"], "unrecognized arguments: --cubits"),
            (["run", "--backend"], "argument --backend: expected one argument"),
            (["run", "--backend", "cuda"], "invalid choice: 'cuda'"),
            (["doctor", "--beads", "3"], "unrecognized arguments: --beads"),
            (["tune", "--shape", "64,16,2,32", "--backend", "cpu"], "--backend: cpu has nothing to tune"),
        ],
    )
    def test_wrong_arguments(self, capsys, arguments, message):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err

    def test_help(self, capsys):
        for name, shown, hidden in (("plugin", "--beads", "--threads"), ("cpu", "--threads", "--beads")):
            with pytest.raises(SystemExit):
                cli.main(["run", "--backend", name, "--help"])
            out = capsys.readouterr().out
            assert shown in out
            assert hidden not in out

    def test_tune(self, capsys):
        command = ["tune", "--backend", "plugin", "--beads", "7", "--shape", "64,16,2,32", "--tokens", "1,2"]
        assert cli.main([*command, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["device"], report["file"]) == ("7 beads", "shelf.json")
        for result, tokens in zip(report["results"], (1, 2), strict=True):
            assert (result["k"], result["n"], result["experts"], result["tokens"]) == (64, 16, 2, tokens)
            assert result["configuration"] == {"wires": 3}
            assert result["refused"] == [{"configuration": {"wires": 99}, "reason": "too wide"}]
        assert cli.main(command) == 0
        out = capsys.readouterr().out
        for text in ("device 7 beads", "3 wires", "99 wires: too wide", "Stored in shelf.json"):
            assert text in out

    def test_doctor(self, capsys, quick_bandwidth):
        assert cli.main(["doctor", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["plugin"] == {"beads": 10}
        assert found["backends"]["plugin"] is None
        assert cli.main(["doctor"]) == 0
        assert "Beads: 10" in capsys.readouterr().out


def test_built_in_backends_are_rows_of_the_same_kind():
    for name, value in backends.BUILT_IN.items():
        module, _, attribute = value.partition(":")
        factory = getattr(__import__(module, fromlist=[attribute]), attribute)
        assert backends.backend_factory(name) is factory
        for hook in ("availability", "add_arguments", "from_arguments", "precisions", "tuner", "doctor"):
            assert callable(getattr(factory, hook))
