"""Match an answer with the accepted answers, letter by letter, in any script.

Two answers match if their normal forms are equal, so matching is reflexive, symmetric and transitive. docs/judges.md
says what the normal form drops and keeps, and how it differs from the published rule.
"""

import re
import string
import unicodedata
from collections.abc import Sequence

# Letters that Unicode does not decompose -> the same without strokes (case folding turns ß into ss already).
_LETTERS = {
    "æ": "ae", "œ": "oe", "ø": "o", "ł": "l", "đ": "d", "ð": "d", "þ": "th", "ħ": "h", "ŧ": "t", "ı": "i",
    "ǥ": "g", "ɓ": "b", "ɗ": "d", "ƙ": "k", "ƴ": "y", "ɨ": "i", "ʉ": "u",
}  # fmt: skip
# Characters that are replaced by another one, whatever their Unicode category.
_SAME = {
    "\u2044": "/", "\u2215": "/", "\u066b": ".", "\u066c": ",", "\u066a": "%", "\u2212": "-", "\u2019": "'",
    "\u2018": "'", "\u02bb": "'", "\u02bc": "'", "\u02be": "'", "\u02bf": "'", "\u0640": "", "\u034f": "",
}  # fmt: skip
# Compatibility forms that only change the look of a letter; <super>, <circle> and others carry a meaning.
_LOOKS = ("<wide>", "<narrow>", "<font>", "<initial>", "<medial>", "<final>", "<isolated>", "<noBreak>", "<vertical>")
_SIGNS = "+<>=~"  # ASCII signs that are kept, because they carry a meaning
# 1,000 and 1'000 and 1 000 with a non-breaking space, and the Indian 1,00,000.
_GROUPED = re.compile(
    r"(?<![\w.,'])(?:\d{1,3}([,'\u00a0\u202f\u2009])\d{3}(?:\1\d{3})*|\d{1,2}(?:,\d{2})+,\d{3})(?![\d,'])"
)
_ARTICLES = frozenset(("a", "an", "the"))
_PUBLISHED_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)


def normalise(text: str) -> str:
    """Return the normal form of an answer; it is "" only if the text has just white space and invisible characters.

    Case, accents of Latin and Greek letters, punctuation and leading articles are dropped. Signs, currencies and
    punctuation within numbers are kept. A text that this would empty is only folded.
    """
    folded = _fold(text)
    plain = _without_punctuation(folded)
    words = plain.split() or folded.split()
    # An article precedes a word: the A of "hepatitis A" is not an article, and "The The" is a name.
    rest = [word for word in words[:-1] if word not in _ARTICLES] + words[-1:]
    return " ".join(words if rest and set(rest) <= _ARTICLES else rest)


def exact_match(answer: str | None, accepted: Sequence[str]) -> float:
    """Return 1.0 if the normalised answer is not empty and equals a normalised accepted answer, else 0.0."""
    if answer is None or not normalise(answer):
        return 0.0
    return float(normalise(answer) in {normalise(text) for text in accepted})


def normalise_published(text: str) -> str:
    """Normalise as SQuAD, Search-R1 and MMSearch-R1 do: lower case, no ASCII punctuation, no articles."""
    plain = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return " ".join(_PUBLISHED_ARTICLES.sub(" ", plain).split())


def exact_match_published(answer: str | None, accepted: Sequence[str]) -> float:
    """Return 1.0 if the answer equals an accepted answer by the published rule, for comparison with papers; else 0.0.

    Two answers that the rule empties are equal, as in the published code; a missing answer is never right.
    """
    if answer is None:
        return 0.0
    return float(normalise_published(answer) in {normalise_published(text) for text in accepted})


def _fold(text: str) -> str:
    """Fold case and looks, make digits ASCII, drop accents of Latin and Greek letters, collapse white space."""
    for _ in range(3):  # a folded character may fold further (İ, ligatures in capitals)
        folded = _fold_once(text)
        if folded == text:
            break
        text = folded
    return " ".join(_GROUPED.sub(lambda found: re.sub(r"\D", "", found[0]), text).split())


