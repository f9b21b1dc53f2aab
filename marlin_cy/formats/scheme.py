"""What a checkpoint format is to the rest of the library.

A format's module has a subclass of :class:`Scheme`, which knows the names, dtypes and shapes of a linear
layer's tensors and brings them to canonical form. An instance is one checkpoint's settings of it.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from marlin_cy.weights.int4 import Int4Weight

__all__ = ["Scheme", "TensorSpec"]


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor of a linear layer has to be.

    Attributes
    ----------
    shape : tuple of int
        For one expert; fused experts have an axis of experts in front.
    dtypes : tuple of str
        Any of these, by safetensors' names: ``"I32"``, ``"F16"``.
    required : bool
    """

    shape: tuple
    dtypes: tuple
    required: bool = True


class Scheme(ABC):
    """How a checkpoint stores its quantised linear layers: a format, with one checkpoint's settings.

    A layer's tensors are named by its module's name and a suffix: ``model.layers.0.mlp.up_proj`` and
    ``.qweight``.

    Attributes
    ----------
    format : str
        The format's name: ``"gptq"``, ``"awq"``.
    marker : str
        The suffix of the tensor that a layer has if, and only if, it is quantised.
    scales : str
        The suffix of its scales.
    order : str or None
        The suffix of the tensor that says which group each row of K is in, where the format has one.
    codes : str
        What a 4-bit code stands for, one of :data:`~marlin_cy.weights.int4.CODES`.
    group_size : int
        As the checkpoint says it: -1 for one group of all of K.
    """

    format: str
    marker: str
    scales: str
    order: str | None = None
    codes: str = "uint4"
    group_size: int

    def for_module(self, module) -> "Scheme":
        """The scheme of one linear layer, where a checkpoint's settings differ by name; else this one.

        Raises
        ------
        UnsupportedError
            The layer's settings are some that there are no kernels for; 8 bits, say.
        """
        return self

    @abstractmethod
    def sizes(self, marker_shape) -> tuple:
        """``(k, n)`` of the layer whose marker tensor has this shape.

        Raises
        ------
        ValueError
            A shape that no layer's has.
        """

    @abstractmethod
    def checked_group_size(self, k, n) -> int:
        """Rows of K that share a scale, -1 resolved, after the sizes were found to be supported.

        Raises
        ------
        ValueError, UnsupportedError
            As :func:`marlin_cy.formats.gptq.checked_group_size`.
        """

    @abstractmethod
    def tensors(self, k, n) -> dict:
        """The :class:`TensorSpec` of each of a layer's tensors, by suffix; the sizes were checked."""

    def scale_dtype(self, stored):
        """The dtype of canonical scales, float16 or bfloat16, from that of stored ones (an ndarray's)."""
        return np.dtype(stored)

    def g_idx(self, array, k, n):
        """A layer's canonical ``g_idx`` from its :attr:`order` tensor: int32 ``[k]``, None for K's own order.

        Raises
        ------
        TypeError, ValueError, IndexError
            As :func:`marlin_cy.formats.gptq.normalised_g_idx`.
        """
        raise NotImplementedError

    @abstractmethod
    def to_canonical(self, arrays, k, n, label="") -> Int4Weight:
        """One linear layer in canonical form.

        Parameters
        ----------
        arrays : dict
            The layer's tensors by suffix; optional ones may be missing.
        k, n : int
            Input and output width.
        label : str
            Follows a tensor's name in messages: ``" of expert 3"``.

        Raises
        ------
        TypeError, ValueError, IndexError, UnsupportedError
            Tensors that contradict the format, with the tensor's name without its dot.
        """
