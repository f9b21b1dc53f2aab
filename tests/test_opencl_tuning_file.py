"""The file of tuning results: several processes at once, and other versions of the library."""

import json
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

pytest.importorskip("pyopencl", reason="PyOpenCL is not installed")
from opencl_devices import DEVICES

from marlin_cy.opencl import tuned, tuning
from marlin_cy.opencl.device import capabilities
from marlin_cy.opencl.tiers import PORTABLE

pytestmark = pytest.mark.skipif(not DEVICES, reason="no OpenCL device")

SHAPE = tuning.Shape(k=512, n=16, experts=2, group_size=128, top_k=1)
DEFAULT = PORTABLE.configurations.cpu[0]
WRITERS, KEYS = 4, 25


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MARLIN_CY_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "opencl"


def result(key):
    best = replace(DEFAULT, splits=4)
    return tuning.Tuning(SHAPE, 1, 1, key, 2e-5, 1e-5, DEFAULT, best, 1, [])


def keep(writer):
    """Keep results one by one, as a run of ``tune`` does after each shape."""
    for number in range(KEYS):
        tuned.keep(capabilities(DEVICES[0]), PORTABLE, [result(f"writer {writer}, product {number}")])


def kept():
    """The keys in the file."""
    (place,) = json.loads(tuned.tuning_file().read_text())["places"].values()
    return set(place)


EXPECTED = {f"writer {writer}, product {number}" for writer in range(WRITERS) for number in range(KEYS)}


def test_threads_lose_no_results():
    threads = [threading.Thread(target=keep, args=(writer,)) for writer in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kept() == EXPECTED


@pytest.mark.sweep
def test_processes_lose_no_results(request):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_opencl_tuning_file as t; t.keep(int(sys.argv[2]))"
    folder = str(request.path.parent)
    running = [subprocess.Popen([sys.executable, "-c", code, folder, str(writer)]) for writer in range(WRITERS)]
    for process in running:
        assert process.wait(120) == 0
    assert kept() == EXPECTED


@pytest.mark.parametrize("name", ["tuning.json", "tuning-2.json", "tuning-1000.json"])
def test_files_of_other_versions_are_left_alone(folder, name, recwarn):
    """They are neither read nor written, whatever they hold."""
    folder.mkdir(parents=True)
    content = b'{"schema": 1000, "places": "in a new form"}'
    (folder / name).write_bytes(content)
    assert tuned.read_places(tuned.tuning_file()) == {}
    keep(0)
    assert (folder / name).read_bytes() == content
    assert not [warning for warning in recwarn if warning.category is RuntimeWarning]


def test_the_schema_is_in_the_name():
    assert tuned.tuning_file().name == f"tuning-{tuned.SCHEMA_VERSION}.json"


def test_without_fcntl(monkeypatch):
    """A system without it has no lock, and results are kept all the same."""
    monkeypatch.setattr(tuned, "fcntl", None)
    keep(0)
    assert len(kept()) == KEYS
