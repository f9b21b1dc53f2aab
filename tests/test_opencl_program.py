"""OpenCL programs: built once, kept in memory and on disk, and rebuilt if files are damaged."""

import os
import pickle
import re
import subprocess
import sys
import tempfile
import threading
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

cl = pytest.importorskip("pyopencl", reason="PyOpenCL is not installed")

from opencl_devices import is_known_wrong  # noqa: E402

from marlin_cy import MarlinError  # noqa: E402
from marlin_cy.errors import BuildError  # noqa: E402
from marlin_cy.opencl import device as devices  # noqa: E402
from marlin_cy.opencl import program  # noqa: E402

COMMON = """
#ifndef VALUE
#define VALUE -1
#endif
"""
WRITE = "__kernel void write(__global int *out)\n{\n    out[0] = VALUE;\n}\n"
BROKEN = "__kernel void write(__global int *out)\n{\n    out[0] = no_such_name;\n}\n"


@pytest.fixture(params=devices.list_devices(), ids=devices.describe)
def device(request):
    return request.param


@pytest.fixture
def context(device):
    return cl.Context([device])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of the binaries, still to be made."""
    monkeypatch.setenv("MARLIN_CY_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "opencl"


@pytest.fixture
def sources(tmp_path):
    files = tmp_path / "kernels"
    files.mkdir()
    for name, text in (("common", COMMON), ("write", WRITE), ("broken", BROKEN)):
        (files / f"{name}.cl").write_text(text)
    return files


@pytest.fixture
def programs(context, device, sources, folder):
    """A function that makes a :class:`ProgramCache`, as a new process would; its binaries are kept even on PoCL."""
    return lambda: program.ProgramCache(context, device, folder=sources, keep_binaries=True)


def result(kernel):
    """What the kernel ``write`` writes."""
    queue = cl.CommandQueue(kernel.context)
    out = np.full(1, -99, np.int32)
    buffer = cl.Buffer(kernel.context, cl.mem_flags.READ_WRITE, out.nbytes)
    kernel(queue, (1,), None, buffer)
    cl.enqueue_copy(queue, out, buffer)
    return int(out[0])


def counts(cache):
    return cache.compiled, cache.loaded


# Building ---------------------------------------------------------------------------------------


def test_a_kernel_is_new_and_its_program_is_not(programs):
    cache = programs()
    first, second = cache.kernel("write", "write", {"VALUE": 5}), cache.kernel("write", "write", {"VALUE": 5})
    assert first is not second
    assert first.int_ptr != second.int_ptr
    assert cache.program("write", {"VALUE": 5}) is cache.program("write", {"VALUE": 5})
    assert counts(cache) == (1, 0)
    assert result(first) == result(second) == 5


def test_macros_and_options_make_programs_of_their_own(programs):
    cache = programs()
    assert result(cache.kernel("write", "write")) == -1
    assert result(cache.kernel("write", "write", {"VALUE": True})) == 1
    assert result(cache.kernel("write", "write", {"VALUE": "(2+1)"})) == 3
    assert result(cache.kernel("write", "write", options=["-DVALUE=4"])) == 4
    assert result(cache.kernel("write", "write", {"VALUE": 3}, ("-cl-mad-enable",))) == 3
    assert cache.compiled == 5
    cache.kernel("write", "write", {"A": 1, "VALUE": 3})
    cache.kernel("write", "write", {"VALUE": 3, "A": 1})
    assert cache.compiled == 6


def test_the_source_names_files_and_lines(sources):
    assert program.source("write", sources) == f'#line 1 "common.cl"\n{COMMON}\n#line 1 "write.cl"\n{WRITE}\n'


def test_a_file_includes_others(programs, sources):
    (sources / "shared.cl").write_text("#define VALUE_OR_MORE (VALUE + MORE)\n")
    (sources / "sum.cl").write_text('#include "shared.cl"\n' + WRITE.replace("VALUE", "VALUE_OR_MORE"))
    text = program.source("sum", sources)
    assert re.findall(r"#line (.*)\n", text) == ['1 "common.cl"', '1 "sum.cl"', '1 "shared.cl"', '2 "sum.cl"']
    assert result(programs().kernel("sum", "write", {"VALUE": 3, "MORE": 4})) == 7
    assert program.kernel_files(sources) == ["broken", "sum", "write"]
    (sources / "shared.cl").write_text("#define VALUE_OR_MORE MORE\n")
    assert result(programs().kernel("sum", "write", {"VALUE": 3, "MORE": 4})) == 4


def test_a_file_is_included_once(programs, sources):
    (sources / "number.cl").write_text("__constant int number = 5;\n")
    (sources / "twice.cl").write_text('#include "number.cl"\n#define TWICE (2 * number)\n')
    (sources / "thrice.cl").write_text('#include "number.cl"\n#define THRICE (3 * number)\n')
    (sources / "both.cl").write_text(
        '#include "twice.cl"\n#include "thrice.cl"\n' + WRITE.replace("VALUE", "TWICE + THRICE")
    )
    text = program.source("both", sources)
    assert re.findall(r'#line 1 "(.*)"\n', text) == ["common.cl", "both.cl", "twice.cl", "number.cl", "thrice.cl"]
    assert "#include" not in text
    assert result(programs().kernel("both", "write")) == 25


def names_the_line(log, place):
    """Whether a compiler's log names a file and line; NVIDIA's compiler does not read ``#line``."""
    return place in log or "<kernel>:" in log


