"""What the commands on whole models do with PyTorch and transformers; imported where a command needs them."""

import copy
import dataclasses
import math
import time

import torch
from transformers import AutoTokenizer, TextStreamer

from marlin_cy import get_backend
from marlin_cy.commands.opencl_options import open_opencl
from marlin_cy.commands.output import LoadProgress
from marlin_cy.errors import CheckpointError, MarlinError
from marlin_cy.integrations.dequantized import dequantized_model
from marlin_cy.integrations.transformers import load, read_config

__all__ = [
    "Generated",
    "context_length",
    "generate",
    "load_tokenizer",
    "perplexity",
    "place_of",
    "tokenize",
]


def place_of(backend, compute_dtype, arguments):
    """Where a model's quantised layers run.

    Parameters
    ----------
    backend : str or None
        None: in PyTorch, with dense weights.
    compute_dtype : str or None
        Of the CPU.
    arguments : argparse.Namespace
        ``threads``, ``device`` and ``tier``.

    Returns
    -------
    DensePlace or PackedPlace
    """
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if backend is None:
        return DensePlace()
    if backend == "opencl":
        backend = open_opencl(arguments)
        return PackedPlace(backend, {}, f"{backend.runtime.capabilities.name}, tier {backend.tier.name}")
    options = {"num_threads": arguments.threads, "compute_dtype": compute_dtype}
    backend = get_backend(backend)
    try:
        context = backend.new_context(**options)
    except ValueError as error:
        # The arguments were checked before: what is left is the environment (MARLIN_CY_ISA).
        raise MarlinError(str(error)) from error
    return PackedPlace(backend, options, f"{context.isa}, {context.num_threads} threads, {compute_dtype}")


class DensePlace:
    """PyTorch alone, with dense weights."""

    description = "PyTorch"

    def load(self, folder, dtype):
        """The model of a folder."""
        return dequantized_model(folder, getattr(torch, dtype))


class PackedPlace:
    """A backend and what its contexts are made with.

    Attributes
    ----------
    description : str
        In a few words.
    """

    def __init__(self, backend, options, description):
        self._backend, self._options, self.description = backend, options, description

    def load(self, folder, dtype):
        """The model of a folder, with a progress bar where it takes long."""
        with LoadProgress() as progress:
            return load(folder, self._backend, dtype=dtype, progress=progress, **self._options)


def load_tokenizer(folder):
    """A folder's tokenizer; a :class:`CheckpointError` where transformers finds none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of many kinds: whatever it is, it is about the folder's files
        raise CheckpointError(f"no tokenizer that transformers can load: {error}", file=folder) from error
    # Without files, transformers makes one of the model's family that knows no text.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise CheckpointError("no tokenizer", file=folder)
    return tokenizer


def tokenize(tokenizer, text):
    """A text's tokens, int64 ``[1, tokens]``."""
    return tokenizer(text, return_tensors="pt", verbose=False)["input_ids"].long()


def context_length(folder):
    """How many tokens a model can see at once, by its config; None where that does not say."""
    return getattr(read_config(folder).get_text_config(), "max_position_embeddings", None)


# ---------------------------------------------------------------------------------------------
# Generation


@dataclasses.dataclass(frozen=True)
class Generated:
    """What came of a prompt.

    Attributes
    ----------
    text : str
    tokens : list of int
    prompt_seconds : float
        Until the first token was there.
    seconds : float
        For the others.
    """

    text: str
    tokens: list
    prompt_seconds: float
    seconds: float


class Streamer(TextStreamer):
    """Hands on text when its words are complete, and notes when each token came."""

    def __init__(self, tokenizer, write):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write
        self.text, self.tokens, self.times = "", [], [time.perf_counter()]

    def put(self, value):
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
            self.tokens += value.tolist()
        super().put(value)

    def on_finalized_text(self, text, stream_end=False):
        self.text += text
        self._write(text)


def generate(model, tokenizer, tokens, max_new_tokens, *, temperature, top_p, seed, write):
    """Continue a prompt.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer
    tokens : int64 tensor ``[1, tokens]``
    max_new_tokens : int
    temperature : float or None
        None: take the most likely token each time.
    top_p : float
        Draw among the most likely tokens that have this much of the probability.
    seed : int
    write : callable
        Given text as it comes.

    Returns
    -------
    Generated
    """
    config = copy.deepcopy(model.generation_config)
    sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature is not None:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        torch.manual_seed(seed)
    config.update(**sampling, max_new_tokens=max_new_tokens, max_length=None, num_beams=1, use_cache=True)
    if config.pad_token_id is None:
        config.pad_token_id = 0  # one prompt needs no padding, but transformers warns without
    streamer = Streamer(tokenizer, write)
    model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=config, streamer=streamer)
    start, first, *_ = streamer.times
    return Generated(streamer.text, streamer.tokens, first - start, streamer.times[-1] - first)


# ---------------------------------------------------------------------------------------------
# Perplexity


@torch.no_grad()
def perplexity(model, tokens, window, windows, progress):
    """``exp`` of the mean negative log-likelihood of tokens, in windows one after another.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokens : int64 tensor ``[1, tokens]``
    window : int
        Tokens that the model sees at once. The first of each is not scored.
    windows : int
        Whole ones that there are.
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
