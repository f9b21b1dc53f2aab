"""One MoE block of a checkpoint: its router, what else decides about routing, and its shared expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from marlin_cy.activations import ACTIVATIONS
from marlin_cy.checkpoints.argument_errors import as_checkpoint_error
from marlin_cy.checkpoints.builders import new_builder
from marlin_cy.checkpoints.families import MoeSpec
from marlin_cy.checkpoints.ignored import is_ignored
from marlin_cy.checkpoints.naming import Naming
from marlin_cy.checkpoints.scaled import ScaledLayers
from marlin_cy.distributed.columns import columns_backend, expert_columns, new_layer_shard
from marlin_cy.distributed.shard import LayerShard, Shard
from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.formats.json_fields import StrPath
from marlin_cy.interface import Backend
from marlin_cy.moe.layer import MoeLayer, SharedExpert
from marlin_cy.moe.routing import Routing
from marlin_cy.reference import dequantize_weight

if TYPE_CHECKING:
    from marlin_cy.checkpoints.contents import Source, Tensors

__all__ = ["MoeBlock", "check_sizes", "dequantized"]


class MoeBlock:
    """A MoE block. :class:`~marlin_cy.checkpoints.checkpoint.Checkpoint` documents the public methods.

    Parameters
    ----------
    name : str
        ``"model.layers.0.mlp"``.
    tensors : SafetensorsFolder or GgufTensors
    source : QuantizedSource, PackedSource or GgufSource
    naming : Naming
    spec : MoeSpec
    config_file : path-like
        For messages.
    scaled : ScaledLayers
        The linear layers in FP8 and int8.
    shard : Shard, optional
        Stacks have only this host's columns.
    """

    def __init__(
        self,
        name: str,
        tensors: Tensors,
        source: Source,
        naming: Naming,
        spec: MoeSpec,
        config_file: StrPath,
        scaled: ScaledLayers,
        shard: Shard | None = None,
    ) -> None:
        self.name, self._tensors, self._source, self._naming, self._spec = name, tensors, source, naming, spec
        self._family, self._config_file, self._scaled = naming.family, config_file, scaled
        self._router = f"{name}.{naming.family.router}"
        self._shard: LayerShard | None = None
        if shard is not None:
            widths = spec.intermediate_size, spec.hidden_size, spec.shared_intermediate_size or None
            self._shard = new_layer_shard(shard, *widths)

    def layer(self, backend: Backend, description: str, shared_expert: bool) -> MoeLayer:
        """As :meth:`Checkpoint.moe_layer`; ``description`` is for progress."""
        self.check()
        routing, spec = self.routing(), self._spec
        shared = self.shared_expert(backend) if shared_expert and spec.shared_intermediate_size else None
        gate_up, down = self._source.expert_stacks(self.name, self._kept(backend), description)
        return MoeLayer(
            gate_up,
            down,
            activation=spec.activation,
            apply_router_weight_on_input=spec.weight_on_input,
            shared_expert=shared,
            shard=self._shard,
            **routing,
        )

    def experts(self, backend: Backend, description: str) -> MoeLayer:
        """As :meth:`Checkpoint.experts`; ``description`` is for progress."""
        gate_up, down = self._source.expert_stacks(self.name, self._kept(backend), description)
        spec = self._spec
        return MoeLayer(gate_up, down, top_k=spec.top_k, activation=spec.activation, shard=self._shard)

    def _kept(self, backend: Backend, shared: bool = False) -> Backend:
        """The backend; with a shard, one that keeps this host's columns of experts, or of the shared expert."""
        if self._shard is None:
            return backend
        spec = self._spec
        gated = ACTIVATIONS[spec.activation].gated
        return columns_backend(backend, expert_columns(self._shard, spec.hidden_size, gated, shared=shared))

    # Routing -----------------------------------------------------------------------------------

    def router_weight(self) -> npt.NDArray[Any]:
        """As :meth:`Checkpoint.router_weight`."""
        shape = self._spec.num_experts, self._spec.hidden_size
        if self._source.has_linear(self._router):
            return dequantized(self._source, self._router, *shape)
        self._tensors.check(f"{self._router}.weight", shape)
        return self._scaled.floats(f"{self._router}.weight")

    def router_bias(self) -> npt.NDArray[Any] | None:
        """As :meth:`Checkpoint.router_bias`."""
        name = f"{self._router}.bias"
        # DeepSeek-V4 has another bias under this name.
        is_other = name == f"{self.name}.{self._family.correction}"
        return None if is_other or name not in self._tensors else self._vector(name, self._spec.num_experts)

    def correction_bias(self) -> npt.NDArray[Any] | None:
        """As :meth:`Checkpoint.correction_bias`."""
        if not self._naming.is_corrected:
            return None
        name, experts = f"{self.name}.{self._family.correction}", self._spec.num_experts
        # ERNIE's has an axis of length 1 in front.
        self._tensors.check(name, (1, experts) if len(self._tensors.info(name).shape) == 2 else (experts,))
        return self._tensors.tensor(name).reshape(experts)

    def expert_scale(self) -> npt.NDArray[Any] | None:
        """As :meth:`Checkpoint.expert_scale`."""
        name = self._family.expert_scale
        return None if name is None else self._vector(f"{self.name}.{name}", self._spec.num_experts)

    def router_logits(self, hidden_states: npt.ArrayLike, norm_eps: float) -> npt.NDArray[np.float32]:
        """As :meth:`Checkpoint.router_logits`."""
        rows, hidden = np.asarray(hidden_states).astype(np.float32), self._spec.hidden_size
        if rows.ndim != 2 or rows.shape[1] != hidden:
            raise ValueError(f"hidden_states: got shape {rows.shape}, expected [tokens, {hidden}]")
        if self._family.router_norm:
            rows = rows / np.sqrt(np.square(rows).mean(axis=1, keepdims=True) + np.float32(norm_eps))
        if self._family.router_scale is not None:
            scale = self._vector(f"{self.name}.{self._family.router_scale}", hidden).astype(np.float32)
            rows = rows * scale * np.float32(hidden**-0.5)
        logits: npt.NDArray[np.float32] = rows @ self.router_weight().astype(np.float32).T
        bias = self.router_bias()
        return logits if bias is None else logits + bias.astype(np.float32)

    def routing(self) -> dict[str, Any]:
        """The arguments of :class:`~marlin_cy.moe.routing.Routing` but for the number of experts, checked."""
        spec, name = self._spec, f"{self.name}.{self._family.correction or self._family.expert_scale}"
        found: dict[str, Any] = {
            "top_k": spec.top_k,
            "correction_bias": self.correction_bias(),
            "expert_scale": self.expert_scale(),
            **spec.routing(),
        }
        file = self._tensors.file_of(name).path if name in self._tensors else self._config_file
        with as_checkpoint_error(file, name):
            Routing(spec.num_experts, **found)
        return found

    def _vector(self, name: str, size: int) -> npt.NDArray[Any]:
        self._tensors.check(name, (size,))
        return self._tensors.tensor(name)

    # The shared expert -------------------------------------------------------------------------

    def shared_modules(self) -> list[str]:
        """The names of the linear layers of the shared expert: gate if there is one, up and down.

        Gate and up are one layer where the files have them so.
        """
        shared, names = f"{self.name}.{self._family.shared_expert}", self._family.shared_names
        fused = f"{shared}.{self._family.gate_up}"
        if self._source.has_linear(fused) or f"{fused}.weight" in self._tensors:
            names = (self._family.gate_up, names[-1])
        return [f"{shared}.{name}" for name in names]

    def has_packed_shared_expert(self) -> bool:
        """Whether all linear layers of the shared expert are quantised."""
        return all(map(self._source.has_linear, self.shared_modules()))

    def _shared_sizes(self, modules: Sequence[str]) -> list[tuple[int, int]]:
        """Input and output width of each of :meth:`shared_modules`."""
        inter, hidden = self._spec.shared_intermediate_size or 0, self._spec.hidden_size
        width = inter * (len(self._family.shared_names) - 1)  # of gate and up, or of up alone
        inner = len(modules) - 1
        return [*inner * [(hidden, width // inner)], (inter, hidden)]

    def shared_expert(self, backend: Backend) -> SharedExpert:
        """The shared expert, loaded to a backend.

        Raises
        ------
        CheckpointError
            A tensor is missing, or contradicts the configuration.
        UnsupportedError
            It is not quantised.
        """
        family, spec, source = self._family, self._spec, self._source
        modules, hidden = self.shared_modules(), spec.hidden_size
        for name in modules:
            if not source.has_linear(name):
                if f"{name}.weight" not in self._tensors:
                    raise CheckpointError("missing", file=self._tensors.source, tensor=f"{name}.weight")
                raise UnsupportedError(
                    f"{self._tensors.source.parent}: {name} is not quantised; load the layer with shared_expert=False, "
                    "and add the shared expert's output to the layer's"
                )
        *first, down = (source.weight(name) for name in modules)
        for name, weight, expected in zip(modules, (*first, down), self._shared_sizes(modules), strict=True):
            check_sizes(name, (weight.k, weight.n), expected, self._tensors.source.parent)
        width = sum(weight.n for weight in first)
        backend = self._kept(backend, shared=True)
        builder = new_builder(backend, 1, width, first[0], [first[0].g_idx])
        for position, weight in enumerate(first):
            builder.add(0, position * weight.n, weight)
        below = new_builder(backend, 1, hidden, down, [down.g_idx])
        below.add(0, 0, down)
        for name in modules:
            source.release(name)
        gate_weight, name = None, modules[0]
        if family.shared_gate is not None:
            name = f"{self.name}.{family.shared_gate}.weight"
            self._tensors.check(name, (1, hidden))
            gate_weight = self._scaled.floats(name)[0]
        elif spec.averaged:
            gate_weight = np.zeros(hidden, np.float32)  # whose sigmoid is a half, exactly
        with as_checkpoint_error(self._tensors.source, name):
            cuts = self._shard
            columns = None if cuts is None or cuts.shared is None else cuts.width(cuts.shared)
            return SharedExpert(builder.finish(), below.finish(), gate_weight, inner=columns)

    # Checks ------------------------------------------------------------------------------------

    def check_all(self, routing: bool) -> None:
        """Refuse what a model would refuse, but for the values of weights; with ``routing``, what a layer would."""
        self._source.check_stacks(self.name)
        self._check_matrix(self._router, self._spec.hidden_size, self._spec.num_experts)
        if self._spec.shared_intermediate_size is not None:
            modules = self.shared_modules()
            for module, (k, n) in zip(modules, self._shared_sizes(modules), strict=True):
                self._check_matrix(module, k, n)
            if self._family.shared_gate is not None:
                self._check_matrix(f"{self.name}.{self._family.shared_gate}", self._spec.hidden_size, 1)
        elif self._family.shared_expert is not None:
            start = f"{self.name}.{self._family.shared_expert}."
            for name in self._naming.block_tensors(self.name):
                if name.startswith(start):
                    raise self._tensors.error(name, "the model has no shared expert by the configuration")
        if routing:
            self.check()
            self.routing()

    def _check_matrix(self, module: str, k: int, n: int) -> None:
        """Refuse a linear layer, quantised or not, that is missing or has another size."""
        if self._source.has_linear(module):
            check_sizes(module, self._source.linear_sizes(module), (k, n), self._tensors.source.parent)
        else:
            self._tensors.check(f"{module}.weight", (n, k))

    def check(self) -> None:
        """Refuse tensors that a layer would not use: its result would be wrong.

        Raises
        ------
        CheckpointError
            Naming the first such tensor.
        """
        family, source = self._family, self._source
        if not family.routes:
            raise UnsupportedError(f"{self.name}: the routing of {family.name} is not known: use Checkpoint.experts")
        used = set(source.expert_tensors(self.name))
        linears = [self._router]
        if self._spec.shared_intermediate_size is not None:
            linears += self.shared_modules()
            if family.shared_gate is not None:
                linears.append(f"{self.name}.{family.shared_gate}")
        for module in linears:
            used |= {f"{module}.weight", f"{module}.bias", *self._scaled.tensors_of(module)}
            if source.has_linear(module):
                used |= set(source.linear_tensors(module))
        used |= {f"{self.name}.{part}" for part in (family.router_scale, family.expert_scale) if part is not None}
        if self._naming.is_corrected:
            used.add(f"{self.name}.{family.correction}")
        for name in self._naming.block_tensors(self.name):
            if name not in used and not is_ignored(name):
                raise self._tensors.error(
                    name, f"unknown for {family.name}: the layer would not use it, so its results may be wrong"
                )


def check_sizes(module: str, found: tuple[int, int], expected: tuple[int, int], folder: StrPath) -> None:
    """Refuse a linear layer whose input and output width are not those of the model."""
    if found != expected:
        raise CheckpointError(
            f"{module}: got {found[0]} to {found[1]} features, expected {expected[0]} to {expected[1]} by the "
            "configuration",
            file=folder,
        )


def dequantized(source: Source, name: str, n: int | None = None, k: int | None = None) -> npt.NDArray[np.float32]:
    """As :meth:`Checkpoint.dequantized`."""
    weight = source.weight(name)
    if n is not None and (weight.n, weight.k) != (n, k):
        raise CheckpointError(
            f"{name}: got {weight.k} to {weight.n} features, expected {k} to {n} by the configuration"
        )
    dense: npt.NDArray[np.float32] = np.ascontiguousarray(dequantize_weight(weight).T, np.float32)
    source.release(name)
    return dense
