"""Layers on several hosts: the same bits as on one."""

import numpy as np
import pytest
from hosts import results_on_hosts
from layers import Layer

from marlin_cy.activations import ACTIVATIONS

HOSTS = 1, 2, 3, 4


def random_layer(rng):
    """A layer with tiles for four hosts: sizes, parts and groups vary."""
    group_size = int(rng.choice([32, 64, -1]))
    step = max(32, group_size)
    order = "common" if group_size > 0 and rng.integers(3) == 0 else "none"
    return Layer(
        rng,
        experts=int(rng.integers(1, 6)),
        hidden=step * -(-int(rng.integers(64, 200)) // step),
        inner=step * -(-int(rng.integers(64, 160)) // step),
        width=int(rng.integers(8, 20)) * 8 if rng.integers(3) == 0 else None,
        group_size=group_size,
        g_idx=order,
        activation=str(rng.choice(list(ACTIVATIONS))),
        bias=bool(rng.integers(2)),
        shared=int(rng.choice([64, 96, 128])) if rng.integers(2) and group_size <= 32 else None,
        gate=bool(rng.integers(2)),
        weigh_input=rng.integers(5) == 0,
    )


def check_bits(backend, rng, hosts, made=None):
    made = made or random_layer(rng)
    layer = made.on(backend, top_k=min(2, made.gate_up.num_experts))
    tokens = int(rng.choice([1, 2, 17]))
    dtype = rng.choice([np.float32, np.float16])
    x = rng.standard_normal((tokens, layer.hidden_size)).astype(dtype)
    logits = rng.standard_normal((tokens, layer.num_experts)).astype(np.float32)
    compute_dtype = str(rng.choice(["int8", "int16"]))
    expected = layer(backend.new_context(num_threads=1, compute_dtype=compute_dtype), x, logits)

    def run(group):
        ctx = backend.new_context(num_threads=1 + group.rank % 2, compute_dtype=compute_dtype)
        return group.layer(layer)(ctx, x, logits)

    for found in results_on_hosts(hosts, run):
        np.testing.assert_array_equal(found.view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("hosts", HOSTS)
def test_bits(cpu_backend, rng, hosts):
    for _ in range(5):
        check_bits(cpu_backend, rng, hosts)


def test_products_of_equal_sizes(cpu_backend, rng):
    made = Layer(rng, experts=2, hidden=64, inner=64, width=128, group_size=64)
    assert made.gate_up.k == made.down.k and made.gate_up.n == made.down.n
    check_bits(cpu_backend, rng, 2, made)


@pytest.mark.sweep
@pytest.mark.parametrize("hosts", HOSTS)
def test_bits_of_many_layers(cpu_backend, rng, hosts):
    for _ in range(100):
        check_bits(cpu_backend, rng, hosts)
