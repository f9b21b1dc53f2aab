"""Packed folders in vLLM: layers are mapped in place, and share their memory with all processes that map them.

vLLM's loader passes over the packed tensors. The layers are opened by this library when vLLM has loaded the rest.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlin_cy.backends import get_backend
from marlin_cy.checkpoints.checkpoint import Checkpoint, open_checkpoint
from marlin_cy.checkpoints.packed import G_IDX, PACKED
from marlin_cy.errors import UnsupportedError
from marlin_cy.integrations.vllm.experts import ExpertsMethod
from marlin_cy.integrations.vllm.linear import LinearMethod
from marlin_cy.integrations.vllm.tensors import naming, refused

if TYPE_CHECKING:
    from marlin_cy.integrations.modules import Contexts

__all__ = ["PASSED_OVER", "StoredExpertsMethod", "StoredLinearMethod", "experts_prefixes", "opened", "stored_linears"]

PASSED_OVER = (PACKED, G_IDX)
"""The suffixes of tensors that vLLM's loader need not see."""

ONE_PROCESS = (
    "a packed folder is mapped as it is, and its layers are not divided: with tensor or expert parallelism, use the "
    "checkpoint from which it was packed"
)


@cache
def opened(folder: str) -> Checkpoint:
    """The packed folder, once in each process.

    Raises
    ------
    UnsupportedError
        vLLM was given a name in place of a local folder.
    CheckpointError
        As :func:`marlin_cy.open_checkpoint`.
    """
    if not Path(folder).is_dir():
        raise UnsupportedError(f"model: got {folder!r}, expected a local folder, as the model is packed")
    return open_checkpoint(folder, get_backend("cpu"))


def stored_linears(folder: str) -> list[str]:
    """The names of a folder's packed linear layers that are not routed experts."""
    checkpoint = opened(folder)
    return [name for name in checkpoint.linears if not checkpoint.is_passed_over(name)]


def experts_prefixes(folder: str) -> list[str]:
    """The names of the routed experts of a folder's layers."""
    checkpoint = opened(folder)
    return [f"{checkpoint.moe_block(layer)}.experts" for layer in checkpoint.moe_layers]


class StoredLinearMethod(LinearMethod):
    """How vLLM runs a linear layer of a packed folder, which may be several layers of it side by side.

    Parameters
    ----------
    name : str
        The layer's name in vLLM.
    folder : str
    names : list of str
        Of the layers in the folder.
    contexts : Contexts
    """

    def __init__(self, name: str, folder: str, names: list[str], contexts: Contexts) -> None:
        super().__init__(name, contexts)
        self._folder, self._names = folder, names

    def create_weights(self, layer: Any, *sizes: Any, **extra_weight_attrs: Any) -> None:
        """Called by vLLM when the layer is made."""
        if layer.tp_size > 1:
            raise refused(self._name, ONE_PROCESS)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Called by vLLM after the other weights are loaded: map the layers."""
        with naming(self._name):
            self._use([opened(self._folder).linear(name) for name in self._names])


class StoredExpertsMethod(ExpertsMethod):
    """How vLLM runs the routed experts of a layer of a packed folder.

    Parameters
    ----------
    name : str
        The experts' name in vLLM.
    moe : FusedMoEConfig
    folder : str
    contexts : Contexts
    """

    def __init__(self, name: str, moe: Any, folder: str, contexts: Contexts) -> None:
        super().__init__(name, moe, contexts)
        self._folder = folder

    def create_weights(self, layer: Any, *sizes: Any, **options: Any) -> None:
        """Called by vLLM when the layer is made."""
        if layer.moe_config.tp_size > 1 or layer.expert_map is not None:
            raise refused(self._name, ONE_PROCESS)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Called by vLLM after the other weights are loaded: map the experts."""
        number = re.search(r"\blayers\.(\d+)\.", f"{self._name}.")
        assert number is not None, self._name
        with naming(self._name):
            stored = opened(self._folder).experts(int(number[1]))
            self._use(layer, stored.gate_up, stored.down, layer.top_k, stored.activation)
