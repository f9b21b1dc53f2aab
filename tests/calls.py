"""A valid call of every method that runs weights. Tests change its arguments or make it fail."""

from copy import copy as copy_of

import numpy as np
import pytest
from asserts import GuardedArray, assert_same_bits
from conftest import DEVICE_LABELS
from problems import activations, random_problem

import marlin_cy

K, N, E, ROWS = 64, 16, 3, 6
INT32, INT64 = np.iinfo(np.int32), np.iinfo(np.int64)
EXTREMES = [0, 1, 2, ROWS, ROWS + 1, -1, INT32.max, INT32.max + 1, INT32.min, INT64.max, INT64.min, 2**64, -(2**70)]


class Memory:
    """Arrays in a backend's memory. For a device, each array is copied with the memory around it.

    A call waits for the events of an array, and leaves its own there. They are those of the copy: on Mesa 22.3,
    clFinish may return before all commands have ended. Arrays that share memory on the host also share it on the
    device.
    """

    def __init__(self, backend):
        self._backend, self._copies = backend, {}

    def buffer(self, array):
        """The array itself, or a device array of the same shape, strides and place in its memory."""
        if self._backend.name == "cpu":
            return array
        from pyopencl.array import Array

        root = array
        while isinstance(root.base, np.ndarray):
            root = root.base
        if id(root) not in self._copies:
            self._copies[id(root)] = root, self._backend.from_host(raw_bytes(root))
        copy = self._copies[id(root)][1]
        offset = array.__array_interface__["data"][0] - root.__array_interface__["data"][0]
        place = {"data": copy.base_data, "offset": offset, "strides": array.strides}
        return Array(copy.queue, array.shape, array.dtype, **place, events=copy.events)

    def fetch(self, ctx):
        """Copy the arrays on the device back to the arrays on the host."""
        if self._copies:
            ctx.finish()
        for root, copy in self._copies.values():
            raw_bytes(root)[:] = self._backend.to_host(copy)


def raw_bytes(array):
    """The bytes of an array that is contiguous in any order of its axes."""
    return array.ravel(order="K").view(np.uint8)


def new_context(backend):
    """A context, on the CPU of one thread."""
    return backend.new_context(num_threads=1) if backend.name == "cpu" else backend.new_context()


class Call:
    """A valid call of one method, as keyword arguments that a test may change, with a guarded output.

    Arguments are NumPy arrays. Those in ``buffers`` (``inputs``, ``output``, ``others``) are converted to the
    backend's buffers, except objects of a subclass of ``ndarray``.

    ``made`` is that of an earlier call of this class on this backend: packed weights, arguments and result, which take
    most of the time of a test. The new call has copies of the arguments, and a context of its own.
    """

    others = ()

    def __init__(self, backend, rng, made=None):
        self.backend, self.ctx = backend, new_context(backend)
        self.buffers = {*self.inputs, self.output, *self.others}
        if made is None:
            self.args = {**self.make(backend, rng), "ctx": self.ctx}
            made = self.call, self.args, self.right().copy()
        self.made = made
        self.call, args, self.expected = made
        self.args = {**{name: copy_of(value) for name, value in args.items() if name != "ctx"}, "ctx": self.ctx}
        self.args[self.output] = self.guarded()

    def guarded(self):
        self.guard = GuardedArray((ROWS, self.width), np.float32)
        return self.guard.array

    def right(self):
        out = GuardedArray((ROWS, self.width), np.float32)
        self.make_call({**self.args, self.output: out.array})
        out.assert_guards()
        return out.array

    def make_call(self, args):
        """Call with arrays in the backend's memory, and copy the results back."""
        memory = Memory(self.backend)
        try:
            self.call(
                **{
                    name: memory.buffer(value) if name in self.buffers and type(value) is np.ndarray else value
                    for name, value in args.items()
                }
            )
        finally:
            memory.fetch(self.ctx)

    def refused(self, changes, exception, message):
        """Make the call with some arguments changed; check the exception, and that nothing else has changed."""
        right = dict(self.args)
        copies = {name: value.copy() for name, value in right.items() if isinstance(value, np.ndarray)}
        wrong = changes(right) if callable(changes) else changes
        with pytest.raises(exception, match=message):
            self.make_call({**right, **wrong})
        self.guard.assert_untouched()
        for name, copy in copies.items():
            assert_same_bits(right[name], copy)
        assert_same_bits(self.right(), self.expected)


