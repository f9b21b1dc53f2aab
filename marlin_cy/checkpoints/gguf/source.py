"""The quantised linear layers of a GGUF model: checked, and packed for a backend on demand."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cy.checkpoints.argument_errors import as_checkpoint_error
from marlin_cy.checkpoints.builders import new_builder
from marlin_cy.checkpoints.calls import ForEach
from marlin_cy.checkpoints.families import Family, MoeSpec
from marlin_cy.checkpoints.gguf.blocks import BLOCK_TYPES, BlockType, StoredBlocks, one_level
from marlin_cy.checkpoints.gguf.tensors import GgufTensors
from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.interface import Backend, Linear, MarlinExpertStack, StackBuilder
from marlin_cy.weights.canonical import CanonicalWeight
from marlin_cy.weights.widening import StackKind

__all__ = ["GgufSource"]

WEIGHT, BIAS = ".weight", ".bias"

PART_COLUMNS = 512
"""Columns of a linear layer that one thread packs at a time: some milliseconds."""


class GgufSource:
    """The quantised linear layers of a GGUF model.

    It has the methods of :class:`~marlin_cy.checkpoints.quantised.QuantizedSource`, which documents them.

    Parameters
    ----------
    tensors : GgufTensors
    family : Family
    spec : MoeSpec
    for_each : callable
        ``for_each(work, count, description)`` calls ``work(i)`` for each ``i`` below ``count``, in parallel.
    """

    format = "gguf"
    act_order = False

    def __init__(self, tensors: GgufTensors, family: Family, spec: MoeSpec, for_each: ForEach) -> None:
        self._tensors, self._family, self._spec, self._for_each = tensors, family, spec, for_each
        self._blocks: set[str] = set()

    # Contents ----------------------------------------------------------------------------------

    @property
    def codes(self) -> str:
        """The code type that most bytes of the quantised weights have."""
        sizes: dict[str, int] = {}
        for name in self._tensors.quantised_names:
            info = self._tensors.info(name)
            codes = BLOCK_TYPES[info.dtype].codes
            sizes[codes] = sizes.get(codes, 0) + info.nbytes
        return max(sizes, key=lambda codes: sizes[codes], default="uint4")

    @property
    def linears(self) -> list[str]:
        return [name.removesuffix(WEIGHT) for name in self._tensors.quantised_names if ".experts." not in name]

    def has_linear(self, module: str) -> bool:
        name = f"{module}{WEIGHT}"
        return name in self._tensors and self._tensors.info(name).dtype in BLOCK_TYPES

    def quantized_tensors(self) -> list[str]:
        experts = [name for block in self._blocks for name in self.expert_tensors(block)]
        return [*self._tensors.quantised_names, *(name for name in experts if name.endswith(BIAS))]

    def expert_tensors(self, block: str) -> list[str]:
        """The names of all tensors of a block's quantised experts, biases included."""
        return [name for module in self._modules(block) for name in self.linear_tensors(module)]

    def linear_tensors(self, module: str) -> list[str]:
        """The names of all tensors of a quantised linear layer, its bias included."""
        return [name for name in (f"{module}{WEIGHT}", f"{module}{BIAS}") if name in self._tensors]

    def holds_experts(self, block: str) -> bool:
        """Whether a block's routed experts are quantised. If they are, all of their tensors were checked."""
        spec, modules = self._spec, self._modules(block)
        hidden, inter = spec.hidden_size, spec.intermediate_size
        for module in modules:
            k, n = (inter, hidden) if module is modules[-1] else (hidden, 2 * inter if len(modules) == 2 else inter)
            self._tensors.check(f"{module}{WEIGHT}", (spec.num_experts, n, k))
            if f"{module}{BIAS}" in self._tensors:
                self._tensors.check(f"{module}{BIAS}", (spec.num_experts, n))
        quantised = [self.has_linear(module) for module in modules]
        if any(quantised) and not all(quantised):
            dense = next(module for module in modules if not self.has_linear(module))
            raise UnsupportedError(
                f"{self._tensors.source}: {dense} has type {self._info(dense).dtype} beside quantised ones; the "
                "experts of a layer must all be quantised"
            )
        if all(quantised):
            self._blocks.add(block)
            self._common(modules[:-1])
        return all(quantised)

    def check_stacks(self, block: str) -> None:
        """Refuse experts that cannot share a stack."""
        inner = self._modules(block)[:-1]
        self._common(inner)
        self._check_biases(block, inner)

    def _check_biases(self, block: str, inner: Sequence[str]) -> None:
        if len({f"{module}{BIAS}" in self._tensors for module in inner}) > 1:
            raise CheckpointError(
                f"{block}.experts: gate or up has a bias, the other has none", file=self._tensors.source
            )

    def _common(self, modules: Sequence[str]) -> BlockType:
        """The form of gate and up in one stack."""
        first, last = self._type(modules[0]), self._type(modules[-1])
        common = first.in_common(last)
        if common is None:
            raise UnsupportedError(
                f"{self._tensors.source}: {modules[0]} has type {first.name}, {modules[-1]} {last.name}, which cannot "
                "share a stack"
            )
        return common

    def _modules(self, block: str) -> list[str]:
        """The modules of a block's experts: gate, up and down, or gate_up and down."""
        family, experts = self._family, f"{block}.experts"
        fused = f"{experts}.{family.gate_up}"
        inner = (
            [fused] if f"{fused}{WEIGHT}" in self._tensors else [f"{experts}.{family.gate}", f"{experts}.{family.up}"]
        )
        return [*inner, f"{experts}.{family.down}"]

    def expert_notes(self, block: str) -> list[str]:
        """None: experts are held as the file has them."""
        return []

    def expert_kinds(self, block: str) -> tuple[StackKind, StackKind]:
        modules = self._modules(block)
        types = self._common(modules[:-1]), self._type(modules[-1])
        gate_up, down = (StackKind(found.group_size, found.codes, found.scales) for found in types)
        return gate_up, down

    def expert_symmetry(self, block: str) -> tuple[bool, bool]:
        modules = self._modules(block)
        return self._type(modules[0]).symmetric, self._type(modules[-1]).symmetric

    def expert_bytes(self, block: str) -> int:
        return sum(self._info(module).nbytes for module in self._modules(block))

    # Loading -----------------------------------------------------------------------------------

    def linear(self, module: str, backend: Backend) -> Linear:
        self.check_linear(module)
        if self._is_converted(module):
            weight = self.weight(module)
            builder = new_builder(backend, 1, weight.n, weight, [None])
            builder.add(0, 0, weight)
            return backend.linear_of(builder.finish(), self.bias(module))
        whole = self._stored(module)
        builder, begins = new_builder(backend, 1, whole.n, whole, [None]), range(0, whole.n, PART_COLUMNS)

        def pack(part: int) -> None:
            with self._named_errors(module):
                builder.add_stored(0, begins[part], whole.part(begins[part], PART_COLUMNS))

        self._for_each(pack, len(begins), None)
        return backend.linear_of(builder.finish(), self.bias(module))

    def weight(self, module: str) -> CanonicalWeight:
        self.check_linear(module)
        view, pair = self._tensors.view(f"{module}{WEIGHT}"), self._shared_pair(module)
        with self._named_errors(module):
            weight = self._stored(module).canonical()
        weight = weight if view.columns is None else rows_of(weight, view.columns)
        return weight if pair is None else self._common(pair).converted(weight)

    def _is_converted(self, module: str) -> bool:
        """Whether a linear layer has another form than its blocks: another order of K, or the form of a pair."""
        pair = self._shared_pair(module)
        return self._tensors.view(f"{module}{WEIGHT}").columns is not None or (
            pair is not None and self._common(pair).forms != self._type(module).forms
        )

    def linear_sizes(self, module: str) -> tuple[int, int]:
        n, k = self._tensors.view(f"{module}{WEIGHT}").shape
        return k, n

    def check_linear(self, module: str) -> None:
        """Refuse what :meth:`linear` would refuse, without reading weights."""
        name = f"{module}{WEIGHT}"
        if not self.has_linear(module):
            raise CheckpointError("missing, or not quantised", file=self._tensors.source, tensor=name)
        view = self._tensors.view(name)
        if len(view.shape) != 2:
            raise self._tensors.error(name, f"got {view.shape}, expected two sizes")
        if view.columns is not None:
            order_of_groups(view.columns, self._type(module).group_size)
        if (pair := self._shared_pair(module)) is not None:
            self._common(pair)

    def _shared_pair(self, module: str) -> list[str] | None:
        """Gate and up of the shared expert that a module belongs to: they form one stack."""
        family = self._family
        owner, _, part = module.rpartition(".")
        if family.shared_expert is None or not owner.endswith(f".{family.shared_expert}") or part == family.down:
            return None
        pair = [f"{owner}.{name}" for name in (family.gate, family.up)]
        return pair if all(self.has_linear(name) for name in pair) else None

    def bias(self, module: str) -> npt.NDArray[np.float32] | None:
        name = f"{module}{BIAS}"
        return self._tensors.tensor(name).astype(np.float32) if name in self._tensors else None

    def release(self, module: str, index: int | None = None) -> None:
        name = f"{module}{WEIGHT}"
        if name in self._tensors:
            self._tensors.release(name, index)

    def expert_stacks(
        self, block: str, backend: Backend, description: str
    ) -> tuple[MarlinExpertStack, MarlinExpertStack]:
        spec, modules = self._spec, self._modules(block)
        hidden, inter, experts = spec.hidden_size, spec.intermediate_size, spec.num_experts
        *inner, last = modules
        self._check_biases(block, inner)
        common, below = self._common(inner), self._type(last)
        gate_up = backend.new_stack_builder(
            experts, hidden, 2 * inter, group_size=common.group_size, codes=common.codes, scales=common.scales
        )
        down = backend.new_stack_builder(
            experts, inter, hidden, group_size=below.group_size, codes=below.codes, scales=below.scales
        )
        scratch = _Scratch()

        def add(builder: StackBuilder, form: BlockType, module: str, expert: int, column: int) -> None:
            weight = self._stored(module, expert, scratch)
            with self._named_errors(module):
                if form.forms == self._type(module).forms:
                    builder.add_stored(expert, column, weight)
                else:
                    builder.add(expert, column, form.converted(weight.canonical()))
            self.release(module, expert)

        def pack(expert: int) -> None:
            column = 0
            for module in inner:
                add(gate_up, common, module, expert, column)
                column += self._info(module).shape[1]
            add(down, below, last, expert, 0)

        self._for_each(pack, experts, description)
        biases = [bias for module in inner if (bias := self.bias(module)) is not None]
        return gate_up.finish(np.concatenate(biases, axis=1) if biases else None), down.finish(self.bias(last))

    def _stored(self, module: str, expert: int | None = None, scratch: _Scratch | None = None) -> StoredBlocks:
        """The blocks of a linear layer, or of one expert."""
        rows = self._tensors.blocks(f"{module}{WEIGHT}", expert)
        return StoredBlocks(self._type(module), np.ascontiguousarray(rows), None if scratch is None else scratch.arrays)

    def _named_errors(self, module: str) -> AbstractContextManager[None]:
        """Errors about values of a weight name its tensor."""
        stored = self._tensors.view(f"{module}{WEIGHT}").stored[0]
        return as_checkpoint_error(stored.file, stored.name)

    def _type(self, module: str) -> BlockType:
        return BLOCK_TYPES[self._info(module).dtype]

    def _info(self, module: str) -> Any:
        return self._tensors.info(f"{module}{WEIGHT}")


