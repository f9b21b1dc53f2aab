"""The quantised linear layers of a quantiser's folder, one by one."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cy.checkpoints.argument_errors import as_checkpoint_error
from marlin_cy.checkpoints.builders import new_builder
from marlin_cy.checkpoints.expert_parts import ExpertPart
from marlin_cy.checkpoints.ignored import is_ignored
from marlin_cy.checkpoints.safetensors import DTYPES, FLOATS, SafetensorsFolder
from marlin_cy.checkpoints.scaled import ScaledLayers
from marlin_cy.formats.json_fields import StrPath
from marlin_cy.formats.scheme import Scheme
from marlin_cy.interface import Backend, Linear
from marlin_cy.weights.canonical import CanonicalWeight
from marlin_cy.weights.widening import StackKind, rounded, widened

__all__ = ["GIdx", "QuantizedLayers"]

GIdx = npt.NDArray[np.int32]


class QuantizedLayers:
    """The quantised linear layers of a checkpoint.

    Parameters
    ----------
    tensors : SafetensorsFolder
    scheme : Scheme
    scaled : ScaledLayers, optional
        The layers in FP8 and int8, which experts may have too.
    """

    def __init__(self, tensors: SafetensorsFolder, scheme: Scheme, scaled: ScaledLayers | None = None) -> None:
        self._tensors, self._scheme = tensors, scheme
        self._scaled = ScaledLayers(tensors) if scaled is None else scaled
        # The names of each module's tensors, without its bias.
        self._names: dict[str, list[str]] = {}
        # The quantised layers, routed experts among them, in the order of the files.
        self._modules: dict[str, None] = {}
        for name in tensors.names:
            if scheme.marks(name, tensors.info(name).dtype):
                self._modules[name.removesuffix(scheme.marker)] = None
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
        return [module for module in self._modules if ".experts." not in f"{module}."]

    @property
    def has_modules(self) -> bool:
        """Whether there are quantised layers at all, routed experts among them."""
        return bool(self._modules)

    def has_linear(self, module: str) -> bool:
        """Whether there is a quantised linear layer of this name."""
        return module in self._modules

    def linear_tensors(self, module: str) -> list[str]:
        """The names of all tensors of a quantised linear layer, its bias included."""
        return [*self._names[module], *(name for name in (f"{module}.bias",) if name in self._tensors)]

    # Loading -----------------------------------------------------------------------------------

    def linear(self, module: str, backend: Backend) -> Linear:
        """A linear layer that is not a routed expert's, with its bias if it has one."""
        weight = self.weight(module)
        builder = new_builder(backend, 1, weight.n, weight, [weight.g_idx])
        builder.add(0, 0, weight)
        return backend.linear_of(builder.finish(), self.bias(module))

    def weight(self, module: str) -> CanonicalWeight:
        """A linear layer in canonical form, checked. Its arrays may be views of the files, except for ``g_idx``."""
        k, n = self.linear_sizes(module)
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

    # Parts of experts --------------------------------------------------------------------------

    def _is_dense(self, part: ExpertPart) -> bool:
        """Whether a part of an expert is not quantised, though other parts of its block are."""
        return not self.has_linear(part.module) and f"{part.module}.weight" in self._tensors

    def _kind(self, part: ExpertPart) -> StackKind:
        """The form of a quantised part in the files."""
        scheme = self._scheme.for_module(part.module)
        stored = DTYPES[self._tensors.info(f"{part.module}{scheme.scales}").dtype]
        return StackKind(scheme.checked_group_size(part.k, part.n), scheme.codes, scheme.scale_dtype(stored).name)

    def _weight_of(self, part: ExpertPart, kind: StackKind, g_idx: GIdx | None) -> CanonicalWeight:
        """A part of an expert, as its stack holds it."""
        if not self._is_dense(part):
            return widened(self._canonical(part, g_idx), kind)
        name = f"{part.module}.weight"
        floats = self._scaled.floats(name)
        with self._as_tensor_error(name):
            return rounded(floats, kind.group_size, g_idx)

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

    # Checks ------------------------------------------------------------------------------------

    def check_linear(self, module: str) -> None:
        """Refuse a linear layer, by the config or by its tensors' dtypes and shapes."""
        self._check_linear(module, *self.linear_sizes(module))

    def _check_dense(self, part: ExpertPart) -> None:
        """Check the weight of a part that is not quantised, except for its values, and its bias."""
        name, bias = f"{part.module}.weight", f"{part.module}.bias"
        if self._scaled.has_weight(name):
            self._tensors.check(name, (part.n, part.k))
            self._scaled.check(name)
        else:
            self._tensors.check(name, (part.n, part.k), FLOATS)
        if bias in self._tensors:
            self._tensors.check(bias, (part.n,))
        for other in self._names[part.module]:
            if other not in (name, self._scaled.scales.get(part.module)) and not is_ignored(other):
                raise self._tensors.error(other, f"{part.module} is not quantised, and has no such tensor")

    def linear_sizes(self, module: str) -> tuple[int, int]:
        """Input and output width of a quantised linear layer."""
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
