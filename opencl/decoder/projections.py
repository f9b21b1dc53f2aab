"""Linear layers of a decoder on the device: quantised ones by the layers' products, dense ones by ``decoder_dense.cl``.

Layers that read the same rows form a group. Their outputs lie side by side in one row, in the order given, and dense
layers that follow each other are one product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyopencl as cl

from marlin_cy.decoder.plan import DenseLinear, Projection
from marlin_cy.errors import UnsupportedError
from marlin_cy.opencl.buffers import WEIGHT_CODES, Rows, as_bytes
from marlin_cy.opencl.decoder.dense_mma import dense_kernel
from marlin_cy.opencl.gemm.multiply import NO_BIAS, OUTPUT_BIAS, multiply
from marlin_cy.opencl.gemm.work import TileList
from marlin_cy.opencl.memory import uploaded
from marlin_cy.opencl.stack import OpenClLinear, expert_columns

if TYPE_CHECKING:
    from marlin_cy.opencl.decoder.maker import Maker
    from marlin_cy.opencl.decoder.merged import Merger
    from marlin_cy.opencl.stack import Runtime
    from marlin_cy.opencl.store import OpenClGptqStore

__all__ = ["DenseMatrix", "PackedColumns", "ProjectionGroup", "Uploads"]

TILED_ROWS = 16
"""Products of fewer rows are never computed in tiles, which would be mostly padding. Products of more are not if there
would be fewer tiles than compute units: a router has one or two columns of tiles, and all of K takes long."""
MMA_ROWS = 5
"""Products of fewer rows read the weights once without tensor cores, too: `dense_few` has four rows at a time."""
TEAM, TEAMS = 32, 4
CPU_TEAM = 8
COLUMNS = 2  # of decoder_dense.cl
TILE = 64  # of decoder_dense.cl


class Uploads:
    """Constant arrays on the device. Arrays of a plan are there once: layers share tables of RoPE, and a head may be
    the embedding.

    Attributes
    ----------
    nbytes : int
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.nbytes = 0
        # The arrays are kept, as the number of an object is not its own once it is gone.
        self._held: dict[int, tuple[npt.NDArray[Any], cl.Buffer]] = {}

    def __call__(self, array: npt.NDArray[Any], what: str) -> cl.Buffer:
        """A buffer with an array of a plan."""
        found = self._held.get(id(array))
        if found is None:
            found = self._held[id(array)] = array, self.new(array, what)
        return found[1]

    def new(self, array: npt.NDArray[Any], what: str) -> cl.Buffer:
        """A buffer with an array that nothing else uses."""
        self.nbytes += array.nbytes
        return uploaded(self.runtime, as_bytes(np.ascontiguousarray(array)), what)

    def optional(self, array: npt.NDArray[Any] | None, what: str) -> cl.Buffer | None:
        """As above; None for None."""
        return None if array is None else self(array, what)


