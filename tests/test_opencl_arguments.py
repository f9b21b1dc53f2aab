"""The tables of kernel arguments against what the compiler reports, and launches by name."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

cl = pytest.importorskip("pyopencl", reason="PyOpenCL is not installed")

from opencl_devices import DEVICES, runtime_of  # noqa: E402

from marlin_cy.opencl.arguments import KERNELS, arguments_of, by_name, is_local, is_pointer, numpy_types  # noqa: E402
from marlin_cy.opencl.device import capabilities  # noqa: E402
from marlin_cy.opencl.launch import Launch  # noqa: E402
from marlin_cy.opencl.program import KERNELS as KERNEL_FOLDER  # noqa: E402
from marlin_cy.opencl.program import kernel_files, source  # noqa: E402

if not DEVICES:
    pytest.skip("no OpenCL device", allow_module_level=True)

# NVIDIA's compiler reports what it did.
pytestmark = pytest.mark.filterwarnings("ignore::pyopencl.CompilerWarning")

SCRIPT = Path(__file__).parents[1] / "tools" / "compile_kernels.py"
ELEMENTS = {
    "INPUT": "INPUT_TYPE",
    "OUTPUT": "OUTPUT_TYPE",
    "LOGIT": "LOGITS_TYPE",
    "PREPARED": "PREPARED_TYPE",
    "CACHE": "CACHE_TYPE",
    "WEIGHT": "WEIGHT_TYPE",
}
ELEMENT_TYPES = "float", "half", "ushort", "uchar", "char"
ADDRESS_SPACES = {
    cl.kernel_arg_address_qualifier.GLOBAL: "global ",
    cl.kernel_arg_address_qualifier.LOCAL: "local ",
    cl.kernel_arg_address_qualifier.CONSTANT: "constant ",
    cl.kernel_arg_address_qualifier.PRIVATE: "",
}


def compile_kernels():
    spec = importlib.util.spec_from_file_location("compile_kernels", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def signature_variants(file):
    """The macro sets that `tools/compile_kernels.py` compiles a file with, once for each table and element types.

    Sets that only change a kernel's body are left out.
    """
    found = {}
    for macros in compile_kernels().variants_of(file):
        key = tuple(
            macros.get(name)
            for name in (*ELEMENTS.values(), "PARTS", "ROUTED", "GATHER", "PREPARES", "ADDED", "ROUTES")
        )
        found.setdefault(key, macros)
    return list(found.values())


def declared(kind, macros):
    """A table's type, with the element type that the macros choose."""
    space, _, base = kind.rpartition(" ")
    name = base.rstrip("*")
    if name in ELEMENTS:
        code = macros.get(ELEMENTS[name], 0)
        base = "uint*" if (name, code) == ("PREPARED", 2) else f"{ELEMENT_TYPES[code]}*"
    return f"{space} {base}".strip()


def reported(kernel):
    """``{name: type}`` of a kernel's arguments, as the compiler reports them."""
    info, result = cl.kernel_arg_info, {}
    for position in range(kernel.num_args):
        space = ADDRESS_SPACES[kernel.get_arg_info(position, info.ADDRESS_QUALIFIER)]
        kind = re.sub(r"\b(const|restrict|volatile)\b|\s", "", kernel.get_arg_info(position, info.TYPE_NAME))
        result[kernel.get_arg_info(position, info.NAME)] = space + kind
    return result


def built(device, file, macros):
    """The kernels of a program that is compiled with information on arguments."""
    options = [f"-D{name}={value}" for name, value in macros.items()]
    if compile_kernels().has_device_atomics(file, macros):
        options.append("-cl-std=CL3.0")
    program = cl.Program(runtime_of(device).context, source(file))
    return program.build([*options, "-cl-kernel-arg-info"], devices=[device], cache_dir=False).all_kernels()


def builds(device, file, macros):
    """Whether a device's compiler takes a program at all."""
    has = capabilities(device)
    if file == "gemm_subgroup":
        return has.fp16 and has.sub_groups and (has.integer_dot_product or not macros.get("DOT"))
    if compile_kernels().has_device_atomics(file, macros):
        return has.device_atomics is not None
    return not macros.get("PTX")


@pytest.mark.parametrize("device", DEVICES, ids=[device.platform.name.strip() for device in DEVICES])
@pytest.mark.parametrize("file", kernel_files())
@pytest.mark.sampled(3)
def test_tables_are_what_the_compiler_reports(device, file):
    variants = [macros for macros in signature_variants(file) if builds(device, file, macros)]
    if not variants:
        pytest.skip(f"{file}.cl is for other devices; test_products_share_their_arguments reads it")
    for macros in variants:
        if compile_kernels().has_ptx(file):
            macros = {**macros, "NO_PTX": 1}
        for kernel in built(device, file, macros):
            table = arguments_of(kernel.function_name, macros)
            expected = {name: declared(kind, macros) for name, kind in table.items()}
            found = reported(kernel)
            assert list(found.items()) == list(expected.items()), f"{kernel.function_name} of {file}.cl, {macros}"


