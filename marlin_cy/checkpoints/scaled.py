"""The linear layers of 8-bit numbers with scales, found by their tensors: their checks, and their weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from marlin_cy.checkpoints.argument_errors import as_checkpoint_error
from marlin_cy.errors import UnsupportedError
from marlin_cy.formats import scaled
from marlin_cy.formats.json_fields import JsonObject

if TYPE_CHECKING:
    from marlin_cy.checkpoints.contents import Tensors

__all__ = ["ScaledLayers", "find_scaled"]

WEIGHT = ".weight"
FP8 = "F8_E4M3"


def find_scaled(tensors: Tensors, config: JsonObject) -> ScaledLayers:
    """The linear layers in FP8 and int8 of a checkpoint whose ``config.json`` is ``config``."""
    found: Any = config.get("quantization_config")
    found = found if isinstance(found, dict) else {}
    source = found.get("source")  # a packed folder keeps the settings of its source
    return ScaledLayers(tensors, scaled.block_size(source if isinstance(source, dict) else found))


class ScaledLayers:
    """The linear layers in FP8 and int8 of a checkpoint; :mod:`marlin_cy.formats.scaled` describes their tensors.

    Parameters
    ----------
    tensors : SafetensorsFolder or GgufTensors
    block : (int, int), optional
        Rows of N and of K of a block of scales.

    Attributes
    ----------
    scales : dict of str to str
        The name of each layer's scale, by the layer's name.
    alone : list of str
        The names of weights in FP8 that have no scale, or several.
    """

    def __init__(self, tensors: Tensors, block: tuple[int, int] = scaled.BLOCK) -> None:
        self._tensors, self._block = tensors, block
        self.scales: dict[str, str] = {}
        self.alone: list[str] = []
        for name in tensors.names:
            dtype = tensors.info(name).dtype
            if name.endswith(WEIGHT) and dtype in scaled.WEIGHT_DTYPES:
                module = name.removesuffix(WEIGHT)
                found = [
                    f"{module}{suffix}" for suffix in scaled.SCALE_SUFFIXES[dtype] if f"{module}{suffix}" in tensors
                ]
                if len(found) == 1 and f"{module}{scaled.ZERO_POINTS}" not in tensors:
                    self.scales[module] = found[0]
                elif dtype == FP8:
                    self.alone.append(name)

    @property
    def weights(self) -> list[str]:
        """The names of the weights of these layers, and of those in ``alone``."""
        return [*(f"{module}{WEIGHT}" for module in self.scales), *self.alone]

    def has_weight(self, tensor: str) -> bool:
        """Whether a tensor is the weight of such a layer."""
        return tensor.endswith(WEIGHT) and tensor.removesuffix(WEIGHT) in self.scales

    def kind(self, module: str) -> str:
        """What a scale belongs to: "tensor", "channel" or "block".

        Raises
        ------
        CheckpointError
            The scale has a shape or a dtype that it cannot have.
        """
        weight, scale = self._tensors.info(f"{module}{WEIGHT}"), self._tensors.info(self.scales[module])
        if len(weight.shape) != 2 or 0 in weight.shape:
            raise self._tensors.error(f"{module}{WEIGHT}", f"got shape {weight.shape}, expected two dimensions")
        kind = scaled.kind_of((weight.shape[0], weight.shape[1]), scale.shape, self._block)
        if kind is None or scale.dtype not in scaled.SCALE_DTYPES:
            raise self._tensors.error(
                self.scales[module],
                f"got {scale.dtype} {scale.shape}, expected {', '.join(scaled.SCALE_DTYPES)}: one scale, one for each "
                f"of {weight.shape[0]} outputs, or one for each block of {self._block[0]} by {self._block[1]} elements "
                f"of {weight.shape}",
            )
        return kind

    def tensors_of(self, module: str) -> list[str]:
        """The names of a layer's weight and scale; none of another layer."""
        return [f"{module}{WEIGHT}", self.scales[module]] if module in self.scales else []

    def check(self, tensor: str) -> None:
        """Refuse a weight that cannot be read, but for its values.

        Raises
        ------
        CheckpointError
        UnsupportedError
            The weight has no scale, or several.
        """
        if self.has_weight(tensor):
            self.kind(tensor.removesuffix(WEIGHT))
        elif tensor in self.alone:
            raise UnsupportedError(
                f"{self._tensors.file_of(tensor).path}, tensor {tensor!r}: {FP8} weights must have one "
                f"scale, called {' or '.join(suffix[1:] for suffix in scaled.SCALE_SUFFIXES[FP8])}"
            )

    def elements(self, module: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32], int]:
        """``(weight, scales, scale_k)`` of a linear layer, as :class:`~marlin_cy.decoder.plan.DenseLinear` has them.

        The weight is a view of the file.

        Raises
        ------
        CheckpointError
            Of :meth:`kind`; or a weight or a scale is not finite.
        """
        weight, scales = self._elements(module), self._scales(module)
        with as_checkpoint_error(self._tensors.file_of(f"{module}{WEIGHT}").path, f"{module}{WEIGHT}"):
            scaled.check_elements(weight)
        return weight, *scaled.by_rows(scales, weight.shape, self._block)

    def weight(self, module: str, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
        """The weight of a linear layer, ``[N, K]``, each element rounded once.

        Raises
        ------
        CheckpointError
            As :meth:`elements`.
        """
        weight, scales = self._elements(module), self._scales(module)
        with as_checkpoint_error(self._tensors.file_of(f"{module}{WEIGHT}").path, f"{module}{WEIGHT}"):
            matrix = scaled.dequantize(weight, scales, self._block, dtype)
        self._tensors.release(f"{module}{WEIGHT}")
        return matrix

    def floats(self, tensor: str) -> npt.NDArray[Any]:
        """A tensor of a layer that is not quantised: a view of the file, or a weight of 8 bits in float32.

        Raises
        ------
        CheckpointError, UnsupportedError
            As :meth:`check` and :meth:`weight`.
        """
        self.check(tensor)
        return self.weight(tensor.removesuffix(WEIGHT)) if self.has_weight(tensor) else self._tensors.tensor(tensor)

    def _elements(self, module: str) -> npt.NDArray[Any]:
        self.kind(module)
        name = f"{module}{WEIGHT}"
        info = self._tensors.info(name)
        weight: npt.NDArray[Any] = self._tensors.raw(name).view(scaled.WEIGHT_DTYPES[info.dtype])
        return weight.reshape(info.shape)

    def _scales(self, module: str) -> npt.NDArray[np.float32]:
        name = self.scales[module]
        with as_checkpoint_error(self._tensors.file_of(name).path, name):
            return scaled.scale_values(self._tensors.tensor(name))
