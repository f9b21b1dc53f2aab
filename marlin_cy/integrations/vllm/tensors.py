"""The tensors of a layer that runs packed, as vLLM's loader hands them over.

vLLM's loader looks up a parameter by its name, and calls the parameter's ``weight_loader`` with the tensor of the
file. The parameters here are empty: the tensors are kept as they are, views of the mapped files, until the layer is
packed. The layer in the order of the checkpoint is therefore never allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import get_current_vllm_config

from marlin_cy.errors import MarlinError, UnsupportedError
from marlin_cy.integrations.modules import array_of

if TYPE_CHECKING:
    from marlin_cy.formats.scheme import Scheme
    from marlin_cy.weights.canonical import CanonicalWeight

__all__ = ["BIAS", "LayerTensors", "canonical", "expected_dtypes", "naming", "order_of", "refused"]

BIAS = "bias"
"""The part of a bias, beside the suffixes of a scheme."""

DTYPES = {
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}

MAPPED_FORMATS = ("auto", "hf", "safetensors")
"""Loaders whose tensors stay valid: those of other loaders may be buffers that the loader uses again."""


class LayerTensors:
    """Collects the tensors of a layer.

    Parameters
    ----------
    layer : torch.nn.Module
        Gets the empty parameters.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._copies = get_current_vllm_config().load_config.load_format not in MAPPED_FORMATS
        self._parameters: list[str] = []
        self._found: dict[Hashable, dict[str, npt.NDArray[Any]]] = {}

    def expect(self, parameter: str, dtype: str, loader: Callable[..., Any]) -> None:
        """Add an empty parameter, for which vLLM's loader calls ``loader(parameter, tensor, ...)``.

        ``dtype`` is that of the files, by safetensors' name: vLLM warns about other dtypes.
        """
        empty = torch.nn.Parameter(torch.empty(0, dtype=DTYPES[dtype]), requires_grad=False)
        empty.weight_loader = loader
        self._layer.register_parameter(parameter, empty)
        self._parameters.append(parameter)

    def add(self, part: Hashable, suffix: str, tensor: torch.Tensor) -> None:
        """Keep a tensor: ``part`` says of which weight, ``suffix`` which of the weight's tensors."""
        kept = tensor.detach().clone() if self._copies else tensor.detach()
        self._found.setdefault(part, {})[suffix] = array_of(kept)

    @property
    def parts(self) -> list[Hashable]:
        """The parts of which there are tensors."""
        return list(self._found)

    def get(self, part: Hashable) -> dict[str, npt.NDArray[Any]]:
        """The tensors of a part by suffix, contiguous; empty if there are none."""
        return {suffix: np.ascontiguousarray(array) for suffix, array in self._found.get(part, {}).items()}

    def pop(self, part: Hashable) -> dict[str, npt.NDArray[Any]]:
        """As :meth:`get`. The tensors are forgotten here."""
        found = self.get(part)
        self._found.pop(part, None)
        return found

    def close(self) -> None:
        """Remove the empty parameters."""
        for parameter in self._parameters:
            delattr(self._layer, parameter)
        self._parameters.clear()
        self._found.clear()


def canonical(
    arrays: dict[str, npt.NDArray[Any]], scheme: Scheme, name: str
) -> tuple[CanonicalWeight, npt.NDArray[Any] | None]:
    """One weight from its tensors by suffix, and its bias or None.

    Raises
    ------
    UnsupportedError
        A tensor is missing or invalid. The message has ``name``.
    """
    if scheme.marker not in arrays:
        raise refused(name, f"got no tensor {scheme.marker.lstrip('._')!r} of format {scheme.format!r}")
    with naming(name):
        arrays[scheme.marker] = marker = in_own_shape(arrays[scheme.marker], scheme)
        k, n = scheme.sizes(marker.shape)
        missing = [suffix for suffix, spec in scheme.tensors(k, n).items() if spec.required and suffix not in arrays]
        if missing:
            raise ValueError(f"got no tensor {missing[0].lstrip('._')!r} of format {scheme.format!r}")
        weight = scheme.to_canonical({key: arrays[key] for key in scheme.tensors(k, n) if key in arrays}, k, n)
    return weight, arrays.get(BIAS)


def order_of(arrays: dict[str, npt.NDArray[Any]], scheme: Scheme, name: str) -> npt.NDArray[np.int32] | None:
    """The ``g_idx`` of a weight; None for K's own order. Raises as :func:`canonical`."""
    if scheme.order not in arrays or scheme.marker not in arrays:
        return None
    with naming(name):
        return scheme.g_idx(arrays[scheme.order], *scheme.sizes(arrays[scheme.marker].shape))


def in_own_shape(marker: npt.NDArray[Any], scheme: Scheme) -> npt.NDArray[Any]:
    """gpt-oss's codes with an axis of blocks, which vLLM removes."""
    flat = scheme.format == "mxfp4" and marker.ndim == 2
    return marker.reshape(len(marker), -1, scheme.group_size // 2) if flat else marker


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Give errors about a layer's tensors and sizes the layer's name.

    Raises
    ------
    UnsupportedError
    """
    try:
        yield
    except (MarlinError, ValueError, TypeError, IndexError) as error:
        raise refused(name, error) from error


def refused(name: str, reason: object) -> UnsupportedError:
    """The error for a layer that cannot run packed."""
    return UnsupportedError(f"{name}: {reason}")


def expected_dtypes(schemes: Iterable[Scheme], k: int, n: int) -> dict[str, tuple[str, ...]]:
    """The accepted dtypes of each tensor of a ``[k, n]`` layer, by suffix. Raises as :meth:`Scheme.tensors`."""
    return {suffix: spec.dtypes for scheme in schemes for suffix, spec in scheme.tensors(k, n).items()}
