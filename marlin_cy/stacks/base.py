"""Stacks and linear layers over a packed store: what every backend's have in common.

A store has ``num_experts``, ``k``, ``n``, ``weight_group_size``, ``act_order``, ``order_of`` (for each expert a number:
equal where rows of K are ordered alike) and ``nbytes``.
"""

from abc import abstractmethod

from marlin_cy.errors import UnsupportedError
from marlin_cy.interface import Linear, MarlinExpertStack, WeightMetadata
from marlin_cy.stacks.builder import N_TILE, as_bias

__all__ = ["PackedLinear", "PackedStack"]


class PackedStack(MarlinExpertStack):
    """A stack over a store.

    Parameters
    ----------
    store : ``store_type``
    num_experts, n_per_expert, k : int
        Of the store.
    bias : float32 ``[num_experts, n_per_expert]``, optional
    """

    store_type: type

    def __init__(self, store, num_experts, n_per_expert, k, bias=None):
        if not isinstance(store, self.store_type):
            raise TypeError(f"store: got {type(store).__name__}, expected {self.store_type.__name__}")
        if (num_experts, n_per_expert, k) != (store.num_experts, store.n, store.k):
            raise ValueError(
                f"store: holds {store.num_experts} experts of [{store.k}, {store.n}], expected {num_experts} of "
                f"[{k}, {n_per_expert}]"
            )
        self.store, self._bias = store, bias
        self._metadata = WeightMetadata(
            bits=4, group_size=store.weight_group_size, act_order=store.act_order, packed_bytes=store.nbytes
        )

    def __repr__(self):
        return f"{type(self).__name__}({self.num_experts} experts of [{self.k}, {self.n_per_expert}])"

    @property
    def n_per_expert(self):
        return self.store.n

    @property
    def k(self):
        return self.store.k

    @property
    def num_experts(self):
        return self.store.num_experts

    @property
    def n_tile(self):
        return N_TILE

    @property
    def metadata(self):
        return self._metadata

    @property
    def bias(self):
        return self._bias


class PackedLinear(Linear):
    """A view on columns of a stack; a layer of its own is a view on all of a stack of one expert.

    Parameters
    ----------
    stack : PackedStack
    offset, width : int
        Columns of the stacked N; multiples of the stack's ``n_tile``.
    bias : array ``[width]``, optional
        On the host; copied.
    """

    def __init__(self, stack, offset, width, bias=None):
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
        self._metadata = WeightMetadata(
            bits=4,
            group_size=store.weight_group_size,
            act_order=store.act_order,
            packed_bytes=store.nbytes * width // total,
        )

    def __repr__(self):
        return (
            f"{type(self).__name__}([{self.in_features}, {self.out_features}]"
            f"{'' if self._bias is None else ' with bias'})"
        )

    @property
    def in_features(self):
        return self.stack.k

    @property
    def out_features(self):
        return self._width

    @property
    def metadata(self):
        return self._metadata

    @abstractmethod
    def _placed(self, bias):
        """A float32 bias, where the backend's kernels read it."""
