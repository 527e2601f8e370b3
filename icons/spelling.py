"""How a text is spelt before the vocabulary is asked: one word of a name, however it was written.

    python -m mome.icons.spelling CHECKPOINT ... --cache DIR     # tokenizers that are there; vocabulary and ids stay

    ＨＴＴＰServer, http_server, "HTTP server!"  -> http server
    Crème brûlée, t–shirt, wi-fi, ﬁsh           -> creme brulee, t-shirt, wifi, fish
    🐝, 🇫🇷, 👋🏽                                  -> honeybee, flag france, waving hand medium skin tone
    🐝 on a hat, bee 🐝, my 🐝                   -> honeybee on a hat, bee, my honeybee
    слон bike, слон                             -> bike, [UNK]

An emoji is its CLDR short name. After the last word it is decoration, unless that word leads on to it (`LEADING`):
"bicycle 🙂" looks for a bicycle, and nothing that "bicycle slightly smiling face" finds.

All of this stands in the tokenizer's own normaliser, in rules that every reader of tokenizer.json has, those in
JavaScript included: no groups, no lookbehind of changing length, no class that has another name elsewhere. Each emoji
is a rule, at about 0.3 microseconds per text.
"""

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from tokenizers import Regex, Tokenizer, normalizers

from .naming import PHRASES
from .palette import NAMES
from .sources import SOURCES, fetch_source