class Batched(Call):
    inputs, output, width = ["input"], "output", N

    def make(self, backend, rng):
        self.call = random_problem(rng, E, K, N, 32).stack(backend).gemm_phase_batched
        dispatches = [(2, 0, 3, 3), (0, 3, 0, 3)]
        return {"input": activations(rng, ROWS, K), "dispatches": dispatches, "output": self.guarded(), "k": K}


class Vllm(Call):
    inputs, output, width = ["input"], "output", N
    others = "sorted_token_ids", "expert_ids"

    def make(self, backend, rng):
        self.call = random_problem(rng, E, K, N, 32).stack(backend).gemm_phase_vllm
        ids = np.array([[0, 1], [2, 0], [2, 1]])
        sorted_ids, expert_ids, past = marlin_cy.moe_align_block_size(ids, 4, E)
        return {
            "input": activations(rng, ROWS, K),
            "sorted_token_ids": sorted_ids,
            "expert_ids": expert_ids,
            "num_tokens_past_padded": past,
            "output": self.guarded(),
            "prob_m": 3,
            "moe_block_size": 4,
            "top_k": 2,
        }


class View(Call):
    inputs, output, width = ["input"], "out", N

    def make(self, backend, rng):
        self.call = random_problem(rng, E, K, N, 32).stack(backend).make_expert_linear(N, N).forward
        return {"input": activations(rng, ROWS, K), "out": self.guarded(), "m": ROWS}


class Layer(Call):
    inputs, output, width = ["hidden_states", "router_logits"], "out", K

    def make(self, backend, rng):
        gate_up, down = random_problem(rng, E, K, 64, 32), random_problem(rng, E, 32, K, 32)
        self.call = marlin_cy.MoeLayer(gate_up.stack(backend), down.stack(backend), top_k=2)
        logits = rng.standard_normal((ROWS, E)).astype(np.float32)
        return {"hidden_states": activations(rng, ROWS, K), "router_logits": logits, "out": self.guarded()}


class RoutedBlocks(Layer):
    inputs = ["hidden_states"]

    def make(self, backend, rng):
        args = super().make(backend, rng)
        self.call = self.call.forward_routed
        del args["router_logits"]
        ids, weights = rng.integers(-1, E, (ROWS, 2)).astype(np.int32), np.ones((ROWS, 2), np.float32)
        return {**args, "topk_ids": ids, "topk_weights": weights}


class Weighed(RoutedBlocks):
    """With the router's weights on the input, a bias everywhere and a shared expert."""

    def make(self, backend, rng):
        def pair(experts, inner):
            gate_up = random_problem(rng, experts, K, 2 * inner, 32, bias=True).stack(backend)
            return gate_up, random_problem(rng, experts, inner, K, 32, bias=True).stack(backend)

        args = super().make(backend, rng)
        shared = marlin_cy.SharedExpert(*pair(1, 64), rng.standard_normal(K))
        self.call = marlin_cy.MoeLayer(
            *pair(E, 32), top_k=1, shared_expert=shared, apply_router_weight_on_input=True
        ).forward_routed
        return {**args, "topk_ids": args["topk_ids"][:, :1].copy(), "topk_weights": np.ones((ROWS, 1), np.float32)}


CALLS = {"batched": Batched, "vllm": Vllm, "view": View, "layer": Layer, "routed": RoutedBlocks, "weighed": Weighed}


def table(lines):
    """Parameters ``(call, *values)`` of a test: each line on each backend, or on the CPU only if the id says so.

    Parameters
    ----------
    lines : iterable of (str, str, tuple)
        A name in CALLS, an id, and the test's other parameters. An id that begins with "host" marks a case that
        only arrays on the host can have.
    """
    return [
        pytest.param((label, call), *values, id=f"{label}-{call}-{name}")
        for call, name, values in lines
        for label in DEVICE_LABELS
        if label == "cpu" or not name.startswith("host")
    ]


every_call = pytest.mark.parametrize("call", table((call, "call", ()) for call in CALLS), indirect=True)


def only(*names):
    """One of some calls, on each backend."""
    return pytest.mark.parametrize("call", table((call, "call", ()) for call in names), indirect=True)
