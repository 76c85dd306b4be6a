"""Which language a text is in, told by its scripts alone: zh, en or other.

Characters of Han are counted against words of Latin, as they carry about as much: a Chinese question about a piece of
code or an address has many more Latin letters than Han characters, and is Chinese all the same. Scripts can't tell
English from, say, Spanish; but English hardly uses accented letters, so a Latin text with several of them is other.
Only the first 2,000 characters are looked at.
"""

import re

HEAD_CHARACTERS = 2000
HAN_SHARE = 0.4  # of Han characters among them and the Latin words, from which a text is zh
FOREIGN_SHARE = 0.3  # of kana, Hangul, Cyrillic and so on among all, from which a text is other
ACCENTED_SHARE = 0.025  # of accented among Latin letters, from which a Latin text is other
FEWEST_ACCENTED = 2  # one accent is a café or a Pokémon in English text

_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+")
_LATIN_WORD = re.compile(r"[A-Za-z\u00c0-\u024f\u1e00-\u1eff]+")
_ACCENTED = re.compile(r"[\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff]")
# All that is neither Latin, nor Han, nor of the CJK symbols and full-width forms that Chinese text uses.
_ELSEWHERE = re.compile(r"[\u0370-\u1dff\u2c00-\u2dff\u3041-\u31ff\ua000-\udfff\uff66-\uffdc\U00010000-\U0001efff]")


def detect(text: str) -> str:
    """Gives "zh", "en" or "other" for a text; "other" where it holds no letters at all."""
    head = text[:HEAD_CHARACTERS]
    if head.isascii():
        return "en" if _LATIN_WORD.search(head) else "other"
    han = sum(map(len, _HAN.findall(head)))
    words = _LATIN_WORD.findall(head)
    foreign = sum(map(str.isalpha, _ELSEWHERE.findall(head)))
    total = han + len(words) + foreign
    if total == 0 or foreign >= FOREIGN_SHARE * total:
        return "other"
    if han >= HAN_SHARE * total:
        return "zh"
    accented = len(_ACCENTED.findall(head))
    return "other" if accented >= max(FEWEST_ACCENTED, ACCENTED_SHARE * sum(map(len, words))) else "en"
