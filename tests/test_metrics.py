"""Metrics on matrices and captions that were worked out by hand."""

import pytest
import torch

from mome.evaluation.metrics import bleu4_and_cider, exact_match, retrieval_recall, token_f1, zero_shot_accuracy


def test_recall_counts_the_best_positive():
    similarity = torch.tensor([[0.9, 0.1, 0.5, 0.2], [0.3, 0.2, 0.8, 0.7], [0.1, 0.2, 0.3, 0.4]])
    positives = torch.tensor([[1, 0, 0, 0], [1, 0, 0, 1], [1, 0, 0, 0]]).bool()
    # Ranks: 0 (first), 1 (behind the third candidate), 3 (last).
    recall = retrieval_recall(similarity, positives, ks=(1, 2, 4))
    assert recall == pytest.approx({1: 1 / 3, 2: 2 / 3, 4: 1.0})


def test_a_model_that_says_the_same_of_everything_recalls_nothing():
    recall = retrieval_recall(torch.zeros(4, 20), torch.eye(4, 20).bool(), ks=(1, 10))
    assert recall == {1: 0.0, 10: 0.0}
    assert zero_shot_accuracy(torch.zeros(4, 20), torch.arange(4), classes=10) == {1: 0.0, 5: 0.0}


def test_queries_without_a_positive_are_left_out():
    positives = torch.tensor([[True, False], [False, False]])
    assert retrieval_recall(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), positives, ks=(1,)) == {1: 1.0}
    with pytest.raises(ValueError, match="no query"):
        retrieval_recall(torch.ones(1, 2), torch.zeros(1, 2).bool())


def test_zero_shot_chooses_among_so_many_classes_with_the_own_one():
    torch.manual_seed(1)
    labels = torch.arange(50)
    assert zero_shot_accuracy(torch.eye(50), labels, classes=10) == {1: 1.0, 5: 1.0}
    assert zero_shot_accuracy(1 - torch.eye(50), labels, classes=10) == {1: 0.0, 5: 0.0}
    guesses = zero_shot_accuracy(torch.rand(2000, 50), torch.arange(2000) % 50, classes=10)
    assert guesses[1] == pytest.approx(0.1, abs=0.03) and guesses[5] == pytest.approx(0.5, abs=0.05)


def test_exact_match_looks_at_words():
    captions, references = ["A red house.", "tree"], [["house", "a red house"], ["a tree"]]
    assert exact_match(captions, references) == 0.5


def test_token_f1_takes_the_closest_reference():
    # "red big house" against "red house": precision 2/3, recall 1 → 0.8; "cat" against "dog": 0.
    assert token_f1(["red big house", "cat"], [["car", "red house"], ["dog"]]) == pytest.approx(0.4)


def test_bleu_and_cider_prefer_the_reference():
    references = [["a red house on a hill"], ["two dogs play in the snow"], ["a plate with a slice of cake"]]
    right = bleu4_and_cider([each[0] for each in references], references)
    wrong = bleu4_and_cider([each[0] for each in references[1:] + references[:1]], references)
    assert right["bleu4"] == pytest.approx(1.0, abs=1e-6) and right["cider"] == pytest.approx(10.0, abs=1e-6)
    assert wrong["bleu4"] < 0.1 and wrong["cider"] < 0.5