def test_products_share_their_arguments():
    """So what the compiler reports for one tier's gemm holds for all of them."""
    for file in kernel_files():
        if file.startswith("gemm_"):
            declarations = re.findall(r"__kernel\s+void\s+(\w+)\((.*?)\)", (KERNEL_FOLDER / f"{file}.cl").read_text())
            assert declarations == [("gemm", "GEMM_ARGS")]


def test_every_kernel_has_a_table_and_every_table_a_kernel():
    texts = [(KERNEL_FOLDER / f"{file}.cl").read_text() for file in kernel_files()]
    assert set(re.findall(r"__kernel\s+void\s+(\w+)\(", "".join(texts))) == set(KERNELS)


def test_types_for_pyopencl():
    table = {"a": "global float*", "b": "uint", "c": "ulong", "d": "local uint4*", "e": "float", "f": "int"}
    assert numpy_types(table) == [None, np.uint32, np.uint64, None, np.float32, np.int32]
    assert [name for name, kind in table.items() if is_pointer(kind)] == ["a", "d"]
    assert [name for name, kind in table.items() if is_local(kind)] == ["d"]


# Launches ---------------------------------------------------------------------------------------

SCALE = {"to": "global float*", "source": "global float*", "factor": "float", "room": "local float*", "shift": "uint"}
TEXT = """
__kernel void scale(__global float *to, __global const float *source, const float factor, __local float *room,
                    const uint shift)
{
    room[0] = source[get_global_id(0)] * factor;
    to[get_global_id(0)] = room[0] + shift;
}
"""


@pytest.fixture
def runtime():
    return runtime_of(DEVICES[0])


def scale_launch(runtime, *rest, **options):
    program = cl.Program(runtime.context, TEXT).build(devices=[runtime.device], cache_dir=False)
    return Launch(cl.Kernel(program, "scale"), SCALE, *rest, **options)


def read(runtime, buffer, count=4):
    result = np.empty(count, np.float32)
    cl.enqueue_copy(runtime.queue, result, buffer)
    return result.tolist()


def values(**given):
    """In the order of SCALE."""
    return tuple(given[name] for name in SCALE if name in given)


def test_a_launch_sets_what_changes(runtime):
    launch = scale_launch(runtime)
    inputs = [runtime.buffer(np.arange(4, dtype=np.float32) + i) for i in range(2)]
    outputs = [runtime.buffer(np.zeros(4, np.float32)) for _ in range(2)]
    for factor, shift, i, j in [(2.0, 1, 0, 0), (2.0, 1, 1, 1), (2.0, 3, 1, 0), (0.5, 3, 0, 1), (0.5, 3, 0, 1)]:
        arguments = values(room=4, shift=shift, source=inputs[i], to=outputs[j], factor=factor)
        launch(runtime.queue, (4,), (1,), arguments)
        assert read(runtime, outputs[j]) == [(x + i) * factor + shift for x in range(4)]


def test_numbers_are_set_when_they_change(monkeypatch):
    """A call with the numbers of the last sets its buffers alone, and what changes in every call."""
    kernel_calls = []

    class Recorder:
        function_name = "scale"

        def set_arg_types(self, types):
            self.types = types

        def set_arg(self, position, value):
            kernel_calls.append(position)

        def set_args(self, *values):
            kernel_calls.append("all")

    monkeypatch.setattr(cl, "enqueue_nd_range_kernel", lambda *arguments: None)
    launch = Launch(Recorder(), SCALE, {"source": "a buffer"}, changing=("shift",))
    arguments = {"to": "another buffer", "factor": 1.0, "room": 4}
    for shift in range(3):
        launch(None, (1,), (1,), values(**arguments, shift=np.uint32(shift)))
    launch(None, (1,), (1,), values(**{**arguments, "room": 8}, shift=np.uint32(3)))
    assert kernel_calls == ["all", 0, 4, 0, 4, "all"]
    # NULL is set once; a buffer in its place is set, and then in each call.
    launch = Launch(Recorder(), SCALE, {"source": "a buffer"})
    kernel_calls.clear()
    for to in (None, None, "another buffer", "another buffer", None):
        launch(None, (1,), (1,), values(to=to, factor=1.0, room=4, shift=1))
    assert kernel_calls == ["all", "all", 0, 0]
    launch(None, (1,), (1,), values(to=None, factor=1.0, room=8, shift=1))
    launch(None, (1,), (1,), values(to=None, factor=1.0, room=8, shift=1))
    assert kernel_calls == ["all", "all", 0, 0, "all"]


@pytest.mark.parametrize("count", [0, 3, 5])
def test_a_wrong_number_of_arguments(runtime, count):
    launch = scale_launch(runtime, {"source": None})
    with pytest.raises(TypeError, match=rf"arguments of scale: got {count}, expected 4: to, factor, room, shift$"):
        launch(runtime.queue, (1,), (1,), (None, 1.0, 4, 1, 1)[:count])


def test_values_by_name():
    """In any order; a name too many or one that is missing is an error."""
    scale_values = by_name(SCALE)
    assert scale_values(shift=1, room=2, factor=3, source=4, to=5) == (5, 4, 3, 2, 1)
    with pytest.raises(TypeError, match="'room'"):
        scale_values(shift=1, factor=3, source=4, to=5)
    with pytest.raises(TypeError, match="'offset'"):
        scale_values(shift=1, room=2, factor=3, source=4, to=5, offset=6)
