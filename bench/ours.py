"""This library behind the peers' interface: so that it is checked, fed and timed as they are.

Activations are float32 in and out, as most peers have them. Products of single experts are views of one stack.
"""

import numpy as np

from bench.peers.interface import Experts, Peer, Projection, RoutedProduct
from bench.shapes import stack_of
from marlin_cy import MoeLayer, get_backend
from marlin_cy.moe import moe_align_block_size

__all__ = ["OURS", "MarlinCyInt8", "MarlinCyInt16"]

BLOCK_SIZE = 16  # of the routing; an expert's blocks are joined, so it matters little


class _MarlinCy(Peer):
    """What the compute dtypes share.

    Parameters
    ----------
    num_threads : int
    isa : str, optional
        The best one here unless given.
    """

    distribution = "marlin-cy"

    def __init__(self, num_threads, isa=None):
        super().__init__(num_threads)
        self._backend = get_backend("cpu")
        self._context = self._backend.new_context(num_threads=num_threads, compute_dtype=self.accuracy, isa=isa)

    @property
    def version(self):
        import marlin_cy

        return marlin_cy.__version__

    def available(self):
        return None

    def load(self, weight):
        return self.load_all([weight])[0]

    def load_all(self, weights):
        stack = stack_of(self._backend, weights)
        return [_Product(self._context, stack, expert) for expert in range(len(weights))]

    def available_routed(self):
        return None

    def load_routed(self, weights):
        return _Routed(self._context, stack_of(self._backend, weights))

    def available_moe(self):
        return None

    def load_moe(self, gate_up, down):
        return _Layer(self._context, stack_of(self._backend, gate_up), stack_of(self._backend, down))


class MarlinCyInt16(_MarlinCy):
    """Activations rounded to 16 bits."""

    name = accuracy = "int16"


class MarlinCyInt8(_MarlinCy):
    """Activations rounded to 8 bits."""

    name = accuracy = "int8"


OURS = (MarlinCyInt16, MarlinCyInt8)
"""Both sides of this library; their names are the compute dtypes'."""


class _Product(Projection):
    def __init__(self, context, stack, expert):
        self._context, self._stack, self._expert = context, stack, expert

    def prepare(self, x):
        plan = np.array([[self._expert, 0, 0, len(x)]])
        return np.ascontiguousarray(x), plan, np.empty((len(x), self._stack.n_per_expert), np.float32)

    def run(self, prepared):
        x, plan, out = prepared
        self._stack.gemm_phase_batched(self._context, x, plan, out, self._stack.k)
        return out

    def result(self, out):
        return out


class _Routed(RoutedProduct):
    """``gemm_phase_vllm``, which gathers the rows itself; the slots are sorted by expert beforehand."""

    def __init__(self, context, stack):
        self._context, self._stack = context, stack

    def prepare(self, x, topk_ids):
        tokens, top_k = topk_ids.shape
        plan = moe_align_block_size(topk_ids, BLOCK_SIZE, self._stack.num_experts)
        out = np.empty((tokens, top_k, self._stack.n_per_expert), np.float32)
        return np.ascontiguousarray(x), plan, out, top_k

    def run(self, prepared):
        x, plan, out, top_k = prepared
        slots = out.reshape(-1, out.shape[2])
        self._stack.gemm_phase_vllm(self._context, x, *plan, slots, len(x), BLOCK_SIZE, top_k)
        return out

    def result(self, out):
        return out


class _Layer(Experts):
    def __init__(self, context, gate_up, down):
        self._context, self._gate_up, self._down = context, gate_up, down

    def prepare(self, x, topk_ids, topk_weights):
        layer = MoeLayer(self._gate_up, self._down, top_k=topk_ids.shape[1])
        return layer, np.ascontiguousarray(x), topk_ids, topk_weights, np.empty((len(x), layer.hidden_size), np.float32)

    def run(self, prepared):
        layer, x, ids, weights, out = prepared
        return layer.forward_routed(self._context, x, ids, weights, out=out)

    def result(self, out):
        return out
