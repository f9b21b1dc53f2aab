"""The OpenCL devices, the selection of a device, and the messages if there is none."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

cl = pytest.importorskip("pyopencl", reason="PyOpenCL is not installed")

import marlin_cy  # noqa: E402
from marlin_cy.errors import BackendUnavailable  # noqa: E402
from marlin_cy.opencl import device as devices  # noqa: E402

TYPE = cl.device_type


def error(code, message="it is broken"):
    """The exception of PyOpenCL when a driver returns ``code``."""
    return cl.RuntimeError(cl._cl._ErrorRecord(msg=message, code=code, routine="clTest"))


class FakePlatform:
    def __init__(self, name, *its_devices, error=None):
        self.name, self.version, self.vendor, self._devices, self._error = name, "OpenCL 3.0", "V", its_devices, error
        for device in its_devices:
            device.platform = self

    def get_devices(self):
        if self._error:
            raise self._error
        return list(self._devices)


class FakeDevice:
    available = compiler_available = endian_little = True
    vendor, version, opencl_c_version, driver_version, extensions = "V", "OpenCL 1.2", "OpenCL C 1.2", "7", "cl_khr_icd"
    local_mem_size, max_mem_alloc_size, global_mem_size = 1 << 15, 1 << 30, 1 << 32
    mem_base_addr_align, max_work_group_size, max_compute_units = 1024, 256, 4

    def __init__(self, name, type=TYPE.GPU, **attributes):
        self.name, self.type = name, type
        self.__dict__.update(attributes)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    monkeypatch.delenv("MARLIN_CY_OPENCL_DEVICE", raising=False)
    monkeypatch.delenv("PYOPENCL_CTX", raising=False)


@pytest.fixture
def machine(monkeypatch):
    """A function that sets the platforms of the system; an exception is raised instead of returned."""

    def has(*platforms):
        def get_platforms():
            if isinstance(platforms[0], Exception):
                raise platforms[0]
            return list(platforms)

        monkeypatch.setattr(cl, "get_platforms", get_platforms)

    return has


@pytest.fixture
def workstation(machine):
    """Five devices on two platforms; the best has index 2."""
    machine(
        FakePlatform("Portable", FakeDevice("Processor One", TYPE.CPU), FakeDevice("Card Zero", TYPE.ACCELERATOR)),
        FakePlatform(
            "Acme Compute",
            FakeDevice("Card One"),
            FakeDevice("Card Two"),
            FakeDevice("Processor Two", TYPE.CPU | TYPE.DEFAULT),
        ),
    )


def chosen(wanted=None):
    return devices.choose_device(wanted).device.name


# The choice -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ([TYPE.CPU, TYPE.GPU], 1),
        ([TYPE.CPU, TYPE.ACCELERATOR, TYPE.GPU], 2),
        ([TYPE.CPU, TYPE.ACCELERATOR], 1),
        ([TYPE.CUSTOM, TYPE.CPU], 1),
        ([TYPE.CUSTOM], 0),
        ([TYPE.GPU | TYPE.DEFAULT, TYPE.GPU], 0),
        ([TYPE.CPU | TYPE.DEFAULT, TYPE.GPU], 1),
    ],
)
def test_ranking(machine, types, expected):
    machine(*(FakePlatform(f"P{i}", FakeDevice(f"D{i}", its)) for i, its in enumerate(types)))
    choice = devices.choose_device()
    assert choice.device.name == f"D{expected}"
    assert "first" in choice.reason


@pytest.mark.parametrize(
    ("attributes", "why"),
    [
        ({"available": False}, "is not available"),
        ({"compiler_available": False}, "has no compiler"),
        ({"endian_little": False}, "is big-endian"),
        ({"version": "OpenCL 1.1 old"}, "has OpenCL 1.1 old, and 1.2 is needed"),
    ],
)
def test_a_device_that_cannot_be_used_is_passed_over(machine, attributes, why):
    machine(FakePlatform("Acme", FakeDevice("Bad", **attributes), FakeDevice("Good", TYPE.CPU)))
    assert chosen() == "Good"
    with pytest.raises(BackendUnavailable, match=rf"Bad \(Acme\) {why}.*argument device=0"):
        devices.choose_device(0)
    machine(FakePlatform("Acme", FakeDevice("Bad", **attributes)))
    assert f"no OpenCL device that can be used: Bad (Acme) {why}; install" in devices.reason_unavailable()
    with pytest.raises(BackendUnavailable, match=why):
        devices.choose_device()


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (0, "Processor One"),
        (3, "Card Two"),
        ("3", "Card Two"),
        (" 1 ", "Card Zero"),
        ("card two", "Card Two"),
        ("PROCESSOR", "Processor One"),
        ("card", "Card One"),  # an accelerator comes earlier, a GPU is better
        ("acme", "Card One"),
        ("portable", "Card Zero"),
    ],
)
def test_choice_by_argument_and_by_variable(workstation, monkeypatch, wanted, expected):
    assert chosen(wanted) == expected
    assert repr(wanted) in devices.choose_device(wanted).reason
    monkeypatch.setenv("MARLIN_CY_OPENCL_DEVICE", str(wanted))
    assert chosen() == expected
    assert f"MARLIN_CY_OPENCL_DEVICE={wanted}" in devices.choose_device().reason


@pytest.mark.parametrize(
    ("wanted", "exception"),
    [(5, IndexError), (-1, IndexError), ("5", IndexError), ("-1", IndexError), ("abacus", ValueError)],
)
def test_no_such_device(workstation, monkeypatch, wanted, exception):
    listed = r"expected one of 0: Processor One \(Portable\), 1: .*, 4: Processor Two \(Acme Compute\)"
    with pytest.raises(
        exception, match=rf"^device: got {int(wanted) if exception is IndexError else repr(wanted)}, {listed}"
    ):
        devices.choose_device(wanted)
    monkeypatch.setenv("MARLIN_CY_OPENCL_DEVICE", str(wanted))
    with pytest.raises(exception, match=rf"^environment variable MARLIN_CY_OPENCL_DEVICE: got .*, {listed}"):
        devices.choose_device()


def test_text_without_any_letter_names_nothing(workstation):
    with pytest.raises(ValueError, match="device: got ' '"):
        devices.choose_device(" ")


@pytest.mark.parametrize("wanted", [True, 1.0, b"card", ["card"]])
def test_device_of_another_type(workstation, wanted):
    with pytest.raises(TypeError, match=r"device: got .*, expected pyopencl\.Device, int or str"):
        devices.choose_device(wanted)


def test_order_of_the_three_ways(workstation, monkeypatch):
    monkeypatch.setenv("PYOPENCL_CTX", "0:1")
    choice = devices.choose_device()
    assert (choice.device.name, choice.reason) == ("Card Zero", "environment variable PYOPENCL_CTX=0:1")
    monkeypatch.setenv("MARLIN_CY_OPENCL_DEVICE", "4")
    assert chosen() == "Processor Two"
    assert chosen("card two") == "Card Two"


@pytest.mark.parametrize(
    ("text", "expected"), [("acme", "Card One"), ("1:2", "Processor Two"), ("1:two", "Card Two"), ("", "Card One")]
)
def test_pyopencl_variable(workstation, monkeypatch, text, expected):
    monkeypatch.setenv("PYOPENCL_CTX", text)
    assert chosen() == expected


@pytest.mark.parametrize("text", ["abacus", "0:abacus", "1:0:3"])
def test_pyopencl_variable_that_names_nothing(workstation, monkeypatch, text):
    monkeypatch.setenv("PYOPENCL_CTX", text)
    with pytest.raises(ValueError, match=rf"PYOPENCL_CTX: got '{text}' \(.*expected one of 0: Processor One"):
        devices.choose_device()


# Contexts and queues of the caller's ------------------------------------------------------------


@pytest.fixture
def context():
    """On the first device there is."""
    return cl.Context([devices.list_devices()[0]])


def test_open_makes_a_context():
    opened = devices.open_device(0)
    assert opened.device == devices.list_devices()[0]
    assert opened.context.devices == [opened.device]
    assert opened.reason == "argument device=0"
    assert devices.open_device(opened.device).device == opened.device


def test_open_uses_what_it_is_given(context):
    opened = devices.open_device(context=context)
    assert opened.context is context
    assert opened.device == context.devices[0]
    assert devices.open_device(0, context).context is context
    queue = cl.CommandQueue(context)
    opened = devices.open_device(queue=queue, context=context, device=0)
    assert (opened.context, opened.device, opened.reason) == (context, queue.device, "the queue's device")


def test_open_refuses_contradictions(context):
    queue = cl.CommandQueue(context)
    with pytest.raises(ValueError, match="context: differs from the queue's context"):
        devices.open_device(context=cl.Context(context.devices), queue=queue)
    with pytest.raises(TypeError, match=r"context: got CommandQueue, expected pyopencl\.Context"):
        devices.open_device(context=queue)
    with pytest.raises(TypeError, match=r"queue: got Context, expected pyopencl\.CommandQueue"):
        devices.open_device(queue=context)


def test_open_refuses_a_device_of_another_context(context, monkeypatch):
    other = FakeDevice("Elsewhere")
    FakePlatform("Acme", other)
    monkeypatch.setattr(devices, "choose_device", lambda device: devices.Choice(other, "test"))
    with pytest.raises(ValueError, match=r"device: got Elsewhere \(Acme\), expected a device of the context: \S"):
        devices.open_device(3, context)
    with pytest.raises(ValueError, match="device: got 3, but the queue's is "):
        devices.open_device(3, queue=cl.CommandQueue(context))


def test_a_driver_that_makes_no_context(monkeypatch):
    def fails(devices):
        raise error(-6, "out of host memory")

    monkeypatch.setattr(cl, "Context", fails)
    with pytest.raises(BackendUnavailable, match=r"cannot make a context on .*out of host memory"):
        devices.open_device(0)


# Capabilities -----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", devices.list_devices(), ids=devices.describe)
def test_capabilities_of_what_is_here(device):
    has = devices.capabilities(device)
    assert has is devices.capabilities(device)
    assert (has.name, has.platform) == (device.name.strip(), device.platform.name.strip())
    assert has.is_cpu == bool(device.type & TYPE.CPU)
    assert has.fp16 == ("cl_khr_fp16" in device.extensions)
    assert has.version >= (1, 2)
    assert has.c_version >= (1, 2)
    assert 0 < has.max_allocation <= has.global_memory
    assert has.local_memory >= 1 << 14
    assert has.alignment & (has.alignment - 1) == 0
    assert has.alignment >= 4
    assert (has.compute_capability is None) == ("NVIDIA" not in has.platform)


@pytest.mark.parametrize(
    ("extensions", "expected"),
    [
        ("cl_khr_icd", (False, False, False, None)),
        ("cl_khr_fp16 cl_khr_fp64", (True, False, False, None)),
        ("cl_khr_subgroups", (False, True, False, None)),
        ("cl_khr_subgroup_shuffle", (False, False, False, None)),
        ("cl_khr_integer_dot_product", (False, False, True, None)),
        ("cl_nv_device_attribute_query", (False, False, False, (9, 0))),
    ],
)
def test_capabilities_from_extensions(extensions, expected):
    device = FakeDevice("Card", extensions=extensions, compute_capability_major_nv=9, compute_capability_minor_nv=0)
    FakePlatform("Acme", device)
    has = devices.capabilities(device)
    assert (has.fp16, has.sub_groups, has.integer_dot_product, has.compute_capability) == expected
    assert (has.type, has.version, has.c_version, has.alignment) == ("GPU", (1, 2), (1, 2), 128)
    assert has.features == frozenset()


def test_capabilities_from_features():
    class Entry:
        def __init__(self, name, version=0):
            self.name, self.version = name, version

    class Device(FakeDevice):
        version = "OpenCL 3.0 Acme"

        def get_info(self, query):
            return {
                cl.device_info.OPENCL_C_FEATURES: [
                    Entry("__opencl_c_subgroups"),
                    Entry("__opencl_c_integer_dot_product_input_4x8bit_packed"),
                ],
                cl.device_info.OPENCL_C_ALL_VERSIONS: [
                    Entry("OpenCL C", 1 << 22 | 2 << 12),
                    Entry("OpenCL C", 3 << 22),
                ],
            }[query]

    device = Device("Card")
    FakePlatform("Acme", device)
    has = devices.capabilities(device)
    assert (has.sub_groups, has.integer_dot_product, has.fp16) == (True, True, False)
    assert (has.version, has.c_version) == ((3, 0), (3, 0))
    assert has.device_atomics is None


def test_device_atomics():
    FakePlatform("Acme", device := FakeDevice("Card"))
    plain = devices.capabilities(device)
    order, scope = "__opencl_c_atomic_order_acq_rel", "__opencl_c_atomic_scope_device"
    for changes, expected in (
        ({}, None),
        ({"features": frozenset((order,))}, None),
        ({"features": frozenset((scope,))}, None),
        ({"features": frozenset((order, scope))}, "OpenCL C 3.0"),
        ({"compute_capability": (6, 1)}, None),
        ({"compute_capability": (6, 1), "features": frozenset((order, scope))}, "OpenCL C 3.0"),
        ({"compute_capability": (7, 0)}, "PTX"),
        ({"compute_capability": (9, 0), "features": frozenset((order, scope))}, "PTX"),
    ):
        assert dataclasses.replace(plain, **changes).device_atomics == expected


# Nothing to run on ------------------------------------------------------------------------------


def test_a_driver_that_fails_beside_one_that_works(machine):
    machine(FakePlatform("Broken", error=error(-6)), FakePlatform("Acme", FakeDevice("Card")))
    assert [(found.name, found.error and "it is broken" in found.error) for found in devices.list_platforms()] == [
        ("Broken", True),
        ("Acme", None),
    ]
    assert devices.reason_unavailable() is None
    assert chosen() == "Card"


def test_platforms_without_devices(machine):
    machine(FakePlatform("Broken", error=error(-6)), FakePlatform("Empty"))
    reason = devices.reason_unavailable()
    assert "platform 'Broken' fails (clTest failed: OUT_OF_HOST_MEMORY - it is broken)" in reason
    assert "platform 'Empty' has no devices" in reason
    with pytest.raises(BackendUnavailable, match=r"'opencl': no OpenCL device: .*pip install"):
        marlin_cy.get_backend("opencl")
    with pytest.raises(BackendUnavailable, match="no OpenCL device"):
        devices.choose_device(0)


def test_a_loader_that_fails(machine):
    machine(error(-6, "the loader fell over"))
    assert "the loader fell over" in devices.reason_unavailable()


def test_a_device_that_does_not_answer(machine):
    class Gone(FakeDevice):
        @property
        def available(self):
            raise error(-2, "device lost")

    machine(FakePlatform("Acme", Gone("Card"), FakeDevice("Processor", TYPE.CPU)))
    assert chosen() == "Processor"
    with pytest.raises(BackendUnavailable, match="does not answer .*device lost"):
        devices.choose_device(0)


def test_broken_drivers(tmp_path, monkeypatch):
    (tmp_path / "a.icd").write_text("libno-such-driver.so\n")
    (tmp_path / "b.icd").write_bytes(b"\xff\xfe")
    (tmp_path / "c.icd").write_text("libc.so.6\n")
    (tmp_path / "d.txt").write_text("libno-such-driver.so\n")
    monkeypatch.setenv("OCL_ICD_VENDORS", str(tmp_path))
    (missing, no_text) = devices.broken_drivers()
    assert missing[0] == str(tmp_path / "a.icd")
    assert "libno-such-driver.so" in missing[1]
    assert no_text[0] == str(tmp_path / "b.icd")
    monkeypatch.setenv("OCL_ICD_VENDORS", str(tmp_path / "none"))
    assert devices.broken_drivers() == []


def python(code, **variables):
    """The output of a new interpreter that runs ``code``, errors included."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | variables, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


