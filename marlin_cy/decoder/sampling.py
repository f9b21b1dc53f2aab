"""Choosing a token from logits: the same token on every CPU.

::

    logits ── penalties ──┬── no temperature: the largest; of equal ones the smallest id
                          └── / temperature ── top_k ── weights ── top_p ── min_p ── drawn by a random number

Everything is float64, each operation is correctly rounded, sums go in ascending order, and equal values are ordered by
id. A random number is a function of the seed and of the token's position in its sequence, so that neither other
sequences nor earlier draws change it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import numpy.typing as npt

from marlin_cy.arguments import integer, number
from marlin_cy.checkpoints.gguf.documents import read_document
from marlin_cy.errors import CheckpointError, MarlinError
from marlin_cy.formats.json_fields import JsonObject, optional

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Sampler", "SamplingOptions", "SamplingParams", "exp", "largest_of", "random_number", "read_sampling"]

Logits = npt.NDArray[np.float32]
Scores = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

LEAST_EXPONENT = -37.0
"""The least exponent of a weight. A weight of 2**-53 of the largest one is practically never drawn."""

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
    """

    def __init__(self, params: SamplingParams, vocab_size: int, prompt: Sequence[int]) -> None:
        self._params = params
        self._seed = mixed((params.seed or 0) & MASK)
        self._penalises = any(
            value not in (None, neutral)
            for value, neutral in (
                (params.repetition_penalty, 1.0),
                (params.presence_penalty, 0.0),
                (params.frequency_penalty, 0.0),
            )
        )
        self._simple = params.greedy and not self._penalises
        if self._penalises:
            self._counts = np.zeros(vocab_size, np.int64)  # of each token in the text
            self._seen = np.zeros(vocab_size, bool)  # in the prompt or the text
            self._seen[np.asarray(prompt, np.int64)] = True

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
        largest = int(logits.argmax())  # a NaN counts as the largest
        if not -np.inf < logits[largest] < np.inf:
            raise MarlinError(f"position {position}: the model's logits have {logits[largest]} for token {largest}")
        if self._simple:
            return largest
        scores = self._penalised(logits.astype(np.float64)) if self._penalises else logits
        token = int(scores.argmax()) if self._params.greedy else self._drawn(scores, position)
        if self._penalises:
            self._counts[token] += 1
            self._seen[token] = True
        return token

    def _penalised(self, scores: Scores) -> Scores:
        params = self._params
        if params.repetition_penalty is not None:
            seen = np.flatnonzero(self._seen)
            values = scores[seen]
            scores[seen] = np.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
        for penalty, factor in ((params.presence_penalty, self._counts > 0), (params.frequency_penalty, self._counts)):
            if penalty:
                scores -= penalty * factor
        return scores

    def _drawn(self, scores: npt.NDArray[Any], position: int) -> int:
        params = self._params
        assert params.temperature is not None
        largest = float(scores.max())
        tokens: Indices | None = None  # of the weights; None: all
        if params.top_k and params.top_k < len(scores):
            tokens = largest_of(scores, params.top_k)
        elif params.min_p:
            # A conservative limit, so that few weights are computed; the exact one is applied to weights.
            tokens = np.flatnonzero(scores >= largest + (math.log(params.min_p) - 1e-3) * params.temperature)
        weights = (scores if tokens is None else scores[tokens]).astype(np.float64)
        weights -= largest
        weights /= params.temperature
        exp(weights)
        top_p = params.top_p if params.top_p != 1 else None
        for limit, kept_of in ((top_p, _most_likely), (params.min_p, _likely)):
            if limit is not None:
                kept = kept_of(weights, limit)
                tokens, weights = kept if tokens is None else tokens[kept], weights[kept]
        sums = weights.cumsum()
        drawn = int(sums.searchsorted(random_number(self._seed, position) * sums[-1], "right"))
        drawn = min(drawn, len(sums) - 1)
        return drawn if tokens is None else int(tokens[drawn])


def largest_of(scores: npt.NDArray[Any], count: int) -> Indices:
    """Indices of the ``count`` largest scores, ascending. Of equal scores the first are taken."""
    least = np.partition(scores, len(scores) - count)[len(scores) - count]
    found = np.flatnonzero(scores >= least)
    if len(found) > count:
        equal = np.flatnonzero(scores[found] == least)
        found = np.delete(found, equal[count - len(found) :])
    return found


def _most_likely(weights: Scores, share: float) -> Indices:
    """Indices of the fewest weights that have this share of the sum together, from the largest down."""
    total = weights.cumsum()[-1]
    # Smaller weights have less than the rest of the sum together. Half the limit makes up for rounding.
    found = np.flatnonzero(weights >= (1 - share) * total / (2 * len(weights)))
    found = found[np.argsort(-weights[found], kind="stable")]
    count = int(weights[found].cumsum().searchsorted(share * total)) + 1
    return found[:count]


def _likely(weights: Scores, share: float) -> Indices:
    """Indices of the weights that are at least this share of the largest one, which is 1."""
    return np.flatnonzero(weights >= share)


# ---------------------------------------------------------------------------------------------
# Arithmetic that has the same bits everywhere


def exp(x: Scores) -> None:
    """Replace ``x <= 0`` by ``e**x``, to a relative error of 1e-10; below :data:`LEAST_EXPONENT` by about its power.

    NumPy's own differs by a bit between CPUs. Multiplication and addition do not. ``x = -(i + f) / STEPS`` with an
    integer ``i`` and ``0 <= f < 1``; the power of ``i`` is in a table, that of ``f`` is a sum of four terms.
    """
    for begin in range(0, len(x), BLOCK):
        power = x[begin : begin + BLOCK]
        f = power * -STEPS
        np.minimum(f, len(POWERS) - 1, out=f)
        i = f.astype(np.int64)
        f -= i
        f *= -1 / STEPS
        np.multiply(f, 1 / 6, out=power)
        for term in (1 / 2, 1.0):
            power += term
            power *= f
        power += 1.0
        power *= POWERS[i]


def _powers() -> Scores:
    """``e**(-i / STEPS)``: by the first terms of the series for ``e**(x / 1024)``, and its 1024th power."""
    x = np.arange(1 - LEAST_EXPONENT * STEPS) * (-1 / STEPS / 1024)
    power = x * (1 / 720)
    for term in (1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0):
        power += term
        power *= x
    power += 1.0
    for _ in range(10):
        power *= power
    return power


STEPS = 256
BLOCK = 8192  # numbers of a block, so that they stay in the cache
POWERS = _powers()

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio


def random_number(mixed_seed: int, position: int) -> float:
    """A number in [0, 1) for a position. Source: SplitMix64 (Steele, Lea and Flood, 2014), its state by position."""
    return (mixed((mixed_seed + (position + 1) * GOLDEN) & MASK) >> 11) * 2.0**-53


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
