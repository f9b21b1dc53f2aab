"""What every peer can be asked for, and the check that it must pass before it may be timed."""

import functools
from abc import ABC, abstractmethod
from importlib import metadata

import numpy as np

from marlin_cy import reference
from marlin_cy.errors import UnsupportedError

__all__ = [
    "Experts",
    "Peer",
    "Projection",
    "RoutedProduct",
    "WrongResult",
    "bound",
    "check",
    "check_moe",
    "check_routed",
    "random_routing",
    "relative_error",
    "require_matching",
    "require_plain",
    "require_routing",
]

ACCURACIES = ("int8", "bf16", "int16", "float32")
"""What activations are computed in, the least accurate first."""

ROWS = (1, 5, 33)  # libraries have other kernels for one row, for a few, and for many
TOKENS = (1, 7)


class WrongResult(ArithmeticError):
    """A peer's result is not the product of what it was given."""


class Projection(ABC):
    """One weight ``[K, N]`` as a peer keeps it.

    :meth:`run` alone is what may be timed.
    """

    @abstractmethod
    def prepare(self, x):
        """The input of :meth:`run`, in the peer's own dtype, from float32 ``[M, K]``."""

    @abstractmethod
    def run(self, prepared):
        """The product, in the peer's own form. It may be called again with the same input."""

    @abstractmethod
    def result(self, out):
        """float32 ``[M, N]`` on the host from what :meth:`run` gave."""

    def rows(self, x):
        """float32 ``[M, N]``, the product of float32 ``[M, K]`` with the weight."""
        return self.result(self.run(self.prepare(x)))


class RoutedProduct(ABC):
    """One weight ``[K, N]`` of every expert, of which each token takes those that it is routed to.

    :meth:`run` alone is what may be timed.
    """

    @abstractmethod
    def prepare(self, x, topk_ids):
        """The input of :meth:`run`; the arguments are those of :meth:`slots`."""

    @abstractmethod
    def run(self, prepared):
        """The products, in the peer's own form. It may be called again with the same input."""

    @abstractmethod
    def result(self, out):
        """float32 ``[T, top_k, N]`` on the host from what :meth:`run` gave."""

    def slots(self, x, topk_ids):
        """float32 ``[T, top_k, N]``: the product of each token with each of its experts.

        Parameters
        ----------
        x : float32 ``[T, K]``
        topk_ids : int ``[T, top_k]``
            The experts of each token, no two of them equal.
        """
        return self.result(self.run(self.prepare(x, topk_ids)))


class Experts(ABC):
    """The experts of one layer as a peer keeps them: gate and up, ``silu(gate) * up``, down, weighted sum.

    :meth:`run` alone is what may be timed.
    """

    @abstractmethod
    def prepare(self, x, topk_ids, topk_weights):
        """The input of :meth:`run`; the arguments are those of :meth:`tokens`."""

    @abstractmethod
    def run(self, prepared):
        """The layer's output, in the peer's own form. It may be called again with the same input."""

    @abstractmethod
    def result(self, out):
        """float32 ``[T, K]`` on the host from what :meth:`run` gave."""

    def tokens(self, x, topk_ids, topk_weights):
        """The layer's output, float32 ``[T, K]``.

        Parameters
        ----------
        x : float32 ``[T, K]``
        topk_ids : int ``[T, top_k]``
            The experts of each token, no two of them equal.
        topk_weights : float32 ``[T, top_k]``
            Positive; a token's sum is 1, as some peers make it so.
        """
        return self.result(self.run(self.prepare(x, topk_ids, topk_weights)))


