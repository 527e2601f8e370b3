"""Pictures in lists, data sets, columns, streams and generators: the same answers, read as they are needed."""

import io

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

from builders import build_processor
from models import tiny_captioner
from mome.embedder import Embedder
from mome.errors import MomeError

COUNT = 5
LABELS = {"candidate_labels": ["red", "green", "blue"]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    processor = build_processor(image_size=16)
    tiny_captioner(vocab_size=len(processor.tokenizer), max_position_embeddings=16).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def embedder(checkpoint):
    return Embedder.load(checkpoint, captions=True)


@pytest.fixture(scope="module", params=["image-captioning", "open-vocabulary-image-classification"])
def run(request, checkpoint):
    loaded = pipeline(request.param, model=str(checkpoint))
    options = {"max_new_tokens": 4} if request.param == "image-captioning" else LABELS
    return lambda images, **more: loaded(images, **options, **more)


@pytest.fixture(scope="module")
def images():
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 256, (20, 30, 3), dtype=np.uint8)) for _ in range(COUNT)]


def png(image):
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def rows_with(images, column="image", broken=None):
    """A data set with texts before the pictures."""
    encoded = [{"bytes": png(image), "path": None} for image in images]
    if broken is not None:
        encoded[broken]["bytes"] = b"no picture"
    features = datasets.Features({"name": datasets.Value("string"), column: datasets.Image()})
    return datasets.Dataset.from_dict({"name": list("abcde"), column: encoded}, features=features)


FORMS = {
    "data set": lambda images: rows_with(images),
    "data set with another column": lambda images: rows_with(images, "picture"),
    "column": lambda images: rows_with(images)["image"],
    "stream": lambda images: rows_with(images).to_iterable_dataset(),
    "column of a stream": lambda images: rows_with(images).to_iterable_dataset()["image"],
    "key data set": lambda images: KeyDataset(rows_with(images, "picture"), "picture"),
    "generator": lambda images: (image for image in images),
    "generator of rows": lambda images: ({"image": image} for image in images),
    "map": lambda images: map(Image.Image.copy, images),
    "tuple": tuple,
    "values of a dict": lambda images: dict(enumerate(images)).values(),
    "array": lambda images: np.stack([np.asarray(image) for image in images]),
    "tensor": lambda images: torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_pipelines_take_pictures_in_every_collection(run, images, form, batch_size):
    wanted = run(images)
    found = list(run(FORMS[form](images), batch_size=batch_size))
    assert len(found) == COUNT
    for ours, theirs in zip(found, wanted):
        assert [{**each, "score": None} for each in ours] == [{**each, "score": None} for each in theirs]
        assert [each["score"] for each in ours] == pytest.approx([each["score"] for each in theirs], abs=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_embedder_takes_pictures_in_every_collection(embedder, images, form):
    wanted = embedder.embed_images(images)
    assert torch.allclose(embedder.embed_images(FORMS[form](images), batch_size=2), wanted, atol=1e-5)
    assert embedder.caption_images(FORMS[form](images), batch_size=2) == embedder.caption_images(images)


def test_streams_and_data_sets_are_read_as_results_are_asked_for(run, images):
    read = []

    def stream():
        for number, image in enumerate(images):
            read.append(number)
            yield image

    results = iter(run(stream()))
    next(results)
    assert len(read) < COUNT
    results = run(rows_with(images))
    assert not isinstance(results, list) and len(results) == COUNT


@pytest.mark.parametrize("streaming", [False, True])
def test_a_picture_that_a_data_set_cannot_decode_is_named_and_can_be_skipped(run, embedder, images, streaming):
    rows = rows_with(images, broken=2)
    data = rows.to_iterable_dataset() if streaming else rows
    with pytest.raises(ValueError, match=r"images\[2\].*not an image that Pillow can read"):
        list(run(data))
    results = list(run(data, on_error="skip"))
    assert len(results) == COUNT and "images[2]" in results[2][0]["error"]
    assert all(result[0].get("error") is None for place, result in enumerate(results) if place != 2)
    with pytest.raises(ValueError, match="image 2: not an image that Pillow can read"):
        embedder.embed_images(data)


def test_a_column_that_cannot_be_decoded_is_named_and_can_be_skipped(run, images):
    results = list(run(rows_with(images, broken=2)["image"], on_error="skip"))
    assert len(results) == COUNT and "images[2]" in results[2][0]["error"]


def test_what_is_no_collection_of_pictures_is_refused_in_one_line(run, embedder, images, tmp_path):
    rows = rows_with(images)
    for value, message in (
        (datasets.DatasetDict(train=rows, test=rows), "dict of splits, train, test"),
        (rows.remove_columns("image"), "no column of images among name"),
    ):
        for function in (run, embedder.embed_images):
            with pytest.raises(ValueError, match=message) as raised:
                function(value)
            assert "\n" not in str(raised.value)
    for one in (images[0], str(tmp_path / "a.png"), np.asarray(images[0]), {"image": images[0]}):
        with pytest.raises(MomeError, match="pass a list, a data set or a generator"):
            embedder.embed_images(one)
    with pytest.raises(MomeError, match="texts='a red dot' is one text: pass a list"):
        embedder.embed_texts("a red dot")


def test_the_processor_takes_the_collections_that_pipelines_take(run, embedder, images, tmp_path):
    paths = [tmp_path / f"{number}.png" for number in range(COUNT)]
    for path, image in zip(paths, images):
        image.save(path)
    rows = rows_with(images)
    wanted = embedder.processor(images=images, return_tensors="pt").pixel_values
    names = np.array([str(path) for path in paths])
    for given in (
        lambda: rows["image"],
        lambda: rows,
        lambda: (image for image in images),
        lambda: names,
        lambda: pd.Series(names),
        lambda: [{"image": image} for image in images],
        lambda: [{"type": "image", "url": path.as_uri()} for path in paths],
    ):
        for processor in (embedder.processor, embedder.processor.image_processor):
            assert torch.equal(processor(images=given(), return_tensors="pt").pixel_values, wanted)
    assert [result[0] for result in run(names)] == [result[0] for result in run(images)]
    with pytest.raises(ValueError, match=r"images\[2\]: not an image that Pillow can read"):
        embedder.processor(images=rows_with(images, broken=2))


def test_the_processor_takes_texts_in_any_order_that_stays(embedder):
    texts = ["a red dot", "blue"]
    wanted = embedder.processor(text=texts)["input_ids"]
    rows = datasets.Dataset.from_dict({"text": texts})
    for given in (tuple(texts), np.array(texts), pd.Series(texts), rows["text"], (text for text in texts)):
        assert embedder.processor(text=given)["input_ids"] == wanted
    assert embedder.processor(text=np.array("blue"))["input_ids"] == embedder.processor(text="blue")["input_ids"]


def test_texts_may_be_a_column_or_a_generator(embedder, images):
    rows = rows_with(images).map(lambda row: {"name": f"red {row['name']}"})
    wanted = embedder.embed_texts(rows["name"][:])
    assert torch.equal(embedder.embed_texts(rows["name"]), wanted)
    assert torch.equal(embedder.embed_texts(text for text in rows["name"]), wanted)
