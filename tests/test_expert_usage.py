"""Who takes what: shares against a count by hand, padding aside, and the picture."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from builders import WORDS, build_processor
from models import tiny_captioner
from mome.embedder import Embedder
from mome.experiments.expert_usage import GroupRouting, main, patches_of, route_texts, typical_words


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("routed")
    tiny_captioner("routed").save_pretrained(folder)
    build_processor(16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    images = []
    for seed in range(7):
        buffer = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    words = WORDS.split()
    path = tmp_path_factory.mktemp("data") / "test.parquet"
    pq.write_table(pa.table({"image": images, "texts": [[" ".join(words[: 1 + each])] for each in range(7)]}), path)
    return path


def test_shares_are_counts_of_choices():
    routing = GroupRouting("text", torch.tensor([[[0, 1], [0, 2], [1, 0]]]), 4)
    assert torch.allclose(routing.shares(), torch.tensor([[3, 2, 1, 0]]) / 6)
    assert routing.tokens_of(0, 0).tolist() == [0, 1] and routing.tokens_of(0, 2).tolist() == []


def test_tokens_of_a_padded_batch_go_where_they_go_alone():
    embedder = Embedder(tiny_captioner("routed").model, build_processor(16))
    texts = ["a red dot", "cat", "the photo of a black cat on a line"]
    together, tokens = route_texts(embedder, texts)
    alone = [route_texts(embedder, [text]) for text in texts]
    assert tokens == [token for _, own in alone for token in own] and tokens[:5] == "[BOS] a red dot [EOS]".split()
    assert torch.equal(together.experts, torch.cat([routing.experts for routing, _ in alone], dim=1))


def test_patches_are_cut_row_by_row_behind_the_class_token():
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[:2, 2:] = 200
    patches = patches_of([Image.fromarray(pixels)] * 2, 2, 2)
    assert patches.shape == (10, 2, 2, 3) and patches[:, 0, 0, 0].tolist() == [160, 0, 200, 0, 0] * 2


def test_typical_words_are_those_an_expert_has_most_of():
    tokens = ["a"] * 10 + ["cat"] * 5 + ["rare"]
    assert typical_words(tokens, torch.tensor([0, 1, 2, 10, 11, 12, 13, 15])) == ["cat", "a"]


def test_the_command_counts_every_token_and_draws(checkpoint, data, tmp_path):
    picture, results = tmp_path / "routing.png", tmp_path / "results.csv"
    arguments = ["--checkpoint", str(checkpoint), "--data", str(data), "--picture", str(picture)]
    image, text = main([*arguments, "--results", str(results)])
    assert image.experts.shape == (2, 7 * 5, 2) and text.experts.shape == (2, sum(range(3, 10)), 2)
    assert torch.allclose(image.shares().sum(dim=1), torch.ones(2))
    drawn = np.asarray(Image.open(picture))
    assert drawn.shape[0] > 2 * 4 * 32 and len(np.unique(drawn.reshape(-1, 3), axis=0)) > 100
    assert results.read_text().count("share of an expert") == 4
    main([*arguments, "--layers", "2"])
    one = np.asarray(Image.open(picture))
    assert 0.4 < one.shape[0] / drawn.shape[0] < 0.6


def test_a_layer_that_is_not_there_is_refused(checkpoint, data, capsys):
    with pytest.raises(SystemExit):
        main(["--checkpoint", str(checkpoint), "--data", str(data), "--layers", "3"])
    assert "--layers 3: the model has layers 1 to 2" in capsys.readouterr().err


def test_a_model_without_a_choice_is_refused(data, tmp_path, capsys):
    tiny_captioner().save_pretrained(tmp_path)
    build_processor(16).save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        main(["--checkpoint", str(tmp_path), "--data", str(data)])
    assert "one expert a modality" in capsys.readouterr().err