class Peer(ABC):
    """A library that multiplies by 4-bit weights, or by what they stand for. Making one imports nothing.

    Parameters
    ----------
    num_threads : int
        Threads that its products may use.

    Attributes
    ----------
    name : str
        The column of a table.
    accuracy : {"int8", "bf16", "int16", "float32"}
        What activations are computed in.
    weight_bytes : float
        Bytes that it keeps of one weight of a matrix, about.
    spin_seconds : float
        How long its idle threads spin after a call; 0 for not longer than OpenMP's do.
    extra_threads : int
        Threads beyond ``num_threads`` that are busy during a call, and need CPUs of their own.
    most_weights : int or None
        Projections that may take turns before their threads get in each other's way; None for any number.
    distribution : str
        The package whose version is the peer's.
    """

    name: str
    accuracy: str
    distribution: str
    weight_bytes = 0.54  # 4 bits, and scales
    spin_seconds = 0.0
    extra_threads = 0
    most_weights = None

    def __init__(self, num_threads):
        self.num_threads = num_threads

    @property
    def version(self):
        """Of the library; None where it is not installed."""
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return None

    @abstractmethod
    def available(self):
        """None, or why it cannot run here, with what to install."""

    def kept(self, weight):
        """The weights that it multiplies by, float64 ``[K, N]``.

        They are what ``weight`` stands for, or what the peer makes of that when it has to round it to a form of
        its own: then :meth:`rounding` says how far they may be off, and its accuracy belongs beside its speed.
        """
        return reference.dequantize_weight(weight)

    def rounding(self, weight):
        """The most that :meth:`kept` may be off, relative, of Frobenius norms; 0 for a peer that rounds nothing."""
        return 0.0

    def available_projection(self):
        """None, or why :meth:`load` cannot be used here."""
        return self.available()

    def load(self, weight) -> Projection:
        """One projection.

        Parameters
        ----------
        weight : Int4Weight
            ``[K, N]``; "uint4" codes, whole groups of consecutive rows, any zero points that the peer can keep.

        Raises
        ------
        UnsupportedError
            The peer has no operator for it, or no form for this weight.
        """
        raise UnsupportedError(self.available_projection())

    def load_all(self, weights):
        """A list of :class:`Projection`, one for each weight; arguments and errors are as :meth:`load`'s."""
        return [self.load(weight) for weight in weights]

    def available_routed(self):
        """None, or why :meth:`load_routed` cannot be used here."""
        return f"{self.name} has no operator for products by expert"

    def load_routed(self, weights) -> RoutedProduct:
        """One product of every expert of a layer.

        Parameters
        ----------
        weights : list of Int4Weight
            ``[K, N]``, one an expert.

        Raises
        ------
        UnsupportedError
            The peer has no operator for it, or no form for these weights.
        """
        raise UnsupportedError(self.available_routed())

    def available_moe(self):
        """None, or why :meth:`load_moe` cannot be used here."""
        return f"{self.name} has no operator for the experts of a layer"

    def load_moe(self, gate_up, down) -> Experts:
        """The experts of one layer.

        Parameters
        ----------
        gate_up, down : list of Int4Weight
            ``[K, 2I]``, gate columns first, and ``[I, K]``, one each an expert.

        Raises
        ------
        UnsupportedError
            The peer has no operator for it, or no form for these weights.
        """
        raise UnsupportedError(self.available_moe())


def require_plain(weight, group_sizes=None):
    """Raise UnsupportedError unless a weight has integer codes and whole groups, of one of these sizes if given."""
    if weight.codes != "uint4":
        raise UnsupportedError(f"weight: got codes {weight.codes!r}, expected 'uint4'")
    if weight.g_idx is not None:
        raise UnsupportedError("weight: got a g_idx, expected groups of consecutive rows")
    if weight.k % weight.group_size:
        raise UnsupportedError(f"weight: got K {weight.k}, expected a multiple of its group size {weight.group_size}")
    if group_sizes is not None and weight.group_size not in group_sizes:
        raise UnsupportedError(f"weight: got group_size {weight.group_size}, expected one of {group_sizes}")


