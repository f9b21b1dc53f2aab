"""The interface between a checkpoint format and the rest of the library.

A format's module has a subclass of :class:`Scheme`. The subclass knows the names, dtypes and shapes of a linear layer's
tensors, and converts them to canonical form. An instance holds the settings of one checkpoint.
``docs/adding-a-format.md`` says how to add a format.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cy.weights.canonical import CanonicalWeight
from marlin_cy.weights.sizes import integer_codes

__all__ = ["Scheme", "TensorSpec"]


@dataclass(frozen=True)
class TensorSpec:
    """The required shape and dtype of a tensor of a linear layer.

    Attributes
    ----------
    shape : tuple of int
        For one expert. A tensor of all experts has an axis of experts in front.
    dtypes : tuple of str
        The accepted dtypes, by safetensors' names: ``"I32"``, ``"F16"``.
    required : bool
    """

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    required: bool = True


class Scheme(ABC):
    """How a checkpoint stores its quantised linear layers: a format with one checkpoint's settings.

    A tensor's name is its module's name and a suffix: ``model.layers.0.mlp.up_proj`` and ``.qweight``.

    Attributes
    ----------
    format : str
        The format's name: ``"gptq"``, ``"awq"``.
    marker : str
        The suffix of a tensor that every quantised layer has, and no other layer.
    marker_dtypes : tuple of str or None
        The dtypes of that tensor, by safetensors' names, if other layers have a tensor of this suffix too.
    scales : str
        The suffix of the scales.
    order : str or None
        The suffix of the tensor that says which group each row of K is in, if the format has one.
    bits : int
        Of a code.
    widths : tuple of int
        The values of ``bits`` that the format supports.
    codes : str
        The name of the code type, a key of :data:`~marlin_cy.weights.code_types.CODE_TYPES`.
    group_size : int
        As stated in the checkpoint: -1 means one group of all of K.
    """

    format: str
    marker: str
    marker_dtypes: tuple[str, ...] | None = None
    scales: str
    order: str | None = None
    bits: int = 4
    widths: tuple[int, ...] = (4,)
    group_size: int

    @property
    def codes(self) -> str:
        """Unsigned integers of :attr:`bits`, unless a format has other code types."""
        return integer_codes(self.bits)

    def marks(self, tensor: str, dtype: str) -> bool:
        """Whether a tensor of this name and dtype (safetensors' name) is the :attr:`marker` of a quantised layer."""
        return tensor.endswith(self.marker) and (self.marker_dtypes is None or dtype in self.marker_dtypes)

    @property
    @abstractmethod
    def symmetric(self) -> bool:
        """Whether every zero point is the symmetric one, or the code type has no zero points."""

    @property
    @abstractmethod
    def act_order(self) -> bool:
        """Whether groups are not runs of consecutive rows of K (``desc_act``), so that :attr:`order` is required."""

    def for_module(self, module: str) -> Scheme:
        """The scheme of one linear layer, if a checkpoint's settings differ by name; else this scheme.

        Raises
        ------
        UnsupportedError
            The layer is not quantised, or no kernel supports its settings, such as 8 bits.
        """
        return self

    @abstractmethod
    def sizes(self, marker_shape: tuple[int, ...]) -> tuple[int, int]:
        """``(k, n)`` of the layer whose marker tensor has this shape.

        Raises
        ------
        ValueError
            No layer's marker tensor has this shape.
        """

    @abstractmethod
    def checked_group_size(self, k: int, n: int) -> int:
        """Number of rows of K that share a scale, -1 resolved, after all sizes were checked.

        Raises
        ------
        ValueError, UnsupportedError
            As :func:`marlin_cy.weights.sizes.checked_group_size`.
        """

    @abstractmethod
    def tensors(self, k: int, n: int) -> dict[str, TensorSpec]:
        """The :class:`TensorSpec` of each tensor of a ``[k, n]`` layer, by suffix. The sizes were checked."""

    def scale_dtype(self, stored: npt.DTypeLike) -> np.dtype[Any]:
        """The dtype of canonical scales, float16 or bfloat16, from the dtype of the stored ones."""
        return np.dtype(stored)

    def g_idx(self, array: npt.ArrayLike, k: int, n: int) -> npt.NDArray[np.int32] | None:
        """A layer's canonical ``g_idx`` from its :attr:`order` tensor: int32 ``[k]``, or None for K's own order.

        Only a format with an :attr:`order` tensor has this method.

        Raises
        ------
        TypeError, ValueError, IndexError
            As :func:`marlin_cy.weights.sizes.normalised_g_idx`.
        """
        raise NotImplementedError

    @abstractmethod
    def to_canonical(self, arrays: Mapping[str, npt.NDArray[Any]], k: int, n: int, label: str = "") -> CanonicalWeight:
        """One linear layer in canonical form.

        Parameters
        ----------
        arrays : dict
            The layer's tensors by suffix. Tensors that are not required may be missing.
        k, n : int
            Input and output width.
        label : str
            Follows a tensor's name in messages: ``" of expert 3"``.

        Raises
        ------
        TypeError, ValueError, IndexError, UnsupportedError
            The tensors contradict the format. The message has the tensor's name, without a leading dot.
        """
