"""How texts are cut before byte-level BPE, by ``tokenizer.ggml.pre``.

The patterns are those of the models' ``tokenizer.json``, as llama.cpp lists them in ``llama-vocab.cpp``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Cutting", "find_cutting"]


@dataclass(frozen=True)
class Cutting:
    """A way to cut texts.

    Attributes
    ----------
    patterns : tuple of str
        Regular expressions. Each cuts the pieces of the one before at its matches.
    nfc : bool
        Whether texts are brought to Unicode's form NFC first.
    ignore_merges : bool
        Whether a piece that is a token is one, even if no merges make it.
    adds_first : bool
        Whether every text begins with a token of its own, where the file does not say it.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    adds_first: bool = False


CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LAST = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CASES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+{end}"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*{end}"
)
"""Words, cut where an upper-case letter follows a lower-case one."""

NOT_HAN = r"&&[^\p{Han}]]"
KIMI = (
    r"[\p{Han}]+|"
    + CASES.replace(r"\p{Lo}\p{M}]", r"\p{Lo}\p{M}" + NOT_HAN).replace("{end}", f"{CONTRACTIONS}?")
    + rf"|\p{{N}}{{1,3}}|{LAST}"
)
DEEPSEEK_PUNCTUATION = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    + SPACES
)
CASED_LETTERS = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
"""Ranges of letters that have two cases, by an older version of Unicode."""

KANA_AND_HAN = "\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff"
HAN_AND_HANGUL = "\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff"
WIDE_PUNCTUATION = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"

LLAMA3 = Cutting((rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}|{LAST}",), ignore_merges=True, adds_first=True)
QWEN2 = Cutting((rf"{CONTRACTIONS}|{WORDS}|\p{{N}}|{LAST}",), nfc=True)
GPT_4O = Cutting(
    (CASES.replace("{end}", f"{CONTRACTIONS}?") + rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}",)
)

CUTTINGS: Mapping[str, Cutting] = {
    "default": Cutting((GPT2,)),
    "gpt-2": Cutting((GPT2,)),
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "tekken": Cutting(
        (CASES.replace("{end}", "") + rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}",),
        ignore_merges=True,
        adds_first=True,
    ),
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
    "qwen35": Cutting(
        (CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + SPACES,),
        nfc=True,
    ),
    "glm4": Cutting((rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}|{LAST}",), ignore_merges=True),
    "chatglm-bpe": Cutting((rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}|{LAST}",)),
    "gpt-4o": GPT_4O,
    "kimi-k2": Cutting((KIMI,)),
    "deepseek-llm": Cutting(
        (
            r"[\r\n]",
            rf"\s?[{CASED_LETTERS}]+",
            rf"\s?[{WIDE_PUNCTUATION}]+",
            r"\s+$",
            f"[{HAN_AND_HANGUL}]+",
            r"\p{N}+",
        )
    ),
    "deepseek-v3": Cutting((r"\p{N}{1,3}", f"[{KANA_AND_HAN}]+", DEEPSEEK_PUNCTUATION)),
}
"""The ways to cut, by name."""


def find_cutting(name: str) -> Cutting | None:
    """The way to cut of this name, or None."""
    return CUTTINGS.get(name)
