"""Choosing a token from logits: the same token on every CPU and every OpenCL device, if the logits are equal.

::

    logits ── penalties ──┬── no temperature: the largest; of equal ones the smallest id
                          └── / temperature ── top_k ── weights ── top_p ── min_p ── drawn by a random number

:mod:`marlin_cy.decoder.draw` defines the arithmetic, in integers. A random number is a function of the seed and of the
token's position in its sequence, so that neither other sequences nor earlier draws change it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import numpy.typing as npt

from marlin_cy.arguments import integer, number
from marlin_cy.checkpoints.gguf.documents import read_document
from marlin_cy.decoder.draw import Factor, amounts_of, draw, penalised, settings_of
from marlin_cy.errors import CheckpointError, MarlinError
from marlin_cy.formats.json_fields import JsonObject, optional

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Sampler", "SamplingOptions", "SamplingParams", "check_largest", "random_bits", "read_sampling"]

Logits = npt.NDArray[np.float32]

LEAST_TEMPERATURE = 1e-6


class SamplingOptions(TypedDict, total=False):
    """The keyword arguments of :class:`SamplingParams`."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    stop: str | Sequence[str]
    stop_token_ids: Iterable[int]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen, and what ends a text.

    Attributes
    ----------
    temperature : float or None
        Logits are divided by it. None or less than 1e-6: the most likely token is taken, and no token is drawn.
    top_k : int or None
        Draw from this many of the most likely tokens. None or 0: from all.
    top_p : float or None
        Draw from the most likely tokens: from as few as have this probability together. Above 0, at most 1.
    min_p : float or None
        Draw from tokens that have at least this share of the most likely token's probability. 0 to 1.
    repetition_penalty : float or None
        Logits of tokens of the prompt and of the text are divided by it if they are positive, else multiplied. Above 0.
    presence_penalty : float or None
        It is subtracted from the logits of tokens of the text.
    frequency_penalty : float or None
        It is subtracted from a token's logit once for each time that the text has the token.
    seed : int or None
        Of the random numbers; any int of 64 bits. None is 0.
    stop : str or sequence of str
        The text ends before the first of these.
    stop_token_ids : iterable of int
        The text ends with any of these tokens, as with those of the model.

    Raises
    ------
    TypeError, ValueError
        An attribute has an invalid value, which the message names.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Iterable[int] = ()

    def __post_init__(self) -> None:
        for name, low, most in (
            ("temperature", 0.0, np.inf),
            ("top_p", None, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", None, np.inf),
            ("presence_penalty", -np.inf, np.inf),
            ("frequency_penalty", -np.inf, np.inf),
        ):
            self._check_number(name, low, most)
        if self.top_k is not None and integer("top_k", self.top_k) < 0:
            raise ValueError(f"top_k: got {self.top_k}, expected a number of tokens, or 0 for all")
        if self.seed is not None:
            integer("seed", self.seed)
        self._set("stop", _checked_stop(self.stop))
        self._set("stop_token_ids", _checked_ids(self.stop_token_ids))

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, instead of one that is drawn."""
        return self.temperature is None or self.temperature < LEAST_TEMPERATURE

    def _check_number(self, name: str, low: float | None, most: float) -> None:
        """Check a float. ``low`` is the least value that is allowed; None: any above 0."""
        value = getattr(self, name)
        if value is None:
            return
        value = number(name, value)
        if not (value > 0 if low is None else value >= low) or value > most:
            least = "above 0" if low is None else f"of at least {low:g}"
            raise ValueError(
                f"{name}: got {value!r}, expected a number {least}" + f" and at most {most:g}" * (most < np.inf)
            )
        self._set(name, value)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def read_sampling(folder: Path, **given: Unpack[SamplingOptions]) -> SamplingParams:
    """The values of ``generation_config.json`` in a folder, replaced by those that are given and not None.

    ``do_sample: false`` in the file means that it has no temperature. Without a file there are no values.

    Raises
    ------
    CheckpointError
        The file has an invalid value.
    """
    file = folder / "generation_config.json"
    config = read_document(folder, file.name)
    kept: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    SamplingParams(**kept)  # an invalid argument is not the file's fault
    try:
        return dataclasses.replace(SamplingParams(**_file_values(config, file)), **kept)
    except (TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(str(error), file=file) from error


def _file_values(config: JsonObject, file: Path) -> dict[str, Any]:
    names = ("top_k", "top_p", "min_p", "repetition_penalty", "temperature")
    values: dict[str, Any] = {name: config[name] for name in names if config.get(name) is not None}
    samples = optional(config, ["do_sample"], bool, file)
    if samples is False:
        values.pop("temperature", None)
    elif samples:
        values.setdefault("temperature", 1.0)
    return values


class Sampler:
    """Chooses the tokens of one sequence.

    Parameters
    ----------
    params : SamplingParams
    vocab_size : int
    prompt : sequence of int
        The tokens before the text.

    Attributes
    ----------
    penalties : Penalties or None
        What :meth:`pick` does to logits first.
    settings : DrawSettings or None
        How a token is drawn; None: the first of the largest logit is taken.
    """

    def __init__(self, params: SamplingParams, vocab_size: int, prompt: Sequence[int]) -> None:
        self._seed = mixed((params.seed or 0) & MASK)
        self.penalties = None
        if any(
            value not in (None, neutral)
            for value, neutral in (
                (params.repetition_penalty, 1.0),
                (params.presence_penalty, 0.0),
                (params.frequency_penalty, 0.0),
            )
        ):
            self.penalties = Penalties(params, vocab_size, prompt)
        self.settings = None
        if not params.greedy:
            assert params.temperature is not None
            self.settings = settings_of(params.temperature, params.top_k, params.top_p, params.min_p)

    def random(self, position: int) -> int:
        """The random number, of 64 bits, that draws the token at a position."""
        return random_bits(self._seed, position)

    def pick(self, logits: Logits, position: int) -> int:
        """The next token.

        Parameters
        ----------
        logits : float32 ``[vocab_size]``
        position : int
            The position of the token in its sequence.

        Raises
        ------
        MarlinError
            The logits have a NaN, or the largest is infinite.
        """
        token = int(logits.argmax())  # a NaN counts as the largest
        check_largest(token, logits[token], position)
        if self.penalties is not None:
            logits = self.penalties.applied(logits)
        if self.settings is not None:
            token = draw(logits, self.settings, self.random(position))
        elif self.penalties is not None:
            token = int(logits.argmax())
        self.took(token)
        return token

    def took(self, token: int) -> None:
        """Count a token of the text. :meth:`pick` does this; a device that has chosen the token does not."""
        if self.penalties is not None:
            self.penalties.count(token)


def check_largest(token: int, logit: float, position: int) -> None:
    """Raise a MarlinError if a row's largest logit is not finite; a NaN counts as the largest."""
    if not -np.inf < logit < np.inf:
        raise MarlinError(f"position {position}: the model's logits have {logit} for token {token}")


class Penalties:
    """The penalties of the tokens that a sequence has.

    Attributes
    ----------
    above, below : Factor
        What positive and negative logits of these tokens are multiplied by.
    """

    def __init__(self, params: SamplingParams, vocab_size: int, prompt: Sequence[int]) -> None:
        repetition = params.repetition_penalty or 1.0
        self.above, self.below = Factor.of(1 / repetition), Factor.of(repetition)
        self._presence, self._frequency = params.presence_penalty or 0.0, params.frequency_penalty or 0.0
        self._counts = np.zeros(vocab_size, np.int64)  # of each token in the text
        self._seen = np.zeros(vocab_size, bool)  # in the prompt or the text
        self._seen[np.asarray(prompt, np.int64)] = True

    def count(self, token: int) -> None:
        """Count a token of the text."""
        self._counts[token] += 1
        self._seen[token] = True

    def tokens(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """``(tokens, amounts)``: the tokens that have penalties, and the ``amounts`` of :func:`penalised`."""
        tokens = np.flatnonzero(self._seen)
        counts = self._counts[tokens]
        return tokens, amounts_of(self._presence * (counts > 0) + self._frequency * counts)

    def applied(self, logits: Logits) -> Logits:
        """A copy of logits with the penalties."""
        tokens, amounts = self.tokens()
        logits = logits.copy()
        logits[tokens] = penalised(logits[tokens], self.above, self.below, amounts)
        return logits


MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio


def random_bits(mixed_seed: int, position: int) -> int:
    """64 random bits for a position. Source: SplitMix64 (Steele, Lea and Flood, 2014), its state by position."""
    return mixed((mixed_seed + (position + 1) * GOLDEN) & MASK)


def mixed(z: int) -> int:
    """The finaliser of SplitMix64: a permutation of 64-bit numbers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def _checked_stop(stop: Any) -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else stop
    if not isinstance(texts, Sequence) or isinstance(texts, bytes):
        raise TypeError(f"stop: got {type(stop).__name__}, expected a str or a sequence of str")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"stop: got {text!r}, expected a str")
        if not text:
            raise ValueError("stop: got an empty text, expected at least 1 character")
    return tuple(texts)


def _checked_ids(ids: Any) -> frozenset[int]:
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
        raise TypeError(f"stop_token_ids: got {type(ids).__name__}, expected token ids")
    return frozenset(integer("stop_token_ids", token) for token in ids)