SAY_WHY = """
import marlin_cy
try:
    marlin_cy.get_backend("opencl")
except marlin_cy.errors.BackendUnavailable as error:
    print(error)
    assert str(error) == f"backend 'opencl': {marlin_cy.available_backends()['opencl']}"
"""


def test_no_platform(tmp_path):
    # The loader in PyOpenCL's wheel goes on to the PoCL beside it, unless this names nothing at all.
    nothing = str(tmp_path / "nothing")
    said = python(SAY_WHY, OCL_ICD_VENDORS=nothing)
    assert f"no OpenCL platform: the loader finds no driver that works (OCL_ICD_VENDORS is {nothing}); install" in said
    assert "pip install 'marlin-cy[opencl]'" in said


def test_a_broken_driver_alone(tmp_path):
    driver = tmp_path / "acme.icd"
    driver.write_text("/nonsense/libacme.so\n")
    said = python(SAY_WHY, OCL_ICD_VENDORS=str(driver))
    assert "no OpenCL platform" in said
    assert f"{driver}: the driver cannot be loaded (/nonsense/libacme.so: " in said


def test_pyopencl_is_missing():
    said = python("import sys; sys.modules['pyopencl'] = None\n" + SAY_WHY)
    assert said == "backend 'opencl': PyOpenCL is not installed; pip install 'marlin-cy[opencl]'\n"


