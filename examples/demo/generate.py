"""The demo's task: does the second sentence follow from the first? Written here from word lists, nothing is copied.

Six kinds of pairs, each as often with the answer yes as with no, built so that the second sentence alone gives
nothing away:

    wording    another verb of the same meaning, or active and passive; no: a verb of another meaning
    kinds      a trout is a fish; no: a trout is not a bird, and a fish need not be a trout
    roles      who did it to whom; no: the roles are swapped
    numbers    seven is 7; no: it is not 9
    outcomes   who managed to do a thing has done it; no: who forgot to do it has not
    details    who bought a red boat in May has bought a boat in May; no: a boat, and nothing is said of the month

People, things, and half of the verbs of the validation rows never occur in a training row, so a model that has
seen no other text cannot know them: this is where the pretrained encoder helps. The same seed gives the same rows.
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

YES, NO = "entailment", "not_entailment"


class Pair(NamedTuple):
    """One row: the two sentences and the label."""

    first: str
    second: str
    label: str


class Verb(NamedTuple):
    """One verb's forms: sell, sold (past), sold (after "was")."""

    base: str
    past: str
    participle: str


class Words(NamedTuple):
    """What sentences of one split are made of."""

    people: Sequence[str]
    things: dict[str, Sequence[str]]  # kind to things of that kind
    actions: Sequence[
        Sequence[Verb]
    ]  # to a thing; verbs in one group mean the same, groups exclude each other's meaning
    meetings: Sequence[Sequence[Verb]]  # of two people, and who is who matters


PEOPLE = (
    "baker pilot nurse judge gardener plumber dancer sailor teacher miner tailor waiter painter farmer banker".split(),
    "butcher captain doctor lawyer florist porter singer fisherman student soldier barber cook sculptor clerk".split(),
)
THINGS = (
    {
        "bird": ("sparrow", "hawk", "swan", "parrot"),
        "fish": ("trout", "salmon", "carp", "herring"),
        "tool": ("hammer", "saw", "drill", "wrench"),
        "fruit": ("pear", "melon", "banana", "peach"),
        "vehicle": ("tractor", "bus", "truck", "van"),
        "garment": ("coat", "shirt", "scarf", "skirt"),
    },
    {
        "flower": ("rose", "tulip", "daisy", "lily"),
        "vegetable": ("carrot", "cabbage", "turnip", "leek"),
        "boat": ("canoe", "ferry", "yacht", "kayak"),
        "insect": ("beetle", "wasp", "moth", "cricket"),
        "weapon": ("sword", "spear", "dagger", "rifle"),
        "jewel": ("ruby", "diamond", "sapphire", "pearl"),
    },
)


def _verbs(text: str) -> list[list[Verb]]:
    """Groups of verbs from lines of ``base past participle, base past participle``."""
    return [[Verb(*forms.split()) for forms in line.split(",")] for line in text.strip().splitlines()]


ACTIONS = (
    _verbs(
        """
        buy bought bought, purchase purchased purchased
        hide hid hidden, conceal concealed concealed
        destroy destroyed destroyed, demolish demolished demolished
        carry carried carried, transport transported transported
        """
    ),
    _verbs(
        """
        lose lost lost, misplace misplaced misplaced
        choose chose chosen, select selected selected
        inspect inspected inspected, examine examined examined
        display displayed displayed, exhibit exhibited exhibited
        """
    ),
)
# occur in training and in validation rows
SHARED_ACTIONS = _verbs(
    """
    photograph photographed photographed
    steal stole stolen
    weigh weighed weighed
    wash washed washed, clean cleaned cleaned
    """
)
MEETINGS = (
    _verbs(
        """
        thank thanked thanked
        hire hired hired, employ employed employed
        chase chased chased, pursue pursued pursued
        """
    ),
    _verbs(
        """
        praise praised praised, commend commended commended
        visit visited visited
        rescue rescued rescued, save saved saved
        """
    ),
)
SHARED_MEETINGS = _verbs(
    """
    follow followed followed
    insult insulted insulted, offend offended offended
    """
)
LOOKS = ("red", "small", "heavy", "old", "dirty", "expensive")
TIMES = ("in May", "on Monday", "at noon", "last week", "before dawn", "in winter")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
FIRST_NUMBER = 2
DONE = ("managed to", "remembered to", "did not forget to", "did not fail to")
NOT_DONE = ("failed to", "forgot to", "refused to", "did not manage to")

TRAINING_WORDS = Words(PEOPLE[0], THINGS[0], [*ACTIONS[0], *SHARED_ACTIONS], [*MEETINGS[0], *SHARED_MEETINGS])
VALIDATION_WORDS = Words(PEOPLE[1], THINGS[1], [*ACTIONS[1], *SHARED_ACTIONS], [*MEETINGS[1], *SHARED_MEETINGS])