def _fold_once(text: str) -> str:
    letters: list[str] = []
    base = ""  # the letter that marks belong to
    for character in unicodedata.normalize("NFD", "".join(map(_look, unicodedata.normalize("NFC", text)))).casefold():
        category = unicodedata.category(character)
        if category.startswith("M"):
            if not _optional(character, base):
                letters.append(character)
            continue
        if category == "Cf" and not 0xE0000 <= ord(character) <= 0xE007F:  # invisible; the tags of flags are letters
            continue
        base = character
        letters.append(_subscript(character, letters) or _LETTERS.get(character, character))
    return unicodedata.normalize("NFC", "".join(letters))


def _look(character: str) -> str:
    """Replace a character that differs only in its look: wide letters, digits of any script, fractions, dashes."""
    if character in _SAME:
        return _SAME[character]
    category = unicodedata.category(character)
    if category == "Nd":
        return str(unicodedata.decimal(character))
    if category == "Pd":
        return "-"
    kind = unicodedata.decomposition(character).split(" ")[0]
    if kind == "<fraction>":
        return " " + unicodedata.normalize("NFKD", character).replace("\u2044", "/")
    if kind in _LOOKS or (kind == "<compat>" and category[0] in "LN") or kind == "<square>":
        plain = unicodedata.normalize("NFKC", character)
        return character if character.isspace() else "".join(_SAME.get(c, c) for c in plain)
    return character


def _optional(mark: str, base: str) -> bool:
    """Return whether a combining mark is not part of a letter.

    These are accents in Latin and Greek, points in Hebrew and Arabic, stress in Cyrillic, and variation selectors.
    й, が and the vowel signs of Indic scripts are letters.
    """
    code, name = ord(mark), unicodedata.name(base, "") if base else ""
    if 0xFE00 <= code <= 0xFE0F or 0xE0100 <= code <= 0xE01EF:
        return True
    if name.startswith(("LATIN", "GREEK")):
        return True
    if name.startswith("CYRILLIC"):
        return mark in "\u0300\u0301" and base in "аеиоуыэюяіїєё"
    return 0x0591 <= code <= 0x05C7 or 0x064B <= code <= 0x0652 or code == 0x0670


def _subscript(character: str, before: list[str]) -> str:
    """Return the digit of a subscript that follows a letter (H₂O is H2O), else ""."""
    is_subscript = unicodedata.decomposition(character).startswith("<sub>")
    if is_subscript and before and (before[-1].isalpha() or before[-1].isdigit()):
        start = len(before)
        while start and before[start - 1].isdigit():
            start -= 1
        follows_letter = start > 0 and before[start - 1][-1:].isalpha()
        return unicodedata.normalize("NFKC", character) if follows_letter else ""
    return ""


def _without_punctuation(text: str) -> str:
    text = re.sub(r"(?<=\d)\s*-\s*(?=\d)", "-", text)
    text = re.sub(r"(?<=\d)\s+(?=[%\u2030\u2031])", "", text)
    kept = []
    for i, character in enumerate(text):
        before, after = text[i - 1] if i else " ", text[i + 1 : i + 2]
        if not _is_punctuation(character) or _has_meaning(character, before, text[i + 1 : i + 4]):
            is_plus = character == "+" and after.isdigit() and not before.isalnum() and before != "+"
            kept.append("" if is_plus else character)
    return "".join(kept)


def _is_punctuation(character: str) -> bool:
    category = unicodedata.category(character)
    if character in _PUNCTUATION:
        return character not in _SIGNS and category != "Sc"
    return category[0] == "P" or (category == "Sk" and not 0x1F3FB <= ord(character) <= 0x1F3FF)


def _has_meaning(character: str, before: str, after: str) -> bool:
    """Return whether a punctuation mark is part of a number (-5, 1.5, 10:30, 1/2, 5 %, 5′) or of a name such as C#."""
    number_follows = bool(re.match(r"\.?\d", after))
    if before.isdigit() and after[:1].isdigit() and character not in "\"'_":
        return True
    if character == "'":
        return before.isdigit() and after[:1].isdigit()
    if character == "-":
        signed = number_follows or (unicodedata.category(after[:1] or " ") == "Sc" and len(after) > 1)
        return signed and not before.isalnum() and before not in ")]"
    if character == ".":
        return after[:1].isdigit() and not before.isalnum() and before != "."
    if character == "#":
        return before.isalnum()
    return before.isdigit() and character in "%\u2030\u2031\u2032\u2033"
