"""The part of ``generate`` and ``perplexity`` that needs PyTorch and transformers.

The commands import it where they use it, so that other commands work without the packages.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as FileTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast, TextStreamer

from marlin_cy.checkpoints.gguf.documents import TOKENIZER, read_document
from marlin_cy.checkpoints.gguf.files import find_gguf
from marlin_cy.commands.options import argument_errors
from marlin_cy.commands.output import LoadProgress
from marlin_cy.errors import CheckpointError
from marlin_cy.integrations.configs import read_config
from marlin_cy.integrations.dequantized import dequantized_model
from marlin_cy.integrations.transformers import load
from marlin_cy.interface import Backend

__all__ = [
    "DensePlace",
    "Generated",
    "PackedPlace",
    "as_tensor",
    "context_length",
    "generate",
    "load_tokenizer",
    "packed_place",
    "perplexity",
    "set_torch_threads",
    "tokenize",
]


def set_torch_threads(arguments: argparse.Namespace) -> None:
    """Give PyTorch as many threads as ``--threads``, if the backend has that option and it was given."""
    if (threads := getattr(arguments, "threads", None)) is not None:
        torch.set_num_threads(threads)


def packed_place(backend: Backend, options: dict[str, Any]) -> PackedPlace:
    """A backend with the options of its contexts.

    Raises
    ------
    MarlinError
        An option, or the environment variable in its place, has an invalid value.
    """
    with argument_errors():
        return PackedPlace(backend, options, backend.describe(backend.new_context(**options)))


class DensePlace:
    """PyTorch alone, with dense weights."""

    description = "PyTorch"

    def load(self, folder: Path, dtype: str | None) -> Any:
        """The model of a folder, with dequantised weights."""
        assert dtype is not None
        return dequantized_model(folder, getattr(torch, dtype))


class PackedPlace:
    """A backend, and the options of its contexts.

    Attributes
    ----------
    description : str
        The device and the settings, in a few words.
    """

    def __init__(self, backend: Backend, options: dict[str, Any], description: str) -> None:
        self._backend, self._options, self.description = backend, options, description

    def load(self, folder: Path, dtype: str | None) -> Any:
        """The model of a folder; shows a progress bar where loading takes long."""
        with LoadProgress() as progress:
            return load(folder, self._backend, dtype=dtype, progress=progress, **self._options)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, or of a GGUF file.

    Raises
    ------
    CheckpointError
        transformers cannot load a tokenizer from the folder.
    """
    if (gguf := find_gguf(folder)) is not None:
        document, config = (read_document(gguf, name) for name in (TOKENIZER, "tokenizer_config.json"))
        special = {name: token for name, token in config.items() if name.endswith("_token")}
        return PreTrainedTokenizerFast(tokenizer_object=FileTokenizer.from_str(json.dumps(document)), **special)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many types for invalid files
        raise CheckpointError(f"no tokenizer that transformers can load: {error}", file=folder) from error
    # Where the folder has no tokenizer files, transformers returns one with only special tokens.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise CheckpointError("no tokenizer", file=folder)
    return tokenizer


def tokenize(tokenizer: Any, text: str) -> torch.Tensor:
    """The tokens of a text, int64 ``[1, tokens]``."""
    return tokenizer(text, return_tensors="pt", verbose=False)["input_ids"].long()


def as_tensor(tokens: list[int]) -> torch.Tensor:
    """Tokens as int64 ``[1, tokens]``."""
    return torch.tensor([tokens])


def context_length(folder: Path) -> int | None:
    """The model's maximum context in tokens; None if its config does not state it."""
    length: int | None = getattr(read_config(folder).get_text_config(), "max_position_embeddings", None)
    return length


# ---------------------------------------------------------------------------------------------
# Generation


@dataclasses.dataclass(frozen=True)
class Generated:
    """The continuation of a prompt, and its times.

    Attributes
    ----------
    text : str
    tokens : list of int
    prompt_seconds : float
        From the prompt to the first token.
    seconds : float
        From the first token to the last one.
    """

    text: str
    tokens: list[int]
    prompt_seconds: float
    seconds: float


# mypy does not follow transformers and PyTorch (pyproject.toml), so that their classes and decorators are Any.
class Streamer(TextStreamer):  # type: ignore[misc]
    """Passes text on when its words are complete, and records the time of each token."""

    def __init__(self, tokenizer: Any, write: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write
        self.text = ""
        self.tokens: list[int] = []
        self.times = [time.perf_counter()]

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
            self.tokens += value.tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self._write(text)


def generate(
    model: Any,
    tokenizer: Any,
    tokens: torch.Tensor,
    max_new_tokens: int,
    options: Mapping[str, Any],
    *,
    write: Callable[[str], object],
) -> Generated:
    """Continue a prompt.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer
    tokens : int64 tensor ``[1, tokens]``
    max_new_tokens : int
    options : mapping
        By the names of :class:`~marlin_cy.decoder.sampling.SamplingParams`: those that transformers has too. Without
        a temperature, the most likely token is taken each time.
    write : callable
        Called with each piece of text.

    Returns
    -------
    Generated
    """
    config = copy.deepcopy(model.generation_config)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None}
    if options.get("temperature"):
        names = ("temperature", "top_p", "top_k", "min_p")
        sampling |= {
            "do_sample": True,
            "top_k": 0,
            "top_p": 1.0,
            **{name: options[name] for name in names if name in options},
        }
        torch.manual_seed(options.get("seed", 0))
    config.update(
        **sampling,
        repetition_penalty=options.get("repetition_penalty"),
        max_new_tokens=max_new_tokens,
        max_length=None,
        num_beams=1,
        use_cache=True,
    )
    if config.pad_token_id is None:
        config.pad_token_id = 0  # one prompt needs no padding, but transformers warns without a padding token
    streamer = Streamer(tokenizer, write)
    model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=config, streamer=streamer)
    start, first, *_ = streamer.times
    return Generated(streamer.text, streamer.tokens, first - start, streamer.times[-1] - first)


# ---------------------------------------------------------------------------------------------
# Perplexity


# As in Streamer: mypy sees a decorator of type Any.
@torch.no_grad()  # type: ignore[untyped-decorator]
def perplexity(
    model: Any, tokens: torch.Tensor, window: int, windows: int, progress: Callable[[int, int, str], None]
) -> float:
    """``exp`` of the mean negative log-likelihood of tokens, in windows one after another.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokens : int64 tensor ``[1, tokens]``
    window : int
        Tokens that the model is given at once. The first token of each window is not scored.
    windows : int
        Number of whole windows.
    progress : callable
        Called as ``progress(done, total, description)``.
    """
    total = 0.0
    for done in range(windows):
        seen = tokens[:, done * window : (done + 1) * window]
        logits = model(seen, use_cache=False).logits[0, :-1]
        # At least in float32, whatever the model's dtype.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total += torch.nn.functional.cross_entropy(logits, seen[0, 1:], reduction="none").double().sum().item()
        progress(done + 1, windows, f"window {done + 1}")
    mean = total / (windows * (window - 1))
    return math.exp(mean) if mean < 700 else math.inf
