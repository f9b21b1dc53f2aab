"""The FP8 linear layers of a checkpoint, found by their tensors: their checks, and their weights as floats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from marlin_cy.checkpoints.argument_errors import as_checkpoint_error
from marlin_cy.errors import UnsupportedError
from marlin_cy.formats import float8
from marlin_cy.formats.json_fields import JsonObject

if TYPE_CHECKING:
    from marlin_cy.checkpoints.contents import Tensors

__all__ = ["Float8Layers", "find_float8"]

WEIGHT = ".weight"


def find_float8(tensors: Tensors, config: JsonObject) -> Float8Layers:
    """The FP8 linear layers of a checkpoint whose ``config.json`` is ``config``."""
    found: Any = config.get("quantization_config")
    found = found if isinstance(found, dict) else {}
    source = found.get("source")  # a packed folder keeps the settings of its source
    return Float8Layers(tensors, float8.block_size(source if isinstance(source, dict) else found))


class Float8Layers:
    """The FP8 linear layers of a checkpoint; :mod:`marlin_cy.formats.float8` describes their tensors.

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

    def __init__(self, tensors: Tensors, block: tuple[int, int] = float8.BLOCK) -> None:
        self._tensors, self._block = tensors, block
        self.scales: dict[str, str] = {}
        self.alone: list[str] = []
        for name in tensors.names:
            if name.endswith(WEIGHT) and tensors.info(name).dtype == float8.WEIGHT_DTYPE:
                module = name.removesuffix(WEIGHT)
                found = [f"{module}{suffix}" for suffix in float8.SCALE_SUFFIXES if f"{module}{suffix}" in tensors]
                if len(found) == 1:
                    self.scales[module] = found[0]
                else:
                    self.alone.append(name)

    @property
    def weights(self) -> list[str]:
        """The names of all weights in FP8."""
        return [*(f"{module}{WEIGHT}" for module in self.scales), *self.alone]

    def has_weight(self, tensor: str) -> bool:
        """Whether a tensor is the weight of an FP8 linear layer."""
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
        kind = float8.kind_of((weight.shape[0], weight.shape[1]), scale.shape, self._block)
        if kind is None or scale.dtype not in float8.SCALE_DTYPES:
            raise self._tensors.error(
                self.scales[module],
                f"got {scale.dtype} {scale.shape}, expected {', '.join(float8.SCALE_DTYPES)}: one scale, one for each "
                f"of {weight.shape[0]} outputs, or one for each block of {self._block[0]} by {self._block[1]} elements "
                f"of {weight.shape}",
            )
        return kind

    def tensors_of(self, module: str) -> list[str]:
        """The names of a layer's weight and scale; none if the layer is not in FP8."""
        return [f"{module}{WEIGHT}", self.scales[module]] if module in self.scales else []

    def check(self, tensor: str) -> None:
        """Refuse a weight in FP8 that cannot be read, but for its values.

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
                f"{self._tensors.file_of(tensor).path}, tensor {tensor!r}: {float8.WEIGHT_DTYPE} weights must have one "
                f"scale, called {' or '.join(suffix[1:] for suffix in float8.SCALE_SUFFIXES)}"
            )

    def elements(self, module: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32], int]:
        """``(weight, scales, scale_k)`` of a linear layer, as :class:`~marlin_cy.decoder.plan.DenseLinear` has them.

        The weight is a view of the file.

        Raises
        ------
        CheckpointError
            Of :meth:`kind`; or a weight or a scale is not finite.
        """
        codes, scales = self._codes(module), self._scales(module)
        with as_checkpoint_error(self._tensors.file_of(f"{module}{WEIGHT}").path, f"{module}{WEIGHT}"):
            float8.check_elements(codes)
        return codes.view(ml_dtypes.float8_e4m3fn), *float8.by_rows(scales, codes.shape, self._block)

    def weight(self, module: str, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
        """The weight of a linear layer, ``[N, K]``, each element rounded once.

        Raises
        ------
        CheckpointError
            As :meth:`elements`.
        """
        codes, scales = self._codes(module), self._scales(module)
        with as_checkpoint_error(self._tensors.file_of(f"{module}{WEIGHT}").path, f"{module}{WEIGHT}"):
            matrix = float8.dequantize(codes, scales, self._block, dtype)
        self._tensors.release(f"{module}{WEIGHT}")
        return matrix

    def floats(self, tensor: str) -> npt.NDArray[Any]:
        """A tensor of a layer that is not quantised: a view of the file, or an FP8 weight in float32.

        Raises
        ------
        CheckpointError, UnsupportedError
            As :meth:`check` and :meth:`weight`.
        """
        self.check(tensor)
        return self.weight(tensor.removesuffix(WEIGHT)) if self.has_weight(tensor) else self._tensors.tensor(tensor)

    def _codes(self, module: str) -> npt.NDArray[np.uint8]:
        self.kind(module)
        name = f"{module}{WEIGHT}"
        return self._tensors.raw(name).reshape(self._tensors.info(name).shape)

    def _scales(self, module: str) -> npt.NDArray[np.float32]:
        name = self.scales[module]
        with as_checkpoint_error(self._tensors.file_of(name).path, name):
            return float8.scale_values(self._tensors.tensor(name))