TONES = "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"
JOINER, KEYCAP, BLACK_FLAG = "\u200d", "\u20e3", "\U0001f3f4"
# What a person is joined with last, and what stands between two: a skin tone moves behind the first ones first.
JOINED_FIRST, JOINED_LAST = "❤💋", "🧑👩👨➡"
# Words that lead on to another: after one of them an emoji at the end is part of what is said.
LEADING = (
    "a an the this that these those my your his her its our their some any no every each another "
    "of in on at with without and or to for from by between under over behind like "
    "one two three four five six seven eight nine ten"
).split()
# Written with a capital inside, and one word nevertheless; "|" is where it stays whole.
WHOLE = (
    "You|Tube Git|Hub Git|Lab Bit|Bucket i|Phone i|Pad i|Pod i|Mac i|Cloud i|Tunes i|OS mac|OS Mac|Book Air|Pods "
    "Pay|Pal Linked|In Whats|App Word|Press Java|Script Type|Script Tik|Tok Drop|box Sound|Cloud Deviant|Art "
    "e|Bay e|Book Power|Point One|Drive One|Note My|SQL Postgre|SQL Mongo|DB Graph|QL Open|AI Mc|Donald"
).split()
# Letters that no decomposition makes plain ones.
FOLDED = {"ß": "ss", "ẞ": "SS", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ø": "o", "Ø": "O", "đ": "d", "Đ": "D"}
FOLDED |= {"ð": "d", "Ð": "D", "þ": "th", "Þ": "Th", "ł": "l", "Ł": "L", "ħ": "h", "Ħ": "H", "ı": "i"}
WORD = "A-Za-z0-9\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\uff10-\uff19\uff21-\uff3a\uff41-\uff5a"
END = r"(?![\s\S])"  # of the text; `$` is the end of a line for some readers


def emoji_names(emojibase: Path) -> dict[str, str]:
    """Emoji, skin tones included, without variation selectors → their CLDR short names in English.

    Args:
        emojibase: folder of emojibase-data, whose labels are those names.
    """
    names = {}
    for entry in json.loads((emojibase / "en/data.json").read_text(encoding="utf-8")):
        for variant in (entry, *entry.get("skins", ())):
            names[variant["emoji"].replace("\ufe0f", "").replace("\ufe0e", "")] = variant["label"]
    return names


def spelling(emoji: Mapping[str, str]) -> normalizers.Sequence:
    """The normaliser of an English tokenizer.

    Args:
        emoji: names by emoji, as `emoji_names` gives them; without any, emoji are taken for marks.
    """
    rules = [_rule(r"[\ufe0e\ufe0f]", ""), *_emoji_rules(emoji)]
    rules += [
        _rule("[\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff]", ""),  # no width
        normalizers.NFKD(),  # full width, ligatures
        normalizers.StripAccents(),
        *(normalizers.Replace(letter, plain) for letter, plain in FOLDED.items()),
        _rule(_between_cases(), " "),
        normalizers.Lowercase(),
        _rule("[\u2018\u2019\u02bc\u2032]", "'"),
        _rule(r"'(?![a-z])|(?<![a-z])'", " "),  # of quotes, not of "o'clock"
        _rule(r"[\p{P}\p{S}\p{C}\p{Z}\p{M}\s](?<!['&])", " "),
        _rule(r"[^\sa-z0-9'&]+(?=[\s\S]*[a-z0-9])", " "),  # other letters, where words stand beside them
        _rule(rf"(?<=[a-z0-9])[^a-z0-9]+{END}", ""),
        _rule(" {2,}", " "),
        _rule(r"(?<![a-z0-9]|[a-z0-9] )&", " "),  # an ampersand that joins nothing
        *(_rule(rf"\b{words}(?![a-z0-9])", name) for words, name in PHRASES.items()),
    ]
    return normalizers.Sequence(rules)


def _rule(pattern: str, replacement: str) -> normalizers.Replace:
    return normalizers.Replace(Regex(pattern), replacement)


def _between_cases() -> str:
    """Matches nothing at the places where camelCase, PascalCase and HTTPServer are split."""
    whole = "|".join("(?<={})(?={})".format(*word.split("|")) for word in WHOLE)
    return f"(?<=[a-z0-9])(?=[A-Z])(?!{whole})|(?<=[A-Z])(?=[A-Z][a-z])"


def _emoji_rules(emoji: Mapping[str, str]) -> list[normalizers.Replace]:
    rules = [_named(sequence, name) for sequence, name in emoji.items() if KEYCAP in sequence]
    leading = "|".join(r"\b" + "".join(f"[{letter.upper()}{letter}]" for letter in word) for word in _leading())
    rules.append(_rule(rf"(?<=[{WORD}])(?=[^{WORD}])(?<!{leading})[^{WORD}]+{END}", ""))
    rules += [
        normalizers.Replace(tone + JOINER + joined, JOINER + joined + tone)
        for joined in _joined(emoji)
        for tone in TONES
    ]
    plain = _without_tones(emoji)
    return rules + [
        _named(sequence, plain[sequence]) for sequence in sorted(plain, key=lambda each: (-len(each), each))
    ]


def _named(sequence: str, name: str) -> normalizers.Replace:
    return normalizers.Replace(sequence, f" {name} ")


def _leading() -> list[str]:
    return list(dict.fromkeys([*LEADING, *(word for name in NAMES for word in name.split()[-1:])]))


def _without_tones(emoji: Mapping[str, str]) -> dict[str, str]:
    """Names of all emoji as if skin tones, which have names of their own, stood behind them; keycaps left out."""
    names = {sequence: name for sequence, name in emoji.items() if KEYCAP not in sequence}
    plain = {each: name for each, name in names.items() if len(each) == 1 or not set(each) & set(TONES)}
    for sequence, name in names.items():  # some pairs of people there are in tones only
        toneless = "".join(character for character in sequence if character not in TONES)
        if toneless and toneless not in plain:
            parts = [part for part in name.replace(":", ",").split(", ") if "skin tone" not in part]
            plain[toneless] = " ".join(parts)
    return plain


def _joined(emoji: Iterable[str]) -> list[str]:
    """What follows a skin tone and a joiner in a sequence, in the order in which the tone moves behind it."""
    found = {
        part[0] for sequence in emoji if sequence[1:2] and sequence[1] in TONES for part in sequence.split(JOINER)[1:]
    }
    return sorted(found, key=lambda each: (JOINED_LAST.find(each), -JOINED_FIRST.find(each) % 3, each))


def respell(tokenizer_file: Path, emoji: Mapping[str, str]):
    """Gives a tokenizer.json the normaliser that this module has; nothing else in it changes."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.normalizer = spelling(emoji)
    tokenizer.save(str(tokenizer_file))


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT", help="folders with tokenizer.json")
    parser.add_argument("--cache", type=Path, required=True, help="folder of downloads, as of mome.icons.build")
    options = parser.parse_args(arguments)
    emoji = emoji_names(fetch_source(SOURCES["emojibase-data"], options.cache))
    for checkpoint in options.checkpoints:
        respell(checkpoint / "tokenizer.json", emoji)
        print(f"{checkpoint / 'tokenizer.json'}: {len(emoji):,} emoji")


if __name__ == "__main__":
    main()
