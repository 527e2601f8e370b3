"""Searching by another word: what counts as one, and that the readers of names are not told the answer."""

import pytest
import torch

from mome.experiments.examples import captions_table, searches_table
from mome.experiments.icons import bm25, evaluation_of, main, name_match, other_words


def test_another_word_shares_no_word_with_the_name():
    texts = ["fire engine", "fire", "fires", "engines running", "truck", "red truck", "!"]
    assert other_words("fire engine", texts) == ["truck", "red truck"]


def test_a_word_that_begins_a_word_of_the_name_is_its_own():
    assert other_words("bicycling person", ["bicycle", "bi", "cyclist"]) == ["bicycle", "cyclist"]


def test_name_match_is_the_share_of_the_words():
    found = name_match(["red house", "tree"], ["house", "red house", "sea"])
    assert torch.equal(found, torch.tensor([[0.5, 1.0, 0.0], [0.0, 0.0, 0.0]]))


def test_bm25_finds_a_tag_unless_it_is_taken_out():
    texts = [["house", "home", "building"], ["tree", "forest"], ["sea", "water", "wave"], ["car", "road"], ["sun"]]
    wanted = torch.tensor([[True, False, False, False, False]])
    assert bm25(["home"], texts, wanted, leave_out=False).argmax() == 0
    assert bm25(["home"], texts, wanted, leave_out=True).eq(0).all()


def test_bm25_still_finds_by_the_words_that_are_left():
    texts = [["house", "home", "country home"], ["tree", "forest"], ["sea", "water"], ["car", "road"], ["sun"]]
    wanted = torch.tensor([[True, False, False, False, False]])
    assert bm25(["home"], texts, wanted, leave_out=True).argmax() == 0


def test_examples_say_what_was_found_and_at_which_rank():
    names = ["house", "tree", "sea", "car", "sun", "moon"]
    similarity = torch.tensor([[0.1, 0.9, 0.5, 0.4, 0.3, 0.2], [0.6, 0.2, 0.9, 0.5, 0.4, 0.3]])
    table = searches_table([0, 2], names, similarity)
    assert "| house | tree, sea, car, sun, moon | 6 |" in table
    assert "| sea | **sea**, house, car, sun, moon | 1 |" in table
    assert "| red house | house | 0.50 |" in captions_table(["red house"], ["house"], [0.5])


def test_figures_to_choose_by_come_from_the_validation_half(tmp_path):
    for half in ("test", "validation"):
        chosen = evaluation_of(tmp_path / "{half}", "unseen concepts", half=half)
        assert chosen.dataset_options["data_files"]["validation"] == str(tmp_path / "{half}" / f"{half}-*.parquet")
    assert "test" in evaluation_of(tmp_path, "unseen concepts").source


def test_a_template_without_a_place_for_the_name_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--checkpoint", str(tmp_path), "--data", str(tmp_path), "--template", "an icon"])
    assert "'an icon' has no {}" in capsys.readouterr().err
