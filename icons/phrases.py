"""Sentences about drawn pictures, put together on a device from tables of token ids; all they say is true.

    text of a row, what its picture shows ─ a form of `captions.sentence` ─ pieces of text ─ token ids
                                            a frame ("a photo of {}")     ┘

A sentence is a row of `SLOTS`, each empty or a phrase from one table, around the text itself:

    lead  colour  adjective  kind  link      article  text     behind   place
    a     red     outline    icon  of        a        bicycle           on a blue background
    the   red                icon  shows     a        bicycle
                                             a        bicycle  in red
    a photo of                               a        apple                                     (as templates do)

The words and their rules are those of `captions.py`; the frames are what people ask with.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch

from .captions import STYLE_ADJECTIVES, article
from .drawing import Drawn
from .palette import NAMES
from .tensors import ARTICLES, KINDS, IconTensors, padded, where

EMOJI = KINDS.index("emoji")
EMPTY = 0  # the number of the phrase that is none
ADJECTIVES = tuple(adjective for each in STYLE_ADJECTIVES.values() for adjective in each)
LINKS = ("of", "for", "stands for", "shows")
ICON_OF = "an icon of"
FRAMES = ("a photo of", "this is a photo of", "a picture of", ICON_OF)
# Templates know no grammar: "This is a photo of {}." is filled with "bicycle", "a photo of a {}." with "apple".
BARE_IN_FRAME, ALWAYS_A = 0.35, 0.15  # shares of the frames with no article, and with "a" whatever follows
NOUN_FORMS, OTHER_FORMS = 7, 4  # of `captions.sentence`
SENTENCE_AT_FIRST = 0.05  # share of the sentences at no strength


@dataclass(frozen=True)
class Phrasing:
    """What pictures are searched by, and what captions say; shares in 0…1.

    Args:
        name: share of the pictures that are searched by their name; the others by any of their texts.
        related: share that are searched by a synonym or broader word of their name, if there is one.
        gloss: share that are searched by the definition of their name, if there is one.
        sentence: share of the texts that are put into a sentence; no definition is.
        frame: share of the sentences that are one of `FRAMES`, half of them with the article that the text wants.
        caption_name: share of the captions that are names; the others are any text of their picture.
    """

    name: float = 0.6
    related: float = 0.15
    gloss: float = 0.04
    sentence: float = 0.3
    frame: float = 0.25
    caption_name: float = 0.85

    def eased(self, strength: float | torch.Tensor) -> "Phrasing":
        """The same at a strength in 0…1, or a tensor () on the texts' device: at 0 names and tags, few sentences."""
        first = min(SENTENCE_AT_FIRST, self.sentence)
        sentence = first + (self.sentence - first) * strength
        others = {name: getattr(self, name) * strength for name in ("related", "gloss")}
        return replace(self, sentence=sentence, **others)


class Texts(NamedTuple):
    """Texts of a batch as a model takes them.

    Attributes:
        input_ids, attention_mask: (rows, tokens) int64, `[BOS] words [EOS]`, padded on the right.
        text: (rows,) int64, the number of the text that is in each.
        bare: (rows,) bool, whether it is nothing but that text.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    text: torch.Tensor
    bare: torch.Tensor


class Phrases:
    """The table of phrases on a device, and the ids that begin, end and fill a text.

    Args:
        tokenizer: makes token ids and names the special ones.
        device: of the table.
    """

    def __init__(self, tokenizer, device: torch.device | str):
        self.bos, self.eos, self.pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        phrases = ["", *ARTICLES[1:], *NAMES, *ADJECTIVES, *KINDS, *LINKS, *FRAMES]
        phrases += [f"in {name}" for name in NAMES] + [f"on {article(name)} background" for name in NAMES]
        self.numbers = {phrase: number for number, phrase in enumerate(phrases)}
        encoded = [tokenizer(phrase, add_special_tokens=False)["input_ids"] for phrase in phrases]
        self.tokens = padded(encoded, torch.int64).to(device)
        self.vowel = torch.tensor([article(phrase or "x").startswith("an ") for phrase in phrases], device=device)
        # Where each family of phrases begins: a family is asked for by the index of its member.
        first = {"article": ARTICLES[1], "colour": NAMES[0], "adjective": ADJECTIVES[0], "kind": KINDS[0]}
        first |= {"frame": FRAMES[0], "in": f"in {NAMES[0]}", "on": f"on {article(NAMES[0])} background"}
        self.first = {family: self.numbers[phrase] for family, phrase in first.items()}
        # Of each style, which adjectives it has: the first one's index and their number.
        counts = [len(each) for each in STYLE_ADJECTIVES.values()]
        starts = [sum(counts[:index]) for index in range(len(counts))]
        self.style_start, self.style_count = (torch.tensor(each, device=device) for each in (starts, counts))

    def of(self, family: str, index: torch.Tensor) -> torch.Tensor:
        """Numbers of the phrases of a family, of indices (rows,) int64; 0, the empty phrase, where an index is -1."""
        return where(index < 0, EMPTY, index + self.first[family])

    def a_or_an(self, vowel: torch.Tensor) -> torch.Tensor:
        return where(vowel, self.numbers["an"], self.numbers["a"])


def assemble(phrases: Phrases, segments: Sequence[torch.Tensor], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Puts ids one behind the other, between `[BOS]` and `[EOS]`.

    Args:
        phrases: knows the special ids.
        segments: (rows, some) int64 each, -1 where nothing is; in order.
        length: of the result; what is beyond it is cut, `[EOS]` stays.

    Returns:
        ids and mask, (rows, length) int64.
    """
    pieces = torch.cat(list(segments), dim=1).long()
    there = pieces >= 0
    places = there.long().cumsum(dim=1)
    kept = there & (places < length - 1)
    # One column more than needed takes what is left out.
    ids = pieces.new_full((len(pieces), length + 1), phrases.pad)
    ids = ids.scatter(1, where(kept, places, length), pieces.clamp(min=0))[:, :length]
    last = (places[:, -1:] + 1).clamp(max=length - 1)
    column = torch.arange(length, device=ids.device)
    ids = where(column == last, phrases.eos, where(column == 0, phrases.bos, ids))
    mask = column <= last
    return where(mask, ids, phrases.pad), mask.long()


