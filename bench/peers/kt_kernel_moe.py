"""kt-kernel's experts (KTransformers) on CPUs. Only its extension is loaded: the package requires another torch.

It has several products of 4-bit weights, each a class of the extension:

============  =======================================================================================================
"RAWINT4"     symmetric codes, a bfloat16 scale per 32 values; 8-bit activations, with AVX512. A longer group is
              loaded as several groups of 32 with the same scale
"GPTQ_INT4"   symmetric codes and float32 scales, as in a GPTQ checkpoint. With AVX2: bfloat16 activations and
              float32 products. With AVX-VNNI: 8-bit activations
"AMXINT4"     one scale per column, which the extension computes from bfloat16 weights; 8-bit activations, with AMX
              or AVX512. It has no groups and is by far the least accurate
============  =======================================================================================================

Inputs and outputs are bfloat16. One thread more than requested spins during a call, and all threads spin for 50 ms
after it. If that extra thread has no CPU of its own, threads wait for time slices of the system's scheduler.

Source of the formats: KTransformers, ``kt-kernel/python/utils/amx.py`` and ``kt-kernel/operators``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import sys
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from bench.peers.forms import (
    columns_of,
    pack_rows,
    require_matching,
    require_plain,
    require_routing,
    require_symmetric,
)
from bench.peers.interface import Array, Experts, Peer
from marlin_cy import reference
from marlin_cy.errors import UnsupportedError
from marlin_cy.weights.canonical import CanonicalWeight, unpack_words

__all__ = ["KtAmxInt4", "KtGptqAvx2", "KtGptqAvxVnni", "KtRawInt4"]

PACKAGE = "kt_kernel"
MAX_TOKENS = 1024  # of one call; the extension allocates buffers of this size
RAW_GROUP = 32
AMX_MULTIPLE = 128  # of K
N_MULTIPLE = 32


@functools.cache
def _extension() -> Any:
    """The extension for this CPU. The package's own module chooses it, and imports nothing else.

    Raises
    ------
    ImportError
        It is not installed, or cannot be loaded.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ImportError(f"No module named {PACKAGE!r}")
    detect: Any = importlib.util.spec_from_file_location(
        "kt_kernel_cpu_detect", Path(spec.origin).parent / "_cpu_detect.py"
    )
    module = importlib.util.module_from_spec(detect)
    detect.loader.exec_module(module)
    return module.initialize()[0]


class _KtKernel(Peer):
    """Base of all four."""

    distribution = "kt-kernel"
    spin_seconds, extra_threads = 0.05, 1
    operator: str
    experts_multiple: int = 1  # the number of experts is rounded up to it; routings never select the added ones
    cpu_flag: str | None = None  # CPU flag that the operator needs beyond those of the extension

    @property
    def pool(self) -> Any:
        """The thread pool."""
        return self._pools[0]

    @functools.cached_property
    def _pools(self) -> list[Any]:
        """A list with the thread pool, which is made on first use. Emptying the list ends the pool."""
        extension = _extension()
        config = extension.WorkerPoolConfig()
        config.subpool_count, config.subpool_numa_map = 1, [0]
        config.subpool_thread_count = [self.num_threads]
        with _quiet():
            pools = [extension.CPUInfer(config)]
        weakref.finalize(self, _end, pools)
        return pools

    def available(self) -> str | None:
        if sys.platform != "linux":
            return "kt-kernel is for Linux"
        try:
            extension = _extension()
        except (ImportError, OSError, RuntimeError) as error:
            return f"kt-kernel cannot be loaded ({error}): pip install --no-deps kt-kernel"
        if not hasattr(extension.moe, self.operator):
            return f"kt-kernel {self.version} has no {self.operator} for this CPU ({extension.__cpu_variant__})"
        if self.cpu_flag is not None and self.cpu_flag not in _cpu_flags():
            return f"{self.operator} of kt-kernel needs a CPU with {self.cpu_flag}"
        return None

    def available_projection(self) -> str | None:
        return f"{self.name} has no operator for one projection"

    def available_moe(self) -> str | None:
        return self.available()

    def load_moe(self, gate_up: Sequence[CanonicalWeight], down: Sequence[CanonicalWeight]) -> Experts:
        require_matching(gate_up, down)
        for weight in (*gate_up, *down):
            self.require_form(weight)
        return _Experts(self, gate_up, down)

    def require_form(self, weight: CanonicalWeight) -> None:
        """Raise UnsupportedError for a weight that cannot be loaded."""
        require_plain(weight)
        require_symmetric(weight)
        if weight.n % N_MULTIPLE:
            raise UnsupportedError(f"weight: got N {weight.n}, expected a multiple of {N_MULTIPLE}")

    def configure(
        self,
        config: Any,
        gate: Sequence[CanonicalWeight],
        up: Sequence[CanonicalWeight],
        down: Sequence[CanonicalWeight],
    ) -> list[Any]:
        """Set the addresses of weights in a configuration. Returns the arrays, which must live until it is loaded."""
        held: list[Any] = []
        for name, weights in (("gate", gate), ("up", up), ("down", down)):
            codes, scales = zip(*(self.arrays(weight) for weight in weights), strict=True)
            held += [codes, scales]
            setattr(config, f"{name}_projs", [[array.ctypes.data for array in codes]])  # one list per NUMA node
            setattr(config, f"{name}_scales", [[array.ctypes.data for array in scales]])
        config.quant_config.bits, config.quant_config.zero_point = 4, False
        config.quant_config.group_size = self.group_size(gate[0])
        return held

    def group_size(self, weight: CanonicalWeight) -> int:
        """The group size of the scales that :meth:`arrays` returns."""
        return weight.group_size

    def arrays(self, weight: CanonicalWeight) -> tuple[Array, Array]:
        """Codes and scales, contiguous."""
        raise NotImplementedError