def test_messages_name_the_line_after_an_include(programs, sources):
    (sources / "number.cl").write_text("__constant int number = 5;\n\n")
    (sources / "wrong.cl").write_text('\n#include "number.cl"\n' + BROKEN)
    with pytest.raises(BuildError) as caught:
        programs().kernel("wrong", "write")
    assert names_the_line(caught.value.log, "wrong.cl:5")


@pytest.mark.parametrize(
    ("texts", "chain"),
    [
        ({"a": '#include "a.cl"\n'}, "a.cl includes a.cl"),
        ({"a": '#include "b.cl"\n', "b": 'int x;\n#include "a.cl"\n'}, "a.cl includes b.cl includes a.cl"),
    ],
)
def test_a_cycle_of_includes_is_refused(sources, texts, chain):
    for name, text in texts.items():
        (sources / f"{name}.cl").write_text(text)
    with pytest.raises(ValueError, match=f"^{re.escape(chain)}: a cycle$"):
        program.source("a", sources)


def test_the_package_has_its_kernels():
    names = program.kernel_files()
    assert {"moe", "pack", "prepare", "reduce", "gemm_portable", "gemm_subgroup"} <= set(names)
    assert "common" not in names
    for name in names:
        assert program.source(name).startswith('#line 1 "common.cl"\n')
        assert f'#line 1 "{name}.cl"\n' in program.source(name)


def test_no_such_file_and_no_such_kernel(programs):
    with pytest.raises(FileNotFoundError, match=r"abacus\.cl"):
        programs().kernel("abacus", "write")
    with pytest.raises(cl.LogicError):
        programs().kernel("write", "abacus")


