"""The case by which the Rust original is checked: float32 scales, random zero points, groups of 32. By every route."""

import numpy as np
import pytest
from asserts import relative_error
from checkpoint_files import write_checkpoint
from safetensors.numpy import load_file, save_file

import marlin_cy
from marlin_cy import open_checkpoint, reference
from marlin_cy.checkpoints.packed_writer import write_packed
from marlin_cy.decoder.loading import Loader

BOUND = 1e-4
ROWS, EXPERTS, K, INTER, GROUP = 9, 3, 128, 64, 32
BLOCK, Q_PROJ = "model.layers.0.mlp", "model.layers.0.self_attn.q_proj"
SIZES = {"bits": 4, "group_size": GROUP, "checkpoint_format": "gptq"}


class Case:
    """A checkpoint's folder, its tensors, and its weights in float64."""

    def __init__(self, folder):
        self.folder = folder
        weights = write_checkpoint(
            folder, layers=1, num_experts=EXPERTS, hidden=K, inter=INTER, group_size=GROUP, seed=3
        )
        self.rng = np.random.default_rng(7)
        self.tensors = load_file(folder / "model.safetensors")
        for module in weights:
            scales = self.tensors[f"{module}.scales"].astype(np.float32)
            factor = self.rng.uniform(0.5, 2, scales.shape).astype(np.float32)
            self.tensors[f"{module}.scales"] = wide = scales * factor
            assert (wide.astype(np.float16) != wide).any()  # no 16-bit float holds these
            weights[module] = (
                weights[module] / np.repeat(scales, GROUP, 0) * np.repeat(wide.astype(np.float64), GROUP, 0)
            )
        save_file(self.tensors, folder / "model.safetensors")
        self.weights = weights
        self.x = self.rng.standard_normal((ROWS, K)).astype(np.float32)

    def up(self, expert):
        return f"{BLOCK}.experts.{expert}.up_proj"

    def parts(self, module):
        return tuple(self.tensors[f"{module}.{name}"] for name in ("qweight", "scales", "qzeros"))

    def stack(self, backend):
        """The stack of the experts' up projections."""
        parts = zip(*(self.parts(self.up(expert)) for expert in range(EXPERTS)), strict=True)
        return backend.load_gptq_stacked(*map(list, parts), k=K, n_per_expert=INTER, **SIZES)

    def products(self):
        """Of the up projections, float64 ``[EXPERTS, ROWS, INTER]``."""
        return np.stack([self.x.astype(np.float64) @ self.weights[self.up(expert)] for expert in range(EXPERTS)])

    def queries(self):
        """Of the queries' projection, float64 ``[ROWS, 32]``."""
        return self.x @ self.weights[Q_PROJ] + self.tensors[f"{Q_PROJ}.bias"].astype(np.float64)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("parity") / "model")


def run_linear(backend, ctx, case, linear):
    out = backend.empty((ROWS, linear.out_features), np.float32)
    linear.forward(ctx, backend.from_host(case.x), out, ROWS)
    return backend.to_host(out)


def by_load_gptq(backend, ctx, case):
    linears = (backend.load_gptq(*case.parts(case.up(expert)), k=K, n=INTER, **SIZES) for expert in range(EXPERTS))
    return np.stack([run_linear(backend, ctx, case, linear) for linear in linears]), case.products()


def by_make_expert_linear(backend, ctx, case):
    stack = case.stack(backend)
    linears = (stack.make_expert_linear(expert * INTER, INTER) for expert in range(EXPERTS))
    return np.stack([run_linear(backend, ctx, case, linear) for linear in linears]), case.products()


def by_batched_phase(backend, ctx, case):
    out = backend.empty((EXPERTS * ROWS, INTER), np.float32)
    dispatches = [(expert, 0, ROWS * expert, ROWS) for expert in range(EXPERTS)]
    case.stack(backend).gemm_phase_batched(ctx, backend.from_host(case.x), dispatches, out, K)
    return backend.to_host(out).reshape(EXPERTS, ROWS, INTER), case.products()


def by_vllm_phase(backend, ctx, case):
    ids = np.tile(np.arange(EXPERTS, dtype=np.int32), (ROWS, 1))
    out = backend.empty((EXPERTS * ROWS, INTER), np.float32)
    aligned = map(backend.from_host, marlin_cy.moe_align_block_size(ids, 8, EXPERTS))
    case.stack(backend).gemm_phase_vllm(ctx, backend.from_host(case.x), *aligned, out, ROWS, 8, EXPERTS)
    return backend.to_host(out).reshape(ROWS, EXPERTS, INTER).swapaxes(0, 1), case.products()


def linear_of(folder, backend, ctx, case):
    with open_checkpoint(folder, backend, num_threads=1) as checkpoint:
        return run_linear(backend, ctx, case, checkpoint.linear(Q_PROJ)), case.queries()


def by_checkpoint(backend, ctx, case):
    return linear_of(case.folder, backend, ctx, case)


def by_decoder_projection(backend, ctx, case):
    with open_checkpoint(case.folder, backend, num_threads=1) as checkpoint:
        linear = Loader(checkpoint).projection(Q_PROJ, K, 32, bias=True)
    return run_linear(backend, ctx, case, linear), case.queries()


def layer_of(folder, backend, ctx, case):
    ids = np.argsort(np.random.default_rng(2).random((ROWS, EXPERTS)), axis=1)[:, :2].astype(np.int32)
    routing = np.random.default_rng(3).random((ROWS, 2)).astype(np.float32)
    with open_checkpoint(folder, backend, num_threads=1) as checkpoint:
        out = checkpoint.moe_layer(0).forward_routed(ctx, backend.from_host(case.x), ids, routing)
    names = [f"{BLOCK}.experts.{expert}" for expert in range(EXPERTS)]
    gate_up = [np.concatenate([case.weights[f"{name}.{p}_proj"] for p in ("gate", "up")], axis=1) for name in names]
    down = [case.weights[f"{name}.down_proj"] for name in names]
    return backend.to_host(out), reference.moe_layer(case.x, np.stack(gate_up), np.stack(down), ids, routing)


def by_moe_layer(backend, ctx, case):
    return layer_of(case.folder, backend, ctx, case)


def by_packed_folder(backend, ctx, case):
    packed = case.folder.parent / f"packed-{backend.name}"
    if not packed.exists():
        with open_checkpoint(case.folder, num_threads=1) as checkpoint:
            write_packed(checkpoint, packed)
    assert relative_error(*linear_of(packed, backend, ctx, case)) <= BOUND
    return layer_of(packed, backend, ctx, case)


ROUTES = [
    by_load_gptq,
    by_make_expert_linear,
    by_batched_phase,
    by_vllm_phase,
    by_checkpoint,
    by_decoder_projection,
    by_moe_layer,
    by_packed_folder,
]


@pytest.mark.sampled(8)
@pytest.mark.parametrize("route", ROUTES)
def test_parity(device_backend, case, route):
    ctx = device_backend.new_context()
    found, expected = route(device_backend, ctx, case)
    assert found.shape == expected.shape
    assert relative_error(found, expected) <= BOUND
