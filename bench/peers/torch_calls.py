"""PyTorch's products of the same shapes: dense bfloat16, and its own int4."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench.common.timing import Call

__all__ = ["GROUP_SIZES", "PEERS", "TorchPeers", "dense_linear", "int4_linear", "missing_int4", "pack_int4"]

PEERS = ("torch_bf16", "torch_int4")
GROUP_SIZES = (32, 64, 128, 256)  # that _weight_int4pack_mm_for_cpu accepts

Linear = Callable[[Any], Any]
"""A function from a tensor ``[rows, K]`` to a tensor ``[rows, N]``."""


def missing_int4(torch: Any) -> str | None:
    """Why this torch has no int4 product; None if it has one."""
    operators = ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu")
    if not all(hasattr(torch.ops.aten, name) for name in operators):
        return f"torch {torch.__version__} has no {operators[1]}"
    return None


def pack_int4(torch: Any, codes: Any) -> Any:
    """The weight argument of the int4 product, from int32 codes ``[N, K]`` in 0..15."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)


def int4_linear(torch: Any, packed: Any, scales_and_zeros: Any, group_size: int) -> Linear:
    """The function from bfloat16 ``[rows, K]`` to ``[rows, N]`` with the weight ``scale * (code - 8) + zero``.

    ``scales_and_zeros`` is bfloat16 ``[K/group_size, N, 2]``.
    """
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    return lambda x: multiply(x, packed, group_size, scales_and_zeros)


def dense_linear(torch: Any, weight: Any) -> Linear:
    """The function from ``[rows, K]`` to ``[rows, N]`` with the weight ``[N, K]``, all of one dtype."""
    linear = torch.nn.functional.linear
    return lambda x: linear(x, weight)


class TorchPeers:
    """The products that this installation of PyTorch has. Without torch there are none, and :attr:`missing` says why.

    Activations are bfloat16. Each expert is a call of its own, as PyTorch has no call for several experts. Each weight
    has several copies, as this library has several experts.

    Parameters
    ----------
    num_threads : int
    wanted : bool
        False: provide no products.

    Attributes
    ----------
    missing : dict of str to str
        The peers that cannot run, with the reason.
    """

    def __init__(self, num_threads: int, wanted: bool = True) -> None:
        self.torch: Any = None
        self.missing: dict[str, str] = {}
        if not wanted:
            self.missing = dict.fromkeys(PEERS, "left out")
            return
        try:
            import torch
        except ImportError as error:
            self.missing = dict.fromkeys(PEERS, f"torch cannot be imported: {error}")
            return
        self.torch = torch
        torch.set_num_threads(num_threads)
        torch.set_grad_enabled(False)
        torch.manual_seed(0)
        if missing := missing_int4(torch):
            self.missing["torch_int4"] = missing

    @property
    def names(self) -> list[str]:
        """The peers that can run."""
        return [name for name in PEERS if name not in self.missing]

    def report(self) -> dict[str, Any]:
        """The JSON object ``machine.torch``."""
        if self.torch is None:
            return {"version": None, "missing": self.missing}
        return {
            "version": self.torch.__version__,
            "cpu_capability": self.torch.backends.cpu.get_cpu_capability(),
            "mkldnn": self.torch.backends.mkldnn.is_available(),
            "threads": self.torch.get_num_threads(),
            "missing": self.missing,
        }

    @staticmethod
    def weight_bytes(name: str, k: int, n: int) -> int:
        """Bytes of one weight."""
        return 2 * k * n if name == "torch_bf16" else k * n * 54 // 100

    def linears(self, name: str, copies: int, k: int, n: int, group_size: int) -> list[Linear]:
        """``copies`` functions from bfloat16 ``[rows, k]`` to ``[rows, n]``, each with a weight of its own."""
        if name == "torch_bf16":
            return self._dense(copies, k, n)
        if group_size not in GROUP_SIZES:
            raise ValueError(f"group_size: got {group_size}, expected one of {GROUP_SIZES}")
        return self._int4(copies, k, n, group_size)

    def _dense(self, copies: int, k: int, n: int) -> list[Linear]:
        weight = self.torch.randn(n, k).mul_(0.02).bfloat16()
        return [dense_linear(self.torch, weight.clone()) for _ in range(copies)]

    def _int4(self, copies: int, k: int, n: int, group_size: int) -> list[Linear]:
        torch = self.torch
        packed = pack_int4(torch, torch.randint(0, 16, (n, k), dtype=torch.int32))
        scales_and_zeros = torch.rand(k // group_size, n, 2).mul_(0.02).bfloat16()
        return [int4_linear(torch, packed.clone(), scales_and_zeros.clone(), group_size) for _ in range(copies)]

    def activations(self, rows: int, k: int) -> Any:
        """Normal bfloat16 ``[rows, k]``."""
        return self.torch.randn(rows, k).bfloat16()

    def gemm_call(self, linears: Sequence[Linear], experts_per_call: int, rows: int, k: int) -> Call:
        """A call that multiplies ``rows`` rows by each of the next ``experts_per_call`` weights."""
        blocks = self.activations(experts_per_call * rows, k).split(rows)

        def call(i: int) -> None:
            first = i * experts_per_call
            for j, block in enumerate(blocks):
                linears[(first + j) % len(linears)](block)

        return call

    def layer_call(
        self,
        gate_up: Sequence[Linear],
        down: Sequence[Linear],
        rows_of_experts: Sequence[Mapping[int, int]],
        hidden: int,
        intermediate: int,
    ) -> Call:
        """A call of the products of routing i alone, for rows gathered beforehand.

        Routing, gathering, activation function and combination are excluded from PyTorch's time, which favours it.

        Parameters
        ----------
        gate_up, down : sequences of functions
        rows_of_experts : sequence of dict of int to int
            For each routing, the number of rows of every expert that it uses.
        hidden, intermediate : int
        """
        most = max(max(rows.values()) for rows in rows_of_experts)
        x, h = self.activations(most, hidden), self.activations(most, intermediate)
        plans = [
            [(gate_up[e % len(gate_up)], x[:m], down[e % len(down)], h[:m]) for e, m in rows.items()]
            for rows in rows_of_experts
        ]

        def call(i: int) -> None:
            for first, first_input, second, second_input in plans[i % len(plans)]:
                first(first_input)
                second(second_input)

        return call
