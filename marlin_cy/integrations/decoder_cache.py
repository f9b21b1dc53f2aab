"""The cache of transformers' ``generate`` over sequences of the decoder: one for each row of a batch.

::

    row 0   [pad][pad][ a ][ b ][ c ]     sequence of 3 tokens
    row 1   [ d ][ e ][ f ][ g ][ h ]     sequence of 5 tokens; the mask says which columns are tokens
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from marlin_cy.errors import UnsupportedError
from marlin_cy.integrations import needs_extra

with needs_extra():
    from transformers import Cache

if TYPE_CHECKING:
    from collections.abc import Sequence as Rows

    from marlin_cy.decoder.cache import Sequence
    from marlin_cy.decoder.model import Model

__all__ = ["DecoderCache", "SharedDecoder"]

Mask = npt.NDArray[np.bool_]
Logits = npt.NDArray[np.float32]


class SharedDecoder:
    """A decoder that several caches and threads use, one call at a time.

    Attributes
    ----------
    model : Model
    recurrent : bool
        Whether sequences have a state that cannot be taken back.
    """

    def __init__(self, model: Model) -> None:
        self.model, self.recurrent = model, model.recurrent
        self._lock = Lock()
        self._dropped: list[Sequence] = []

    def drop(self, sequences: list[Sequence]) -> None:
        """Free sequences before the next call. The garbage collector may run this while another call is running."""
        self._dropped.extend(sequences)

    @contextmanager
    def using(self) -> Iterator[Model]:
        """The decoder, for this thread alone."""
        with self._lock:
            while self._dropped:
                self.model.free(self._dropped.pop())
            yield self.model


class DecoderCache(Cache):
    """Sequences of a decoder, in place of tensors of keys and values.

    Parameters
    ----------
    decoder : SharedDecoder
    """

    is_compileable = False

    def __init__(self, decoder: SharedDecoder) -> None:
        super().__init__(layers=[])
        self.decoder = decoder
        self._sequences: list[Sequence] = []
        self._mask = np.zeros((0, 0), bool)
        weakref.finalize(self, decoder.drop, self._sequences).atexit = False

    def __repr__(self) -> str:
        return f"DecoderCache({len(self._sequences)} rows of {self.get_seq_length()} tokens)"

    def __deepcopy__(self, memo: dict[int, Any]) -> DecoderCache:
        twin = DecoderCache(self.decoder)
        with self.decoder.using() as model:
            twin._sequences += _forks(model, self._sequences)
        twin._mask = self._mask
        return twin

    # What generate() asks for ------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of columns, padding included."""
        return self._mask.shape[1]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """The most tokens of a row."""
        return self.decoder.model.context_length

    get_max_cache_shape = get_max_length  # its name in earlier versions

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """``(columns with the next ones, 0)``."""
        return self.get_seq_length() + query_length, 0

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return len(self._sequences)

    @property
    def max_batch_size(self) -> int:
        """Number of rows."""
        return len(self._sequences)

    @property
    def is_initialized(self) -> bool:
        """Whether there are rows."""
        return bool(self._sequences)

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back."""
        return not self.decoder.recurrent

    @property
    def is_linear(self) -> list[bool]:
        """For each layer, whether it has recurrent state alone. The cache counts as one layer with attention."""
        return [False]

    is_sliding = is_dummy = is_linear

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse keys and values.

        Raises
        ------
        UnsupportedError
        """
        raise UnsupportedError("DecoderCache: it holds tokens of the decoder, and takes no keys and values")

    def crop(self, tokens: int) -> None:
        """Forget the last columns: as many as a negative number says, or all after as many as a positive one says.

        Raises
        ------
        UnsupportedError
            The model has recurrent state.
        """
        length = self.get_seq_length()
        kept = max(length + tokens, 0) if tokens <= 0 else min(tokens, length)
        if kept == length:
            return
        with self.decoder.using() as model:
            for sequence, mask in zip(self._sequences, self._mask[:, :kept], strict=True):
                model.truncate(sequence, int(mask.sum()))
        self._mask = self._mask[:, :kept]

    def reset(self) -> None:
        """Forget everything."""
        self._take([])
        self._mask = np.zeros((0, 0), bool)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Row i becomes what row ``beam_idx[i]`` was."""
        self._take(beam_idx.tolist())

    def batch_select_indices(self, indices: Any) -> None:
        """Keep some rows."""
        self._take(np.arange(self.batch_size)[indices.numpy()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times."""
        self._take(np.arange(self.batch_size).repeat(repeats).tolist())

    def _take(self, rows: list[int]) -> None:
        if not self._sequences:
            return
        with self.decoder.using() as model:
            first = {row: place for place, row in reversed(list(enumerate(rows)))}
            others = [place for place, row in enumerate(rows) if first[row] != place]
            taken = [self._sequences[row] for row in rows]
            forks = _forks(model, [taken[place] for place in others])
            for place, fork in zip(others, forks, strict=True):
                taken[place] = fork
            for row, sequence in enumerate(self._sequences):
                if row not in first:
                    model.free(sequence)
            self._sequences[:] = taken
        self._mask = self._mask[rows]

    # What the model does -----------------------------------------------------------------------

    @property
    def mask(self) -> Mask:
        """Which columns are tokens, ``[rows, columns]``."""
        return self._mask

    def append(self, rows: Rows[npt.NDArray[np.int64]], mask: Mask, *, all_logits: bool) -> list[Logits | None]:
        """Run the next tokens of each row, which may be none.

        Rows of an empty cache that have the same tokens run once: beams begin so.

        Parameters
        ----------
        rows : int64 arrays
            The tokens of each row, without padding.
        mask : bool ``[rows, columns]``
            Which of the next columns are tokens.
        all_logits : bool

        Returns
        -------
        list of float32 arrays or None
            As :meth:`~marlin_cy.decoder.model.Model.forward_batch`; None for rows without tokens.
        """
        first = list(range(len(rows)))
        with self.decoder.using() as model:
            sequences = self._sequences
            if not sequences:
                known: dict[bytes, int] = {}
                first = [known.setdefault(tokens.tobytes(), row) for row, tokens in enumerate(rows)]
                sequences = _made(model, (model.new_sequence() for _ in known))
            own = sorted(set(first))
            by_row = dict(zip(own, sequences, strict=True))
            running = [row for row in own if len(rows[row])]
            try:
                found = model.forward_batch([(by_row[row], rows[row]) for row in running], all_logits=all_logits)
                if not self._sequences:
                    copies = [row for row, other in enumerate(first) if row != other]
                    forks = _forks(model, [by_row[first[row]] for row in copies])
                    by_row |= dict(zip(copies, forks, strict=True))
            except BaseException:
                if not self._sequences:
                    for sequence in sequences:
                        model.free(sequence)
                raise
            self._sequences[:] = [by_row[row] for row in range(len(rows))]
        before = self._mask if len(self._mask) else np.zeros((len(rows), 0), bool)
        self._mask = np.concatenate([before, mask], axis=1)
        logits = dict(zip(running, found, strict=True))
        return [logits.get(row) for row in first]


def _forks(model: Model, sequences: Iterable[Sequence]) -> list[Sequence]:
    return _made(model, (model.fork(sequence) for sequence in sequences))


def _made(model: Model, making: Iterator[Sequence]) -> list[Sequence]:
    """All of these sequences, or none after an error."""
    made: list[Sequence] = []
    try:
        made.extend(making)
    except BaseException:
        for sequence in made:
            model.free(sequence)
        raise
    return made
