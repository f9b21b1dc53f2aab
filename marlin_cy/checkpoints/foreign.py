"""Layers of a checkpoint in a format that this library does not read, found by the names of their tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING

from marlin_cy.checkpoints.packed import PACKED
from marlin_cy.checkpoints.safetensors import DTYPES, SafetensorsFolder
from marlin_cy.checkpoints.scaled import ScaledLayers
from marlin_cy.errors import UnsupportedError
from marlin_cy.formats.scheme import Scheme

if TYPE_CHECKING:
    from marlin_cy.checkpoints.contents import Tensors

__all__ = ["foreign_layers", "unreadable_tensors"]

SUFFIXES = (
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_global_scale",
    ".weight_packed",
    ".weight_scale_2",
    ".qweight",
    ".SCB",
    ".weight.absmax",
)
"""Tensors that quantised layers have, in the formats of all tools. Scales beside ``weight`` are those of 8 bits."""


def foreign_layers(
    tensors: Tensors, scheme: Scheme | None, scaled: ScaledLayers, is_passed_over: Callable[[str], bool]
) -> Iterator[UnsupportedError]:
    """An error for each quantised layer that the checkpoint's own format does not have; none for GGUF."""
    if not isinstance(tensors, SafetensorsFolder):
        return
    seen = set()
    for name in tensors.names:
        suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
        module = name.removesuffix(suffix or "")
        if suffix is None or module in seen or module in scaled.scales or is_passed_over(name):
            continue
        marker = f"{module}{scheme.marker if scheme else PACKED}"
        if marker in tensors and (scheme is None or scheme.marks(marker, tensors.info(marker).dtype)):
            continue
        seen.add(module)
        yield UnsupportedError(f"{tensors.file_of(name).path}: {reason(tensors, scheme, module, suffix)}")


def reason(tensors: SafetensorsFolder, scheme: Scheme | None, module: str, suffix: str) -> str:
    """Why a layer is not supported: as the config says, or else by its tensors."""
    if scheme is not None:
        try:
            scheme.for_module(module)
        except UnsupportedError as error:
            return str(error)
    weight = f"{module}.weight"
    kind = f"{tensors.info(weight).dtype} weights" if weight in tensors else f"a tensor {suffix[1:]}"
    name = "packed" if scheme is None else scheme.format
    return f"{module}: {kind} with {suffix[1:]}, which is not a layer of format {name!r}"


def unreadable_tensors(
    tensors: Tensors, known: Collection[str], is_passed_over: Callable[[str], bool]
) -> Iterator[UnsupportedError]:
    """An error for each tensor of a dtype that no model has outside of quantised layers; none for GGUF.

    Parameters
    ----------
    tensors : SafetensorsFolder or GgufTensors
    known : collection of str
        The names of tensors of quantised layers.
    is_passed_over : callable
        Whether a tensor is not needed.
    """
    if not isinstance(tensors, SafetensorsFolder):
        return
    for name in tensors.names:
        dtype = tensors.info(name).dtype
        if (dtype not in DTYPES or dtype.startswith("F8_")) and name not in known and not is_passed_over(name):
            yield UnsupportedError(
                f"{tensors.file_of(name).path}, tensor {name!r}: dtype {dtype} is not supported outside of quantised "
                "layers"
            )
