"""Stacks and linear layers over a packed store: the part that all backends share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from marlin_cy.errors import UnsupportedError
from marlin_cy.interface import Linear, MarlinExpertStack, WeightMetadata
from marlin_cy.stacks.builder import N_TILE, as_bias
from marlin_cy.weights.code_types import code_type

__all__ = ["PackedLinear", "PackedStack", "PackedStore"]


class PackedStore(Protocol):
    """The attributes of a backend's packed weights that the classes below use.

    Attributes
    ----------
    num_experts, k, n : int
        Number of experts, and the shape ``[k, n]`` of each.
    weight_group_size : int
        Number of rows of K that share a scale.
    codes : str
        The name of the code type.
    act_order : bool
        Whether the rows of K of any expert are packed in another order than K's own.
    order_of : int32 ``[num_experts]``
        A number per expert. Experts whose numbers are equal pack K in the same order.
    nbytes : int
        Bytes of the packed weights.
    """

    num_experts: int
    k: int
    n: int
    weight_group_size: int
    codes: str
    order_of: Sequence[int] | npt.NDArray[np.int32]
    nbytes: int

    @property
    def act_order(self) -> bool: ...


class PackedStack(MarlinExpertStack):
    """A stack over a store.

    Parameters
    ----------
    store : ``store_type``
    num_experts, n_per_expert, k : int
        Must be the store's.
    bias : float32 ``[num_experts, n_per_expert]``, optional
    """

    store_type: type[Any]
    store: Any

    def __init__(
        self,
        store: Any,
        num_experts: int,
        n_per_expert: int,
        k: int,
        bias: npt.NDArray[np.float32] | None = None,
    ) -> None:
        if not isinstance(store, self.store_type):
            raise TypeError(f"store: got {type(store).__name__}, expected {self.store_type.__name__}")
        if (num_experts, n_per_expert, k) != (store.num_experts, store.n, store.k):
            raise ValueError(
                f"store: holds {store.num_experts} experts of [{store.k}, {store.n}], expected {num_experts} of "
                f"[{k}, {n_per_expert}]"
            )
        self.store = store
        self._bias = bias
        self._metadata = metadata_of(store, store.nbytes)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_experts} experts of [{self.k}, {self.n_per_expert}])"

    @property
    def n_per_expert(self) -> int:
        return int(self.store.n)

    @property
    def k(self) -> int:
        return int(self.store.k)

    @property
    def num_experts(self) -> int:
        return int(self.store.num_experts)

    @property
    def n_tile(self) -> int:
        return N_TILE

    @property
    def metadata(self) -> WeightMetadata:
        return self._metadata

    @property
    def bias(self) -> npt.NDArray[np.float32] | None:
        return self._bias


class PackedLinear(Linear):
    """A linear layer that is a view on columns of a stack.

    A single linear layer is a view on all columns of a stack of one expert.

    Parameters
    ----------
    stack : PackedStack
    offset, width : int
        Columns of the stacked N; multiples of the stack's ``n_tile``.
    bias : array ``[width]``, optional
        On the host; copied.

    Raises
    ------
    IndexError
        The columns do not lie within the stack.
    ValueError
        ``offset`` or ``width`` is not a multiple of ``n_tile``, or the bias has another shape.
    UnsupportedError
        The view spans experts that pack K in different orders (``desc_act``).
    """

    def __init__(self, stack: PackedStack, offset: int, width: int, bias: npt.ArrayLike | None = None) -> None:
        store, total = stack.store, stack.num_experts * stack.n_per_expert
        for name, value in (("expert_offset", offset), ("expert_n", width)):
            if value % N_TILE:
                raise ValueError(f"{name}: got {value}, expected a multiple of n_tile, {N_TILE}")
        if offset < 0 or width <= 0 or offset + width > total:
            raise IndexError(
                f"expert_offset, expert_n: got columns {offset} to {offset + width}, expected a part of 0 to {total}"
            )
        first, last = offset // store.n, (offset + width - 1) // store.n
        if len(set(store.order_of[first : last + 1])) > 1:
            raise UnsupportedError(
                f"expert_offset, expert_n: columns {offset} to {offset + width} span experts {first} to {last}, whose "
                "rows of K are ordered differently (desc_act); make one view for each expert"
            )
        self.stack, self._offset, self._width = stack, offset, width
        self._bias = None if bias is None else self._placed(as_bias(bias, (width,)))
        self._metadata = metadata_of(store, store.nbytes * width // total)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}([{self.in_features}, {self.out_features}]"
            f"{'' if self._bias is None else ' with bias'})"
        )

    @property
    def in_features(self) -> int:
        return self.stack.k

    @property
    def out_features(self) -> int:
        return self._width

    @property
    def offset(self) -> int:
        """The first column in the stacked N."""
        return self._offset

    @property
    def bias(self) -> Any:
        """The bias, float32 ``[out_features]`` in the backend's memory, or None."""
        return self._bias

    @property
    def metadata(self) -> WeightMetadata:
        return self._metadata

    @abstractmethod
    def _placed(self, bias: npt.NDArray[np.float32]) -> Any:
        """A float32 bias in the memory from which the backend's kernels read it."""


def metadata_of(store: PackedStore, packed_bytes: int) -> WeightMetadata:
    """The metadata of a store's weights."""
    return WeightMetadata(
        bits=code_type(store.codes).bits,
        group_size=store.weight_group_size,
        act_order=store.act_order,
        packed_bytes=packed_bytes,
    )
