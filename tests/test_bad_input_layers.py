"""Wrong arguments of layers, of routing and of alignment."""

import numpy as np
import pytest
from asserts import assert_same_bits
from calls import INT64, E, K, only
from problems import random_problem, with_value

import marlin_cy
from marlin_cy.errors import UnsupportedError


class TestMoe:
    @pytest.mark.parametrize(
        ("changes", "exception", "message"),
        [
            ({"top_k": 0}, ValueError, "top_k: got 0, expected 1 to 3, the number of experts"),
            ({"top_k": E + 1}, ValueError, "top_k: got 4, expected 1 to 3"),
            ({"top_k": 2**70}, ValueError, "top_k: got a number of 71 bits"),
            ({"top_k": 1.0}, TypeError, "top_k: got 1.0, expected an int"),
            (
                {"activation": "relu"},
                UnsupportedError,
                "activation: got 'relu', expected one of silu, gelu, gelu_tanh,",
            ),
            ({"activation": None}, UnsupportedError, "activation: got None"),
            ({"activation": ["silu"]}, UnsupportedError, r"activation: got \['silu'\]"),
            ({"activation": np.array("silu")}, UnsupportedError, "activation: got array"),
            (
                {"apply_router_weight_on_input": True},
                ValueError,
                "apply_router_weight_on_input: got top_k 2, expected 1",
            ),
            ({"apply_router_weight_on_input": 1}, TypeError, "apply_router_weight_on_input: got 1, expected a bool"),
            (
                {"apply_router_weight_on_input": None},
                TypeError,
                "apply_router_weight_on_input: got None, expected a bool",
            ),
            ({"shared_expert": 3}, TypeError, "shared_expert: got int, expected a SharedExpert"),
            ({"num_groups": 2}, ValueError, "num_groups: got 2, expected a divisor of 3 experts"),
            ({"scoring": "tanh"}, ValueError, "scoring: got 'tanh', expected one of softmax"),
            ({"correction_bias": np.zeros(2)}, ValueError, r"correction_bias: got shape \(2,\), expected \(3,\)"),
            ({"gate_up": None}, TypeError, "gate_up: got NoneType, expected a MarlinExpertStack"),
            ({"down": 3}, TypeError, "down: got int, expected a MarlinExpertStack"),
        ],
    )
    def test_layer_refused(self, backend, rng, changes, exception, message):
        gate_up, down = random_problem(rng, E, K, 64, 32), random_problem(rng, E, 32, K, 32)
        right = {"gate_up": gate_up.stack(backend), "down": down.stack(backend), "top_k": 2}
        with pytest.raises(exception, match=message):
            marlin_cy.MoeLayer(**{**right, **changes})

    @pytest.mark.parametrize(
        ("changes", "exception", "message"),
        [
            ({"gate_up": None}, TypeError, "gate_up: got NoneType, expected a MarlinExpertStack"),
            ({"down": "down"}, TypeError, "down: got str, expected a MarlinExpertStack"),
            ({"gate_weight": np.zeros(K - 1)}, ValueError, r"gate_weight: got shape \(63,\), expected \(64,\)"),
            ({"gate_weight": np.zeros((1, K))}, ValueError, r"gate_weight: got shape \(1, 64\)"),
            ({"gate_weight": 0.0}, ValueError, r"gate_weight: got shape \(\)"),
            ({"gate_weight": [[0.0], [0.0, 1.0]]}, ValueError, "gate_weight: got list"),
            ({"gate_weight": np.zeros(K, np.int32)}, TypeError, "gate_weight: got dtype int32, expected float32"),
            ({"gate_weight": np.zeros(K, ">f4")}, TypeError, "gate_weight: got dtype >f4"),
            ({"gate_weight": np.zeros(K, object)}, TypeError, "gate_weight: got dtype object"),
            ({"gate_weight": "gate"}, TypeError, "gate_weight: got dtype <U4"),
            (
                {"gate_weight": with_value(np.zeros(K), 5, np.nan)},
                ValueError,
                r"gate_weight: got nan at \[5\], expected",
            ),
            (
                {"gate_weight": with_value(np.zeros(K), 9, 1e39)},
                ValueError,
                r"gate_weight: got 1e\+39 at \[9\], expected",
            ),
        ],
    )
    def test_shared_expert_refused(self, backend, rng, changes, exception, message):
        gate_up, down = random_problem(rng, 1, K, 64, 32), random_problem(rng, 1, 32, K, 32)
        right = {"gate_up": gate_up.stack(backend), "down": down.stack(backend), "gate_weight": np.zeros(K)}
        with pytest.raises(exception, match=f"^{message}"):
            marlin_cy.SharedExpert(**{**right, **changes})

    def test_shared_expert_that_does_not_fit(self, backend, rng):
        def stack(*sizes):
            return random_problem(rng, *sizes, 32).stack(backend)

        gate_up, down = stack(E, K, 64), stack(E, 32, K)
        with pytest.raises(ValueError, match="^gate_up: got 3 experts, expected 1"):
            marlin_cy.SharedExpert(gate_up, down)
        with pytest.raises(ValueError, match="^down: got 3 experts, expected 1, as in gate_up"):
            marlin_cy.SharedExpert(stack(1, K, 64), down)
        with pytest.raises(ValueError, match="^gate_up: got n_per_expert 64, expected 192, twice the k of down"):
            marlin_cy.SharedExpert(stack(1, K, 64), stack(1, 96, K))
        for k, width in ((K, 32), (32, K)):
            shared = marlin_cy.SharedExpert(stack(1, k, 64), stack(1, 32, width))
            with pytest.raises(ValueError, match=f"^shared_expert: got {k} -> {width}, expected 64 -> 64"):
                marlin_cy.MoeLayer(gate_up, down, top_k=1, shared_expert=shared)

    @only("layer", "routed")
    def test_stacks_of_another_backend(self, call, rng):
        """Stacks of a shared expert are checked too. An object of another class takes the place of its stack."""
        layer = call.call.__self__ if hasattr(call.call, "__self__") else call.call

        class Elsewhere:
            num_experts, k, n_per_expert = 1, K, 64

        class Down(Elsewhere):
            k, n_per_expert = 32, K

        shared = marlin_cy.SharedExpert(Elsewhere(), Down())
        other = marlin_cy.MoeLayer(layer.gate_up, layer.down, top_k=2, shared_expert=shared)
        right = call.call
        call.call = other if right is layer else other.forward_routed
        with pytest.raises(
            TypeError, match="^ctx: got an? .* context, but the layer's shared_expert.gate_up is a Elsew"
        ):
            call.make_call(call.args)
        call.guard.assert_untouched()
        call.call = right
        assert_same_bits(call.right(), call.expected)

    def test_stacks_that_do_not_fit(self, backend, rng):
        gate_up = random_problem(rng, E, K, 64, 32).stack(backend)
        with pytest.raises(ValueError, match="down: got 2 experts, expected 3, as in gate_up"):
            marlin_cy.MoeLayer(gate_up, random_problem(rng, 2, 32, K, 32).stack(backend), top_k=1)
        with pytest.raises(ValueError, match="gate_up: got n_per_expert 64, expected 128, twice the k of down"):
            marlin_cy.MoeLayer(gate_up, random_problem(rng, E, 64, K, 32).stack(backend), top_k=1)

    @pytest.mark.parametrize(
        ("changes", "exception", "message"),
        [
            ({"block_size": 0}, ValueError, "block_size: got 0, expected at least 1"),
            ({"block_size": -1}, ValueError, "block_size: got -1"),
            ({"block_size": 2.0}, TypeError, "block_size: got 2.0, expected an int"),
            ({"block_size": 2**70}, ValueError, "block_size: got a number of 71 bits"),
            ({"block_size": 2**31}, ValueError, r"topk_ids: got 8 slots, expected fewer than 2\*\*31"),
            ({"block_size": INT64.max}, ValueError, "topk_ids: got 8 slots, expected fewer"),
            ({"num_experts": 0}, ValueError, "num_experts: got 0, expected at least 1"),
            ({"num_experts": None}, TypeError, "num_experts: got None"),
            ({"num_experts": 2**31}, ValueError, "topk_ids: got 8 slots, expected fewer"),
            ({"topk_ids": np.full((4, 2), 3)}, IndexError, r"topk_ids\[0, 0\]: got 3, expected -1 to 2"),
            ({"topk_ids": np.full((4, 2), -2)}, IndexError, r"topk_ids\[0, 0\]: got -2"),
            ({"topk_ids": np.full((4, 2), 2**32)}, IndexError, r"topk_ids\[0, 0\]: got 4294967296"),
            ({"topk_ids": np.zeros(8, np.int32)}, ValueError, r"topk_ids: got shape \(8,\)"),
            ({"topk_ids": np.zeros((4, 2))}, TypeError, "topk_ids: got dtype float64"),
            ({"topk_ids": None}, TypeError, "topk_ids: got dtype object"),
            ({"topk_ids": [[0], [1, 2]]}, ValueError, "topk_ids: got list"),
            ({"expert_map": np.zeros(2, np.int32)}, ValueError, r"expert_map: got shape \(2,\), expected \(3,\)"),
            ({"expert_map": np.zeros(3)}, TypeError, "expert_map: got dtype float64, expected int32"),
            ({"expert_map": np.full(3, -2)}, IndexError, "expert_map: got -2 to -2, expected -1 or a local index"),
            ({"expert_map": np.full(3, 2**32)}, IndexError, "expert_map: got 4294967296"),
            ({"expert_map": 5}, ValueError, r"expert_map: got shape \(\)"),
        ],
    )
    def test_align_refused(self, changes, exception, message):
        right = {"topk_ids": np.zeros((4, 2), np.int32), "block_size": 4, "num_experts": 3}
        with pytest.raises(exception, match=message):
            marlin_cy.moe_align_block_size(**{**right, **changes})

    @pytest.mark.parametrize(
        ("logits", "exception", "message"),
        [
            (None, TypeError, "router_logits: got NoneType"),
            (np.zeros((2, E + 1), np.float32), ValueError, r"router_logits: got shape \(2, 4\), expected \[rows, 3\]"),
            (np.zeros((2, E)), TypeError, "router_logits: got dtype float64"),
        ],
    )
    @only("layer")
    def test_route_refused(self, call, logits, exception, message):
        if logits is not None:
            logits = call.backend.from_host(logits)
        with pytest.raises(exception, match=message):
            call.call.route(call.ctx, logits)
        with pytest.raises(TypeError, match="ctx: got NoneType, expected a Context"):
            call.call.route(None, call.backend.from_host(np.zeros((2, E), np.float32)))