def require_matching(gate_up, down):
    """Raise ValueError unless the second product of each expert takes what the first gives, and gives what it took."""
    if (down[0].k, down[0].n, len(down)) != (gate_up[0].n // 2, gate_up[0].k, len(gate_up)):
        raise ValueError(
            f"down: got {len(down)} weights [{down[0].k}, {down[0].n}], "
            f"expected {len(gate_up)} weights [{gate_up[0].n // 2}, {gate_up[0].k}]"
        )


def require_routing(x, ids, weights, hidden, num_experts):
    """Raise ValueError or IndexError unless tokens, their experts and weights fit each other and a layer."""
    if x.ndim != 2 or x.shape[1] != hidden:
        raise ValueError(f"x: got shape {x.shape}, expected [T, {hidden}]")
    if ids.ndim != 2 or len(ids) != len(x) or ids.shape != weights.shape:
        raise ValueError(f"topk_ids, topk_weights: got {ids.shape}, {weights.shape}, expected [{len(x)}, top_k]")
    if ids.size and not 0 <= ids.min() <= ids.max() < num_experts:
        raise IndexError(f"topk_ids: got {ids.min()} to {ids.max()}, expected 0 to {num_experts - 1}")


def bound(accuracy, k):
    """The relative error (of Frobenius norms) that an accuracy allows a product over K normal activations.

    ==========  =================================================================================================
    "float32"   K roundings that act as independent ones, with some room: sums are cut into lanes in any order
    "int16"     as "int8", with steps of 5/32639
    "bf16"      a rounding each of activations, scales, zero points and outputs, each of 2**-8 at most
    "int8"      an amax is at most 5 standard deviations, so a step is 5/127 of one; rounding to it is off by the
                step over the square root of 12; doubled, for scales in 16 bits and sums of offsets
    ==========  =================================================================================================

    A weight whose zero points are off by one is beyond all of these, by a factor of five and more.
    """
    return {
        "float32": (4 + 2 * k**0.5) * 2.0**-24,
        "int16": 2 * 5 / 32639 / 12**0.5,
        "bf16": 4 * 2.0**-8,
        "int8": 2 * 5 / 127 / 12**0.5,
    }[accuracy]


def check(peer, weight, rng, loaded=None):
    """The relative error of a peer's products against float64: the largest over a few numbers of rows.

    It is that of the product with ``weight``. What has a bound are its two parts: the product's error with the
    weights that the peer keeps, and these weights' own.

    Parameters
    ----------
    peer : Peer
        An available one.
    weight : Int4Weight
    rng : numpy.random.Generator
    loaded : Projection, optional
        What the peer made of ``weight``; loaded here unless given.

    Raises
    ------
    WrongResult
        The error is beyond :func:`bound`, is a NaN, or the shape or dtype is wrong; or the weights kept are
        further off than :meth:`Peer.rounding` says.
    """
    dense, kept = reference.dequantize_weight(weight), _kept(peer, weight)
    loaded = peer.load(weight) if loaded is None else loaded
    errors = []
    for rows in ROWS:
        x = rng.standard_normal((rows, weight.k), np.float32)
        y = loaded.rows(x)
        _require_error(peer, y, x.astype(np.float64) @ kept, bound(peer.accuracy, weight.k))
        errors.append(relative_error(y, x.astype(np.float64) @ dense))
    return max(errors)


def check_routed(peer, weights, top_k, rng, loaded):
    """As :func:`check`, of a :class:`RoutedProduct` of these weights."""
    dense, kept = (_of_each(make, weights) for make in _dense_and_kept(peer))
    errors = []
    for tokens in TOKENS:
        x = rng.standard_normal((tokens, weights[0].k), np.float32)
        ids, _ = random_routing(rng, tokens, len(weights), top_k)
        y = loaded.slots(x, ids)
        _require_error(peer, y, _slots(x, kept, ids), bound(peer.accuracy, weights[0].k))
        errors.append(relative_error(y, _slots(x, dense, ids)))
    return max(errors)


def check_moe(peer, gate_up, down, top_k, rng, loaded=None):
    """As :func:`check`, of a layer's output; the bound is that of three products, as each adds its own error.

    Parameters
    ----------
    peer, rng
        As in :func:`check`.
    gate_up, down : list of Int4Weight
        As in :meth:`Peer.load_moe`.
    top_k : int
        Experts a token.
    loaded : Experts, optional
        What the peer made of the weights; loaded here unless given.
    """
    dense, kept = ([_of_each(make, weights) for weights in (gate_up, down)] for make in _dense_and_kept(peer))
    loaded = peer.load_moe(gate_up, down) if loaded is None else loaded
    limit = 3 * bound(peer.accuracy, max(gate_up[0].k, down[0].k))
    errors = []
    for tokens in TOKENS:
        x = rng.standard_normal((tokens, gate_up[0].k), np.float32)
        ids, weights = random_routing(rng, tokens, len(gate_up), top_k)
        y = loaded.tokens(x, ids, weights)
        _require_error(peer, y, reference.moe_layer(x, *kept, ids, weights), limit)
        errors.append(relative_error(y, reference.moe_layer(x, *dense, ids, weights)))
    return max(errors)


def _dense_and_kept(peer):
    """What makes float64 of a weight: as it is, and as a peer keeps it."""
    return reference.dequantize_weight, functools.partial(_kept, peer)


def _of_each(make, weights):
    """``make`` of every weight; the same array for the same weight, as a benchmark's experts share a few."""
    made = {id(weight): make(weight) for weight in {id(weight): weight for weight in weights}.values()}
    return [made[id(weight)] for weight in weights]


def _slots(x, dense, topk_ids):
    """float64 ``[T, top_k, N]``: each token's product with each of its experts."""
    return np.stack(
        [[row @ dense[e] for e in chosen] for row, chosen in zip(x.astype(np.float64), topk_ids, strict=True)]
    )


def random_routing(rng, tokens, num_experts, top_k):
    """``(topk_ids, topk_weights)``, int32 and float32 ``[tokens, top_k]``; a token's weights have the sum 1."""
    ids = np.argsort(rng.random((tokens, num_experts)), axis=1)[:, :top_k].astype(np.int32)
    weights = rng.uniform(0.1, 1, ids.shape)
    return ids, (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def relative_error(actual, expected):
    """Of Frobenius norms."""
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def _kept(peer, weight):
    """What a peer keeps of a weight, as near to it as the peer says."""
    kept, limit = peer.kept(weight), peer.rounding(weight)
    error = relative_error(kept, reference.dequantize_weight(weight))
    if not error <= limit:
        raise WrongResult(f"{peer.name}: got weights that are {error:.2e} off, expected at most {limit:.2e}")
    return kept


def _require_error(peer, actual, expected, limit):
    if (actual.shape, actual.dtype) != (expected.shape, np.float32):
        raise WrongResult(f"{peer.name}: got {actual.dtype} {actual.shape}, expected float32 {expected.shape}")
    error = relative_error(actual, expected)
    if not error <= limit:
        raise WrongResult(f"{peer.name}: got a relative error of {error:.2e}, expected at most {limit:.2e}")