def bare_texts(icons: IconTensors, phrases: Phrases, text: torch.Tensor, length: int) -> Texts:
    """The texts of these numbers (rows,) as they are, cut to `length` tokens."""
    ids, mask = assemble(phrases, [icons.tokens[text]], length)
    return Texts(ids, mask, text, torch.ones_like(text, dtype=torch.bool))


def framed_texts(icons: IconTensors, phrases: Phrases, text: torch.Tensor, lead: str, length: int) -> Texts:
    """The texts of these numbers (rows,) behind one of `FRAMES`, with their article: "an icon of a bicycle"."""

    frame = phrases.tokens[phrases.numbers[lead]].expand(len(text), -1)
    shown = phrases.tokens[phrases.of("article", icons.noun[text].long() - 2)]
    ids, mask = assemble(phrases, [frame, shown, icons.tokens[text]], length)
    return Texts(ids, mask, text, torch.zeros_like(text, dtype=torch.bool))


def captions(icons: IconTensors, phrases: Phrases, rows: torch.Tensor, options: Phrasing, length: int) -> Texts:
    """What captions of these rows (rows,) shall say: names mostly, or another of their texts."""
    name, other = icons.name[rows].long(), _any(icons.own[rows])
    text = where(torch.rand(len(rows), device=rows.device) < options.caption_name, name, other)
    return bare_texts(icons, phrases, text, length)


def descriptions(
    icons: IconTensors, phrases: Phrases, rows: torch.Tensor, drawn: Drawn, options: Phrasing, length: int
) -> Texts:
    """What the drawn pictures of these rows (rows,) are found by: texts, and sentences that are true of them."""
    text, gloss = _choose_texts(icons, rows, options)
    draws = torch.rand(8, len(rows), device=rows.device)  # one more than is used: runs draw what they always drew
    sentence = ~gloss & (draws[0] < options.sentence)
    framed = sentence & (draws[1] < options.frame)
    # A text that is no noun makes way for the name in a sentence, as in `compose._sentence`.
    name = icons.name[rows].long()
    text = where(sentence & (icons.noun[text] == 0), name, text)
    slots = _sentence_slots(icons, phrases, rows, text, drawn, draws[2:])
    frame = phrases.of("frame", (draws[2] * len(FRAMES)).long())
    slots = {slot: where(sentence & ~framed, number, EMPTY) for slot, number in slots.items()}
    in_frame = phrases.of("article", icons.noun[text].long() - 2)
    in_frame = where(draws[3] < BARE_IN_FRAME + ALWAYS_A, phrases.numbers["a"], in_frame)
    in_frame = where(draws[3] < BARE_IN_FRAME, EMPTY, in_frame)
    slots["lead"] = where(framed, frame, slots["lead"])
    slots["article"] = where(framed, in_frame, slots["article"])
    before = [phrases.tokens[slots[slot]] for slot in ("lead", "colour", "adjective", "kind", "link", "article")]
    behind = [phrases.tokens[slots[slot]] for slot in ("behind", "place")]
    ids, mask = assemble(phrases, [*before, icons.tokens[text], *behind], length)
    return Texts(ids, mask, text, ~sentence)


def _choose_texts(icons: IconTensors, rows: torch.Tensor, options: Phrasing) -> tuple[torch.Tensor, torch.Tensor]:
    """A text of each row (rows,) int64, and (rows,) bool, whether it is a definition."""
    name = icons.name[rows].long()
    chance, kind = torch.rand(2, len(rows), device=rows.device)
    text = where(chance < options.name, name, _any(icons.own[rows]))
    related, gloss = _any(icons.related[name]), icons.gloss[name].long()
    by_related = (kind < options.related) & (related >= 0)
    by_gloss = (kind > 1 - options.gloss) & (gloss >= 0)
    return where(by_gloss, gloss, where(by_related, related, text)), by_gloss


