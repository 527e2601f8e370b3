"""What is said about a name: which sense of a word counts, what is too broad, and that nothing held out is named."""

import pytest

from mome.icons.assemble import Named
from mome.icons.build import add_relations
from mome.icons.splits import is_held_out
from mome.icons.wordnet import Nouns, definition_of, head_of, relations

# Key, then lemmas, lexicographer file, key of what is broader (with "@i" before it for an instance), gloss.
SYNSETS = {
    "entity": ("entity", 3, "", "that which is perceived to exist"),
    "animal": ("animal animate_being", 3, "entity", "a living organism"),
    "artifact": ("artifact artefact", 3, "entity", "a man-made object"),
    "person": ("person individual", 3, "entity", "a human being"),
    "insect": ("insect", 5, "arthropod", "small air-breathing arthropod"),
    "arthropod": ("arthropod", 5, "animal", "invertebrate with jointed limbs"),
    "bee": ("bee", 5, "insect", 'any of numerous hairy-bodied insects (of many kinds) ; "a bee stung me"; "two bees"'),
    "bee-party": ("bee", 14, "entity", "a social gathering"),
    "transport": ("conveyance transport", 6, "artifact", "something that serves as a means of transportation"),
    "vehicle": ("vehicle", 6, "transport", "a conveyance that transports people or objects"),
    "truck": ("truck motortruck", 6, "vehicle", "an automotive vehicle suitable for hauling"),
    "fire-engine": ("fire_engine fire_truck", 6, "truck", "a truck that carries firemen"),
    "poet": ("poet", 18, "person", "a writer of poems"),
    "Piston": ("Piston Walter_Piston", 18, "@i poet", "United States poet (1899-1932)"),
    "piston": ("piston", 6, "artifact", "moves in a cylinder"),
    "tiger-person": ("tiger", 18, "person", "a fierce or audacious person"),
    "tiger": ("tiger", 5, "animal", "large feline of forests"),
    "boat": ("boat", 6, "vessel", "a small vessel for travel on water"),
    "vessel": ("vessel watercraft", 6, "vehicle", "a craft designed for water transportation"),
    "Peru": ("Peru", 15, "@i country", "a republic in South America"),
    "country": ("country land", 15, "entity", "the territory occupied by a nation"),
    "peru-wood": ("peru", 27, "entity", "made up for this test"),
    "heart": ("heart", 8, "entity", "the hollow muscular organ"),
    "man": ("man adult_male", 18, "person", "an adult person who is male"),
    "rude": ("bumpkin", 18, "person", "an offensive word for a person"),
    "idea": ("idea", 9, "entity", "the content of cognition"),
}
INDEX = {
    key.replace("-", "_"): [key] for key in ("insect", "truck", "man", "heart", "idea", "boat", "fire-engine")
} | {
    "bee": ["bee-party", "bee"],
    "piston": ["Piston", "piston"],
    "tiger": ["tiger-person", "tiger"],
    "peru": ["Peru", "peru-wood"],
    "bumpkin": ["rude"],
}


@pytest.fixture(scope="module")
def nouns(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wordnet")
    lines, offsets, length = [], {}, 0
    for key in SYNSETS:  # offsets have eight digits, so that a line is as long before they are known as after
        offsets[key] = length
        length += len(data_line(key, dict.fromkeys(SYNSETS, 0)).encode())
    lines = [data_line(key, offsets) for key in SYNSETS]
    (folder / "data.noun").write_text("".join(lines))
    index = ["  1 This is the licence  "]
    for lemma, keys in INDEX.items():
        index.append(f"{lemma} n {len(keys)} 1 @ {len(keys)} 0 {' '.join(f'{offsets[key]:08d}' for key in keys)}  ")
    (folder / "index.noun").write_text("\n".join(index) + "\n")
    (folder / "noun.exc").write_text("men man\n")
    return Nouns(folder)


def data_line(key, offsets):
    lemmas, topic, broader, gloss = SYNSETS[key]
    symbol, _, target = broader.rpartition(" ")
    words = " ".join(f"{lemma} 0" for lemma in lemmas.split())
    # A pointer to a part comes first: it is no broader word.
    pointers = f"%p {0:08d} n 0000" + (f" {symbol or '@'} {offsets[target]:08d} n 0000" if broader else "")
    count = f"{1 + bool(broader):03d}"
    return f"{offsets[key]:08d} {topic:02d} n {len(lemmas.split()):02x} {words} {count} {pointers} | {gloss}  \n"


def nothing(word):
    return False


def test_other_words_come_first_then_broader_ones_and_no_words_that_say_nothing(nouns):
    found, gloss = relations("fire engine", nouns, nothing)
    assert found == ["fire truck", "truck", "motortruck", "vehicle", "transport"]
    assert gloss == "a truck that carries firemen"


def test_the_first_sense_that_can_be_drawn_counts(nouns):
    assert relations("bee", nouns, nothing) == (
        ["insect", "animal", "animate being"],
        "any of numerous hairy-bodied insects",
    )
    assert relations("idea", nouns, nothing) == ([], "")


def test_a_country_goes_before_a_thing_and_a_thing_before_a_poet(nouns):
    assert relations("peru", nouns, nothing)[0] == ["country", "land"]
    assert relations("piston", nouns, nothing) == ([], "moves in a cylinder")


def test_what_icons_mean_goes_before_what_is_usual(nouns):
    assert relations("tiger", nouns, nothing) == (["animal", "animate being"], "large feline of forests")


def test_words_that_hurt_are_left_alone(nouns):
    assert relations("bumpkin", nouns, nothing) == ([], "")


@pytest.mark.parametrize(
    "text, lemma", [("bees", "bee"), ("men", "man"), ("fire engines", "fire_engine"), ("x", None)]
)
def test_plurals_are_found_in_the_singular(nouns, text, lemma):
    assert nouns.lemma(text) == lemma


@pytest.mark.parametrize(
    "name, lemma",
    [
        ("red fire engine", "fire_engine"),  # the longest end that there is
        ("toy trucks", "truck"),
        ("man with beard", "man"),
        ("heart with arrow", "heart"),
        ("calendar heart", None),  # a mark at the end
        ("truck up", None),
        ("bee idea", None),  # no noun of things
    ],
)
def test_a_compound_is_what_its_head_is(nouns, name, lemma):
    assert head_of(name, nouns) == lemma


def test_a_compound_has_its_head_first_and_the_definition_of_it(nouns):
    definition = "an automotive vehicle suitable for hauling"
    assert relations("toy truck", nouns, nothing) == (["truck", "motortruck", "vehicle", "transport"], definition)
    assert relations("toy truck", nouns, lambda word: word == "truck") == (["motortruck", "vehicle", "transport"], "")


def test_examples_and_remarks_are_no_part_of_a_definition():
    assert definition_of('a cell (of a honeycomb) ; used for honey; "the cells were full"') == (
        "a cell; used for honey"
    )


def test_no_relation_names_what_is_held_out(nouns):
    assert is_held_out("vessel") and "vessel" in relations("boat", nouns, nothing)[0]
    rows = [
        Named(f"mdi:{place}", "mdi", "MIT", name, "", [name]) for place, name in enumerate(["boat", "bee", "boat"])
    ]
    add_relations(rows, nouns)
    assert rows[0].related == rows[2].related == ["watercraft", "vehicle", "transport"]
    assert rows[1].related == ["insect", "animal", "animate being"] and rows[1].gloss.endswith("insects")
