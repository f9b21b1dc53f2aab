"""Random Mixture-of-Experts layers, with their expected results and error bounds."""

import numpy as np
from asserts import assert_close, product_bound, unit_roundoff
from problems import as_given, random_problem

import marlin_cy
from marlin_cy import reference
from marlin_cy.activations import ACTIVATIONS

FLOAT32 = unit_roundoff(np.float32)


class Layer:
    """A random layer, with its expected result.

    Parameters
    ----------
    experts, hidden, inner, width : int
        ``width`` is that of the output; by default that of a token.
    bias : bool
        Whether all stacks have biases.
    shared : int, optional
        Intermediate size of a shared expert.
    gate : bool
        Whether the shared expert has a gate.
    """

    def __init__(
        self,
        rng,
        *,
        experts=5,
        hidden=96,
        inner=64,
        width=None,
        group_size=32,
        g_idx="none",
        activation="silu",
        bias=False,
        weigh_input=False,
        shared=None,
        gate=False,
    ):
        def pair(count, inner, g_idx):
            first = 2 * inner if ACTIVATIONS[activation].gated else inner
            gate_up = random_problem(rng, count, hidden, first, group_size, g_idx=g_idx, bias=bias)
            return gate_up, random_problem(rng, count, inner, width or hidden, group_size, g_idx=g_idx, bias=bias)

        self.gate_up, self.down = pair(experts, inner, g_idx)
        # The shared expert has its own order of K.
        self.shared = None if shared is None else pair(1, shared, "none" if g_idx == "none" else "common")
        self.gate_weight = (rng.standard_normal(hidden) / 8).astype(np.float32) if gate else None
        self.activation, self.weigh_input = activation, weigh_input

    def on(self, backend, top_k=2, **options):
        shared = None
        if self.shared is not None:
            shared = marlin_cy.SharedExpert(*(part.stack(backend) for part in self.shared), self.gate_weight)
        return marlin_cy.MoeLayer(
            self.gate_up.stack(backend),
            self.down.stack(backend),
            top_k=1 if self.weigh_input else top_k,
            activation=self.activation,
            apply_router_weight_on_input=self.weigh_input,
            shared_expert=shared,
            **options,
        )

    def expected(self, x, ids, weights):
        x, shared = as_given(x), None
        if self.shared is not None:
            gate_up, down = self.shared
            shared = reference.shared_expert(
                x,
                gate_up.dense(0),
                down.dense(0),
                activation=self.activation,
                gate_up_bias=gate_up.bias,
                down_bias=down.bias,
                gate_weight=self.gate_weight,
            )
        return reference.moe_layer(
            x,
            self.gate_up.dense_all(),
            self.down.dense_all(),
            ids,
            weights,
            activation=self.activation,
            gate_up_bias=self.gate_up.bias,
            down_bias=self.down.bias,
            apply_router_weight_on_input=self.weigh_input,
            shared=shared,
        )

    def bound(self, backend, x, ids, weights, dtype=np.float32):
        """Bounds of the weighted outputs of experts. The weights' own error is at most 32 roundoffs.

        On a device, values between the products are float16 if ``x`` is.
        """
        between = np.float16 if backend.name != "cpu" and x.dtype == np.float16 else np.float32
        bound = np.zeros((len(x), self.down.n))
        for token, row in enumerate(as_given(x).astype(np.float64)):
            terms = []
            for expert, weight in zip(ids[token], np.abs(weights[token]), strict=True):
                if expert < 0:
                    continue
                on_input, after = (weight, 1) if self.weigh_input else (1, weight)
                output, error = self.expert_bound(backend, row, self.gate_up, self.down, expert, between, on_input)
                terms.append((after, 32 * FLOAT32 * after, output, error))
            if self.shared is not None:
                output, error = self.expert_bound(backend, row, *self.shared, 0, between)
                terms.append((*self.gate_bound(row), output, error))
            # And a sum of as many terms, rounded to the output's dtype.
            rounding = unit_roundoff(dtype) + len(terms) * FLOAT32
            for weight, off_weight, output, error in terms:
                bound[token] += weight * error + (off_weight + rounding * weight) * (output + error)
        return bound + 2.0**-24

    def gate_bound(self, x):
        """A shared expert's gate and its error bound: the slope of a sigmoid is at most a quarter."""
        if self.gate_weight is None:
            return 1, 0
        dot = np.abs(x) @ np.abs(self.gate_weight)
        return reference.sigmoid(x @ self.gate_weight), FLOAT32 * (8 + len(x) * dot / 4)

    def expert_bound(self, backend, x, gate_up, down, expert, between, weight=1):
        """The largest magnitude of one expert's output for ``weight * x``, and its error bound, ``[width]`` each.

        The bounds of both products, carried through the activation ``f(gate) * u``, where ``u`` is ``up``, or 1 more:
        slopes of ``f`` are below 1.2, and it is computed to 8 roundoffs of ``gate * u``.
        """
        w1, w2, x = gate_up.dense(expert), down.dense(expert), weight * x
        sums, off = x @ w1, product_bound(backend, x[None], w1, between)[0]
        if weight != 1:  # the weight has an error of 32 roundoffs, and its product with x may be rounded
            off = off + (32 * FLOAT32 + unit_roundoff(between)) * (np.abs(x) @ np.abs(w1))
        if gate_up.bias is not None:
            sums = sums + gate_up.bias[expert]
            off = off + FLOAT32 * (np.abs(sums) + off)
        if self.activation == "relu2":
            inner, off = np.maximum(sums, 0) ** 2, (2 * np.abs(sums) + off) * off + FLOAT32 * (np.abs(sums) + off) ** 2
        else:
            inner, off = self.gated_bound(*np.split(sums, 2), *np.split(off, 2))
        output = (inner + off) @ np.abs(w2)
        error = off @ np.abs(w2) + product_bound(backend, (inner + off)[None], w2, between)[0]
        if down.bias is not None:
            output = output + np.abs(down.bias[expert])
            error = error + FLOAT32 * (output + error)
        return output, error

    def gated_bound(self, gate, up, off_gate, off_up):
        """The largest magnitude of ``f(gate) * u``, and its error bound."""
        if self.activation == "swigluoai":
            gate, up = np.minimum(gate, 7), np.clip(up, -7, 7) + 1
            f = ACTIVATIONS["swigluoai"].reference(gate, 0)
        elif self.activation == "silu_clamp10":
            gate, up = np.minimum(gate, 10), np.clip(up, -10, 10)
            f = ACTIVATIONS["silu"].reference(gate, 1)
        else:
            f = ACTIVATIONS[self.activation].reference(gate, 1)
        f, up = np.abs(f), np.abs(up)
        off = 1.2 * off_gate * (up + off_up) + f * off_up + 8 * FLOAT32 * (np.abs(gate) + off_gate) * (up + off_up)
        return f * up, off


def check(backend, layer, x, ids, weights, result):
    bound = layer.bound(backend, x, ids, weights, result.dtype)
    assert_close(result, layer.expected(x, ids, weights), bound)
