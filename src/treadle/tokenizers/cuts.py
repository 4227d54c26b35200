"""How byte-level tokenizers cut text into pieces, inside which they merge.

GGUF only names the rule (`tokenizer.ggml.pre`); `PRES` says what each name means.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Pre:
    """How text is cut before merging."""

    patterns: tuple[str, ...]
    """Applied one after another; each match is a piece, and so is what lies between."""
    ignore_merges: bool = False
    """A piece that is a token is taken whole."""
    nfc: bool = False
    adds_bos: bool = False
    """Whether a BOS is added where the file does not say."""


PRES: Mapping[str, Pre] = {
    "gpt-2": Pre((GPT2,)),
    "smollm": Pre((r"\p{N}", GPT2)),
    "llama-bpe": Pre((GPT4,), ignore_merges=True, adds_bos=True),
    "qwen2": Pre((GPT4.replace(r"\p{N}{1,3}", r"\p{N}"),), nfc=True),
    "deepseek-v3": Pre((r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK3)),
    "default": Pre((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}
ALIASES = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
    "starcoder": "smollm",
    "phi-2": "gpt-2",
    "olmo": "gpt-2",
}


PROBE = (
    "I'M he'll WE'VE x'd don't 'Tis a1b22c333d4444e55555 ½² ٣٤٥ naïve Ünï e\u0301 日本語テキスト "
    "한국어 हिन्दी\u200d  two   three\ttab\n\n\nlines \r\n end  \n x=y+1;#$% foo_bar.baz/qux "
    "C++,<|not|> «q» “w” … — €5 🙂👩‍💻 .hidden -flag @you (a) [b]\n  indented\n\tx  "
)
"""A text that tells all the rules apart."""


def splitter(patterns: Iterable[str]) -> pre_tokenizers.PreTokenizer:
    """Cut by each pattern in turn, then spell bytes as characters."""
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*cuts, spell])