def test_a_build_failure_shows_the_log(programs, device, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    cache = programs()
    for _ in range(2):
        with pytest.raises(BuildError) as caught:
            cache.kernel("broken", "write", {"VALUE": 1}, ["-cl-mad-enable"])
        error = caught.value
        assert isinstance(error, MarlinError)
        assert isinstance(error, RuntimeError)
        assert error.program == "broken.cl"
        assert error.options == ("-DVALUE=1", "-cl-mad-enable")
        assert error.device == devices.describe(device)
        assert "no_such_name" in error.log
        assert names_the_line(error.log, "broken.cl:3")
        for words in ("broken.cl does not build on", device.name.strip(), "-DVALUE=1 -cl-mad-enable", error.log):
            assert words in str(error)
    assert counts(cache) == (0, 0)
    assert list(temporary.glob("*.cl")) == []  # PyOpenCL leaves a copy of the source there
    assert result(cache.kernel("write", "write", {"VALUE": 7})) == 7


def test_a_build_error_survives_pickling():
    error = pickle.loads(pickle.dumps(BuildError("a.cl", ["-DA=1"], "Card", "no good")))
    assert (error.program, error.options, error.device, error.log) == ("a.cl", ("-DA=1",), "Card", "no good")


# Binaries on disk -------------------------------------------------------------------------------


def test_a_binary_is_loaded(programs, folder, monkeypatch):
    assert result(programs().kernel("write", "write", {"VALUE": 5})) == 5
    (file,) = folder.iterdir()
    assert file.name.startswith("write-")
    assert file.suffix == ".bin"

    def from_source(*arguments):
        raise AssertionError("compiled again")

    monkeypatch.setattr(program.ProgramCache, "_from_source", from_source)
    cache = programs()
    assert result(cache.kernel("write", "write", {"VALUE": 5})) == 5
    assert counts(cache) == (0, 1)
    with pytest.raises(AssertionError, match="compiled again"):
        cache.kernel("write", "write", {"VALUE": 6})


def test_what_a_binary_says_is_what_runs(programs, folder, sources):
    """The strongest proof that it was loaded: one that was compiled from another source."""
    programs().kernel("write", "write", {"VALUE": 5})
    (file,) = folder.iterdir()
    cache = programs()
    other = cache.program("write", {"VALUE": 6})
    key = cache._key(program.source("write", sources), ("-DVALUE=5",))
    program._write(file, key, other.get_info(cl.program_info.BINARIES)[0])
    assert result(programs().kernel("write", "write", {"VALUE": 5})) == 6


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:10],
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: b"not a binary" * 1000,
        lambda content: content[:100] + bytes([content[100] ^ 1]) + content[101:],
    ],
    ids=["empty", "shorter than its checksum", "half", "one byte less", "one byte more", "garbage", "one bit"],
)
def test_a_damaged_binary_is_built_again(programs, folder, damage):
    programs().kernel("write", "write", {"VALUE": 5})
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    cache = programs()
    assert result(cache.kernel("write", "write", {"VALUE": 5})) == 5
    assert counts(cache) == (1, 0)
    again = programs()
    assert result(again.kernel("write", "write", {"VALUE": 5})) == 5
    assert counts(again) == (0, 1)
    assert list(folder.iterdir()) == [file]


def test_the_binary_of_another_program_is_not_taken(programs, folder):
    programs().kernel("write", "write", {"VALUE": 5})
    (file,) = folder.iterdir()
    programs().kernel("write", "write", {"VALUE": 6})
    (other,) = set(folder.iterdir()) - {file}
    file.write_bytes(other.read_bytes())
    assert result(programs().kernel("write", "write", {"VALUE": 5})) == 5


def test_a_binary_that_the_driver_refuses_is_built_again(device, programs, folder, sources):
    if is_known_wrong(device) and device.driver_version.startswith("22."):
        pytest.skip("Mesa 22.3 ends the process")
    cache = programs()
    cache.kernel("write", "write", {"VALUE": 5})
    (file,) = folder.iterdir()
    program._write(file, cache._key(program.source("write", sources), ("-DVALUE=5",)), b"not a binary" * 100)
    cache = programs()
    assert result(cache.kernel("write", "write", {"VALUE": 5})) == 5
    assert counts(cache) == (1, 0)


def test_a_changed_source_is_built(programs, sources):
    programs().kernel("write", "write")
    (sources / "common.cl").write_text("#define VALUE 8\n")
    assert result(programs().kernel("write", "write")) == 8


def test_a_key_holds_all_that_a_binary_depends_on(monkeypatch):
    def key(text="text", options=("-DA=1",), platform=(), **attributes):
        its_platform = SimpleNamespace(**{"name": "P", "version": "1"} | dict(platform))
        its = {"vendor": "V", "name": "N", "version": "2", "driver_version": "3", "platform": its_platform}
        monkeypatch.setattr(program, "cache_folder", lambda: None)
        return program.ProgramCache(None, SimpleNamespace(**its | attributes))._key(text, options)

    variants = [
        key(text="other"),
        key(options=("-DA=2",)),
        key(options=()),
        key(vendor="other"),
        key(name="other"),
        key(version="other"),
        key(driver_version="other"),
        key(platform={"name": "other"}),
        key(platform={"version": "other"}),
    ]
    usual = key()
    assert usual == key()
    monkeypatch.setenv("PYOPENCL_BUILD_OPTIONS", "-DA=3")
    variants.append(key())
    monkeypatch.delenv("PYOPENCL_BUILD_OPTIONS")
    monkeypatch.setattr(program, "__version__", "0")
    variants.append(key())
    assert len({usual, *variants}) == len(variants) + 1