def test_pyopencl_is_broken(tmp_path):
    (tmp_path / "pyopencl.py").write_text("raise ImportError('libOpenCL.so.1: cannot open shared object file')")
    said = python(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + SAY_WHY)
    assert "PyOpenCL is installed but cannot be imported (libOpenCL.so.1: cannot open" in said


# The doctor -------------------------------------------------------------------------------------


def doctor(*arguments, **variables):
    """Exit code and output of the command, with the measurement of memory bandwidth replaced."""
    code = f"""
import sys
from marlin_cy import cli
from marlin_cy.cpu.measure import _bandwidth
_bandwidth.read_bandwidth = lambda num_threads: 10e9
sys.exit(cli.main(["doctor", *{arguments!r}]))
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "NO_COLOR")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment | variables, timeout=120
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_doctor_json(tmp_path):
    code, out = doctor("--json", MARLIN_CY_CACHE_DIR=str(tmp_path))
    assert code == 0
    found = json.loads(out)["opencl"]
    assert found.keys() == {"platforms", "broken_drivers", "chosen", "reason", "tier", "tiers", "decoder", "cache"}
    listed = [device for platform in found["platforms"] for device in platform["devices"]]
    assert [device["index"] for device in listed] == list(range(len(listed)))
    assert [device["name"] for device in listed] == [device.name.strip() for device in devices.list_devices()]
    assert listed[found["chosen"]]["unusable"] is None
    assert "there is no better type" in found["reason"]
    assert found["tier"] == next(tier["name"] for tier in found["tiers"] if tier["missing"] is None)
    assert found["cache"] == str(tmp_path / "opencl")


def test_doctor_tables(tmp_path):
    code, out = doctor(MARLIN_CY_OPENCL_DEVICE="0", MARLIN_CY_CACHE_DIR="")
    assert code == 0
    (first, *_) = devices.list_platforms()
    assert f"OpenCL platform {first.name}, {first.version}" in out
    # A long name may be wrapped in its column.
    assert "(chosen)" in out
    assert all(word in out for word in first.devices[0].name.split())
    assert "OpenCL device 0: environment variable MARLIN_CY_OPENCL_DEVICE=0." in out
    assert "Compiled OpenCL programs: not kept" in out
    assert "portable" in out


def test_doctor_on_a_variable_that_names_no_device():
    code, out = doctor("--json", MARLIN_CY_OPENCL_DEVICE="abacus")
    assert code == 1
    found = json.loads(out)
    assert (found["ok"], found["opencl"]["chosen"], found["opencl"]["tier"]) == (False, None, None)
    assert "MARLIN_CY_OPENCL_DEVICE: got 'abacus'" in found["opencl"]["reason"]
    assert "No OpenCL device: environment variable" in doctor(MARLIN_CY_OPENCL_DEVICE="abacus")[1]


def test_doctor_on_a_broken_driver(tmp_path):
    driver = tmp_path / "acme.icd"
    driver.write_text("/nonsense/libacme.so\n")
    code, out = doctor(OCL_ICD_VENDORS=str(driver))
    assert code == 0  # there is still the CPU
    assert f"OpenCL driver {driver} cannot be loaded: /nonsense/libacme.so" in out
    assert "no OpenCL platform" in out
