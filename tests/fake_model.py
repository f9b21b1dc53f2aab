"""A small model whose logits are a function of the tokens so far: for tests of text, without weights."""

import hashlib
import json
from pathlib import Path

import numpy as np

from marlin_cy.decoder.program import picked
from marlin_cy.errors import MarlinError, UnsupportedError


class FakeSequence:
    def __init__(self):
        self.tokens, self.freed = [], False

    @property
    def length(self):
        return len(self.tokens)


class FakeModel:
    """Logits are random numbers whose seed is the history, or those that ``scripted`` says.

    Parameters
    ----------
    scripted : list of int, optional
        The tokens that the model finds most likely after a prompt, one after another.
    prompt_length : int
        Where ``scripted`` begins.
    """

    def __init__(self, folder, *, vocab_size=264, context_length=64, cache_tokens=None, scripted=None, prompt_length=1):
        self.folder, self.vocab_size, self.context_length = Path(folder), vocab_size, context_length
        self.cache_tokens = -(-(cache_tokens or context_length) // 16) * 16
        self.scripted, self.prompt_length = scripted, prompt_length
        self.sequences = []
        self.calls = []  # the lengths of the tokens of each call
        self.recurrent = False
        self.context, self.plan, self.cache_bytes = None, (), 0

    def new_sequence(self):
        self.sequences.append(FakeSequence())
        return self.sequences[-1]

    def fork(self, sequence):
        copy = self.new_sequence()
        copy.tokens = list(sequence.tokens)
        return copy

    def truncate(self, sequence, length):
        if self.recurrent:
            raise UnsupportedError("truncate: this model has a recurrent state")
        assert not sequence.freed
        assert 0 <= length <= sequence.length
        del sequence.tokens[length:]

    def free(self, sequence):
        assert not sequence.freed
        sequence.freed = True

    @property
    def free_tokens(self):
        return self.cache_tokens - sum(-(-sequence.length // 16) * 16 for sequence in self.open)

    @property
    def open(self):
        """The sequences that are not freed."""
        return [sequence for sequence in self.sequences if not sequence.freed]

    def forward(self, tokens, *, sequence=None, all_logits=False):
        return self.forward_batch([(sequence, tokens)], all_logits=all_logits)[0]

    def forward_batch(self, pairs, *, all_logits=False):
        pairs = list(pairs)
        self.calls.append([len(tokens) for _, tokens in pairs])
        for sequence, tokens in pairs:
            assert not sequence.freed
            assert len(tokens) > 0
            if sequence.length + len(tokens) > self.context_length:
                raise MarlinError("beyond the context")
        results = []
        for sequence, tokens in pairs:
            rows = []
            for number, token in enumerate(tokens, 1):
                assert 0 <= int(token) < self.vocab_size
                sequence.tokens.append(int(token))
                if all_logits or number == len(tokens):
                    rows.append(self.logits(sequence.tokens))
            assert self.free_tokens >= 0, "the cache is full"
            results.append(np.stack(rows) if all_logits else rows[-1])
        return results

    def pick_batch(self, pairs, samplers):
        pairs = list(pairs)
        logits = self.forward_batch(pairs)
        return [
            sampler and picked(sampler, sequence.length, row)
            for (sequence, _), sampler, row in zip(pairs, samplers, logits, strict=True)
        ]

    def logits(self, tokens):
        seed = int.from_bytes(hashlib.sha256(np.array(tokens, np.int64).tobytes()).digest()[:8], "little")
        logits = np.random.default_rng(seed).standard_normal(self.vocab_size).astype(np.float32)
        index = len(tokens) - self.prompt_length
        if self.scripted is not None and 0 <= index < len(self.scripted):
            logits[self.scripted[index]] = 10
        return logits


def install(monkeypatch, model):
    """Let :func:`marlin_cy.decoder.load.load_model` give this model. Gives the list of its calls' arguments."""
    calls = []

    def load_model(path, backend, *, context_length, cache_tokens, cache_dtype, lm_head, group, progress, **options):
        calls.append({**options, "path": path, "context_length": context_length, "cache_tokens": cache_tokens})
        calls[-1]["cache_dtype"] = cache_dtype
        model.context = backend.new_context(**options)
        return model

    monkeypatch.setattr("marlin_cy.decoder.load.load_model", load_model)
    return calls


def write_tokenizer(folder, **changes):
    """Write a byte-level tokenizer: a byte is its own token, ``<eos>`` is 256. ``changes`` are to its config."""
    from importlib.resources import files

    from marlin_cy.commands.options import BUILT_IN

    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_bytes((files("marlin_cy") / BUILT_IN / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", **changes}))
    return folder
