"""An evaluation of figures that are known beforehand: a stand-in whose embeddings are one-hot."""

import datasets
import pytest
import torch

from builders import build_processor
from models import tiny_captioner
from mome.embedder import Embedder
from mome.evaluation.evaluator import Evaluation
from test_training_data import as_dataset, text_of


@pytest.fixture
def data(tmp_path):
    """20 images of 4 colours; every image has its colour's text and one of its own."""
    texts = [[text_of(index), f"picture {'on' if index % 2 else 'of'} {index}"] for index in range(20)]
    datasets.DatasetDict({"validation": as_dataset(texts=texts)}).save_to_disk(tmp_path / "data")
    return {"dataset": str(tmp_path / "data"), "text_column": "texts", "captions": 0}


class ColourBlind(Embedder):
    """Images and texts are known by their colour, so that images of one colour can't be told apart."""

    colours = ["red", "green", "blue", "white"]

    def __init__(self):
        super().__init__(tiny_captioner(), build_processor())

    def embed_texts(self, texts, batch_size, allow_blank):
        words = [[word for word in text.split() if word in self.colours] for text in texts]
        return torch.tensor([[float(colour in each) for colour in self.colours] for each in words])

    def embed_images(self, images, batch_size, progress):
        pixels = torch.tensor([image.convert("RGB").getpixel((5, 5)) for image in images])
        known = torch.tensor([(255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255)])
        return (pixels[:, None] == known).all(dim=2).float()


def test_one_image_for_each_label_is_found_by_it(data):
    figures = Evaluation(**data).run(ColourBlind())
    assert figures["images"] == 4
    assert figures["text_to_image_r1"] == figures["image_to_text_r1"] == figures["zero_shot_top1"] == 1.0


def test_every_image_with_a_label_counts_as_found_by_it(data):
    figures = Evaluation(**data, every_image=True).run(ColourBlind())
    assert figures["images"] == 20
    assert figures["text_to_image_r1"] == figures["image_to_text_r1"] == 1.0  # any of the five images of a colour


def test_any_text_of_an_image_counts_and_all_of_them_ask(data):
    figures = Evaluation(**data, every_image=True, all_texts=True).run(ColourBlind())
    # 4 texts with a colour find one of their images first; 20 without one find nothing, ties count against them.
    assert figures["text_to_image_r1"] == pytest.approx(4 / 24)
    assert figures["image_to_text_r1"] == 1.0
    assert figures["zero_shot_top1"] == 1.0


def test_evaluating_leaves_the_model_in_its_mode_and_the_generator_alone(data):
    captioner, before = tiny_captioner().train(), torch.get_rng_state()
    figures = Evaluation(**data | {"captions": 4}).run(Embedder(captioner, build_processor(image_size=16)))
    assert captioner.training and torch.equal(torch.get_rng_state(), before)
    assert 0 <= figures["caption_f1"] <= 1 and {"caption_exact", "caption_bleu4", "caption_cider"} <= figures.keys()
