"""Whole models: sequences of tokens in, logits out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from marlin_cy.arguments import flag, integer
from marlin_cy.checkpoints.checkpoint import Checkpoint
from marlin_cy.decoder.appending import Wanted, append
from marlin_cy.decoder.cache import CacheFull, PagePool, Sequence, pages_of
from marlin_cy.decoder.config import DecoderConfig
from marlin_cy.decoder.plan import DecoderPlan, DeltaNetPlan
from marlin_cy.decoder.program import PAGE_TOKENS, Batch
from marlin_cy.decoder.text_methods import TextMethods
from marlin_cy.decoder.token_ids import Tokens, token_ids
from marlin_cy.errors import ContextInUse, DeviceError, MarlinError, UnsupportedError
from marlin_cy.interface import Context

if TYPE_CHECKING:
    from marlin_cy.decoder.sampling import Sampler

__all__ = ["Model"]

Pair = tuple[Sequence, Tokens]

MAX_ROWS = 1024
"""Tokens of a step, at most. More tokens would read the weights less often, but need more memory between products."""

DEFAULT_STATES = 16
"""Sequences of a model with recurrent state that may exist at once, at least."""


class Model(TextMethods):
    """A model on a backend, with the cache of its sequences. Made by :func:`~marlin_cy.decoder.load.load_model`.

    One thread may call a model at a time; a second one gets :class:`~marlin_cy.errors.ContextInUse`. A call that
    raises has changed no sequence, with one exception: if a KeyboardInterrupt ends a call, sequences of a model with
    recurrent state may have all of its tokens. :attr:`Sequence.length` then includes them.

    If the device fails, a call raises :class:`~marlin_cy.errors.DeviceError`. All sequences are then freed, and all
    later calls but :meth:`free` raise the error: the model has to be loaded again.

    Attributes
    ----------
    folder : Path
    config : DecoderConfig
    plan : DecoderPlan
    context : Context
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: DecoderConfig,
        plan: DecoderPlan,
        ctx: Context,
        cache_tokens: int,
        cache_dtype: str,
    ) -> None:
        self.folder: Path = checkpoint.path
        self.config = config
        self.plan = plan
        self.context = ctx
        self.cache_dtype = cache_dtype
        self._checkpoint = checkpoint
        self._recurrent = any(isinstance(layer.mixer, DeltaNetPlan) for layer in plan.layers)
        num_pages = pages_of(cache_tokens)
        num_states = max(DEFAULT_STATES, cache_tokens // plan.context_length) if self._recurrent else 0
        self._program = ctx.backend.new_decoder(ctx, plan, num_pages, num_states, cache_dtype)
        self._pool = PagePool(num_pages, self._program.provide_pages)
        self._free_states = list(range(num_states - 1, -1, -1))
        self._sequences: set[Sequence] = set()
        self._lock = threading.Lock()
        self._own: Sequence | None = None
        self._lost: str | None = None

    def __repr__(self) -> str:
        return (
            f"Model({self.config.model_type}, {len(self.plan.layers)} layers, context of {self.context_length}, "
            f"{self.context.backend.describe(self.context)})"
        )

    @property
    def context_length(self) -> int:
        """The most tokens of one sequence."""
        return self.plan.context_length

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the model knows: ids are 0 to ``vocab_size - 1``."""
        return self.plan.vocab_size

    @property
    def recurrent(self) -> bool:
        """Whether sequences have recurrent state, which cannot be taken back."""
        return self._recurrent

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache. The system may provide the memory only as it is used."""
        return self._program.cache_bytes

    @property
    def free_tokens(self) -> int:
        """Positions of the cache that no sequence holds, in whole pages."""
        return self._pool.num_free * PAGE_TOKENS

    # Sequences ---------------------------------------------------------------------------------

    def new_sequence(self) -> Sequence:
        """An empty sequence.

        Raises
        ------
        CacheFull
            The model has recurrent state, and all of its slots are in use.
        """
        with self._exclusive():
            sequence = Sequence(self._pool, pages_of(self.context_length), self._take_state())
            if sequence.state >= 0:
                self._program.clear_state(sequence.state)
            self._sequences.add(sequence)
            return sequence

    def fork(self, sequence: Sequence) -> Sequence:
        """A sequence with the same tokens. Both grow apart; they share the cache of what they have in common.

        Raises
        ------
        TypeError, ValueError
            ``sequence`` is not a live sequence of this model.
        CacheFull
            As :meth:`new_sequence`.
        """
        with self._exclusive():
            self._check_sequence("sequence", sequence)
            self._check_state("sequence", sequence)
            fork = sequence.fork(self._take_state())
            if fork.state >= 0:
                self._program.copy_state(sequence.state, fork.state)
            self._sequences.add(fork)
            return fork

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Forget all tokens of a sequence from ``length`` on.

        Raises
        ------
        TypeError, ValueError
            ``sequence`` is not a live sequence of this model, or it has fewer tokens.
        UnsupportedError
            The model has recurrent state, which cannot be taken back, and ``length`` is neither 0 nor the sequence's
            own length.
        """
        with self._exclusive():
            self._check_sequence("sequence", sequence)
            length = integer("length", length)
            if not 0 <= length <= sequence.length:
                raise ValueError(f"length: got {length}, expected 0 to {sequence.length}, the sequence's length")
            if self._recurrent and 0 < length < sequence.length:
                raise UnsupportedError(
                    f"truncate: {self.config.model_type} has recurrent state, which cannot go back to {length} tokens; "
                    "fork the sequence before it grows"
                )
            if self._recurrent and length == 0:
                self._program.clear_state(sequence.state)
            sequence.shrink(length)

    def free(self, sequence: Sequence) -> None:
        """Give a sequence's part of the cache back. The sequence can no longer be used.

        Raises
        ------
        TypeError, ValueError
            ``sequence`` is not a live sequence of this model.
        """
        if self._lost is not None:
            return  # the sequence was freed when the device failed
        with self._exclusive():
            self._check_sequence("sequence", sequence)
            if sequence.state >= 0:
                self._free_states.append(sequence.state)
            sequence.free()
            self._sequences.discard(sequence)
            if sequence is self._own:
                self._own = None

    # Logits ------------------------------------------------------------------------------------

    def forward(
        self, tokens: Tokens, *, sequence: Sequence | None = None, all_logits: bool = False
    ) -> npt.NDArray[np.float32]:
        """Append tokens to a sequence.

        Parameters
        ----------
        tokens : ints
            Ids, at least one.
        sequence : Sequence, optional
            By default the model's own sequence.
        all_logits : bool

        Returns
        -------
        float32 ``[vocab_size]``
            The logits after the last token; with ``all_logits``, ``[len(tokens), vocab_size]``, those after each.

        Raises
        ------
        TypeError, ValueError, IndexError
            An invalid token or sequence, no tokens, or more than the context has room for.
        CacheFull
            The cache has too few free pages.
        ContextInUse
            Another thread is calling the model.
        """
        if sequence is None:
            if self._own is None:
                self._own = self.new_sequence()
            sequence = self._own
        return self.forward_batch([(sequence, tokens)], all_logits=all_logits)[0]

    def forward_batch(self, pairs: Iterable[Pair], *, all_logits: bool = False) -> list[npt.NDArray[np.float32]]:
        """Append tokens to several sequences at once. The result does not depend on what is run together.

        Parameters
        ----------
        pairs : sequence of (Sequence, ints)
            Each sequence once.
        all_logits : bool

        Returns
        -------
        list of float32 arrays
            In the order of ``pairs``, each as :meth:`forward` returns it.

        Raises
        ------
        TypeError, ValueError, IndexError, CacheFull, ContextInUse
            As :meth:`forward`. No sequence has changed.
        """
        wanted = Wanted.ALL if flag("all_logits", all_logits) else Wanted.LAST
        with self._exclusive():
            work = self._checked(pairs)
            found = self._append(work, [wanted] * len(work), lambda batch, owners: self._program.step(batch))
        results = [parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in found]
        return results if all_logits else [result[0] for result in results]

    def pick_batch(self, pairs: Iterable[Pair], samplers: Iterable[Sampler | None]) -> list[int | MarlinError | None]:
        """Append tokens to several sequences at once, and choose the token that follows each of them.

        The logits stay on the device, if the backend can choose tokens there.

        Parameters
        ----------
        pairs : sequence of (Sequence, ints)
            As for :meth:`forward_batch`.
        samplers : sequence of Sampler or None
            One for each pair; it counts the token. None: no token is chosen.

        Returns
        -------
        list of int, MarlinError or None
            A MarlinError where the logits of a sequence are not finite.

        Raises
        ------
        TypeError, ValueError, IndexError, CacheFull, ContextInUse
            As :meth:`forward`. No sequence has changed.
        """
        choosing = list(samplers)
        with self._exclusive():
            work = self._checked(pairs)
            if len(choosing) != len(work):
                raise ValueError(f"samplers: got {len(choosing)}, expected {len(work)}, one for each pair")
            ends = [sequence.length + len(tokens) for sequence, tokens in work]

            def chosen(batch: Batch, owners: list[int]) -> list[int | MarlinError]:
                choices = [(sampler, ends[index]) for index in owners if (sampler := choosing[index])]
                return self._program.pick(batch, choices)

            found = self._append(work, [Wanted.LAST if sampler else Wanted.NONE for sampler in choosing], chosen)
        return [parts[0][0] if parts else None for parts in found]

    def _append(
        self,
        work: list[tuple[Sequence, npt.NDArray[np.int32]]],
        wanted: list[Wanted],
        compute: Callable[[Batch, list[int]], Any],
    ) -> list[list[Any]]:
        """Append tokens. An exception leaves all sequences as they were.

        ``wanted``: the wanted rows of each. ``compute(batch, owners)`` runs a step, and returns what it gives for each
        wanted row, in parts; ``owners``: the index of each in ``work``. Returns the parts of each of ``work``.
        """
        lengths = [sequence.length for sequence, _ in work]
        # The state before a single step is not kept: it is large, and its step does not stop halfway.
        saves = self._recurrent and sum(len(tokens) for _, tokens in work) > MAX_ROWS
        states = [self._program.save_state(sequence.state) for sequence, _ in work if saves]
        try:
            return append(self._program, work, wanted, compute, MAX_ROWS)
        except DeviceError:
            raise  # there is nothing to take back
        except BaseException:
            for (sequence, _), state in zip(work, states, strict=False):
                self._program.restore_state(sequence.state, state)
            for (sequence, _), length in zip(work, lengths, strict=True):
                sequence.shrink(max(0, self._program.state_length(sequence.state)) if self._recurrent else length)
            raise

    # Checks ------------------------------------------------------------------------------------

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise ContextInUse("model: in use by another thread; a model serves one thread at a time")
        try:
            if self._lost is not None:
                raise DeviceError(f"model: its device has failed, load the model again: {self._lost}")
            yield
        except DeviceError as error:
            self._lost = self._lost or str(error)
            for sequence in self._sequences:
                sequence.free()
            self._sequences.clear()
            self._own = None
            raise
        finally:
            self._lock.release()

    def _checked(self, pairs: Iterable[Pair]) -> list[tuple[Sequence, npt.NDArray[np.int32]]]:
        """Pairs with copies of their tokens, after all checks."""
        work: list[tuple[Sequence, npt.NDArray[np.int32]]] = []
        needed = 0
        for number, pair in enumerate(pairs):
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise TypeError(f"pairs[{number}]: got {pair!r}, expected a tuple (sequence, tokens)")
            sequence, tokens = pair
            self._check_sequence(f"pairs[{number}]", sequence)
            self._check_state(f"pairs[{number}]", sequence)
            if any(sequence is other for other, _ in work):
                raise ValueError(f"pairs[{number}]: got a sequence a second time, expected each sequence once")
            ids = token_ids(tokens, self.vocab_size)
            if sequence.length + len(ids) > self.context_length:
                raise ValueError(
                    f"tokens: got {len(ids)}, expected at most {self.context_length - sequence.length}: the context "
                    f"has {self.context_length} positions, and the sequence {sequence.length} tokens"
                )
            work.append((sequence, ids))
            needed += sequence.pages_needed(len(ids))
        self._pool.make_free(needed)
        return work

    def _check_sequence(self, name: str, sequence: Sequence) -> None:
        if not isinstance(sequence, Sequence):
            raise TypeError(f"{name}: got {type(sequence).__name__}, expected a Sequence from new_sequence")
        if sequence.freed:
            raise ValueError(f"{name}: the sequence was freed")
        if sequence not in self._sequences:
            raise ValueError(f"{name}: the sequence belongs to another model")

    def _check_state(self, name: str, sequence: Sequence) -> None:
        if self._recurrent and self._program.state_length(sequence.state) != sequence.length:
            raise ValueError(
                f"{name}: KeyboardInterrupt has ended a call that was changing its recurrent state; truncate the "
                "sequence to 0 tokens, or free it"
            )

    def _take_state(self) -> int:
        if not self._recurrent:
            return -1
        if not self._free_states:
            raise CacheFull("sequences: all slots of recurrent state are in use; free sequences")
        return self._free_states.pop()
