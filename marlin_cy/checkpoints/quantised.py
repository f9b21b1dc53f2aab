"""The quantised weights of a quantiser's folder: found, checked, and packed for a backend on demand.

::

    Family ─ names ────┐
    Scheme ─ tensors ──┼─ how experts are stored (separate, fused or not quantised), checked when opening
    SafetensorsFolder ─┘            │
                     expert_stacks(block): for each expert, in parallel: map → canonical → pack → release pages
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from marlin_cy.checkpoints.builders import stacked_biases
from marlin_cy.checkpoints.calls import ForEach
from marlin_cy.checkpoints.expert_parts import ExpertPart, fused_parts, separate_parts
from marlin_cy.checkpoints.families import Family, MoeSpec
from marlin_cy.checkpoints.quantised_layers import GIdx, QuantizedLayers
from marlin_cy.checkpoints.safetensors import SafetensorsFolder
from marlin_cy.checkpoints.scaled import ScaledLayers
from marlin_cy.errors import UnsupportedError
from marlin_cy.formats.json_fields import StrPath
from marlin_cy.formats.scheme import Scheme
from marlin_cy.interface import Backend, MarlinExpertStack, StackBuilder
from marlin_cy.stacks.builder import same_groups
from marlin_cy.weights.canonical import CanonicalWeight
from marlin_cy.weights.widening import ROUNDED, StackKind, joined

__all__ = ["QuantizedSource"]


class QuantizedSource(QuantizedLayers):
    """The quantised linear layers of a checkpoint.

    Parameters
    ----------
    tensors : SafetensorsFolder
    scheme : Scheme
    family : Family
    spec : MoeSpec
    config_file : Path
        The file that the spec was read from, for messages.
    for_each : callable
        As :data:`ForEach`.
    scaled : ScaledLayers, optional
        The layers in FP8 and int8, which experts may have too.
    """

    def __init__(
        self,
        tensors: SafetensorsFolder,
        scheme: Scheme,
        family: Family,
        spec: MoeSpec,
        config_file: StrPath,
        for_each: ForEach,
        scaled: ScaledLayers | None = None,
    ) -> None:
        super().__init__(tensors, scheme, scaled)
        self._family, self._spec = family, spec
        self._config_file = config_file
        self._for_each = for_each
        # How each block's experts are stored: see _find_experts.
        self._kinds: dict[str, str] = {}
        # The first quantised layer of each block's experts.
        self._first_experts: dict[str, str] = {}
        for module in self._modules:
            block, inside, _ = module.partition(".experts.")
            if inside:
                self._first_experts.setdefault(block, module)

    # Contents ----------------------------------------------------------------------------------

    def holds_experts(self, block: str) -> bool:
        """Whether a block's routed experts are quantised. If they are, all of their tensors were checked.

        Raises
        ------
        CheckpointError
            There are no experts under the family's names, a tensor contradicts the configuration, or only some of
            the experts are quantised.
        """
        if block not in self._kinds:
            self._kinds[block] = self._find_experts(block)
        return self._kinds[block] != "dense"

    def _find_experts(self, block: str) -> str:
        """How a block's experts are stored: "fused" (all in one tensor), "separate", or "dense" (not quantised)."""
        fused = f"{block}.experts.{self._family.gate_up}"
        if self.has_linear(fused):
            for part in self._fused_parts(block, 0):
                self._check_linear(part.module, part.k, part.n, self._spec.num_experts, self._config_file)
            return "fused"
        quantised = self._first_experts.get(block)
        first = self._separate_parts(block, 0)[0].module
        dense = [name for name in (fused, f"{fused}.weight") if name in self._tensors]
        if quantised is not None and dense:
            raise self._tensors.error(
                f"{quantised}{self._scheme.marker}", f"quantised, but {dense[0]} is not: no known family mixes the two"
            )
        if quantised is None and (dense or f"{first}.weight" in self._tensors):
            return "dense"
        # One expert after another: the configuration may have any number. The first tensor that is missing is named.
        for expert in range(self._spec.num_experts):
            for part in self._separate_parts(block, expert):
                if self._is_dense(part):
                    self._check_dense(part)
                else:
                    self._check_linear(part.module, part.k, part.n, config_file=self._config_file)
        return "separate"

    def _parts(self, block: str, expert: int) -> list[ExpertPart]:
        """The parts of an expert: gate, up and down, or gate_up and down."""
        kind = self._kinds[block]
        return self._fused_parts(block, expert) if kind == "fused" else self._separate_parts(block, expert)

    def _separate_parts(self, block: str, expert: int) -> list[ExpertPart]:
        return separate_parts(self._family, self._spec, block, expert)

    def _fused_parts(self, block: str, expert: int) -> list[ExpertPart]:
        return fused_parts(self._family, self._spec, block, expert)

    def expert_kinds(self, block: str) -> tuple[StackKind, StackKind]:
        """The kind of each stack: ``(gate and up, down)``."""
        gate_up, down = map(self._stack_kind, self._stacks(block))
        return gate_up, down

    def expert_symmetry(self, block: str) -> tuple[bool, bool]:
        """Whether all zero points are the symmetric one, by the scheme: ``(in gate and up, in down)``."""

        def symmetric(part: ExpertPart) -> bool:
            return self._is_dense(part) or self._scheme.for_module(part.module).symmetric

        gate_up, down = (all(map(symmetric, parts)) for parts in self._stacks(block))
        return gate_up, down

    def expert_notes(self, block: str) -> list[str]:
        """Sentences about stacks that hold experts in another form than the files."""
        notes = []
        for name, parts in zip(("gate and up", "down"), self._stacks(block), strict=True):
            kind, dense = self._stack_kind(parts), sum(map(self._is_dense, parts))
            form = f"{kind.codes} in groups of {kind.group_size} with {kind.scales} scales"
            if dense:
                notes.append(
                    f"{name}: {dense} of {len(parts)} matrices of experts are not quantised in the files, and are "
                    f"rounded to {form}" + ("; the others keep their values in this form" if dense < len(parts) else "")
                )
            elif any(self._kind(part) != kind for part in parts):
                notes.append(f"{name}: experts differ in their settings, and keep their values as {form}")
        return notes

    def expert_bytes(self, block: str) -> int:
        """Bytes of a block's quantised experts in the files."""
        modules = self._expert_modules(block)
        return sum(self._tensors.info(name).nbytes for module in modules for name in self._names[module])

    def expert_tensors(self, block: str) -> list[str]:
        """The names of all tensors of a block's quantised experts, biases included."""
        modules = self._expert_modules(block)
        biases = [f"{module}{separator}bias" for module in modules for separator in "._"]
        names = [name for module in modules for name in self._names[module]]
        return names + [name for name in biases if name in self._tensors]

    def _expert_modules(self, block: str) -> list[str]:
        """The modules that hold a block's quantised experts."""
        experts = {"dense": 0, "fused": 1, "separate": self._spec.num_experts}[self._kinds[block]]
        return [part.module for expert in range(experts) for part in self._parts(block, expert)]

    # Loading -----------------------------------------------------------------------------------

    def quantized_tensors(self) -> list[str]:
        """The names of the quantised layers' tensors. Biases are included for routed experts only."""
        names = [name for module in self.linears for name in self._names[module]]
        return names + [name for block in self._kinds for name in self.expert_tensors(block)]

    def expert_stacks(
        self, block: str, backend: Backend, description: str
    ) -> tuple[MarlinExpertStack, MarlinExpertStack]:
        """``(gate_up, down)`` of a block's routed experts.

        Parameters
        ----------
        block : str
        backend : Backend
        description : str
            For ``for_each``.

        Raises
        ------
        CheckpointError
            A scale is not finite, or an entry of ``g_idx`` is out of range.
        UnsupportedError
            The gate and up layers of an expert order K differently (``desc_act``).
        """
        parts = self._all_parts(block)
        inner = [part[:-1] for part in parts]
        g_idx = [self._common_g_idx(modules) for modules in inner]
        g_idx_down = [self._common_g_idx(part[-1:]) for part in parts]
        hidden, width = self._spec.hidden_size, self._inner_width
        kinds = [
            self._stack_kind(stack, permuted=any(order is not None for order in orders))
            for stack, orders in zip(self._stacks(block), (g_idx, g_idx_down), strict=True)
        ]
        gate_up = self._new_builder(backend, inner[0][0].k, width, kinds[0], g_idx)
        down = self._new_builder(backend, parts[0][-1].k, hidden, kinds[1], g_idx_down)

        def pack(expert: int) -> None:
            column = 0
            for part in inner[expert]:
                weight = self._weight_of(part, kinds[0], g_idx[expert])
                for piece in self._gate_and_up(weight):
                    gate_up.add(expert, column, piece)
                    column += piece.n
                self._release(part)
            part = parts[expert][-1]
            down.add(expert, 0, self._weight_of(part, kinds[1], g_idx_down[expert]))
            self._release(part)

        self._for_each(pack, len(parts), description)
        biases = self._biases(inner), self._biases([part[-1:] for part in parts])
        return gate_up.finish(biases[0]), down.finish(biases[1])

    def _biases(self, parts: Sequence[Sequence[ExpertPart]]) -> npt.NDArray[np.float32] | None:
        """float32 ``[num_experts, n]``, gate before up; None if no expert has a bias, or all biases are 0."""
        if parts[0][0].index is None:
            return stacked_biases([[(self.bias(part.module), part.n) for part in row] for row in parts])
        name = f"{parts[0][0].module}_bias"
        if name not in self._tensors:
            return None
        bias: npt.NDArray[np.float32] = self._tensors.tensor(name).astype(np.float32)
        # By its name: the other bias may be as long.
        interleaved = self._family.interleaved and parts[0][0].module.endswith(f".{self._family.gate_up}")
        return np.concatenate([bias[:, 0::2], bias[:, 1::2]], axis=1) if interleaved else bias

    def _gate_and_up(self, weight: CanonicalWeight) -> list[CanonicalWeight]:
        """A stored weight, cut into gate and up if it interleaves their columns."""
        if not (self._family.interleaved and weight.n == self._inner_width):
            return [weight]
        return [weight.columns(slice(first, None, 2)) for first in (0, 1)]

    @property
    def _inner_width(self) -> int:
        """Columns of an expert's first product: gate and up, or up alone."""
        return self._spec.intermediate_size * (len(self._family.expert_names) - 1)

    @staticmethod
    def _new_builder(
        backend: Backend, k: int, n_per_expert: int, kind: StackKind, g_idx: Sequence[GIdx | None]
    ) -> StackBuilder:
        """A builder for a stack of experts."""
        return backend.new_stack_builder(
            len(g_idx),
            k,
            n_per_expert,
            group_size=kind.group_size,
            g_idx=None if all(entry is None for entry in g_idx) else g_idx,
            codes=kind.codes,
            scales=kind.scales,
        )

    def _common_g_idx(self, parts: Sequence[ExpertPart]) -> GIdx | None:
        """The ``g_idx`` that the quantised parts among some parts share."""
        quantised = [part for part in parts if not self._is_dense(part)]
        if not quantised:
            return None
        first, *others = (self._g_idx(part) for part in quantised)
        for part, other in zip(quantised[1:], others, strict=True):
            if not same_groups(first, other):
                file = self._tensors.file_of(f"{part.module}{self._scheme.order}").path
                raise UnsupportedError(
                    f"{file}: {quantised[0].module} and {part.module} order K differently (desc_act), so they cannot "
                    "share one stack; load each of them with linear()"
                )
        return first

    # Checks ------------------------------------------------------------------------------------

    def check_stacks(self, block: str) -> None:
        """Refuse experts that cannot share a stack."""
        for parts in self._stacks(block):
            self._stack_kind(parts, permuted=self.act_order)

    def _stacks(self, block: str) -> tuple[list[ExpertPart], list[ExpertPart]]:
        """The parts of all experts, by stack: ``(gate and up, down)``."""
        rows = self._all_parts(block)
        return [part for row in rows for part in row[:-1]], [row[-1] for row in rows]

    def _all_parts(self, block: str) -> list[list[ExpertPart]]:
        return [self._parts(block, expert) for expert in range(self._spec.num_experts)]

    def _stack_kind(self, parts: Sequence[ExpertPart], permuted: bool = False) -> StackKind:
        """The form of a stack that holds these parts; with permuted rows of K, its groups are those of the files."""
        kinds = {self._kind(part): part.module for part in reversed(parts) if not self._is_dense(part)}
        modules = {kind.group_size: module for kind, module in kinds.items()}
        if permuted and len(modules) > 1:
            (size, module), (other_size, other) = list(modules.items())[:2]
            raise UnsupportedError(
                f"{module} has groups of {size}, {other} has groups of {other_size}: one stack cannot hold them, as "
                "rows of K are permuted"
            )
        wanted = list(kinds)
        if any(map(self._is_dense, parts)):
            wanted.append(ROUNDED._replace(group_size=wanted[0].group_size) if permuted and wanted else ROUNDED)
        return joined(wanted)