def unwritable(tmp_path):
    """A folder that not even root can make."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "cache"


def test_an_unwritable_folder_costs_one_warning(programs, tmp_path, monkeypatch):
    monkeypatch.setenv("MARLIN_CY_CACHE_DIR", str(unwritable(tmp_path)))
    cache = programs()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert result(cache.kernel("write", "write", {"VALUE": 5})) == 5
        assert result(cache.kernel("write", "write", {"VALUE": 6})) == 6
    (warning,) = (entry for entry in said if entry.category is RuntimeWarning)
    assert str(unwritable(tmp_path)) in str(warning.message)
    assert "MARLIN_CY_CACHE_DIR" in str(warning.message)
    assert os.path.samefile(warning.filename, __file__)


def test_a_write_that_fails_half_way_leaves_nothing(programs, folder, monkeypatch):
    def replace(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        assert result(programs().kernel("write", "write", {"VALUE": 5})) == 5
    assert list(folder.iterdir()) == []


def test_no_cache_on_disk(programs, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MARLIN_CY_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert program.cache_folder() is None
    for _ in range(2):
        cache = programs()
        assert result(cache.kernel("write", "write", {"VALUE": 5})) == 5
        assert counts(cache) == (1, 0)
    assert not folder.exists()
    assert not (tmp_path / "xdg" / "marlin_cy").exists()


def test_binaries_are_kept_where_the_driver_does_not(context, device, sources, folder):
    cache = program.ProgramCache(context, device, folder=sources)
    assert result(cache.kernel("write", "write", {"VALUE": 5})) == 5
    assert folder.exists() == (device.platform.name != "Portable Computing Language")


def test_where_binaries_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("MARLIN_CY_CACHE_DIR", str(tmp_path))
    assert program.cache_folder() == tmp_path / "opencl"
    monkeypatch.delenv("MARLIN_CY_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    if sys.platform == "linux":
        assert program.cache_folder() == tmp_path / "xdg" / "marlin_cy" / "opencl"


def test_a_context_of_two_devices(sources, folder):
    """PoCL shows one CPU as two devices when told to; a program is built for one of them, and kept for that one."""
    code = f"""
import pathlib
import pyopencl as cl
from marlin_cy.opencl.program import ProgramCache
platforms = [platform for platform in cl.get_platforms() if platform.name == "Portable Computing Language"]
context = cl.Context(platforms[0].get_devices()) if platforms else None
for device in 2 * context.devices if context else ():
    cache = ProgramCache(context, device, folder=pathlib.Path({str(sources)!r}), keep_binaries=True)
    cache.kernel("write", "write")
    print(cache.compiled, cache.loaded)
"""
    environment = os.environ | {"POCL_DEVICES": "pthread basic"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    if not done.stdout:
        pytest.skip("no PoCL here")
    assert done.stdout.splitlines() == ["1 0", "1 0", "0 1", "0 1"]


# Threads ----------------------------------------------------------------------------------------


def together(*calls):
    """The results of calls, each in its own thread, all at the same time."""
    barrier, results = threading.Barrier(len(calls)), [None] * len(calls)

    def run(index):
        barrier.wait()
        results[index] = calls[index]()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_threads_that_want_the_same_program_build_it_once(programs):
    cache = programs()
    kernels = together(*[lambda: cache.kernel("write", "write", {"VALUE": 5})] * 4)
    assert [result(kernel) for kernel in kernels] == [5] * 4
    assert counts(cache) == (1, 0)


def test_threads_that_want_different_programs(programs):
    cache = programs()
    kernels = together(*(lambda value=value: cache.kernel("write", "write", {"VALUE": value}) for value in range(4)))
    assert [result(kernel) for kernel in kernels] == [0, 1, 2, 3]
    assert counts(cache) == (4, 0)


def test_two_caches_on_one_folder(programs, folder):
    kernels = together(*[lambda: programs().kernel("write", "write", {"VALUE": 5})] * 2)
    assert [result(kernel) for kernel in kernels] == [5, 5]
    assert [file.suffix for file in folder.iterdir()] == [".bin"]
    cache = programs()
    assert result(cache.kernel("write", "write", {"VALUE": 5})) == 5
    assert counts(cache) == (0, 1)
