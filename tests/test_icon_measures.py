"""Searching by broader words, sentences and definitions, worked out by hand; what is checked before the work."""

import csv
import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image

from builders import build_processor
from models import tiny_captioner
from mome.errors import DataError, MomeError
from mome.evaluation.metrics import r_precision
from mome.experiments import icon_measures, icons
from mome.icons import build, render
from mome.icons.assemble import Named


class Known:
    """An embedder of texts that have their vectors."""

    def __init__(self, **texts):
        self.texts = texts

    def embed_texts(self, texts, on_cut=None):
        if on_cut and "long" in texts:
            on_cut(texts.count("long"))
        return torch.tensor([self.texts[text] for text in texts], dtype=torch.float32)


def example(name, image, related=(), gloss="", references=()):
    return {"text": name, "image": image, "related": related, "gloss": gloss, "references": [name, *references]}


def pool_of(*examples):
    return icon_measures.Pool(examples, torch.tensor([each["image"] for each in examples]))


def test_as_many_results_count_as_there_are_true_ones_and_at_most_ten():
    similarity = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5], [0.1, 0.2, 0.3, 0.4, 0.5]])
    positives = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 1, 1]]).bool()
    assert r_precision(similarity, positives) == pytest.approx((2 / 3 + 1) / 2)
    assert r_precision(similarity, positives, most=2) == pytest.approx((1 / 2 + 1) / 2)
    assert r_precision(similarity, positives, most=1) == 1.0
    with pytest.raises(ValueError, match="no positive"):
        r_precision(similarity, torch.zeros(2, 5).bool())


def test_a_broader_word_must_be_true_of_three_pictures_and_a_picture_called_so_is_left_out():
    pool = pool_of(
        example("bee", [1.0, 0.0], ["insect", "animal"]),
        example("dog", [0.8, 0.0], ["animal"]),
        example("cat", [0.1, 0.0], ["animal"]),
        example("van", [0.6, 0.0], ["car"]),
        example("beast", [0.9, 0.0], [], references=["animal"]),
    )
    figures = icon_measures.broader(Known(animal=[1, 0]), pool)
    # The first three of the four that count are bee, dog and van.
    assert figures == pytest.approx({"queries": 1, "R-precision": 2 / 3})
    with pytest.raises(DataError, match="no related word is true of 3 of the 2 pictures"):
        icon_measures.broader(Known(), pool_of(*pool.examples[:2]))


def test_a_sentence_that_hides_the_name_finds_less():
    pool = pool_of(example("bee", [1.0, 0.0]), example("dog", [0.0, 1.0]))
    texts = {"bee": [1, 0], "dog": [0, 1], "an icon of a bee": [1, 0], "an icon of a dog": [1, 0]}
    texts |= {"This is a photo of bee.": [0, 1], "This is a photo of dog.": [1, 0]}
    figures = icon_measures.templates(Known(**texts), pool)
    assert figures["'{}', text_to_image_r1"] == figures["'{}', image_to_text_r1"] == 1.0
    assert figures["'an icon of a {}', text_to_image_r1"] == 0.5
    assert figures["'This is a photo of {}.', text_to_image_r1"] == 0.0
    assert figures["'This is a photo of {}.', text_to_image_r10"] == 1.0


def test_a_definition_finds_any_picture_that_it_defines():
    pool = pool_of(
        example("bee", [1.0, 0.0], gloss="stings"),
        example("car", [0.0, 1.0], gloss="long"),
        example("automobile", [0.1, 0.9], gloss="long"),
        example("arrow left", [0.6, 0.6]),
    )
    figures = icon_measures.glosses(Known(stings=[0, 1], long=[0, 1]), pool)
    assert {key: figures[key] for key in ("queries", "queries of which the end is not read", "pictures")} == {
        "queries": 2, "queries of which the end is not read": 1, "pictures": 4,
    }  # fmt: skip
    assert figures["R@1"] == 0.5 and figures["R@10"] == 1.0
    with pytest.raises(DataError, match="none of the 1 pictures has a definition"):
        icon_measures.glosses(Known(), pool_of(*pool.examples[3:]))


