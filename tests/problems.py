"""Random problems in GPTQ form, with their dense weights."""

import threading
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from marlin_cy import reference
from marlin_cy.formats import gptq
from marlin_cy.weights.canonical import CanonicalWeight, pack_words
from marlin_cy.weights.code_types import CODE_TYPES
from marlin_cy.weights.scale_records import scale_record

DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
G_IDX_MODES = ("none", "common", "per_expert", "unequal")


@dataclass(frozen=True)
class Problem:
    """The weights of a stack.

    The attributes are those of ``CanonicalWeight``, with a leading axis of experts, and with codes ``q`` for words;
    ``g_idx`` is a list with one entry per expert.
    ``group_size`` may be -1; ``group`` is what it means. ``bias`` is float32 ``[num_experts, n]`` or None.
    """

    q: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None
    group_size: int
    g_idx: list
    checkpoint_format: str
    codes: str = "uint4"
    bias: np.ndarray | None = None
    minimum: np.ndarray | None = None
    block_scale: np.ndarray | None = None
    block_minimum: np.ndarray | None = None

    @property
    def num_experts(self):
        return self.q.shape[0]

    @property
    def k(self):
        return self.q.shape[1]

    @property
    def n(self):
        return self.q.shape[2]

    @property
    def group(self):
        return self.k if self.group_size == -1 else self.group_size

    @property
    def is_gptq(self):
        """Whether :meth:`tensors` describes the weights completely."""
        return self.codes == "uint4" and self.canonical(0).scales == "float16" and self.bias is None

    def tensors(self):
        """``(qweights, scales, qzeros)``, each a list with one entry per expert."""
        packed = [
            gptq.pack_gptq(*parts, checkpoint_format=self.checkpoint_format)
            for parts in zip(self.q, self.scale, self.zero, strict=True)
        ]
        return tuple(map(list, zip(*packed, strict=True)))

    def sizes(self):
        """Keyword arguments of ``load_gptq_stacked``."""
        return {
            "bits": 4,
            "group_size": self.group_size,
            "k": self.k,
            "n_per_expert": self.n,
            "checkpoint_format": self.checkpoint_format,
        }

    def stack(self, backend):
        if self.is_gptq:
            g_idx = None if all(entry is None for entry in self.g_idx) else self.g_idx
            return backend.load_gptq_stacked(*self.tensors(), g_idx, **self.sizes())
        builder = self.builder(backend)
        for expert in range(self.num_experts):
            builder.add(expert, 0, self.canonical(expert))
        return builder.finish(self.bias)

    def builder(self, backend):
        """An empty builder for these weights."""
        return backend.new_stack_builder(
            self.num_experts,
            self.k,
            self.n,
            group_size=self.group_size,
            g_idx=self.g_idx,
            codes=self.codes,
            scales=self.canonical(0).scales,
        )

    def linear(self, backend, bias=None):
        """The first expert as a layer of its own."""
        if not self.is_gptq:
            return self.stack(backend).make_expert_linear(0, self.n, bias)
        qweights, scales, qzeros = self.tensors()
        sizes = self.sizes()
        sizes["n"] = sizes.pop("n_per_expert")
        return backend.load_gptq(qweights[0], scales[0], qzeros[0], self.g_idx[0], bias, **sizes)

    def canonical(self, expert, columns=slice(None)):
        """An expert, or some of its columns, as ``CanonicalWeight``."""
        parts = {name: getattr(self, name) for name in PARTS}
        return CanonicalWeight(
            pack_words(self.q[expert][:, columns], CODE_TYPES[self.codes].bits),
            group_size=self.group,
            g_idx=self.g_idx[expert],
            codes=self.codes,
            **{name: None if part is None else part[expert][:, columns] for name, part in parts.items()},
        )

    def parts(self, expert):
        """``(q, scale, zero)`` of an expert."""
        return self.q[expert], self.scale[expert], None if self.zero is None else self.zero[expert]

    def dense(self, expert):
        """float64 ``[K, N]``."""
        return reference.dequantize_weight(self.canonical(expert))

    def terms(self, expert):
        """What rounding errors of a product go by, float64 ``[K, N]``: magnitudes of weights.

        Where weights have minima, the two terms of a weight are rounded by themselves.
        """
        weight, w = self.canonical(expert), np.abs(self.dense(expert))
        _, minimum = reference.float_scales(weight)
        if minimum is None:
            return w
        return w + 2 * np.abs(minimum.astype(np.float64)).repeat(self.group, axis=0)[: self.k]

    def part(self, experts):
        """The same for some of the experts, a slice."""
        parts = {name: getattr(self, name) for name in ("q", "g_idx", "bias", *PARTS)}
        return replace(self, **{name: None if part is None else part[experts] for name, part in parts.items()})

    def dense_all(self):
        """One of these an expert."""
        return [self.dense(expert) for expert in range(self.num_experts)]

    def reference(self, expert, x, compute_dtype="int16"):
        """The CPU's result for float32 ``x``, to the last bit."""
        product = reference.gemm_weight(x, self.canonical(expert), compute_dtype)
        return product if self.bias is None else product + self.bias[expert]


