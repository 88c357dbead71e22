"""Typing errors: one in some of a row's words, the same ones at every call.

| error | example |
| --- | --- |
| two neighbouring letters change places | river, rievr |
| a letter is dropped | river, rver |
| a neighbouring key of a QWERTY keyboard | river, rivet |
"""

import random
import re
from collections.abc import Sequence

SHARE = 0.1
_WORD = re.compile(r"[^\W\d_]{3,}")  # runs of letters; shorter ones could become nothing
# the keys that touch each letter; each row of keys stands half a key to the right of the one above
NEIGHBOURS = dict(
    q="wa", w="qeas", e="wrsd", r="etdf", t="ryfg", y="tugh", u="yihj", i="uojk", o="ipkl", p="ol",
    a="sqwz", s="adwezx", d="sferxc", f="dgrtcv", g="fhtyvb", h="gjyubn", j="hkuinm", k="jliom", l="kop",
    z="xas", x="zcsd", c="xvdf", v="cbfg", b="vngh", n="bmhj", m="njk",
)  # fmt: skip


def misspelt(word: str, draw: random.Random) -> str:
    """The word with one error, of a kind that it allows; it differs from the word."""
    swaps = [place for place in range(len(word) - 1) if word[place] != word[place + 1]]
    keys = [place for place, letter in enumerate(word) if letter.lower() in NEIGHBOURS]
    kind = draw.choice(["drop", *["swap"] * bool(swaps), *["key"] * bool(keys)])
    if kind == "swap":
        place = draw.choice(swaps)
        return word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    if kind == "drop":
        place = draw.randrange(len(word))
        return word[:place] + word[place + 1 :]
    place = draw.choice(keys)
    key = draw.choice(NEIGHBOURS[word[place].lower()])
    return word[:place] + (key.upper() if word[place].isupper() else key) + word[place + 1 :]


def with_typos(texts: Sequence[str], identity: str, share: float = SHARE, seed: int = 1) -> list[str]:
    """A row's texts with an error in a share of their words of three letters or more, in one word at least.

    Which words and which errors follows from ``identity`` and ``seed`` alone.

    >>> with_typos(["The clerk weighed an old kayak.", "It was winter."], "17")
    ['The clerk weighed an old kayak.', 'It was wintef.']
    """
    draw = random.Random(f"{seed} {identity}")
    found = [(number, word) for number, text in enumerate(texts) for word in _WORD.finditer(text)]
    count = max(1, round(share * len(found)))
    changed = list(texts)
    # from the end, so that the places before an error stay
    for number, word in sorted(draw.sample(found, min(count, len(found))), key=lambda pair: -pair[1].start()):
        text = changed[number]
        changed[number] = text[: word.start()] + misspelt(word.group(), draw) + text[word.end() :]
    return changed