class KtRawInt4(_KtKernel):
    """ "RAWINT4": int8 activations, a scale every 32 values."""

    name, accuracy, operator = "kt_rawint4", "int8", "AMXInt4_KGroup_MOE"
    experts_multiple = 8  # other numbers of experts misalign the extension's buffers

    def require_form(self, weight: CanonicalWeight) -> None:
        super().require_form(weight)
        if weight.group_size % RAW_GROUP or weight.k % (2 * RAW_GROUP):
            raise UnsupportedError(
                f"weight: got K {weight.k}, group_size {weight.group_size}, expected multiples of {2 * RAW_GROUP}, "
                f"{RAW_GROUP}"
            )

    def group_size(self, weight: CanonicalWeight) -> int:
        return RAW_GROUP

    def arrays(self, weight: CanonicalWeight) -> tuple[Array, Array]:
        """uint8 ``[N, K / 2]``, low nibble first, and bfloat16 ``[N, K / 32]``."""
        codes = unpack_words(weight.words).T
        scales = np.repeat(weight.scale.astype(ml_dtypes.bfloat16), weight.group_size // RAW_GROUP, axis=0)
        return pack_rows(codes), np.ascontiguousarray(scales.T)


class KtGptqAvx2(_KtKernel):
    """ "GPTQ_INT4" with AVX2: bfloat16 activations, products in float32."""

    name, accuracy, operator = "kt_gptq_avx2", "bf16", "AVX2GPTQInt4_MOE"

    def arrays(self, weight: CanonicalWeight) -> tuple[Array, Array]:
        """int32 ``[K / 8, N]``, as in GPTQ, and float32 ``[K / group_size, N]``."""
        return np.ascontiguousarray(weight.words), np.ascontiguousarray(weight.scale, np.float32)


class KtGptqAvxVnni(KtGptqAvx2):
    """ "GPTQ_INT4" with AVX-VNNI: int8 activations."""

    name, accuracy, operator = "kt_gptq_avxvnni", "int8", "AVXVNNI256GPTQInt4Packed_MOE"
    cpu_flag = "avx_vnni"

    def require_form(self, weight: CanonicalWeight) -> None:
        super().require_form(weight)
        if weight.group_size % 32:
            raise UnsupportedError(f"weight: got group_size {weight.group_size}, expected a multiple of 32")


class KtAmxInt4(_KtKernel):
    """ "AMXINT4": int8 activations, weights that the extension quantises itself."""

    name, accuracy, operator = "kt_amxint4", "int8", "AMXInt4_MOE"

    def require_form(self, weight: CanonicalWeight) -> None:
        require_plain(weight)
        if weight.k % AMX_MULTIPLE or weight.n % N_MULTIPLE:
            raise UnsupportedError(
                f"weight: got K {weight.k}, N {weight.n}, expected multiples of {AMX_MULTIPLE}, {N_MULTIPLE}"
            )

    def configure(
        self,
        config: Any,
        gate: Sequence[CanonicalWeight],
        up: Sequence[CanonicalWeight],
        down: Sequence[CanonicalWeight],
    ) -> list[Any]:
        held: list[Any] = []
        for name, weights in (("gate", gate), ("up", up), ("down", down)):
            dense = np.empty((len(weights), weights[0].n, weights[0].k), ml_dtypes.bfloat16)
            for into, weight in zip(dense, weights, strict=True):
                into[:] = reference.dequantize_weight(weight).T
            held.append(dense)
            setattr(config, f"{name}_proj", dense.ctypes.data)
        return held

    def kept(self, weight: CanonicalWeight) -> npt.NDArray[np.float64]:
        """Codes -7 to 7 and one scale per column: values are rounded to 8 bits, then to the upper 4 of these bits."""
        dense = reference.dequantize_weight(weight).astype(ml_dtypes.bfloat16).astype(np.float32)
        scale = (np.abs(dense).max(axis=0) / 112.0).astype(np.float32)
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
        eight_bits = np.rint(dense * inverse).clip(-128, 127)
        upper = np.floor((np.abs(eight_bits) + 8) / 16) * 16
        kept: npt.NDArray[np.float64] = np.copysign(upper, eight_bits) * scale.astype(np.float64)
        return kept

    def rounding(self, weight: CanonicalWeight) -> float:
        """Half a step, which is 1/7 of a column's largest value, and half of 1/16 step for the rounding to 8 bits."""
        dense = reference.dequantize_weight(weight)
        off = np.abs(dense).max(axis=0) / 7 * (1 / 2 + 1 / 32)
        return float(np.linalg.norm(off) * weight.k**0.5 / np.linalg.norm(dense)) + 2.0**-9


class _Experts(Experts):
    """Has one object of the extension per top-k, on which the object depends."""

    def __init__(self, peer: _KtKernel, gate_up: Sequence[CanonicalWeight], down: Sequence[CanonicalWeight]) -> None:
        self._peer, self._gate_up, self._down = peer, gate_up, down
        self._objects: dict[int, Any] = {}

    def prepare(self, x: Array, topk_ids: Array, topk_weights: Array) -> Any:
        hidden, num_experts = self._down[0].n, len(self._down)
        x = np.array(x, ml_dtypes.bfloat16, order="C")
        ids = np.array(topk_ids, np.int64, order="C")
        weights = np.array(topk_weights, np.float32, order="C")
        require_routing(x, ids, weights, hidden, num_experts)
        if len(x) > MAX_TOKENS:
            raise ValueError(f"x: got {len(x)} tokens, expected at most {MAX_TOKENS} tokens")
        top_k = ids.shape[1]
        if top_k not in self._objects:
            self._objects[top_k] = self._make(top_k)
        count, out = np.array([len(x)], np.int32), np.empty_like(x)
        arrays = count, ids, weights, x, out
        addresses = [array.ctypes.data for array in arrays]
        return self._objects[top_k], (addresses[0], top_k, *addresses[1:], False), arrays

    def run(self, prepared: Any) -> Any:
        (operator, arguments, arrays), pool = prepared, self._peer.pool
        pool.submit(operator.forward_task(*arguments))
        pool.sync()
        return arrays[-1]

    def result(self, out: Any) -> Array:
        result: Array = out.astype(np.float32)
        return result

    def _make(self, top_k: int) -> Any:
        extension, pool = _extension(), self._peer.pool
        down, intermediate = self._down, self._down[0].k
        gate, up = (
            [columns_of(weight, columns) for weight in self._gate_up]
            for columns in (slice(intermediate), slice(intermediate, None))
        )
        no_mask = 0  # of experts on a GPU
        unused = -len(down) % self._peer.experts_multiple
        config = extension.moe.MOEConfig(len(down) + unused, top_k, down[0].n, intermediate, no_mask)
        config.pool, config.max_len = pool.backend_, MAX_TOKENS
        held = self._peer.configure(config, gate, up, down)
        experts = np.array([*range(len(down)), *[0] * unused], np.uint64)  # the expert whose weights each one gets
        with _quiet():
            operator = getattr(extension.moe, self._peer.operator)(config)
            pool.submit(operator.load_weights_task(experts.ctypes.data))
            pool.sync()
        del held
        return operator


def _cpu_flags() -> list[str]:
    """The CPU's flags, as the system names them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])


def _end(pools: list[Any]) -> None:
    """End the thread pools."""
    with _quiet():
        pools.clear()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Discard what is written to the standard output: the extension writes a line per pool and layer."""
    flush = ctypes.CDLL(None).fflush
    sys.stdout.flush()
    flush(None)
    kept = os.dup(1)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
