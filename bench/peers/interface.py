"""The interface of every peer: how it loads weights, and which of its methods are timed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cy import reference
from marlin_cy.errors import UnsupportedError
from marlin_cy.weights.canonical import CanonicalWeight

__all__ = ["ACCURACIES", "Array", "Experts", "Peer", "Projection", "RoutedProduct"]

ACCURACIES = ("int8", "bf16", "int16", "float32")
"""Types that activations are computed in, the least accurate first."""

Array = npt.NDArray[Any]


class Projection(ABC):
    """One weight ``[K, N]`` as a peer stores it.

    Only :meth:`run` is timed. :meth:`prepare` and :meth:`result` convert between NumPy arrays and the peer's own form.
    """

    @abstractmethod
    def prepare(self, x: Array) -> Any:
        """The input of :meth:`run`, in the peer's own form, from float32 ``[M, K]``."""

    @abstractmethod
    def run(self, prepared: Any) -> Any:
        """The product, in the peer's own form. May be called again with the same input."""

    @abstractmethod
    def result(self, out: Any) -> Array:
        """float32 ``[M, N]`` on the host, from what :meth:`run` returned."""

    def rows(self, x: Array) -> Array:
        """float32 ``[M, N]``, the product of float32 ``[M, K]`` with the weight."""
        return self.result(self.run(self.prepare(x)))


class RoutedProduct(ABC):
    """One weight ``[K, N]`` per expert. Each token is multiplied by the weights of the experts it is routed to.

    Only :meth:`run` is timed, as with :class:`Projection`.
    """

    @abstractmethod
    def prepare(self, x: Array, topk_ids: Array) -> Any:
        """The input of :meth:`run`. The arguments are those of :meth:`slots`."""

    @abstractmethod
    def run(self, prepared: Any) -> Any:
        """The products, in the peer's own form. May be called again with the same input."""

    @abstractmethod
    def result(self, out: Any) -> Array:
        """float32 ``[T, top_k, N]`` on the host, from what :meth:`run` returned."""

    def slots(self, x: Array, topk_ids: Array) -> Array:
        """float32 ``[T, top_k, N]``: the product of each token with each of its experts.

        Parameters
        ----------
        x : float32 ``[T, K]``
        topk_ids : int ``[T, top_k]``
            The experts of each token, all different.
        """
        return self.result(self.run(self.prepare(x, topk_ids)))


class Experts(ABC):
    """The experts of one layer as a peer stores them: gate and up, ``silu(gate) * up``, down, weighted sum.

    Only :meth:`run` is timed, as with :class:`Projection`.
    """

    @abstractmethod
    def prepare(self, x: Array, topk_ids: Array, topk_weights: Array) -> Any:
        """The input of :meth:`run`. The arguments are those of :meth:`tokens`."""

    @abstractmethod
    def run(self, prepared: Any) -> Any:
        """The layer's output, in the peer's own form. May be called again with the same input."""

    @abstractmethod
    def result(self, out: Any) -> Array:
        """float32 ``[T, K]`` on the host, from what :meth:`run` returned."""

    def tokens(self, x: Array, topk_ids: Array, topk_weights: Array) -> Array:
        """The layer's output, float32 ``[T, K]``.

        Parameters
        ----------
        x : float32 ``[T, K]``
        topk_ids : int ``[T, top_k]``
            The experts of each token, all different.
        topk_weights : float32 ``[T, top_k]``
            Positive. The weights of a token sum to 1, because some peers normalise them.
        """
        return self.result(self.run(self.prepare(x, topk_ids, topk_weights)))


class Peer(ABC):
    """A library that multiplies by 4-bit weights, or by their dequantised values. The constructor imports nothing.

    Parameters
    ----------
    num_threads : int
        Threads that its products may use.

    Attributes
    ----------
    name : str
        Its name in tables.
    accuracy : {"int8", "bf16", "int16", "float32"}
        The type that activations are computed in.
    distribution : str
        The package whose version is reported.
    weight_bytes : float
        Approximate memory per element of a weight matrix, in bytes.
    spin_seconds : float
        How long its idle threads spin after a call; 0 if no longer than OpenMP's threads.
    extra_threads : int
        Threads beyond ``num_threads`` that are busy during a call and need a CPU each.
    most_weights : int or None
        How many projections may be used in turn before their threads disturb each other; None for any number.
    """

    name: str
    accuracy: str
    distribution: str
    weight_bytes: float = 0.54  # 4 bits, and scales
    spin_seconds: float = 0.0
    extra_threads: int = 0
    most_weights: int | None = None

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads

    @property
    def version(self) -> str | None:
        """The library's version; None if it is not installed."""
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return None

    @abstractmethod
    def available(self) -> str | None:
        """None if the peer can run here; otherwise the reason, with what to install."""

    def kept(self, weight: CanonicalWeight) -> npt.NDArray[np.float64]:
        """The values that the peer multiplies by, float64 ``[K, N]``.

        These are the dequantised values of ``weight``. A peer whose format cannot hold them rounds them once more:
        :meth:`rounding` then bounds the difference, and the peer's error must be reported with its speed.
        """
        return reference.dequantize_weight(weight)

    def rounding(self, weight: CanonicalWeight) -> float:
        """The largest relative difference (Frobenius norms) of :meth:`kept`; 0 for a peer that does not round."""
        return 0.0

    def available_projection(self) -> str | None:
        """None if :meth:`load` can be used here; otherwise the reason."""
        return self.available()

    def load(self, weight: CanonicalWeight) -> Projection:
        """One projection.

        Parameters
        ----------
        weight : CanonicalWeight
            ``[K, N]``: "uint4" codes, whole groups of consecutive rows, zero points that the peer's format can hold.

        Raises
        ------
        UnsupportedError
            The peer has no operator for projections, or its format cannot hold this weight.
        """
        raise UnsupportedError(self.available_projection())

    def load_all(self, weights: Sequence[CanonicalWeight]) -> Sequence[Projection]:
        """One :class:`Projection` per weight; arguments and errors as for :meth:`load`."""
        return [self.load(weight) for weight in weights]

    def available_routed(self) -> str | None:
        """None if :meth:`load_routed` can be used here; otherwise the reason."""
        return f"{self.name} has no operator for products by expert"

    def load_routed(self, weights: Sequence[CanonicalWeight]) -> RoutedProduct:
        """One projection of all experts of a layer.

        Parameters
        ----------
        weights : list of CanonicalWeight
            ``[K, N]``, one per expert.

        Raises
        ------
        UnsupportedError
            The peer has no operator for it, or its format cannot hold these weights.
        """
        raise UnsupportedError(self.available_routed())

    def available_moe(self) -> str | None:
        """None if :meth:`load_moe` can be used here; otherwise the reason."""
        return f"{self.name} has no operator for the experts of a layer"

    def load_moe(self, gate_up: Sequence[CanonicalWeight], down: Sequence[CanonicalWeight]) -> Experts:
        """The experts of one layer.

        Parameters
        ----------
        gate_up, down : list of CanonicalWeight
            ``[K, 2I]``, gate columns first, and ``[I, K]``; one of each per expert.

        Raises
        ------
        UnsupportedError
            The peer has no operator for it, or its format cannot hold these weights.
        """
        raise UnsupportedError(self.available_moe())
