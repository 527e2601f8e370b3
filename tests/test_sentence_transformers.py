"""sentence-transformers: a checkpoint loads with no code of the user's and gives our own embeddings."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

import mome
from builders import build_processor
from loopback_hub import LoopbackHub
from models import tiny_captioner
from mome.publish import build_folder

TEXTS = ["red dot", "a", "a photo of the red circle with a green square on the black line", "", "a cat " * 20]
FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    processor = build_processor(image_size=16)
    tiny_captioner("routed", vocab_size=len(processor.tokenizer), max_position_embeddings=16).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_images() -> list[Image.Image]:
    """Of several sizes and modes, among them transparent and grey ones."""
    noise = np.random.default_rng(0)
    pictures = [noise.integers(0, 256, (16 + side, 30 - side, 4), dtype=np.uint8) for side in range(5)]
    return [Image.fromarray(picture).convert(mode) for picture, mode in zip(pictures, "RGB RGBA L LA P".split())]


def assert_same(actual, expected):
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= 1e-5


def our_embeddings(checkpoint) -> tuple[np.ndarray, np.ndarray]:
    """Of the images and of the texts, each computed alone: no batch, no padding."""
    model = mome.MomeModel.from_pretrained(checkpoint)
    processor = mome.MomeProcessor.from_pretrained(checkpoint)
    with torch.no_grad():
        images = [
            model.get_image_features(**processor(images=[image], return_tensors="pt")).pooler_output
            for image in make_images()
        ]
        texts = [
            model.get_text_features(**processor(text=[text], truncation=True, return_tensors="pt")).pooler_output
            for text in TEXTS
        ]
    return torch.cat(images).numpy(), torch.cat(texts).numpy()


def test_images_and_texts_have_the_model_s_own_embeddings(checkpoint, tmp_path):
    images, texts = our_embeddings(checkpoint)
    encoder = SentenceTransformer(str(checkpoint))
    assert encoder.get_embedding_dimension() == images.shape[1] and encoder.similarity_fn_name == "cosine"
    assert set(encoder.modalities) == {"text", "image"}
    for batch_size in (1, 2, 32):
        assert_same(encoder.encode(make_images(), batch_size=batch_size), images)
        assert_same(encoder.encode(TEXTS, batch_size=batch_size), texts)
    assert_same(encoder.encode(make_images()[1]), images[1])
    assert_same(encoder.encode(TEXTS[0]), texts[0])
    assert_same(encoder.encode_query(TEXTS), texts)
    assert_same(encoder.encode_document(make_images()), images)
    assert_same(encoder.similarity(encoder.encode(TEXTS), encoder.encode(make_images())).numpy(), texts @ images.T)
    path = tmp_path / "picture.png"
    make_images()[0].save(path)
    assert_same(encoder.encode([{"image": str(path)}]), images[:1])


ENCODE = """
import sys
import numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformer
encoder = SentenceTransformer(sys.argv[1], trust_remote_code=True)
noise = np.random.default_rng(0)
pictures = [noise.integers(0, 256, (16 + side, 30 - side, 4), dtype=np.uint8) for side in range(5)]
images = [Image.fromarray(picture).convert(mode) for picture, mode in zip(pictures, "RGB RGBA L LA P".split())]
texts = ["red dot", "a", "a photo of the red circle with a green square on the black line", "", "a cat " * 20]
np.savez(sys.argv[2], images=encoder.encode(images), texts=encoder.encode(texts))
assert "mome" not in sys.modules
"""


def encode_without_the_package(source, home, **variables: str) -> dict[str, np.ndarray]:
    """A fresh process; -S keeps the editable install of the package out."""
    home.mkdir()
    packages = [path for path in sys.path if path.endswith("-packages")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(packages), "HF_HOME": str(home / "hf"), **variables}
    command = [sys.executable, "-S", "-c", ENCODE, str(source), str(home / "embeddings.npz")]
    process = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return np.load(home / "embeddings.npz")


def test_a_published_folder_encodes_without_the_package(checkpoint, tmp_path):
    folder = build_folder(checkpoint, tmp_path / "folder", "ada/tiny")
    embeddings = encode_without_the_package(folder, tmp_path / "home")
    for actual, expected in zip((embeddings["images"], embeddings["texts"]), our_embeddings(checkpoint)):
        assert_same(actual, expected)


def test_a_checkpoint_on_the_hub_encodes_by_its_name(checkpoint, tmp_path):
    with LoopbackHub({"right": "ada"}) as hub:
        push = "import sys, mome; mome.MomeModel.from_pretrained(sys.argv[1]).push_to_hub('ada/tiny');"
        push += "mome.MomeProcessor.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2], push_to_hub=True,"
        push += " repo_id='ada/tiny')"
        environment = {**os.environ, **hub.environment(tmp_path, "right")}
        command = [sys.executable, "-c", push, str(checkpoint), str(tmp_path / "processor")]
        pushed = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert pushed.returncode == 0, pushed.stderr
        assert set(FILES) <= hub.files("ada/tiny").keys()
        there = tmp_path / "there"
        embeddings = encode_without_the_package("ada/tiny", there, **hub.environment(there, None))
    for actual, expected in zip((embeddings["images"], embeddings["texts"]), our_embeddings(checkpoint)):
        assert_same(actual, expected)


def test_what_sentence_transformers_saves_loads_in_both(checkpoint, tmp_path):
    SentenceTransformer(str(checkpoint)).save_pretrained(str(tmp_path / "saved"))
    again = SentenceTransformer(str(tmp_path / "saved"))
    for encoder in (again, SentenceTransformer(str(checkpoint))):
        assert_same(encoder.encode(TEXTS), our_embeddings(checkpoint)[1])
    for actual, expected in zip(our_embeddings(tmp_path / "saved"), our_embeddings(checkpoint)):
        assert_same(actual, expected)


def test_a_save_keeps_further_modules_of_sentence_transformers(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "more modules")
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 1, "name": "1", "path": "1_Dense", "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    mome.MomeProcessor.from_pretrained(folder).save_pretrained(folder)
    assert json.loads((folder / "modules.json").read_text()) == modules
