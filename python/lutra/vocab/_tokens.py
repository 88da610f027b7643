"""What a token's text says: its canonical form, and the script of its characters."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache


def _byte_alphabet() -> dict[str, int]:
    """The characters in which byte-level BPE (GPT-2) writes bytes: printable Latin-1 stands for itself,
    U+0100 and up for the other bytes in order."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in own}
    others = [b for b in range(256) if b not in set(own)]
    table.update({chr(256 + i): b for i, b in enumerate(others)})
    return table


_BYTES = _byte_alphabet()


def _style(tokens: Iterable[str]) -> str:
    """How a vocabulary marks the beginning of words: 'wordpiece', 'bytes' or 'plain'."""
    pieces = levels = marks = 0
    for token in tokens:
        pieces += token.startswith("##") and len(token) > 2
        levels += token.startswith("\u0120")
        marks += token.startswith("\u2581")
    most = max(pieces, levels, marks)
    if most == 0 or marks == most:
        return "plain"
    return "wordpiece" if pieces == most else "bytes"


def _special(token: str) -> bool:
    return len(token) > 2 and (token[0], token[-1]) in (("[", "]"), ("<", ">"))


def canonical_tokens(vocab: Iterable[str]) -> dict[str, str]:
    """Tokens in one way of writing, whatever the tokenizer: a word begins with a space.

    Parameters
    ----------
    vocab : dict or iterable of str
        The tokens of one vocabulary. How it writes them is found from their marks: ``##`` (WordPiece: tokens
        without it begin a word), ``\u0120`` (byte-level BPE, whose alphabet is decoded; bytes that are no
        whole character stay undecoded) or ``\u2581`` (SentencePiece).

    Returns
    -------
    dict of str to str
        Tokens such as ``[CLS]`` and ``<s>`` stay as they are.

    Examples
    --------
    >>> import lutra
    >>> lutra.vocab.canonical_tokens(["play", "##ing", "[CLS]"])
    {'play': ' play', '##ing': 'ing', '[CLS]': '[CLS]'}
    """
    tokens = list(vocab)
    style = _style(tokens)
    return {t: t if _special(t) else _canonical(t, style) for t in tokens}


def _canonical(token: str, style: str) -> str:
    if style == "wordpiece":
        return token[2:] if token.startswith("##") and len(token) > 2 else " " + token
    if style == "bytes":
        try:
            return bytes(_BYTES[c] for c in token).decode("utf-8")
        except (KeyError, UnicodeDecodeError):
            return token
    return token.replace("\u2581", " ")


# ---------------------------------------------------------------- scripts
#: First words of character names (unicodedata.name) that are not a script's name, and what they stand for.
_NAMES = {
    "CJK": "Han", "IDEOGRAPHIC": "Han", "KANGXI": "Han", "FEMININE": "Latin", "MASCULINE": "Latin",
    "KELVIN": "Latin", "ANGSTROM": "Latin", "TURNED": "Latin", "ROMAN": "Latin", "SUPERSCRIPT": "Latin",
    "SUBSCRIPT": "Latin", "OHM": "Greek", "HENTAIGANA": "Hiragana", "MODIFIER": "Common",
    "MATHEMATICAL": "Common", "MICRO": "Common", "SCRIPT": "Common", "BLACK-LETTER": "Common",
    "DOUBLE-STRUCK": "Common", "PLANCK": "Common", "EULER": "Common", "ALEF": "Common", "BET": "Common",
    "GIMEL": "Common", "DALET": "Common", "INFORMATION": "Common", "KATAKANA-HIRAGANA": "Common",
    "VERTICAL": "Common", "MASU": "Common", "CARON": "Common", "COMBINING": "Inherited",
    "VARIATION": "Inherited", "VEDIC": "Inherited", "ZNAMENNY": "Inherited", "MUSICAL": "Inherited",
    "VIETNAMESE": "Han", "EGYPTIAN": "Egyptian_Hieroglyphs", "CANADIAN": "Canadian_Aboriginal",
    "ANATOLIAN": "Anatolian_Hieroglyphs", "KHITAN": "Khitan_Small_Script", "ZANABAZAR": "Zanabazar_Square",
    "NYIAKENG": "Nyiakeng_Puachue_Hmong", "PAU": "Pau_Cin_Hau", "PHAGS-PA": "Phags_Pa", "KAYAH": "Kayah_Li",
    "BASSA": "Bassa_Vah", "IMPERIAL": "Imperial_Aramaic", "PSALTER": "Psalter_Pahlavi",
    "CYPRO-MINOAN": "Cypro_Minoan",
}  # fmt: skip
#: First words of scripts that two words name, and the names of three words among these.
_TWO = frozenset((
    "OLD", "LINEAR", "MEETEI", "NEW", "OL", "TAI", "SYLOTI", "INSCRIPTIONAL", "CAUCASIAN", "WARANG", "PAHAWH",
    "MENDE", "MASARAM", "GUNJALA", "SORA", "MEROITIC", "HANIFI", "DIVES",
))  # fmt: skip
_THREE = {
    "New_Tai": "New_Tai_Lue", "Old_South": "Old_South_Arabian", "Old_North": "Old_North_Arabian",
    "Meroitic_Hieroglyphic": "Meroitic_Hieroglyphs", "Old_Chinese": "Common",
}  # fmt: skip


@lru_cache(maxsize=1 << 16)
def _script_of_character(c: str) -> str:
    """The script of one character; 'Common' for digits, signs and spaces, 'Inherited' for combining marks."""
    if c.isascii():
        return "Latin" if c.isalpha() else "Common"
    if unicodedata.category(c)[0] not in "LM":
        return "Common"
    words = unicodedata.name(c, "").split()
    while words and words[0] in ("FULLWIDTH", "HALFWIDTH"):
        words = words[1:]
    if not words:  # Python knows no names of Tangut
        return "Tangut" if 0x17000 <= ord(c) <= 0x18D08 else "Common"
    if words[0] in _NAMES:
        return _NAMES[words[0]]
    count = 2 if words[0] in _TWO else 1
    name = "_".join(w.capitalize() for w in words[:count])
    return _THREE.get(name, name)


def script_of(text: str) -> str:
    """The script that most letters of a text are written in.

    Python's ``unicodedata`` has no property Script; the first word of a character's name stands for it
    ("CYRILLIC SMALL LETTER ZHE"), with a list of the exceptions. Only letters and marks count; all else, and
    combining marks of no script, take the script of the rest.

    Parameters
    ----------
    text : str
        For tokens, their canonical form (`canonical_tokens`).

    Returns
    -------
    str
        'Latin', 'Cyrillic', 'Han', 'Hiragana', ... ; 'Common' where there is no letter. Of equal counts the
        script that comes first.

    Notes
    -----
    Equal to the property Script of Unicode for 99.7 % of all letters and marks (tests/test_vocab.py).

    Examples
    --------
    >>> import lutra
    >>> lutra.vocab.script_of(" \u0434\u043e\u043c 7"), lutra.vocab.script_of("3.14")
    ('Cyrillic', 'Common')
    """
    found = Counter(s for s in map(_script_of_character, text) if s not in ("Common", "Inherited"))
    return found.most_common(1)[0][0] if found else "Common"
