"""The tokenizer of a header, as ``tokenizer.json``, ``tokenizer_config.json`` and ``generation_config.json`` say it.

Two kinds of vocabularies are read: byte-level BPE (``gpt2``), and SentencePiece's BPE (``llama``), whose merges are
ordered by the scores of their results. How a text is cut before BPE is a name in the file, a row of
:mod:`~marlin_cy.checkpoints.gguf.pretokenizers`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from marlin_cy.checkpoints.gguf.metadata import Metadata
from marlin_cy.checkpoints.gguf.pretokenizers import Cutting, find_cutting
from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.formats.json_fields import JsonObject

__all__ = ["generation_config", "tokenizer_config", "tokenizer_json"]

PREFIX = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of tokens in ``token_type``."""

SPACE = "▁"
"""What stands for a space in vocabularies of SentencePiece."""

SPECIAL = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad", "seperator": "sep", "mask": "mask"}
"""For each name of a field with a token's id, that of ``tokenizer_config.json``. llama.cpp misspells one."""

ENDS = ("eos", "eot", "eom")
"""Fields with tokens that end a text."""

ENDING_TOKENS = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
        *("<|endoftext|>", "<|eom_id|>", "<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<|user|>", "<|observation|>"),
    )
)
"""Control tokens that end a text. Source: llama.cpp, ``llama-vocab.cpp``; GLM-4.5's ``generation_config.json``."""

NOT_AN_END = {"<|end|>": ("<|return|>", "<|call|>")}
"""A token that ends a part of a text where these tokens exist. Source: gpt-oss."""

SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
"""The name in ``generation_config.json`` of each field ``general.sampling.*``."""


def tokenizer_json(fields: Metadata) -> JsonObject:
    """``tokenizer.json``.

    Raises
    ------
    CheckpointError
        There is no tokenizer, or its parts contradict each other.
    UnsupportedError
        A tokenizer of another kind, or a way to cut texts that is not known.
    """
    kind = fields.text(f"{PREFIX}model")
    if kind in (None, "none", "no_vocab"):
        raise CheckpointError("the file has no tokenizer", file=fields.header.files[0])
    if kind not in KINDS:
        raise UnsupportedError(
            f"{fields.header.files[0]}: {PREFIX}model: a tokenizer of kind {kind!r}, supported: {', '.join(KINDS)}"
        )
    tokens, kinds = _tokens(fields)
    added = [
        {
            "id": index,
            "content": tokens[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": bool(kinds[index] != USER_DEFINED),
        }
        for index in np.flatnonzero(np.isin(kinds, (UNKNOWN, CONTROL, USER_DEFINED))).tolist()
        if tokens[index]
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "post_processor": _post_processor(fields, tokens, kind),
        **KINDS[kind](fields, tokens, kinds),
    }


def tokenizer_config(fields: Metadata) -> JsonObject:
    """``tokenizer_config.json``; without a tokenizer, what there is."""
    config: JsonObject = {}
    tokens = fields.strings(f"{PREFIX}tokens")
    for name, ours in SPECIAL.items():
        index = fields.integer(f"{PREFIX}{name}_token_id")
        if tokens is not None and index is not None:
            config[f"{ours}_token"] = tokens[_checked_id(fields, f"{PREFIX}{name}_token_id", index, len(tokens))]
    templates = {
        name.removeprefix("tokenizer.chat_template."): value
        for name, value in fields.header.fields.items()
        if name.startswith("tokenizer.chat_template.") and isinstance(value, str)
    }
    default = fields.text("tokenizer.chat_template")
    if templates:
        named = templates if default is None else {"default": default, **templates}
        config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
    elif default is not None:
        config["chat_template"] = default
    if tokens is not None:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    return config


def generation_config(fields: Metadata) -> JsonObject:
    """``generation_config.json``: the tokens that end a text, and the settings of sampling."""
    config: JsonObject = {}
    tokens = fields.strings(f"{PREFIX}tokens")
    if tokens is not None:
        ends = [fields.integer(f"{PREFIX}{name}_token_id") for name in ENDS]
        found = [_checked_id(fields, f"{PREFIX}eos_token_id", end, len(tokens)) for end in ends if end is not None]
        config["eos_token_id"] = list(dict.fromkeys([*found, *_named_ends(fields, tokens)]))
        for name in ("bos", "padding"):
            if (index := fields.integer(f"{PREFIX}{name}_token_id")) is not None:
                config[f"{SPECIAL[name]}_token_id"] = index
    sampling = {ours: fields.number(f"general.sampling.{name}") for name, ours in SAMPLING.items()}
    given = {name: value for name, value in sampling.items() if value is not None}
    if "top_k" in given:
        given["top_k"] = round(given["top_k"])
    if given:
        config |= given | {"do_sample": True}
    return config


# ---------------------------------------------------------------------------------------------
# Kinds of tokenizers


def _byte_level(fields: Metadata, tokens: list[str], kinds: Any) -> JsonObject:
    """Byte-level BPE: each character of a token stands for a byte."""
    name = fields.text(f"{PREFIX}pre") or "default"
    cutting = find_cutting(name)
    if cutting is None:
        raise UnsupportedError(f"{fields.header.files[0]}: {PREFIX}pre: {name!r} is not known")
    return {
        "normalizer": {"type": "NFC"} if cutting.nfc else None,
        "pre_tokenizer": _pre_tokenizer(cutting),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(tokens, _merges(fields, tokens, kinds), ignore_merges=cutting.ignore_merges),
    }


def _sentencepiece(fields: Metadata, tokens: list[str], kinds: Any) -> JsonObject:
    """SentencePiece's BPE: of all neighbours, the two are joined whose result has the highest score."""
    scores = fields.get(f"{PREFIX}scores")
    if not isinstance(scores, np.ndarray) or scores.dtype.kind != "f" or len(scores) != len(tokens):
        raise fields.error(f"{PREFIX}scores", scores, f"{len(tokens)} numbers")
    prefix = fields.flag(f"{PREFIX}add_space_prefix")
    steps = [{"type": "Prepend", "prepend": SPACE}] if prefix is None or prefix else []
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    unknown = np.flatnonzero(kinds == UNKNOWN)
    back: list[JsonObject] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if steps:
        back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*steps, replaced]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": back},
        "model": _bpe(
            tokens,
            _scored_merges(tokens, scores, kinds),
            unk_token=tokens[unknown[0]] if len(unknown) else None,
            fuse_unk=True,
            byte_fallback=bool((kinds == BYTE).any()),
        ),
    }


