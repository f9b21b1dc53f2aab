"""The quantised weights of a quantiser's folder: found, checked, and packed for a backend on demand.

::

    Family ─ names ────┐
    Scheme ─ tensors ──┼─ how experts are stored (separate, fused or not quantised), checked when opening
    SafetensorsFolder ─┘            │
                     expert_stacks(block): for each expert, in parallel: map → canonical → pack → release pages
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cy.checkpoints.argument_errors import as_checkpoint_error
from marlin_cy.checkpoints.builders import new_builder, stacked_biases
from marlin_cy.checkpoints.calls import ForEach
from marlin_cy.checkpoints.families import Family, MoeSpec
from marlin_cy.checkpoints.ignored import is_ignored
from marlin_cy.checkpoints.safetensors import DTYPES, SafetensorsFolder
from marlin_cy.errors import UnsupportedError
from marlin_cy.formats.json_fields import StrPath
from marlin_cy.formats.scheme import Scheme
from marlin_cy.interface import Backend, Linear, MarlinExpertStack, StackBuilder
from marlin_cy.stacks.builder import same_groups
from marlin_cy.weights.canonical import CanonicalWeight

__all__ = ["ExpertPart", "QuantizedSource"]


GIdx = npt.NDArray[np.int32]


@dataclass(frozen=True)
class ExpertPart:
    """A linear layer of an expert, as it is stored.

    Attributes
    ----------
    module : str
        The layer's name. If one tensor holds all experts, the name that they share.
    k, n : int
        Input and output width of the stored layer.
    index : int or None
        If one tensor holds all experts: the expert's index on its first axis.
    """

    module: str
    k: int
    n: int
    index: int | None = None


class QuantizedSource:
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
    """

    def __init__(
        self,
        tensors: SafetensorsFolder,
        scheme: Scheme,
        family: Family,
        spec: MoeSpec,
        config_file: StrPath,
        for_each: ForEach,
    ) -> None:
        self._tensors, self._scheme, self._family, self._spec = tensors, scheme, family, spec
        self._config_file = config_file
        self._for_each = for_each
        # How each block's experts are stored: see _find_experts.
        self._kinds: dict[str, str] = {}
        # The names of each module's tensors, without its bias.
        self._names: dict[str, list[str]] = {}
        for name in tensors.names:
            module, _, part = name.rpartition(scheme.marker[0])
            if part != "bias":
                self._names.setdefault(module, []).append(name)

    # Contents ----------------------------------------------------------------------------------

    @property
    def format(self) -> str:
        """The format's name."""
        return self._scheme.format

    @property
    def codes(self) -> str:
        """The name of the code type."""
        return self._scheme.codes

    @property
    def act_order(self) -> bool:
        """Whether rows of K are permuted (``desc_act``)."""
        return self._scheme.act_order

    @property
    def linears(self) -> list[str]:
        """Names of the quantised linear layers that are not routed experts."""
        marker = self._scheme.marker
        return [
            name.removesuffix(marker)
            for name in self._tensors.names
            if name.endswith(marker) and ".experts." not in name
        ]

    def has_linear(self, module: str) -> bool:
        """Whether there is a quantised linear layer of this name."""
        return f"{module}{self._scheme.marker}" in self._tensors

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
        family, marker = self._family, self._scheme.marker
        fused = f"{block}.experts.{family.gate_up}"
        if f"{fused}{marker}" in self._tensors:
            for part in self._fused_parts(block, 0):
                self._check_linear(part.module, part.k, part.n, self._spec.num_experts, self._config_file)
            return "fused"
        separate = f"{block}.experts.0.{family.expert_names[0]}"
        dense = [name for name in (f"{separate}.weight", fused, f"{fused}.weight") if name in self._tensors]
        if not dense:
            # If there are no experts at all, the error names the first tensor that is missing.
            for expert in range(self._spec.num_experts):
                for part in self._separate_parts(block, expert):
                    self._check_linear(part.module, part.k, part.n, config_file=self._config_file)
            return "separate"
        quantised = [
            part.module
            for expert in range(self._spec.num_experts)
            for part in self._separate_parts(block, expert)
            if self.has_linear(part.module)
        ]
        if quantised:
            raise self._tensors.error(
                f"{quantised[0]}{marker}", f"quantised, but {dense[0]} is not: no known family mixes the two"
            )
        return "dense"

    def _parts(self, block: str, expert: int) -> list[ExpertPart]:
        """The parts of an expert: gate, up and down, or gate_up and down."""
        kind = self._kinds[block]
        return self._fused_parts(block, expert) if kind == "fused" else self._separate_parts(block, expert)

    def _separate_parts(self, block: str, expert: int) -> list[ExpertPart]:
        family, hidden, inter = self._family, self._spec.hidden_size, self._spec.intermediate_size
        *inner, down = (f"{block}.experts.{expert}.{name}" for name in family.expert_names)
        return [*(ExpertPart(name, hidden, inter) for name in inner), ExpertPart(down, inter, hidden)]

    def _fused_parts(self, block: str, expert: int) -> list[ExpertPart]:
        family, hidden, inter = self._family, self._spec.hidden_size, self._spec.intermediate_size
        inner = inter if family.gate is None else 2 * inter
        return [
            ExpertPart(f"{block}.experts.{family.gate_up}", hidden, inner, expert),
            ExpertPart(f"{block}.experts.{family.down}", inter, hidden, expert),
        ]

    def expert_group_sizes(self, block: str) -> tuple[int, int]:
        """Number of rows of K that share a scale: ``(in gate and up, in down)``."""
        parts = self._parts(block, 0)
        return self._kind(parts[0])[0], self._kind(parts[-1])[0]

    def expert_symmetry(self, block: str) -> tuple[bool, bool]:
        """Whether all zero points are the symmetric one, by the scheme: ``(in gate and up, in down)``."""
        parts = self._all_parts(block)

        def symmetric(part: ExpertPart) -> bool:
            return self._scheme.for_module(part.module).symmetric

        return all(symmetric(part) for row in parts for part in row[:-1]), all(symmetric(row[-1]) for row in parts)

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

    def linear_tensors(self, module: str) -> list[str]:
        """The names of all tensors of a quantised linear layer, its bias included."""
        return [*self._names[module], *(name for name in (f"{module}.bias",) if name in self._tensors)]

    def _expert_modules(self, block: str) -> list[str]:
        """The modules that hold a block's quantised experts."""
        experts = {"dense": 0, "fused": 1, "separate": self._spec.num_experts}[self._kinds[block]]
        return [part.module for expert in range(experts) for part in self._parts(block, expert)]

    # Loading -----------------------------------------------------------------------------------

    def linear(self, module: str, backend: Backend) -> Linear:
        """A linear layer that is not a routed expert's, with its bias if it has one."""
        weight = self.weight(module)
        builder = new_builder(backend, 1, weight.n, weight, [weight.g_idx])
        builder.add(0, 0, weight)
        return backend.linear_of(builder.finish(), self.bias(module))

    def weight(self, module: str) -> CanonicalWeight:
        """A linear layer in canonical form, checked. Its arrays may be views of the files, except for ``g_idx``."""
        k, n = self._linear_sizes(module)
        self._check_linear(module, k, n)
        part = ExpertPart(module, k, n)
        return self._canonical(part, self._g_idx(part))

    def bias(self, module: str) -> npt.NDArray[np.float32] | None:
        """A linear layer's bias, float32, or None."""
        name = f"{module}.bias"
        return self._tensors.tensor(name).astype(np.float32) if name in self._tensors else None

    def release(self, module: str, index: int | None = None) -> None:
        """Release the memory of a linear layer's tensors; with ``index``, only one expert's part of each tensor."""
        for name in self._names.get(module, ()):
            self._tensors.release(name, index)

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
        g_idx_down = [self._g_idx(part[-1]) for part in parts]
        hidden, width = self._spec.hidden_size, self._inner_width
        gate_up = self._new_builder(backend, inner, width, g_idx)
        down = self._new_builder(backend, [part[-1:] for part in parts], hidden, g_idx_down)

        def pack(expert: int) -> None:
            column = 0
            for part in inner[expert]:
                weight = self._canonical(part, g_idx[expert])
                for piece in self._gate_and_up(weight):
                    gate_up.add(expert, column, piece)
                    column += piece.n
                self._release(part)
            part = parts[expert][-1]
            down.add(expert, 0, self._canonical(part, g_idx_down[expert]))
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
        return [
            replace(
                weight,
                words=weight.words[:, first::2],
                scale=weight.scale[:, first::2],
                zero=None if weight.zero is None else weight.zero[:, first::2],
            )
            for first in (0, 1)
        ]

    @property
    def _inner_width(self) -> int:
        """Columns of an expert's first product: gate and up, or up alone."""
        return self._spec.intermediate_size * (len(self._family.expert_names) - 1)

    def _new_builder(
        self, backend: Backend, parts: Sequence[Sequence[ExpertPart]], n_per_expert: int, g_idx: Sequence[GIdx | None]
    ) -> StackBuilder:
        """A builder for a stack of experts; ``parts`` has the parts of each expert."""
        self._check_alike([part for modules in parts for part in modules])
        first = parts[0][0]
        group_size, codes, scales = self._kind(first)
        return backend.new_stack_builder(
            len(parts),
            first.k,
            n_per_expert,
            group_size=group_size,
            g_idx=None if all(entry is None for entry in g_idx) else g_idx,
            codes=codes,
            scales=scales,
        )

    def _canonical(self, part: ExpertPart, g_idx: GIdx | None) -> CanonicalWeight:
        scheme = self._scheme.for_module(part.module)
        arrays = {
            suffix: self._array(part, suffix)
            for suffix in scheme.tensors(part.k, part.n)
            if f"{part.module}{suffix}" in self._tensors and suffix != scheme.order
        }
        # Dtypes and shapes were checked when the checkpoint was opened, g_idx by the caller. Scales are checked here.
        with self._as_tensor_error(f"{part.module}{scheme.scales}"):
            weight = scheme.to_canonical(arrays, part.k, part.n)
        return weight if g_idx is None else replace(weight, g_idx=g_idx)

    def _array(self, part: ExpertPart, suffix: str) -> npt.NDArray[Any]:
        array = self._tensors.tensor(f"{part.module}{suffix}")
        return array if part.index is None else array[part.index]

    def _release(self, part: ExpertPart) -> None:
        self.release(part.module, part.index)

    def _g_idx(self, part: ExpertPart) -> GIdx | None:
        """A private copy of a linear layer's ``g_idx``; None if there is none, or if it is K's own order."""
        scheme = self._scheme.for_module(part.module)
        name = f"{part.module}{scheme.order}"
        if scheme.order is None or name not in self._tensors:
            return None
        with self._as_tensor_error(name):
            g_idx = scheme.g_idx(self._array(part, scheme.order), part.k, part.n)
        self._tensors.release(name)
        return g_idx

    def _common_g_idx(self, parts: Sequence[ExpertPart]) -> GIdx | None:
        """The ``g_idx`` that gate and up share."""
        first, *others = (self._g_idx(part) for part in parts)
        for part, other in zip(parts[1:], others, strict=True):
            if not same_groups(first, other):
                file = self._tensors.file_of(f"{part.module}{self._scheme.order}").path
                raise UnsupportedError(
                    f"{file}: {parts[0].module} and {part.module} order K differently (desc_act), so they cannot "
                    "share one stack; load each of them with linear()"
                )
        return first

    # Checks ------------------------------------------------------------------------------------

    def check_linear(self, module: str) -> None:
        """Refuse a linear layer, by the config or by its tensors' dtypes and shapes."""
        self._check_linear(module, *self._linear_sizes(module))

    def check_stacks(self, block: str) -> None:
        """Refuse experts that cannot share a stack."""
        parts = self._all_parts(block)
        self._check_alike([part for row in parts for part in row[:-1]])
        self._check_alike([row[-1] for row in parts])

    def _all_parts(self, block: str) -> list[list[ExpertPart]]:
        return [self._parts(block, expert) for expert in range(self._spec.num_experts)]

    def _check_alike(self, parts: Sequence[ExpertPart]) -> None:
        first = parts[0]
        kind = group_size, codes, scales = self._kind(first)
        for part in parts:
            other = self._kind(part)
            if other != kind:
                raise UnsupportedError(
                    f"{first.module} has {codes} in groups of {group_size} with {scales} scales, {part.module} has "
                    f"{other[1]} in groups of {other[0]} with {other[2]} scales; experts of a stack must agree in all"
                )

    def _kind(self, part: ExpertPart) -> tuple[int, str, str]:
        """``(group size, code type, scale record)`` of a part."""
        scheme = self._scheme.for_module(part.module)
        stored = DTYPES[self._tensors.info(f"{part.module}{scheme.scales}").dtype]
        return scheme.checked_group_size(part.k, part.n), scheme.codes, scheme.scale_dtype(stored).name

    def _linear_sizes(self, module: str) -> tuple[int, int]:
        marker = f"{module}{self._scheme.marker}"
        shape = self._tensors.info(marker).shape
        with self._as_tensor_error(marker):
            return self._scheme.for_module(module).sizes(shape)

    def _check_linear(
        self, module: str, k: int, n: int, experts: int | None = None, config_file: StrPath | None = None
    ) -> None:
        """Check that a linear layer's tensors exist and have the dtypes and shapes of ``[k, n]``."""
        lead = () if experts is None else (experts,)
        scheme = self._scheme.for_module(module)
        marker = f"{module}{scheme.marker}"
        self._tensors.file_of(marker)
        # The sizes of experts come from config.json, those of other layers from their tensors.
        with self._as_tensor_error(marker) if config_file is None else as_checkpoint_error(config_file):
            scheme.checked_group_size(k, n)
            specs = scheme.tensors(k, n)
        for suffix, spec in specs.items():
            name = f"{module}{suffix}"
            if spec.required or name in self._tensors:
                self._tensors.check(name, (*lead, *spec.shape), spec.dtypes)
        for name in self._names[module]:
            if name.removeprefix(module) not in specs and not is_ignored(name):
                raise self._tensors.error(
                    name, f"layers of format {scheme.format!r} with these settings have no such tensor"
                )
        for name in (f"{module}.bias", f"{module}_bias") if experts else (f"{module}.bias",):
            if name in self._tensors:
                self._tensors.check(name, (*lead, n))

    def _as_tensor_error(self, tensor: str) -> AbstractContextManager[None]:
        return as_checkpoint_error(self._tensors.file_of(tensor).path, tensor)
