"""The inputs of the MoE layers of a run: recorded or random activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from marlin_cy.checkpoints.safetensors import SafetensorsFile
from marlin_cy.errors import CheckpointError

__all__ = ["LayerActivations", "RandomActivations", "RecordedActivations"]

DEFAULT_TOKENS = 128
FLOAT_DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)


class LayerActivations(NamedTuple):
    """The activations of one layer.

    Attributes
    ----------
    hidden_states : float array ``[tokens, hidden_size]``
    router_logits : float array ``[tokens, num_experts]``
    moe_output : float array ``[tokens, hidden_size]`` or None
        The recorded output of the layer.
    """

    hidden_states: npt.NDArray[Any]
    router_logits: npt.NDArray[Any]
    moe_output: npt.NDArray[Any] | None


class RecordedActivations:
    """Activations from a safetensors file.

    For each layer i it holds ``layers.i.hidden_states``, ``layers.i.router_logits`` and
    ``layers.i.moe_output`` in float32, float16 or bfloat16.

    Parameters
    ----------
    path : Path
    tokens : int, optional
        Use only the first ``tokens`` tokens; all by default.

    Raises
    ------
    CheckpointError
        The file is missing or damaged.
    """

    def __init__(self, path: Path, tokens: int | None = None) -> None:
        self.path = path
        self._tokens = tokens
        self._file = SafetensorsFile(path)

    @property
    def description(self) -> str:
        """The source of the activations, in a few words."""
        return f"recorded activations from {self.path.name}"

    def layer(self, index: int, hidden_size: int, num_experts: int) -> LayerActivations:
        """The activations of one layer; a :class:`CheckpointError` if their shapes do not match the layer."""
        hidden_states = self._tensor(index, "hidden_states", None, hidden_size)
        recorded = len(hidden_states)
        router_logits = self._tensor(index, "router_logits", recorded, num_experts)
        moe_output = self._tensor(index, "moe_output", recorded, hidden_size)
        first = slice(self._tokens)
        return LayerActivations(hidden_states[first], router_logits[first], moe_output[first])

    def _tensor(self, index: int, kind: str, tokens: int | None, width: int) -> npt.NDArray[Any]:
        name = f"layers.{index}.{kind}"
        array: npt.NDArray[Any] = self._file.tensor(name)
        expected = ("tokens" if tokens is None else tokens, width)
        if array.ndim != 2 or array.shape[1] != width or tokens not in (None, len(array)) or len(array) == 0:
            raise CheckpointError(f"got shape {array.shape}, expected {expected}", file=self.path, tensor=name)
        if array.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"got dtype {array.dtype}, expected float32, float16 or bfloat16", file=self.path, tensor=name
            )
        return array


class RandomActivations:
    """Normally distributed activations from a fixed seed, for a checkpoint without recorded activations.

    Parameters
    ----------
    tokens : int, optional
        128 by default.
    seed : int
    """

    def __init__(self, tokens: int | None = None, seed: int = 0) -> None:
        self._tokens = tokens or DEFAULT_TOKENS
        self._seed = seed

    @property
    def description(self) -> str:
        """The source of the activations, in a few words."""
        return f"random normal activations (seed {self._seed}), as none are recorded"

    def layer(self, index: int, hidden_size: int, num_experts: int) -> LayerActivations:
        """The activations of one layer, float32; the same in each call."""
        random = np.random.default_rng((self._seed, index))
        return LayerActivations(
            random.standard_normal((self._tokens, hidden_size), dtype=np.float32),
            random.standard_normal((self._tokens, num_experts), dtype=np.float32),
            None,
        )