def _one(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _many(noun: str) -> str:
    irregular = {"fish": "fish", "trout": "trout", "salmon": "salmon", "carp": "carp"}
    if noun in irregular:
        return irregular[noun]
    if noun.endswith(("s", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _told(who: str, verb: Verb, what: str, passive: bool) -> str:
    """Who did it to what, in one of the two voices."""
    return f"{what} was {verb.participle} by {who}" if passive else f"{who} {verb.past} {what}"


class _Writer:
    """Draws words; each method writes the two sentences of one kind of pair."""

    def __init__(self, words: Words, draw: random.Random) -> None:
        self.words, self.draw = words, draw

    def _coin(self) -> bool:
        return self.draw.random() < 0.5

    def _person(self) -> str:
        return "the " + self.draw.choice(self.words.people)

    def _thing(self) -> tuple[str, str]:
        """A thing and its kind."""
        kind = self.draw.choice(sorted(self.words.things))
        return self.draw.choice(self.words.things[kind]), kind

    def _action(self) -> Verb:
        return self.draw.choice(self.draw.choice(self.words.actions))

    def wording(self, follows: bool) -> tuple[str, str]:
        groups = self.draw.sample(range(len(self.words.actions)), 2)
        group = self.words.actions[groups[0]]
        verb = self.draw.choice(group)
        other = self.draw.choice(group if follows else self.words.actions[groups[1]])
        who, (thing, _) = self._person(), self._thing()
        passive = self._coin()
        # the same verb needs the other voice, or the sentences would be the same
        second_passive = not passive if other == verb else self._coin()
        return _told(who, verb, f"the {thing}", passive), _told(who, other, f"the {thing}", second_passive)

    def kinds(self, follows: bool) -> tuple[str, str]:
        who, verb = self._person(), self._action()
        thing, kind = self._thing()
        group = next(group for group in self.words.actions if verb in group)
        other_verb = self.draw.choice(group)
        if self._coin():  # the second sentence names a kind
            wrong = self.draw.choice(sorted({*self.words.things} - {kind}))
            first, second = thing, kind if follows else wrong
        else:  # it names a thing
            first = thing if follows else kind
            second = thing
        passive = first == second and other_verb == verb
        return _told(who, verb, _one(first), False), _told(who, other_verb, _one(second), passive)

    def roles(self, follows: bool) -> tuple[str, str]:
        group = self.draw.choice(self.words.meetings)
        verb, other = self.draw.choice(group), self.draw.choice(group)
        one, two = ("the " + person for person in self.draw.sample(list(self.words.people), 2))
        passive = self._coin()
        second_passive = not passive if other == verb else self._coin()
        first = _told(one, verb, two, passive)
        return first, _told(one, other, two, second_passive) if follows else _told(two, other, one, second_passive)

    def numbers(self, follows: bool) -> tuple[str, str]:
        who, verb, (thing, _) = self._person(), self._action(), self._thing()
        said, other = self.draw.sample(range(len(NUMBERS)), 2)
        as_digits = str((said if follows else other) + FIRST_NUMBER)
        first, second = self.draw.sample([NUMBERS[said], as_digits], 2)
        return f"{who} {verb.past} {first} {_many(thing)}", f"{who} {verb.past} {second} {_many(thing)}"

    def outcomes(self, follows: bool) -> tuple[str, str]:
        who, verb, (thing, _) = self._person(), self._action(), self._thing()
        done = self._coin()
        first = f"{who} {self.draw.choice(DONE if done else NOT_DONE)} {verb.base} the {thing}"
        passive = self._coin()
        if done == follows:
            return first, _told(who, verb, f"the {thing}", passive)
        if passive:
            return first, f"the {thing} was not {verb.participle} by {who}"
        return first, f"{who} did not {verb.base} the {thing}"

    def details(self, follows: bool) -> tuple[str, str]:
        who, verb, (thing, _) = self._person(), self._action(), self._thing()
        look, time = self.draw.choice(LOOKS), self.draw.choice(TIMES)
        with_look = f"{who} {verb.past} {_one(f'{look} {thing}')}"
        with_time = f"{who} {verb.past} {_one(thing)} {time}"
        second, other = (with_look, with_time) if self._coin() else (with_time, with_look)
        return f"{with_look} {time}" if follows else other, second


KINDS: dict[str, Callable[[_Writer, bool], tuple[str, str]]] = {
    "wording": _Writer.wording,
    "kinds": _Writer.kinds,
    "roles": _Writer.roles,
    "numbers": _Writer.numbers,
    "outcomes": _Writer.outcomes,
    "details": _Writer.details,
}


def pairs(words: Words, count: int, seed: int) -> list[Pair]:
    """``count`` different rows (a multiple of 12: each kind as often as the others, with either label), shuffled."""
    if count % (2 * len(KINDS)):
        raise ValueError(f"{count} rows: must be a multiple of {2 * len(KINDS)}")
    draw = random.Random(seed)
    writer = _Writer(words, draw)
    found: dict[tuple[str, str], Pair] = {}
    for write in KINDS.values():
        for label in (YES, NO):
            wanted = len(found) + count // (2 * len(KINDS))
            while len(found) < wanted:
                first, second = map(_sentence, write(writer, label == YES))
                found.setdefault((first, second), Pair(first, second, label))
    rows = list(found.values())
    draw.shuffle(rows)
    return rows


def write_task(folder: Path, *, train: int, valid: int, seed: int) -> None:
    """train.tsv and dev.tsv in the columns of GLUE's RTE."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, words, count, part_seed in (
        ("train.tsv", TRAINING_WORDS, train, 2 * seed),
        ("dev.tsv", VALIDATION_WORDS, valid, 2 * seed + 1),
    ):
        lines = ["index\tsentence1\tsentence2\tlabel"]
        lines += [f"{place}\t" + "\t".join(row) for place, row in enumerate(pairs(words, count, part_seed))]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
