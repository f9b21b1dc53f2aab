"""Wrong arguments of loading: sizes, tensors, columns of a view; and objects that cannot be copied."""

import copy
import itertools
import pickle

import numpy as np
import pytest
from calls import EXTREMES, E, K, N
from problems import random_problem, with_value

from marlin_cy.errors import UnsupportedError


class TestViews:
    @pytest.mark.parametrize(
        ("changes", "exception", "message"),
        [
            ({"expert_offset": 4}, ValueError, "expert_offset: got 4, expected a multiple of n_tile, 8"),
            ({"expert_n": 12}, ValueError, "expert_n: got 12, expected a multiple of n_tile, 8"),
            ({"expert_offset": -8}, IndexError, "got columns -8 to 8, expected a part of 0 to 48"),
            ({"expert_offset": 40}, IndexError, "got columns 40 to 56, expected a part of 0 to 48"),
            ({"expert_n": 0}, IndexError, "got columns 0 to 0"),
            ({"expert_n": -8}, IndexError, "got columns 0 to -8"),
            ({"expert_n": 56}, IndexError, "got columns 0 to 56"),
            ({"expert_offset": 2**63 - 8}, IndexError, "got columns 9223372036854775800 to"),
            ({"expert_n": 2**63 - 8}, IndexError, "got columns 0 to 9223372036854775800"),
            ({"expert_offset": 2**70}, ValueError, "expert_offset: got a number of 71 bits"),
            ({"expert_n": 2**70}, ValueError, "expert_n: got a number of 71 bits"),
            ({"expert_offset": 8.0}, TypeError, "expert_offset: got 8.0, expected an int"),
            ({"expert_n": "8"}, TypeError, "expert_n: got '8', expected an int"),
            ({"expert_n": None}, TypeError, "expert_n: got None, expected an int"),
            ({"bias_host": np.zeros(15, np.float32)}, ValueError, r"bias: got shape \(15,\), expected \(16,\)"),
            ({"bias_host": np.zeros((1, 16), np.float32)}, ValueError, r"bias: got shape \(1, 16\)"),
            ({"bias_host": np.zeros(0, np.float32)}, ValueError, r"bias: got shape \(0,\)"),
            ({"bias_host": 0.0}, ValueError, r"bias: got shape \(\)"),
            ({"bias_host": np.zeros(16, np.int32)}, TypeError, "bias: got dtype int32, expected float32, float16 or"),
            ({"bias_host": np.zeros(16, ">f4")}, TypeError, "bias: got dtype >f4"),
            ({"bias_host": np.zeros(16, object)}, TypeError, "bias: got dtype object"),
            ({"bias_host": "bias"}, TypeError, "bias: got dtype <U4"),
            ({"bias_host": [[0.0], [0.0, 1.0]]}, ValueError, "bias: got list"),
        ],
    )
    def test_refused(self, backend, rng, changes, exception, message):
        stack = random_problem(rng, E, K, N, 32).stack(backend)
        with pytest.raises(exception, match=message):
            stack.make_expert_linear(**{"expert_offset": 0, "expert_n": N, **changes})

    def test_every_place(self, backend, rng):
        """Refused, or a view."""
        stack = random_problem(rng, E, K, N, 32).stack(backend)
        for offset, width in itertools.product([*range(-9, 60), *EXTREMES], repeat=2):
            right = offset % 8 == width % 8 == 0 and 0 <= offset < offset + width <= E * N
            if right:
                assert stack.make_expert_linear(offset, width).out_features == width
            else:
                with pytest.raises((ValueError, IndexError), match="expert_"):
                    stack.make_expert_linear(offset, width)


