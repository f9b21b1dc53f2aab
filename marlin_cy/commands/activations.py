"""What a run feeds its MoE layers: recorded activations, or random ones."""

from typing import NamedTuple

import ml_dtypes
import numpy as np

from marlin_cy.checkpoints.safetensors import SafetensorsFile
from marlin_cy.errors import CheckpointError

__all__ = ["LayerActivations", "RandomActivations", "RecordedActivations"]

DEFAULT_TOKENS = 128
FLOAT_DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)


class LayerActivations(NamedTuple):
    """One layer's: hidden states ``[tokens, hidden]``, router logits ``[tokens, experts]``, and the
    output ``[tokens, hidden]`` that was recorded for them, or None."""

    hidden_states: np.ndarray
    router_logits: np.ndarray
    moe_output: np.ndarray | None


class RecordedActivations:
    """Activations from a safetensors file.

    For each layer i it holds ``layers.i.hidden_states``, ``layers.i.router_logits`` and
    ``layers.i.moe_output`` in float32, float16 or bfloat16.

    Parameters
    ----------
    path : Path
    tokens : int, optional
        Give the first so many tokens alone; all of them when left out.

    Raises
    ------
    CheckpointError
        The file is missing or damaged.
    """

    def __init__(self, path, tokens=None):
        self.path = path
        self._tokens = tokens
        self._file = SafetensorsFile(path)

    @property
    def description(self):
        """Where they come from, in a few words."""
        return f"recorded activations from {self.path.name}"

    def layer(self, index, hidden_size, num_experts):
        """One layer's activations; a :class:`CheckpointError` where they do not fit its shape."""
        hidden_states = self._tensor(index, "hidden_states", None, hidden_size)
        recorded = len(hidden_states)
        router_logits = self._tensor(index, "router_logits", recorded, num_experts)
        moe_output = self._tensor(index, "moe_output", recorded, hidden_size)
        first = slice(self._tokens)
        return LayerActivations(hidden_states[first], router_logits[first], moe_output[first])

    def _tensor(self, index, kind, tokens, width):
        name = f"layers.{index}.{kind}"
        array = self._file.tensor(name)
        expected = ("tokens" if tokens is None else tokens, width)
        if array.ndim != 2 or array.shape[1] != width or tokens not in (None, len(array)) or len(array) == 0:
            raise CheckpointError(f"got shape {array.shape}, expected {expected}", file=self.path, tensor=name)
        if array.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"got dtype {array.dtype}, expected float32, float16 or bfloat16", file=self.path, tensor=name
            )
        return array


class RandomActivations:
    """Normal activations from a fixed seed, for a checkpoint that has none recorded.

    Parameters
    ----------
    tokens : int, optional
        128 when left out.
    seed : int
    """

    def __init__(self, tokens=None, seed=0):
        self._tokens = tokens or DEFAULT_TOKENS
        self._seed = seed

    @property
    def description(self):
        """Where they come from, in a few words."""
        return f"random normal activations (seed {self._seed}): none are recorded"

    def layer(self, index, hidden_size, num_experts):
        """One layer's activations, float32; the same at each call."""
        random = np.random.default_rng((self._seed, index))
        return LayerActivations(
            random.standard_normal((self._tokens, hidden_size), dtype=np.float32),
            random.standard_normal((self._tokens, num_experts), dtype=np.float32),
            None,
        )
