"""Weights of a plan, from a checkpoint: projections, vectors, and matrices that are unpacked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cy.checkpoints.argument_errors import as_checkpoint_error
from marlin_cy.checkpoints.builders import new_builder
from marlin_cy.checkpoints.checkpoint import Checkpoint
from marlin_cy.checkpoints.moe_block import check_sizes
from marlin_cy.checkpoints.safetensors import FLOATS
from marlin_cy.decoder.plan import SCALE_STEP, DenseLinear, MlpPlan, Projection, Vector
from marlin_cy.decoder.share import Share
from marlin_cy.distributed.columns import columns_backend, padded, runs_of
from marlin_cy.distributed.shard import Columns, Cut
from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.interface import Linear
from marlin_cy.reference import dequantize_weight
from marlin_cy.stacks.builder import N_TILE
from marlin_cy.weights.canonical import CanonicalWeight

__all__ = ["Loader"]


class Loader:
    """Loads the weights of a checkpoint by the names of their modules.

    Matrices that are not quantised are views of the mapped files, unless their rows are reordered.
    Vectors are float32 copies.

    Parameters
    ----------
    checkpoint : Checkpoint
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._linears = frozenset(checkpoint.linears)
        self._names = frozenset(checkpoint.tensor_names)
        self._used: set[str] = set()  # tensors and quantised layers

    def is_quantised(self, module: str) -> bool:
        """Whether a module is a quantised linear layer."""
        return module in self._linears

    def check_all_used(self) -> None:
        """Refuse tensors of layers that the plan does not use: the model would not be the one that was trained.

        Raises
        ------
        CheckpointError
            Naming the first such tensor.
        """
        checkpoint = self.checkpoint
        blocks = tuple(f"{checkpoint.moe_block(layer)}." for layer in checkpoint.moe_layers)  # moe_layer checks these
        for name in checkpoint.tensor_names:
            if not name.startswith(f"{checkpoint.layer_prefix}.") or name.startswith(blocks):
                continue
            if not self._used & {name, name.rpartition(".")[0]} and not checkpoint.is_passed_over(name):
                raise CheckpointError("the decoder would not use it", file=checkpoint.path, tensor=name)

    def has(self, tensor: str) -> bool:
        """Whether the checkpoint has a tensor."""
        return tensor in self._names

    def vector(self, tensor: str, size: int, shape: tuple[int, ...] | None = None) -> Vector:
        """A tensor as float32 ``[size]``; ``shape`` is that in the file, ``(size,)`` if omitted."""
        values = self._floats(tensor, (size,) if shape is None else shape).reshape(size)
        return np.array(values, np.float32)

    def matrix(self, tensor: str, rows: int, columns: int) -> npt.NDArray[Any]:
        """A matrix in the file's dtype: a view of the mapped file. One of 8 bits becomes float32."""
        return self._floats(tensor, (rows, columns))

    def _floats(self, tensor: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        info, scaled = self.checkpoint.tensor_info(tensor), self.checkpoint.scaled
        if info.dtype not in FLOATS and not scaled.has_weight(tensor):
            raise UnsupportedError(
                f"{self.checkpoint.path}, tensor {tensor!r}: dtype {info.dtype}, the decoder supports "
                f"{', '.join(FLOATS)} and quantised layers"
            )
        self.checkpoint.check_tensor(tensor, shape)
        self._use(tensor)
        return scaled.floats(tensor)

    def _use(self, tensor: str) -> None:
        """Note that the plan uses a tensor; with a weight of 8 bits, its scale too."""
        self._used |= {tensor, *self.checkpoint.scaled.tensors_of(tensor.removesuffix(".weight"))}

    def dense(self, module: str, k: int, n: int, bias: bool = False, columns: Columns | None = None) -> DenseLinear:
        """A linear layer of 16 or 32 bits; the rest is as for :meth:`projection`. Others become float32."""
        weight = (
            self.unpacked(module, k, n, bias) if self.is_quantised(module) else self.matrix(f"{module}.weight", n, k)
        )
        return DenseLinear(rows_of(weight, columns), self._bias(module, n, bias, columns))

    def projection(self, module: str, k: int, n: int, bias: bool = False, columns: Columns | None = None) -> Projection:
        """A linear layer of ``k`` inputs and ``n`` outputs, quantised or dense.

        With ``columns``, it has only these outputs. A quantised layer has a multiple of 8: the last one is repeated.

        Raises
        ------
        CheckpointError
            A tensor is missing or contradicts the configuration. A bias of zeros that the model lacks is accepted:
            AutoGPTQ writes it.
        """
        if not self.is_quantised(module):
            layer = outputs_of(self._unquantised(module, k, n), columns)
            return replace(layer, bias=self._bias(module, n, bias, columns))
        self._bias(module, n, bias)
        self._used.add(module)
        if columns is not None:
            with as_checkpoint_error(self.checkpoint.path, module):
                return self.checkpoint.linear(module, columns_backend(self.checkpoint.backend, {(k, n): columns}))
        linear = self.checkpoint.linear(module)
        check_sizes(module, (linear.in_features, linear.out_features), (k, n), self.checkpoint.path)
        return linear

    def _unquantised(self, module: str, k: int, n: int) -> DenseLinear:
        """A linear layer that is not quantised, without its bias; of 8 bits if the kernels read its scales."""
        tensor, scaled = f"{module}.weight", self.checkpoint.scaled
        if not scaled.has_weight(tensor):
            return DenseLinear(self.matrix(tensor, n, k))
        self.checkpoint.check_tensor(tensor, (n, k))
        self._use(tensor)
        elements, scales, scale_k = scaled.elements(module)
        if scale_k < k and scale_k % SCALE_STEP:
            return DenseLinear(self.matrix(tensor, n, k))
        return DenseLinear(elements, None, scales, scale_k)

    def mlp(
        self, module: str, names: Sequence[str], k: int, inner: int, activation: str, share: Share, outputs: Cut | None
    ) -> MlpPlan:
        """A feed-forward network; ``names`` are those of gate, up and down in the module."""
        gate, up, down = (f"{module}.{name}" for name in names)
        cut = share.cut("intermediate_size", inner)
        columns = share.columns(cut)
        return MlpPlan(
            gate=self.projection(gate, k, inner, columns=columns),
            up=self.projection(up, k, inner, columns=columns),
            down=self.projection(down, inner, k, columns=share.columns(outputs)),
            activation=activation,
            inner=cut,
        )

    def unpacked(self, module: str, k: int, n: int, bias: bool = False) -> npt.NDArray[np.float32]:
        """The weight of a linear layer, float32 ``[n, k]``, exact: quantised weights fit a float32."""
        self._bias(module, n, bias)
        if not self.is_quantised(module):
            return self.matrix(f"{module}.weight", n, k).astype(np.float32)
        self._used.add(module)
        return self.checkpoint.dequantized(module, n, k)

    def reordered(
        self, module: str, k: int, n: int, parts: Sequence[Columns], kept: Sequence[Columns | None]
    ) -> list[Projection]:
        """A linear layer without bias, cut into several; ``parts`` has the outputs of each.

        ``kept`` says which outputs of each part to keep; None for all. Dense rows are copied. A part of a quantised
        layer that is too narrow for the backends is unpacked to float32.
        """
        self._bias(module, n, False)
        if not self.is_quantised(module):
            layer = self._unquantised(module, k, n)
            own = (part if columns is None else part[columns] for part, columns in zip(parts, kept, strict=True))
            return [outputs_of(layer, columns) for columns in own]
        weight = self.checkpoint.weight(module)
        self._used.add(module)
        check_sizes(module, (weight.k, weight.n), (k, n), self.checkpoint.path)
        projections: list[Projection] = []
        for part, columns in zip(parts, kept, strict=True):
            # Whether a part is unpacked does not depend on the columns to keep: its bits do not either.
            unpacked = len(part) % N_TILE
            if columns is not None:
                part = part[columns]
            piece = weight.columns(part if unpacked else padded(part))
            if unpacked:
                dense = dequantize_weight(piece).T.astype(np.float32)
                projections.append(DenseLinear(np.ascontiguousarray(dense)))
            else:
                projections.append(self._linear(module, piece))
        return projections

    def _linear(self, module: str, weight: CanonicalWeight) -> Linear:
        backend = self.checkpoint.backend
        with as_checkpoint_error(self.checkpoint.path, module):
            builder = new_builder(backend, 1, weight.n, weight, [weight.g_idx])
            builder.add(0, 0, weight)
            return backend.linear_of(builder.finish(), None)

    def _bias(self, module: str, n: int, expected: bool, columns: Columns | None = None) -> Vector | None:
        name = f"{module}.bias"
        if not expected and not self.has(name):
            return None
        bias = self.vector(name, n)
        if expected:
            return bias if columns is None else bias[columns]
        if bias.any():
            raise CheckpointError("the model has no such bias", file=self.checkpoint.path, tensor=name)
        return None


def outputs_of(layer: DenseLinear, columns: Columns | None) -> DenseLinear:
    """Some outputs of a layer without a bias."""
    scales = None if layer.scales is None else rows_of(layer.scales, columns)
    return replace(layer, weight=rows_of(layer.weight, columns), scales=scales)


def rows_of(matrix: npt.NDArray[Any], rows: Columns | None) -> npt.NDArray[Any]:
    """Some rows of a matrix: a view if they follow each other."""
    if rows is None:
        return matrix
    runs = runs_of(rows)
    return matrix[slice(*runs[0])] if len(runs) == 1 else matrix[rows]