class TestLoading:
    """One line for each argument of ``load_gptq_stacked``; ``test_gptq_format.py`` has the rest."""

    @pytest.mark.parametrize(
        ("changes", "exception", "message"),
        [
            ({"bits": 3}, UnsupportedError, "bits: got 3, supported: 4, 8"),
            ({"bits": 8}, ValueError, "qweight of expert 0: got shape"),
            ({"bits": 4.0}, TypeError, "bits: got 4.0, expected an int"),
            ({"bits": True}, TypeError, "bits: got True, expected an int"),
            ({"bits": None}, TypeError, "bits: got None"),
            ({"group_size": 16}, UnsupportedError, "group_size: got 16, supported are 32, 64"),
            ({"group_size": 96}, UnsupportedError, "group_size: got 96"),
            ({"group_size": 0}, ValueError, "group_size: got 0"),
            ({"group_size": -128}, ValueError, "group_size: got -128"),
            ({"group_size": 2**70}, ValueError, "group_size: got a number of 71 bits"),
            ({"k": 48}, ValueError, "k: got 48, expected a positive multiple of 32"),
            ({"k": 96}, ValueError, r"qweight of expert 0: got shape \(8, 16\), expected int32 \(12, 16\)"),
            ({"k": 0}, ValueError, "k: got 0"),
            ({"k": 2**62}, ValueError, "qweight of expert 0: got shape"),
            ({"k": "64"}, TypeError, "k: got '64', expected an int"),
            ({"n_per_expert": 4}, ValueError, "n_per_expert: got 4, expected a positive multiple of 8"),
            ({"n_per_expert": 24}, ValueError, r"qweight of expert 0: got shape \(8, 16\), expected int32 \(8, 24\)"),
            ({"n_per_expert": None}, TypeError, "n_per_expert: got None, expected an int"),
            ({"checkpoint_format": "awq"}, ValueError, "checkpoint_format: got 'awq', expected one of gptq, gptq_v2"),
            ({"checkpoint_format": None}, ValueError, "checkpoint_format: got None"),
            ({"qweights": []}, ValueError, "qweights: got no experts|scales: got 3 entries"),
            ({"qweights": None}, TypeError, "qweights: got NoneType, expected a sequence"),
            ({"qweights": 5}, TypeError, "qweights: got int, expected a sequence"),
            ({"qweights": [None] * E}, TypeError, "qweight of expert 0: got dtype object"),
            ({"scales": None}, TypeError, "scales: got NoneType, expected a sequence"),
            ({"qzeros": iter([])}, TypeError, "qzeros: got list_iterator, expected a sequence"),
            ({"g_idx": 3}, TypeError, "g_idx: got int, expected a sequence"),
            ({"g_idx": []}, ValueError, "g_idx: got 0 entries, expected one per expert: 3"),
            ({"g_idx": [None, None]}, ValueError, "g_idx: got 2 entries"),
            ({"g_idx": np.zeros(K - 1, np.int32)}, ValueError, r"g_idx: got shape \(63,\)"),
            ({"g_idx": np.zeros((E, K - 1), np.int32)}, ValueError, r"g_idx of expert 0: got shape \(63,\)"),
            ({"g_idx": np.zeros((E, K, 1), np.int32)}, ValueError, "g_idx: got 3 dimensions"),
            ({"g_idx": np.full(K, 2, np.int32)}, IndexError, "g_idx of expert 0: got 2 at row 0, expected 0 to 1"),
            ({"g_idx": [None, None, np.full(K, -1, np.int32)]}, IndexError, "g_idx of expert 2: got -1 at row 0"),
            ({"g_idx": np.zeros(K)}, TypeError, "g_idx of expert 0: got dtype float64, expected int32"),
            ({"g_idx": np.zeros(K, np.int64)}, TypeError, "g_idx of expert 0: got dtype int64, expected int32"),
        ],
    )
    def test_refused(self, backend, rng, changes, exception, message):
        problem = random_problem(rng, E, K, N, 32)
        tensors = dict(zip(("qweights", "scales", "qzeros"), problem.tensors(), strict=True))
        with pytest.raises(exception, match=message):
            backend.load_gptq_stacked(**{**tensors, **problem.sizes(), **changes})

    @pytest.mark.parametrize("name", ["qweights", "scales", "qzeros"])
    def test_lengths_that_disagree(self, backend, rng, name):
        problem = random_problem(rng, E, K, N, 32)
        tensors = dict(zip(("qweights", "scales", "qzeros"), problem.tensors(), strict=True))
        tensors[name] = tensors[name][:-1]
        with pytest.raises(ValueError, match="entries, expected one per expert: [23], as in qweights"):
            backend.load_gptq_stacked(**tensors, **problem.sizes())

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_scales_that_are_not_finite(self, backend, rng, value):
        problem = random_problem(rng, E, K, N, 32)
        qweights, scales, qzeros = problem.tensors()
        scales[2] = with_value(scales[2], (1, 7), value)
        with pytest.raises(ValueError, match=r"scales of expert 2: got -?(nan|inf) at \[1, 7\], expected finite"):
            backend.load_gptq_stacked(qweights, scales, qzeros, **problem.sizes())

    @pytest.mark.parametrize(
        ("changes", "exception", "message"),
        [
            ({"bits": 2}, UnsupportedError, "bits: got 2"),
            ({"n": 12}, ValueError, "n: got 12"),
            ({"n": 2**70}, ValueError, "n: got a number of 71 bits"),
            ({"k": None}, TypeError, "k: got None, expected an int"),
            ({"bias": np.zeros(N - 1, np.float32)}, ValueError, r"bias: got shape \(15,\), expected \(16,\)"),
            ({"bias": np.zeros(N, np.int64)}, TypeError, "bias: got dtype int64"),
            ({"g_idx": np.full(K, 9, np.int32)}, IndexError, "g_idx: got 9 at row 0"),
        ],
    )
    def test_linear_refused(self, backend, rng, changes, exception, message):
        qweights, scales, qzeros = random_problem(rng, 1, K, N, 32).tensors()
        right = {"qweight": qweights[0], "scales": scales[0], "qzeros": qzeros[0]}
        with pytest.raises(exception, match=message):
            backend.load_gptq(**{**right, "bits": 4, "group_size": 32, "k": K, "n": N, **changes})


def test_store_of_another_size(device_backend, rng):
    stack = random_problem(rng, E, K, N, 32).stack(device_backend)
    with pytest.raises(ValueError, match=r"store: holds 3 experts of \[64, 16\], expected 4 of \[64, 16\]"):
        type(stack)(stack.store, 4, N, K)
    with pytest.raises(TypeError, match=r"store: got NoneType, expected \w+GptqStore"):
        type(stack)(None, 4, N, K)


def test_contexts_and_stores_cannot_be_pickled(device_backend, rng):
    """They hold addresses: a copy would point into the memory of the original."""
    stack = random_problem(rng, E, K, N, 32).stack(device_backend)
    for unique in (device_backend.new_context(), stack.store):
        for attempt in (pickle.dumps, copy.deepcopy):
            with pytest.raises(TypeError, match="pickl|__reduce__"):
                attempt(unique)