class _Scratch(threading.local):
    """Arrays that each thread uses again for one expert after another: new ones would be new pages each time."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[str, int, int], dict[str, npt.NDArray[Any]]] = {}

    def arrays(self, kind: BlockType, k: int, n: int) -> dict[str, npt.NDArray[Any]]:
        """The arrays of a type and a size."""
        key = kind.name, k, n
        if key not in self._arrays:
            self._arrays[key] = kind.arrays(k, n)
        return self._arrays[key]


def rows_of(weight: CanonicalWeight, rows: npt.NDArray[np.int64]) -> CanonicalWeight:
    """A weight whose row ``i`` of K is row ``rows[i]``: whole groups, in another order."""
    order = order_of_groups(rows, weight.group_size)
    weight = one_level(weight)
    words = weight.words.reshape(len(order), -1, weight.n)[order].reshape(weight.words.shape)
    parts = {name: part[order] for name in ("scale", "zero", "minimum") if (part := getattr(weight, name)) is not None}
    return replace(weight, words=words, **parts)


def order_of_groups(rows: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    """The group of rows of K at each place.

    Raises
    ------
    UnsupportedError
        Groups would be cut.
    """
    groups = rows.reshape(-1, size)
    if (groups[:, 0] % size).any() or (groups != groups[:, :1] + np.arange(size)).any():
        raise UnsupportedError(f"rows of K in an order that cuts groups of {size}")
    return groups[:, 0] // size