def _any(table: torch.Tensor) -> torch.Tensor:
    """One entry of each row of a table (rows, some) that is filled up with -1; -1 for an empty row."""
    count = (table >= 0).sum(dim=1)
    draw = (torch.rand(len(table), device=table.device) * count).long().clamp(max=table.shape[1] - 1)
    return table.gather(1, draw[:, None])[:, 0].long()


def _sentence_slots(icons, phrases: Phrases, rows, text, drawn: Drawn, draws: torch.Tensor) -> dict[str, torch.Tensor]:
    """Phrase numbers (rows,) of each slot: the forms of `captions.sentence`, with the shares of `compose._sentence`.

    `draws` (at least 5, rows) in 0…1 choose form, colour, style, background and adjective.
    """
    none = torch.full_like(text, -1)
    kind, noun = icons.kind[rows].long(), icons.noun[text].long()
    said = where(draws[1] < 0.6, drawn.ink, none)
    adjective = _adjectives(phrases, where(draws[2] < 0.5, drawn.style, none), draws[4])
    colour = phrases.of("colour", said)
    place = phrases.of("on", where(draws[3] < 0.2, drawn.ground, none))
    kinds = phrases.of("kind", kind)
    is_noun = noun > 0
    form = where(is_noun, draws[0] * NOUN_FORMS, NOUN_FORMS + draws[0] * OTHER_FORMS).long()
    noun_article = phrases.of("article", noun - 2)

    def one_of(*forms: int) -> torch.Tensor:
        return _is_one_of(forms, form.device)[form]

    look_before = one_of(0, 1, 5, 9, 10)  # "a red outline icon of ..."
    look_around = one_of(4, 7, 8)  # "a red outline bicycle icon"
    plain_thing = one_of(2) & (colour == 0)  # "a bicycle"
    red_thing = one_of(2) & (colour != 0)  # "a red bicycle", "red scissors", "the flag of peru in red"
    the_thing = red_thing & (noun == 1 + ARTICLES.index("the"))
    no_article = red_thing & (noun == 1)
    with_look = look_before | look_around
    slots = {
        "colour": where(with_look | red_thing & ~the_thing, colour, EMPTY),
        "adjective": where(with_look, adjective, EMPTY),
        "kind": where(look_before, kinds, EMPTY),
        "article": where(one_of(0, 1, 3, 5, 6) | plain_thing | the_thing, noun_article, EMPTY),
        "place": where(one_of(5, 10), EMPTY, place),
    }
    in_colour = the_thing | one_of(3) & (colour != 0) & (kind != EMOJI)
    slots["behind"] = where(in_colour, phrases.of("in", said), where(look_around, kinds, EMPTY))
    link = where(one_of(0, 1), phrases.numbers["of"], EMPTY)
    for number, words in ((5, "shows"), (9, "for"), (10, "stands for")):
        link = where(one_of(number), phrases.numbers[words], link)
    slots["link"] = link
    # "a" or "an" goes by the word that follows it.
    follows = where(slots["colour"] > 0, slots["colour"], slots["adjective"])
    follows = where(follows > 0, follows, slots["kind"])
    vowel = where(follows > 0, phrases.vowel[follows], icons.vowel[text])
    indefinite = one_of(0, 1, 4, 7, 9) | red_thing & ~the_thing & ~no_article
    lead = where(indefinite, phrases.a_or_an(vowel), EMPTY)
    slots["lead"] = where(one_of(5, 10), phrases.numbers["the"], lead)
    return slots


@lru_cache(maxsize=64)
def _is_one_of(forms: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """(forms,) bool; made once, since a copy to the device is one that the host waits for."""
    return torch.tensor([form in forms for form in range(NOUN_FORMS + OTHER_FORMS)], device=device)


def _adjectives(phrases: Phrases, style: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
    """Phrase numbers (rows,) of an adjective of each style, 0 where the style is -1."""
    known = style.clamp(min=0)
    index = phrases.style_start[known] + (draw * phrases.style_count[known]).long()
    return phrases.of("adjective", where(style < 0, -1, index))


def positives(icons: IconTensors, rows: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """(pictures, texts) bool: which texts are true of which pictures, by name, own texts and what is related.

    Args:
        rows: (pictures,) int64, rows of the data set; `text`: (texts,) int64 numbers, text i the one of picture i.
    """
    name = icons.name[rows].long()
    true = torch.cat([name[:, None], icons.own[rows].long(), icons.related[name].long()], dim=1)
    found = (name[:, None] == name[None]) | (text[:, None] == text[None])
    for column in true.unbind(dim=1):  # one at a time: (pictures, texts, columns) would be a gigabyte
        found |= column[:, None] == text[None]
    return found
