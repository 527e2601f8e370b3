"""What WordNet says about a name: other words for it, broader words, and its definition.

    bee          insect, invertebrate, animal         "any of numerous hairy-bodied insects including ..."
    fire engine  fire truck, truck, motortruck, ...   "any of various large trucks that carry firemen and ..."
    toy train    train, railroad train, ...           "public transport provided by a line of railway cars ..."

    name ─ whole, else what it is a kind of (`head_of`) ─ sense that can be drawn (`Nouns.sense`) ─ hypernyms ─ words

WordNet 3.0 (Fellbaum 1998) as plain files: `index.noun` lists the synsets of a lemma by frequency, `data.noun` has a
line for each synset, at the byte that its number says (manual page wndb).
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .captions import DIRECTIONS, LINKS, MARKS, NOUNS
from .naming import concept_key, to_name
from .rules import ICON_SENSES

MAX_RELATED = 10
OWN_WORDS, BROADER_WORDS = 3, 2  # of each synset, the most usual first
SENSES = 3  # of a lemma; later ones are rare
# Lexicographer files whose nouns can be drawn: animal, artifact, body, food, location, object, person, phenomenon,
# plant, shape, substance.
CONCRETE = frozenset({5, 6, 8, 13, 15, 17, 18, 19, 20, 25, 27})
LOCATION = 15
TOPS = 3  # person, animal, plant and food are here, beside what is too broad
# Too broad to be searched by, or words of a taxonomy that nobody searches by.
ABSTRACT = frozenset(
    "abstract entity|abstraction|agent|animate thing|area|artefact|arthropod|article|artifact|attribute|being|"
    "body|causal agent|cause|chordate|commodity|component|constituent|construction|consumer goods|container|"
    "conveyance|covering|craniate|creation|decoration|design|device|entity|equipment|eutherian|eutherian mammal|"
    "extent|fabrication|facility|figure|form|formation|geological formation|good|goods|group|implement|"
    "individual|installation|instrument|instrumentality|instrumentation|ligneous plant|line|living thing|"
    "location|material|matter|measuring system|mechanism|natural object|natural phenomenon|nourishment|nutriment|"
    "object|obstruction|obstructor|organism|ornament|part|pattern|phenomenon|physical entity|physical object|"
    "physical phenomenon|physical process|piece|placental|placental mammal|plane figure|point|process|product|"
    "production|region|representation|self propelled vehicle|shape|solid|solid food|structure|stuff|substance|"
    "supporting structure|surface|system|thing|tracheophyte|trade good|two dimensional figure|unit|"
    "vascular plant|vertebrate|ware|way|wheeled vehicle|whole|woody plant".split("|")
)
RUDE = re.compile(r"\b(?:disparag|insult|obscen|offensive|slur\b|vulgar)")
ENDINGS = {"ses": "s", "xes": "x", "zes": "z", "ches": "ch", "shes": "sh", "men": "man", "ies": "y", "s": ""}
SHORT = NOUNS | ICON_SENSES.keys()  # the names of one or two letters that are no abbreviations


@dataclass(frozen=True)
class Synset:
    """One meaning.

    Args:
        lemmas: words for it, `fire_engine`; the most usual first, proper names with capitals.
        topic: number of the lexicographer file, 5 for animals.
        broader: offset of the first hypernym, or of what it is an instance of; None at the top.
        is_instance: whether it is one thing with a proper name, as Peru.
        definition: the gloss without its examples.
        is_rude: whether the gloss warns of the words.
    """

    lemmas: tuple[str, ...]
    topic: int
    broader: int | None
    is_instance: bool
    definition: str
    is_rude: bool


class Nouns:
    """WordNet's nouns, read from the folder of its files.

    Args:
        folder: with `index.noun`, `data.noun` and `noun.exc`.
    """

    def __init__(self, folder: Path):
        self._data = (folder / "data.noun").read_bytes()
        self._offsets: dict[str, tuple[int, ...]] = {}
        for line in (folder / "index.noun").read_text().splitlines():
            if not line.startswith(" "):  # the licence
                lemma, _, senses, *rest = line.split()
                self._offsets[lemma] = tuple(map(int, rest[-int(senses) :]))
        pairs = (line.split()[:2] for line in (folder / "noun.exc").read_text().splitlines())
        self._irregular = {plural: singular for plural, singular in pairs}

    @cache  # noqa: B019 (one object per build)
    def synset(self, offset: int) -> Synset:
        """The synset at a byte of `data.noun`."""
        line = self._data[offset : self._data.index(b"\n", offset)].decode()
        fields, _, gloss = line.partition(" | ")
        _, topic, _, count, *rest = fields.split()
        words = int(count, 16)
        pointers = rest[2 * words + 1 :]
        up = [(symbol, int(target)) for symbol, target in zip(pointers[::4], pointers[1::4]) if symbol in ("@", "@i")]
        symbol, target = up[0] if up else ("", None)
        return Synset(
            tuple(rest[: 2 * words : 2]),
            int(topic),
            target,
            symbol == "@i",
            definition_of(gloss),
            bool(RUDE.search(gloss)),
        )

    def lemma(self, text: str) -> str | None:
        """The lemma of lower-case words, in the singular if only that is one: "fire engines" -> `fire_engine`."""
        word = text.replace(" ", "_").replace("-", "_")
        endings = (word.removesuffix(end) + start for end, start in ENDINGS.items() if word.endswith(end))
        spellings = (text.replace(" ", "_"), word, word.replace("_", "-"), self._irregular.get(word, ""), *endings)
        return next((each for each in spellings if each in self._offsets), None)

    def sense(self, lemma: str) -> Synset | None:
        """The first of the usual meanings of a lemma that can be drawn, proper names last."""
        senses = [self.synset(offset) for offset in self._offsets[lemma]]
        if (chosen := ICON_SENSES.get(lemma)) is not None:
            return senses[chosen - 1] if chosen else None
        common = [each for each in senses[:SENSES] if lemma in each.lemmas and not each.is_instance]
        first = senses[:1] if senses[0].topic == LOCATION else []  # Berlin is no carriage
        return next(
            (each for each in [*first, *common, *senses[:1]] if each.topic in CONCRETE and not each.is_rude), None
        )

    def broader(self, synset: Synset) -> Iterator[Synset]:
        """What a meaning is a kind of, nearest first, as long as that can be drawn."""
        while synset.broader is not None and (synset := self.synset(synset.broader)).topic in CONCRETE | {TOPS}:
            yield synset


def definition_of(gloss: str) -> str:
    """A gloss without its examples and without remarks in parentheses."""
    text = re.split(r';\s*"', gloss)[0]
    text = re.sub(r"\([^()]*\)", " ", text).replace("`", "'")
    return re.sub(r"\s+(?=[;,:])", "", re.sub(r"\s+", " ", text)).strip(" ;:")


def head_of(name: str, nouns: Nouns) -> str | None:
    """The lemma of what a compound is a kind of: the longest end that WordNet has.

    "pixel palm tree" gives `palm_tree`, "man with beard" `man`; "calendar heart" nothing, since a heart at the end
    is a mark on the calendar.
    """
    words = name.split()
    links = [place for place, word in enumerate(words) if place and word in LINKS]
    words = words[: links[0]] if links else words
    last, singular = words[-1], concept_key(words[-1])
    if not NOUNS & {last, singular} or DIRECTIONS.difference(LINKS).intersection(words):
        return None
    if not links and MARKS & {last, singular}:
        return None
    ends = (nouns.lemma(" ".join(words[start:])) for start in range(0 if links else 1, len(words)))
    return next((lemma for lemma in ends if lemma), None)


def relations(name: str, nouns: Nouns, unwanted: Callable[[str], bool]) -> tuple[list[str], str]:
    """Other and broader words for a name, nearest first, and its definition, or that of its head; both may be empty.

    Args:
        name: lower-case words.
        nouns: WordNet.
        unwanted: which words are left out, for example those that are held out.
    """
    lemma, compound = nouns.lemma(name) if len(name) > 2 or name in SHORT else None, False
    if lemma is None and " " in name:
        lemma, compound = head_of(name, nouns), True
    synset = nouns.sense(lemma) if lemma else None
    if synset is None or (compound and synset.is_instance):
        return [], ""
    groups = [[lemma] if compound else [], list(synset.lemmas)[: OWN_WORDS + 1]]
    groups += [list(each.lemmas)[:BROADER_WORDS] for each in nouns.broader(synset)]
    words = dict.fromkeys(to_name(word.split("_")) for group in groups for word in group)
    own = concept_key(name)
    kept = [w for w in words if w and w not in ABSTRACT and concept_key(w) != own and not unwanted(w)]
    return kept[:MAX_RELATED], "" if compound and unwanted(to_name(lemma.split("_"))) else synset.definition