PARTS = ("scale", "zero", "minimum", "block_scale", "block_minimum")

# The kinds of weights that the contract tests run on every backend: keyword arguments of random_problem, by name.
WEIGHT_KINDS = {
    f"{codes}-{scales}": {"codes": codes, "scales": scales}
    for codes in ("uint4", "e2m1")
    for scales in ("float16", "bfloat16")
}

# The kinds that need no blocks of 256 rows, so that they have the same sizes.
CPU_KINDS = WEIGHT_KINDS | {
    f"{codes}-{scales}": {"codes": codes, "scales": scales}
    for codes, scales in [
        ("uint4", "float32"),
        ("uint4", "float16_min"),
        ("uint4", "float32_min"),
        ("iq4_nl", "float16"),
        ("uint8", "float16"),
        ("uint8", "float32"),
        ("uint8", "float32_min"),
    ]
}

# The kinds with two levels, which need a K that is a multiple of 256.
TWO_LEVEL_KINDS = {
    f"{codes}-{scales}": {"codes": codes, "scales": scales}
    for codes, scales in [
        ("uint4", "two_level"),
        ("uint4", "two_level_min"),
        ("e2m1", "two_level"),
        ("iq4_nl", "two_level"),
        ("uint8", "two_level"),
        ("uint8", "two_level_min"),
    ]
}


def random_problem(
    rng,
    num_experts,
    k,
    n,
    group_size,
    *,
    g_idx="none",
    checkpoint_format="gptq",
    sym=False,
    codes="uint4",
    scales="float16",
    bias=False,
):
    """Weights of every code and every zero point that the format can hold, with scales of either sign.

    Unless ``sym``, where all of them are, about a third of the groups of 16 columns have zero points of 8.
    """
    group = k if group_size == -1 else group_size
    groups = -(-k // group)
    low = gptq.ZERO_OFFSETS[checkpoint_format]
    row, record = CODE_TYPES[codes], scale_record(scales)
    shape = (num_experts, groups, n)

    def zeros():
        if not record.has_zero_points(row):
            return None
        if sym:
            return np.full(shape, row.symmetric_zero, row.zero_dtype)
        zero = rng.integers(low, low + 2**row.bits, shape).astype(row.zero_dtype)
        # Kernels may have a separate path for a group of a tile of 16 columns that is symmetric.
        symmetric = rng.random((num_experts, groups, -(-n // 16))) < 0.3
        zero[symmetric.repeat(16, axis=2)[:, :, :n]] = row.symmetric_zero
        return zero

    def floats(dtype, shape):
        return (rng.uniform(0.5, 2, shape) * rng.choice([1, 1, 1, -1], shape) / 64).astype(dtype)

    def values(dtype):
        if dtype.kind == "f" or dtype == DTYPES["bfloat16"]:
            return floats(dtype, shape)
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max + 1, shape).astype(dtype)

    blocks = {name: floats(dtype, (num_experts, k // 256, n)) for name, dtype in record.block_parts().items()}
    return Problem(
        q=rng.integers(0, 2**row.bits, (num_experts, k, n)).astype(np.uint8),
        scale=values(record.scale),
        minimum=values(record.scale) if record.has_minimum else None,
        **blocks,
        zero=zeros(),
        group_size=group_size,
        g_idx=random_g_idx(rng, num_experts, k, group, g_idx),
        checkpoint_format=checkpoint_format,
        codes=codes,
        bias=rng.standard_normal((num_experts, n)).astype(np.float32) if bias else None,
    )


def random_g_idx(rng, num_experts, k, group, mode):
    """none; common: one shuffle for all; per_expert: each its own; unequal: groups of any length, some empty."""
    groups = -(-k // group)
    in_order = np.arange(k, dtype=np.int32) // group
    if mode == "none":
        return [None] * num_experts
    if mode == "common":
        return [rng.permutation(in_order)] * num_experts
    if mode == "per_expert":  # one of them in K's own order
        return [None if expert == 1 else rng.permutation(in_order) for expert in range(num_experts)]
    return [rng.integers(0, groups, k).astype(np.int32) for _ in range(num_experts)]


def add_in_parts(builder, problem, rng):
    """Fill a builder for 120 columns by cuts at multiples of 8, in any order, from several threads."""
    cuts = [0, 8, 24, 64, 72, 120]
    parts = [(e, a, b) for e in range(problem.num_experts) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    parts = [parts[i] for i in rng.permutation(len(parts))]

    def add(share):
        for expert, begin, end in share:
            builder.add(expert, begin, problem.canonical(expert, slice(begin, end)))

    workers = [threading.Thread(target=add, args=(parts[i::4],)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def activations(rng, m, k, dtype=np.float32):
    """Normal, with each row at its own magnitude."""
    return (rng.standard_normal((m, k)) * 2.0 ** rng.integers(-4, 5, (m, 1))).astype(dtype)


def as_given(x):
    """Activations as the kernels see them, float32."""
    return np.asarray(x).astype(np.float32)


def with_value(values, index, value):
    """A copy of an array with one element replaced."""
    values = values.copy()
    values[index] = value
    return values