class DenseMatrix:
    """A matrix ``[n, k]`` on the device, or ``batch`` of them, of 8, 16 or 32 bits.

    Parameters
    ----------
    uploads : Uploads
    weight : float array ``[n, k]`` or ``[batch, n, k]``
    bias : float32 ``[n]`` or None
    scales, scale_k
        Of one matrix of 8 bits, as :class:`~marlin_cy.decoder.plan.DenseLinear` has them.
    of_plan : bool
        Whether the arrays are the plan's own.
    """

    def __init__(
        self,
        uploads: Uploads,
        weight: npt.NDArray[Any],
        bias: npt.NDArray[np.float32] | None = None,
        scales: npt.NDArray[np.float32] | None = None,
        scale_k: int = 0,
        *,
        of_plan: bool = True,
    ) -> None:
        self.n, self.k = weight.shape[-2:]
        self.batch = 1 if weight.ndim == 2 else weight.shape[0]
        self.type_code = WEIGHT_CODES[weight.dtype]
        self.scale_k = scale_k if scale_k < self.k else 0
        upload = uploads if of_plan else uploads.new
        self.buffer = upload(weight, "weights that are not quantised")
        self.scales = None if scales is None else upload(scales, "scales of weights")
        self.bias = None if bias is None else upload(bias, "bias")

    def record(
        self,
        maker: Maker,
        x: Rows,
        out: Rows,
        *,
        x_offset: int = 0,
        x_batch: int = 0,
        out_offset: int = 0,
        out_batch: int = 0,
        label: str = "dense",
    ) -> None:
        """Record ``out[r, out_offset + c] = x[r, x_offset:] @ matrix.T + bias``, for each matrix of the batch."""
        aligned = all(number % 8 == 0 for number in (self.k, x.width, x_offset, x_batch))
        macros = {"INPUT_TYPE": x.type_code, "WEIGHT_TYPE": self.type_code, "ALIGNED": int(aligned)}
        if self.scale_k:
            macros["SCALE_K"] = self.scale_k
        values = {
            "x": x.data,
            "x_offset": x_offset,
            "x_stride": x.width,
            "x_batch": x_batch,
            "weight": self.buffer,
            "scales": self.scales,
            "bias": self.bias,
            "out": out.data,
            "out_offset": out_offset,
            "out_stride": out.width,
            "out_batch": out_batch,
            "rows": out.rows,
            "n": self.n,
            "k": self.k,
        }
        if aligned and out.rows >= MMA_ROWS:
            kernel = dense_kernel(
                maker.ctx.backend, x.type_code, self.type_code, out.rows, self.n, self.batch, self.scale_k
            )
            if kernel is not None:
                kernel.record(maker.ctx, self.batch, label, values)
                return
        device = maker.ctx.backend.runtime.capabilities
        tiles = -(-self.n // TILE), -(-out.rows // TILE)
        if out.rows >= TILED_ROWS and tiles[0] * tiles[1] * self.batch >= device.compute_units:
            size = tiles[0] * 256, tiles[1], self.batch
            maker.record("decoder_dense", "dense_many", macros, size, (256, 1, 1), label, **values)
            return
        team = CPU_TEAM if device.is_cpu else TEAM
        rows = next(number for number in (1, 2, 4) if number >= out.rows or number == 4)
        macros |= {"DENSE_ROWS": rows, "TEAM": team, "TEAMS": TEAMS}
        groups = -(-self.n // (TEAMS * COLUMNS))
        size = groups * team * TEAMS, -(-out.rows // rows), self.batch
        maker.record("decoder_dense", "dense_few", macros, size, (team * TEAMS, 1, 1), label, **values)


@dataclass(eq=False)
class PackedColumns:
    """A quantised layer whose outputs begin at a column of a row.

    Attributes
    ----------
    store, bias_kind, bias_buffer
        Those of :class:`~marlin_cy.opencl.gemm.multiply.Weights`; the bias has a value for each column of the row.
    columns : int32 ``[experts, 4]``
        As of :func:`~marlin_cy.opencl.stack.expert_columns`.
    """

    store: OpenClGptqStore
    bias_kind: int
    bias_buffer: cl.Buffer | None
    columns: npt.NDArray[np.int32]

    def record(self, maker: Maker, x: Rows, out: Rows, activation: str | None, label: str) -> None:
        """Record the product."""
        runs = np.zeros((len(self.columns), 7), np.int32)
        runs[:, :4] = self.columns
        runs[:, 6] = out.rows
        multiply(maker.ctx, self, x, out, TileList(runs, one_order=True), activation=activation, label=label)


class ProjectionGroup:
    """Linear layers that read the same rows.

    Parameters
    ----------
    uploads : Uploads
    layers : sequence of Projection
    merger : Merger, optional
        Quantised layers that follow each other are merged if it can.

    Attributes
    ----------
    width : int
        Of the outputs together.
    quantised : bool
        Whether any layer is quantised.
    parts : list
        :class:`PackedColumns`, or a dense matrix and its first column.
    """

    def __init__(self, uploads: Uploads, layers: Sequence[Projection], merger: Merger | None = None) -> None:
        self.width = sum(layer.out_features for layer in layers)
        self.quantised = not all(isinstance(layer, DenseLinear) for layer in layers)
        self.parts: list[PackedColumns | tuple[DenseMatrix, int]] = []
        column = 0
        for run in runs_of(layers):
            if isinstance(run[0], DenseLinear):
                self.parts.append((dense_matrix(uploads, run), column))
            else:
                self.parts += packed_columns(uploads, run, column, self.width, merger)
            column += sum(layer.out_features for layer in run)

    @property
    def whole_dense(self) -> DenseMatrix | None:
        """The matrix, if the group is one dense matrix."""
        if len(self.parts) == 1 and not isinstance(self.parts[0], PackedColumns):
            return self.parts[0][0]
        return None

    def record(self, maker: Maker, x: Rows, out: Rows, label: str, activation: str | None = None) -> None:
        """Record the products; ``out`` is ``width`` wide. ``activation``: of quantised layers, as in ``multiply``."""
        for part in self.parts:
            if isinstance(part, PackedColumns):
                part.record(maker, x, out, activation, label)
            else:
                matrix, column = part
                matrix.record(maker, x, out, out_offset=column, label=label)


def runs_of(layers: Sequence[Projection]) -> list[list[Any]]:
    """The layers in order: those that follow each other together if they are dense ones of one form, or quantised."""
    runs: list[list[Any]] = []
    for layer in layers:
        if runs and kind_of(runs[-1][0]) == kind_of(layer):
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return runs


def kind_of(layer: Projection) -> object:
    """The form of a dense layer; None for a quantised one."""
    return (layer.weight.dtype, layer.scale_k) if isinstance(layer, DenseLinear) else None


def dense_matrix(uploads: Uploads, layers: Sequence[DenseLinear]) -> DenseMatrix:
    """Dense layers as one matrix."""
    if len(layers) == 1:
        return DenseMatrix(uploads, layers[0].weight, layers[0].bias, layers[0].scales, layers[0].scale_k)
    bias = None
    if any(layer.bias is not None for layer in layers):
        bias = np.concatenate(
            [np.zeros(layer.out_features, np.float32) if layer.bias is None else layer.bias for layer in layers]
        )
    found = [layer.scales for layer in layers if layer.scales is not None]
    scales = np.concatenate(found) if found else None
    weight = np.concatenate([layer.weight for layer in layers])
    return DenseMatrix(uploads, weight, bias, scales, layers[0].scale_k, of_plan=False)


def packed_columns(
    uploads: Uploads, layers: Sequence[Any], column: int, width: int, merger: Merger | None
) -> list[PackedColumns]:
    """Quantised layers whose outputs begin at ``column`` of rows of ``width``: merged, or one by one."""
    for layer in layers:
        if not isinstance(layer, OpenClLinear):
            raise UnsupportedError(f"decoder: got a {type(layer).__name__}, expected linear layers of this backend")
    bias = output_bias(uploads, layers, column, width)
    kind = NO_BIAS if bias is None else OUTPUT_BIAS
    merged = None if merger is None else merger(layers)
    if merged is not None:
        return [PackedColumns(merged, kind, bias, np.array([[0, 0, merged.n, column]], np.int32))]
    parts = []
    for layer in layers:
        columns = expert_columns(layer.store.n, layer.offset, layer.out_features)
        columns[:, 3] += column
        column += layer.out_features
        parts.append(PackedColumns(layer.store, kind, bias, columns))
    return parts


def output_bias(uploads: Uploads, layers: Sequence[OpenClLinear], column: int, width: int) -> cl.Buffer | None:
    """The biases of layers by the columns of rows of ``width``, 0 in all other columns; None if there are none."""
    if all(layer.bias_buffer is None for layer in layers):
        return None
    bias, runtime = np.zeros(width, np.float32), uploads.runtime
    for layer in layers:
        end = column + layer.out_features
        if layer.bias_buffer is not None:
            with runtime.loading_lock:
                cl.enqueue_copy(runtime.loading_queue, bias[column:end], layer.bias_buffer, is_blocking=True)
        column = end
    return uploads.new(bias, "bias")
