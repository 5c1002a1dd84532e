"""Pre-tokenizers of byte-level BPE, which split a text into words before merging; a GGUF file has only their names.

The patterns are part of the models' vocabularies: OpenAI's for GPT-2, cl100k and o200k, and those that DeepSeek,
Falcon, Llama 3, Qwen and others published in their tokenizer.json. The names are llama.cpp's.
"""

from dataclasses import dataclass

from model.errors import InputError

_SPACES = r"\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|" + _SPACES
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cl100k(digits: str, letter: str = r"\p{L}", no_mark: str = "") -> str:
    """Return the pattern of words with the character before them, numbers, signs to a line end, and line ends."""
    word = rf"[^\r\n\p{{L}}\p{{N}}]?{letter}+"
    signs = rf" ?[^\s\p{{L}}{no_mark}\p{{N}}]+[\r\n]*"
    return rf"{_ENDINGS}|{word}|{digits}|{signs}|\s*[\r\n]+|{_SPACES}"


def _o200k(digits: str, ending: str = "") -> str:
    """Return a pattern like cl100k's in which a word also ends between a lowercase and an uppercase letter."""
    word = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{ending}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{ending}"
    return rf"{word}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|{_SPACES}"


# Letters of words in DeepSeek's first tokenizer: ranges of code points, in hexadecimal.
_DEEPSEEK_LETTERS = """
41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376-377 37B-37D 37F 386 388-38A 38C 38E-3A1
3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A
1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4
1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128
212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183-2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2-2CF3 A640-A66D
A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3
104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943
"""
_DEEPSEEK_SIGNS = "21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3000-3002"
_DEEPSEEK_CJK = "4E00-9FA5 800-4E00 AC00-D7FF"
_CJK_AND_KANA = "4E00-9FA5 3040-309F 30A0-30FF"


def _class(ranges: str) -> str:
    escaped = ["-".join(rf"\x{{{end}}}" for end in pair.split("-")) for pair in ranges.split()]
    return f"[{''.join(escaped)}]"


@dataclass(frozen=True)
class PreTokenizer:
    """Patterns applied in sequence: each splits the parts left by those before it into matches and the rest.

    ignore_merges: a word that is in the vocabulary is one token, regardless of the merges. adds_bos: by default, texts
    begin with the begin token.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    adds_bos: bool = False


_KNOWN = {
    ("gpt-2", "phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "gigachat", "a.x-4.0", "mellum"): PreTokenizer(
        (_GPT2,)
    ),
    ("modern-bert", "exaone4", "mpt", "olmo", "jais", "trillion", "granite-docling"): PreTokenizer((_GPT2,)),
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"): PreTokenizer(
        (r"\p{N}", _GPT2)
    ),
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"): PreTokenizer(
        (_cl100k(r"\p{N}{1,3}"),), ignore_merges=True, adds_bos=True
    ),
    ("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"): PreTokenizer((_cl100k(r"\p{N}{1,3}"),)),
    ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "grok-2", "solar-open", "kormo"): PreTokenizer(
        (_cl100k(r"\p{N}"),)
    ),
    ("qwen35",): PreTokenizer((_cl100k(r"\p{N}", r"[\p{L}\p{M}]", r"\p{M}"),)),
    ("tekken",): PreTokenizer((_o200k(r"\p{N}"),), ignore_merges=True, adds_bos=True),
    ("gpt-4o", "llama4", "kanana2", "minimax-m2"): PreTokenizer((_o200k(r"\p{N}{1,3}", f"{_ENDINGS}?"),)),
    ("deepseek-llm",): PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?{_class(_DEEPSEEK_LETTERS)}+",
            rf"\s?{_class(_DEEPSEEK_SIGNS)}+",
            r"\s+$",
            f"{_class(_DEEPSEEK_CJK)}+",
            r"\p{N}+",
        )
    ),
    ("deepseek-coder",): PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", f"{_class(_DEEPSEEK_CJK)}+", r"\p{N}")),
    ("deepseek-v3", "hunyuan-dense", "joyai-llm"): PreTokenizer(
        (
            r"\p{N}{1,3}",
            f"{_class(_CJK_AND_KANA)}+",
            r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|"
            + _SPACES,
        )
    ),
    ("falcon",): PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    ("default",): PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
}
_BY_NAME = {name: rule for names, rule in _KNOWN.items() for name in names}


def pre_tokenizer(name: str) -> PreTokenizer:
    """Return the pre-tokenizer named in `tokenizer.ggml.pre`. Raises InputError with the known names."""
    if name not in _BY_NAME:
        raise InputError(
            f"the pre-tokenizer {name!r} is unknown; known are {', '.join(sorted(_BY_NAME))}:"
            " take the model's tokenizer.json instead"
        )
    return _BY_NAME[name]
