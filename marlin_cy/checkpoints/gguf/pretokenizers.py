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
LATIN_GREEK_CYRILLIC = (
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώ"
    r"ᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⲳⲳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻"
    r"𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)

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
            LATIN_GREEK_CYRILLIC,
            r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
            r"\s+$",
            r"[一-龥ࠀ-一가-퟿]+",
            r"\p{N}+",
        )
    ),
    "deepseek-v3": Cutting((r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK_PUNCTUATION)),
}
"""The ways to cut, by name."""


def find_cutting(name: str) -> Cutting | None:
    """The way to cut of this name, or None."""
    return CUTTINGS.get(name)