KINDS = {"gpt2": _byte_level, "llama": _sentencepiece}
"""The part of ``tokenizer.json`` that each kind has, by ``tokenizer.ggml.model``."""

ADDS_FIRST = {"gpt2": False, "llama": True}
"""Whether a kind's texts begin with a token of their own, where the file does not say it."""


def _bpe(tokens: list[str], merges: list[list[str]], **settings: Any) -> JsonObject:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {token: index for index, token in enumerate(tokens)},
        "merges": merges,
    } | settings


def _merges(fields: Metadata, tokens: list[str], kinds: Any) -> list[list[str]]:
    """The pairs that are joined, in order. The first of a pair may begin with a space."""
    merges = fields.strings(f"{PREFIX}merges")
    if merges is None:
        if all(len(tokens[index]) == 1 for index in np.flatnonzero(kinds == NORMAL).tolist()):
            return []
        raise CheckpointError(f"{PREFIX}merges: missing", file=fields.header.files[0])
    pairs = []
    for merge in merges:
        place = merge.find(" ", 1)
        if place < 0:
            raise fields.error(f"{PREFIX}merges", merge, "two tokens with a space between")
        pairs.append([merge[:place], merge[place + 1 :]])
    return pairs


def _scored_merges(tokens: list[str], scores: Any, kinds: Any) -> list[list[str]]:
    """The pairs of tokens whose joined text is a token, the highest scores first."""
    score_of = {token: float(scores[index]) for index, token in enumerate(tokens) if kinds[index] == NORMAL}
    index_of = {token: index for index, token in enumerate(tokens)}
    found = []
    for token, score in score_of.items():
        for place in range(1, len(token)):
            left, right = token[:place], token[place:]
            if left in score_of and right in score_of:
                found.append((-score, index_of[left], index_of[right], left, right))
    return [[left, right] for *_, left, right in sorted(found)]


def _pre_tokenizer(cutting: Cutting) -> JsonObject:
    splits: list[JsonObject] = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in cutting.patterns
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*splits, level]}


def _post_processor(fields: Metadata, tokens: list[str], kind: str) -> JsonObject:
    """Puts the first and last token of every text."""
    cutting = find_cutting(fields.text(f"{PREFIX}pre") or "default")
    first = fields.flag(f"{PREFIX}add_bos_token")
    if first is None:
        first = ADDS_FIRST[kind] or (kind == "gpt2" and cutting is not None and cutting.adds_first)
    parts: list[JsonObject] = [{"Sequence": {"id": "A", "type_id": 0}}]
    special = {}
    for name, wanted, place in (
        ("bos", first, 0),
        ("eos", fields.flag(f"{PREFIX}add_eos_token") or False, len(tokens)),
    ):
        key = f"{PREFIX}{name}_token_id"
        index = fields.integer(key)
        if not wanted or (index is None and fields.flag(f"{PREFIX}add_{name}_token") is None):
            continue
        token = tokens[_checked_id(fields, key, fields.required(index, key), len(tokens))]
        parts.insert(place, {"SpecialToken": {"id": token, "type_id": 0}})
        special[token] = {"id": token, "ids": [index], "tokens": [token]}
    pair = [*parts, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": parts, "pair": pair, "special_tokens": special}


# ---------------------------------------------------------------------------------------------
# Fields


def _tokens(fields: Metadata) -> tuple[list[str], Any]:
    """``(tokens, their kinds)``."""
    tokens = fields.required(fields.strings(f"{PREFIX}tokens"), f"{PREFIX}tokens")
    rows = fields.tensor("token_embd.weight").shape[0]
    if not 1 <= len(tokens) <= rows:
        raise CheckpointError(
            f"{PREFIX}tokens: got {len(tokens)} tokens, but token_embd.weight has {rows} rows",
            file=fields.header.files[0],
        )
    kinds = fields.get(f"{PREFIX}token_type")
    if kinds is None:
        return tokens, np.full(len(tokens), NORMAL)
    if not isinstance(kinds, np.ndarray) or kinds.dtype.kind not in "iu" or len(kinds) != len(tokens):
        raise fields.error(f"{PREFIX}token_type", kinds, f"{len(tokens)} integers")
    return tokens, kinds


def _named_ends(fields: Metadata, tokens: list[str]) -> list[int]:
    """Control tokens whose names say that they end a text."""
    kinds = fields.get(f"{PREFIX}token_type")
    if not isinstance(kinds, np.ndarray) or len(kinds) != len(tokens):
        return []
    control = {tokens[index]: index for index in np.flatnonzero(kinds == CONTROL).tolist()}
    names = [name for name in control if name in ENDING_TOKENS]
    names = [name for name in names if not all(other in control for other in NOT_AN_END.get(name, (name + " ",)))]
    return [control[name] for name in names]


def _checked_id(fields: Metadata, name: str, index: int, count: int) -> int:
    if not 0 <= index < count:
        raise fields.error(name, index, f"0 to {count - 1}")
    return index