@pytest.fixture
def data(tmp_path):
    """Eight pictures of an unseen set and a checkpoint of a few kilobytes."""
    rows, pictures = [], {}
    for number, name in enumerate("cat dog dot line circle square triangle picture".split()):
        row = Named(f"streamline-freehand-color:{name}", "streamline-freehand-color", "MIT", name, "", [name])
        row.related, row.gloss = ["red", "white"][: 1 + number % 2], f"a {name} with a dot"
        pixels = np.zeros((64, 64, 4), np.uint8)
        pixels[8 * number :, 8:, 3] = 255
        pictures[row.source_id] = render._encode(row.source_id, Image.fromarray(pixels))
        rows.append(row)
    build.write_splits(tmp_path, rows, ["freehand"] * len(rows), pictures)
    tiny_captioner().save_pretrained(tmp_path / "checkpoint")
    build_processor(image_size=16).save_pretrained(tmp_path / "checkpoint")
    return tmp_path


def arguments(data, *more):
    return ["--checkpoint", str(data / "checkpoint"), "--data", str(data), "--results", str(data / "rows.csv"), *more]


def test_parts_are_computed_on_the_data_that_were_asked_for(data, capsys):
    figures = icons.main(arguments(data, "--on", "freehand", "--only", "broader", "templates", "glosses"))
    assert {name.partition(":")[0] for name in figures} == {"unseen set freehand"}
    assert figures["unseen set freehand: broader, queries"] == 2
    assert figures["unseen set freehand: glosses, queries"] == 8
    rows = list(csv.DictReader((data / "rows.csv").open()))
    assert [row["metric"] for row in rows] == [f"icons, {name}" for name in figures]
    assert all("--on freehand" in row["command"] and row["metric"][7:] in capsys.readouterr().out for row in rows[:1])


def test_what_was_measured_stays_when_a_later_part_fails(data, monkeypatch):
    def fail(embedder, pool):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(icon_measures, "glosses", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        icons.main(arguments(data, "--on", "freehand", "--only", "glosses", "broader"))
    metrics = [row["metric"] for row in csv.DictReader((data / "rows.csv").open())]
    assert metrics == [
        "icons, unseen set freehand: broader, queries",
        "icons, unseen set freehand: broader, R-precision",
    ]


def test_a_missing_package_is_named_before_anything_is_computed(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rank_bm25" else find(name))
    monkeypatch.setattr(icon_measures, "EXTRAS", {"words": {"rank_bm25": "eval", "torch": "training"}})
    with pytest.raises(MomeError, match=r"'words' needs rank_bm25: pip install -e \"\.\[eval\]\""):
        icon_measures.check_parts(["broader", "words"], [])
    icon_measures.check_parts(["broader"], [])


def test_data_without_the_column_or_the_files_are_refused_in_one_line(data):
    import pyarrow.parquet as pq

    [path] = data.glob("freehand-*.parquet")
    pq.write_table(pq.read_table(path).drop_columns(["related"]), path)
    with pytest.raises(SystemExit, match="error: 'broader' needs the column 'related', which .*freehand.* lacks"):
        icons.main(arguments(data, "--on", "freehand", "--only", "broader"))
    for path in data.glob("healthicons-*.parquet"):
        path.unlink()
    with pytest.raises(SystemExit, match="error: .* has no healthicons-"):
        icons.main(arguments(data, "--on", "healthicons", "--only", "broader"))


def test_the_validation_half_leaves_the_unseen_sets_out():
    assert icons.data_of("validation") == ["unseen concepts", "seen pictures"]
    assert icons.data_of("test", ["freehand", "seen"]) == icons.data_of("test", ["seen", "freehand"])
    assert icons.data_of("validation", ["freehand", "concepts"]) == ["unseen concepts"]
