"""The check of token ids that callers pass in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Tokens", "token_ids"]

Tokens = Iterable[int] | npt.NDArray[np.integer[Any]]


def token_ids(tokens: Tokens, vocab_size: int) -> npt.NDArray[np.int32]:
    """A new array of the ids.

    Raises
    ------
    TypeError, ValueError, IndexError
        They are not a row of integers, there are none, or one is not in the vocabulary.
    """
    try:
        array = np.array(tokens if isinstance(tokens, np.ndarray) else list(tokens))
    except (TypeError, ValueError) as error:
        raise TypeError(f"tokens: got {type(tokens).__name__}, expected a row of integers ({error})") from None
    if array.size == 0:
        raise ValueError("tokens: got none, expected at least one")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise TypeError(f"tokens: got shape {array.shape} of {array.dtype}, expected a row of integers")
    if array.min() < 0 or array.max() >= vocab_size:
        wrong = array[(array < 0) | (array >= vocab_size)][0]
        raise IndexError(f"tokens: got id {wrong}, expected 0 to {vocab_size - 1}")
    return array.astype(np.int32)
