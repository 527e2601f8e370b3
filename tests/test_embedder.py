"""The embedding loop and the caption loop: one rule for long texts, wherever they come from; no trace in the model."""

import threading

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import pipeline

from builders import build_processor
from models import tiny_captioner
from mome import quickstart
from mome.data.images import read_image
from mome.embedder import Embedder
from mome.errors import MomeError
from mome.evaluation.evaluator import Evaluation
from mome.experiments.expert_usage import route_texts
from mome.retrieval import embed_corpus, load_table
from test_training_data import as_dataset, png

LIMIT = 12  # of the position table; the tokenizer's own limit is 16
LONG = " ".join(["red green blue cat dog"] * 8)
CUT = " ".join(LONG.split()[: LIMIT - 2])  # [BOS] and [EOS] have places as well


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    processor = build_processor(image_size=16)
    tiny_captioner(vocab_size=len(processor.tokenizer), max_position_embeddings=LIMIT).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def embedder(checkpoint):
    return Embedder.load(checkpoint, captions=True)


@pytest.fixture(scope="module")
def images():
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 256, (20, 30, 3), dtype=np.uint8)) for _ in range(5)]


def warnings_of(caplog) -> list[str]:
    return [record.message for record in caplog.records if "the rest is cut off" in record.message]


# --------------------------------------------------------------------------------------------------- long texts


def test_long_texts_are_cut_with_one_warning_that_names_the_limit(embedder, caplog):
    texts = [LONG, "a cat", LONG + " line", CUT]
    embeds = embedder.embed_texts(texts, batch_size=1)
    assert warnings_of(caplog) == [
        f"2 texts have more than {LIMIT} tokens, the most that the model reads: the rest is cut off"
    ]
    expected = embedder.embed_texts([CUT, "a cat", CUT, CUT])
    assert_close(embeds, expected)
    assert len(warnings_of(caplog)) == 1  # a text that just fits is not cut
    assert_close(embedder.embed_texts(texts), expected)  # all in one batch
    assert (embeds[0] - embedder.embed_texts([CUT.rpartition(" ")[0]])).abs().max() > 1e-3


def test_long_texts_are_refused_where_that_is_asked_for(embedder, caplog):
    with pytest.raises(MomeError, match=rf"text 2 \('red green.*more than {LIMIT} tokens.*shorten it") as raised:
        embedder.embed_texts(["a cat", CUT, LONG], batch_size=2, long_texts="refuse")
    assert "\n" not in str(raised.value) and not warnings_of(caplog)
    assert embedder.embed_texts(["a cat", CUT], long_texts="refuse").shape == (2, 16)
    with pytest.raises(MomeError, match="long_texts='drop': choose 'cut' or 'refuse'"):
        embedder.embed_texts(["a cat"], long_texts="drop")


def test_the_shorter_limit_of_tokenizer_and_model_holds(caplog):
    processor = build_processor(image_size=16, max_length=6)
    embedder = Embedder(tiny_captioner(vocab_size=len(processor.tokenizer)), processor)
    assert embedder.longest_text == 6
    assert_close(embedder.embed_texts([LONG]), embedder.embed_texts(["red green blue cat"]))
    assert "1 text has more than 6 tokens" in warnings_of(caplog)[0]


def test_labels_are_cut_by_the_same_rule(checkpoint, embedder, images, caplog):
    classify = pipeline("open-vocabulary-image-classification", model=str(checkpoint))
    classify.label_batch_size = 1
    results = classify(images, candidate_labels=[LONG, "dog"], templates=["{}", "the {}"], batch_size=2)
    assert len(warnings_of(caplog)) == 1 and f"2 texts have more than {LIMIT} tokens" in warnings_of(caplog)[0]
    expected = classify(images, candidate_labels=[CUT, "dog"], templates=["{}", "the {}"])
    for result, other in zip(results, expected):
        scores = [sorted(each["score"] for each in row) for row in (result, other)]
        assert_close(torch.tensor(scores[0]), torch.tensor(scores[1]))


def test_a_prompt_is_cut_by_the_same_rule(checkpoint, images, caplog):
    caption = pipeline("image-captioning", model=str(checkpoint))
    results = caption(images, prompt=LONG, batch_size=2)
    assert len(warnings_of(caplog)) == 1 and f"1 prompt has more than {LIMIT} tokens" in warnings_of(caplog)[0]
    assert all(result[0]["generated_text"].startswith(CUT) for result in results)
    assert results == caption(images, prompt=CUT, batch_size=2)
    assert len(warnings_of(caplog)) == 1


def test_long_texts_of_a_corpus_are_warned_of_once(tmp_path, embedder, caplog):
    rows = datasets.Dataset.from_dict(
        {"text": [text for number in range(6) for text in (f"{LONG} {number}", "a cat")]}
    )
    embed_corpus(rows, tmp_path / "table.parquet", embedder, batch_size=2, workers=2, progress=False)
    assert len(warnings_of(caplog)) == 1 and f"6 texts have more than {LIMIT} tokens" in warnings_of(caplog)[0]
    table = load_table(tmp_path / "table.parquet")
    assert_close(table.embeddings([0, 1]), embedder.embed_texts([CUT, "a cat"]))


def test_an_evaluation_a_search_and_a_count_of_experts_have_the_same_rule(tmp_path, embedder, images, caplog):
    texts = [[LONG], ["a cat"]] * 2
    datasets.DatasetDict({"validation": as_dataset(4, texts=texts)}).save_to_disk(tmp_path / "data")
    figures = Evaluation(str(tmp_path / "data"), text_column="texts", captions=0).run(embedder, progress=False)
    assert len(warnings_of(caplog)) == 1 and f"1 text has more than {LIMIT} tokens" in warnings_of(caplog)[0]
    datasets.DatasetDict({"validation": as_dataset(4, texts=[[CUT], ["a cat"]] * 2)}).save_to_disk(tmp_path / "cut")
    assert figures == Evaluation(str(tmp_path / "cut"), text_column="texts", captions=0).run(embedder, progress=False)
    scores, hits = quickstart.search(embedder, images, [LONG, "a cat"])
    assert len(warnings_of(caplog)) == 2 and f"1 text has more than {LIMIT} tokens" in warnings_of(caplog)[1]
    assert_close(scores, quickstart.search(embedder, images, [CUT, "a cat"])[0])
    processor = build_processor(image_size=16)
    routed = tiny_captioner("routed", vocab_size=len(processor.tokenizer), max_position_embeddings=LIMIT)
    _, tokens = route_texts(Embedder(routed, processor), [LONG, "a cat"])
    assert tokens == ["[BOS]", *CUT.split(), "[EOS]", "[BOS]", "a", "cat", "[EOS]"]
    assert len(warnings_of(caplog)) == 3


# ------------------------------------------------------------------------------------------------------- loops


@pytest.mark.parametrize("count", [0, -1, 1.5, True, None])
def test_a_batch_or_caption_of_nothing_is_refused_and_never_an_answer(embedder, images, count):
    told = rf"^batch_size={count} must be a whole number from 1$"
    for several in (images, iter(images)):
        with pytest.raises(MomeError, match=told):
            embedder.embed_images(several, batch_size=count)
    with pytest.raises(MomeError, match=told):
        embedder.embed_texts(["a cat"], batch_size=count)
    with pytest.raises(MomeError, match=rf"^max_new_tokens={count} must be"):
        embedder.caption_images(images, max_new_tokens=count)


def test_batches_change_nothing(embedder, images):
    assert_close(embedder.embed_images(images, batch_size=2), embedder.embed_images(images))
    texts = ["a red dot", "cat", "the blue line"]
    assert_close(embedder.embed_texts(texts, batch_size=1), embedder.embed_texts(texts))
    assert embedder.caption_images(images, batch_size=2) == embedder.caption_images(images)
    assert embedder.embed_images([]).shape == embedder.embed_texts([]).shape == (0, 16)


def test_captions_are_those_of_generate(embedder, images):
    model, processor = embedder.model, embedder.processor
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    for options in ({}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"guidance_scale": 2.0}):
        ids = model.generate(pixel_values=pixels, max_new_tokens=5, **{"do_sample": False, "num_beams": 1} | options)
        expected = processor.post_process_image_text_to_text(ids)
        assert embedder.caption_images(images, max_new_tokens=5, **options) == expected


def test_a_caption_may_be_asked_to_be_longer_than_the_model_can_write(embedder, images, caplog):
    ids = embedder.model.generate(
        pixel_values=embedder.processor(images=images, return_tensors="pt")["pixel_values"],
        max_new_tokens=LIMIT - 1,
    )
    expected = embedder.processor.post_process_image_text_to_text(ids)
    assert embedder.caption_images(images, max_new_tokens=500) == expected and not caplog.records


def test_a_model_without_a_caption_head_is_refused(checkpoint, images):
    with pytest.raises(MomeError, match="a MomeModel writes no captions: load one with captions=True"):
        Embedder.load(checkpoint).caption_images(images)


def test_encoded_images_are_read_and_a_bad_one_is_named(embedder, images):
    encoded = [{"bytes": png(number), "path": None} for number in range(2)]
    plain = [read_image(each) for each in encoded]
    assert_close(embedder.embed_images(encoded), embedder.embed_images(plain))
    for bad, message in (
        ({"bytes": b"no picture", "path": None}, "image 1: not an image that Pillow can read"),
        ({"bytes": None, "path": None}, "image 1: no image"),
        (None, "image 1: no image"),
        ("nowhere.png", "image 1 .'nowhere.png'.: no such file"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            embedder.embed_images([encoded[0], bad], batch_size=1)
        assert "\n" not in str(raised.value)


def test_blank_texts_are_refused_unless_they_are_allowed(embedder):
    with pytest.raises(MomeError, match="text 1 is ' ': pass a text of at least one word"):
        embedder.embed_texts(["a", " "])
    with pytest.raises(MomeError, match="text 0 is None"):
        embedder.embed_texts([None], allow_blank=True)
    assert embedder.embed_texts(["a", " "], allow_blank=True).shape == (2, 16)


# -------------------------------------------------------------------------------------------- training and threads


def test_a_model_in_training_is_evaluated_and_goes_on_training(images):
    processor = build_processor(image_size=16)
    captioner = tiny_captioner(vocab_size=len(processor.tokenizer))
    expected = Embedder(captioner, processor).embed_images(images)
    captioner.train()
    captioner.model.text_projection.eval()  # a frozen part
    modes = [module.training for module in captioner.modules()]
    embedder, seen = Embedder(captioner, processor), []
    captioner.model.image_projection.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    assert_close(embedder.embed_images(images), expected)
    with pytest.raises(ValueError):
        embedder.embed_images(["nowhere.png"])
    assert seen and not any(seen)
    assert [module.training for module in captioner.modules()] == modes and any(modes) and not all(modes)
    ids = torch.tensor([[1, 7, 2], [1, 8, 2]])
    captioner(pixel_values=torch.randn(2, 3, 16, 16), input_ids=ids, labels=ids).loss.backward()


def test_threads_share_a_model_in_training(images):
    processor = build_processor(image_size=16)
    captioner = tiny_captioner(vocab_size=len(processor.tokenizer)).train()
    embedder, seen = Embedder(captioner, processor), []
    captioner.model.image_projection.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    threads = [threading.Thread(target=embedder.embed_images, args=(images * 4, 1)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 80 and not any(seen)
    assert all(module.training for module in captioner.modules())


def test_progress_is_shown_only_where_it_is_asked_for(embedder, images, capsys):
    embedder.embed_images(images)
    assert not capsys.readouterr().err
    embedder.embed_images(images, progress=True)
    assert "embedding images" in capsys.readouterr().err


def test_the_dtype_is_the_models_and_embeddings_are_float32(checkpoint, images):
    half = Embedder.load(checkpoint, dtype=torch.bfloat16)
    embeds = half.embed_images(images)
    assert embeds.dtype == torch.float32
    assert_close(embeds.norm(dim=1), torch.ones(5))
    assert_close(embeds, Embedder.load(checkpoint).embed_images(images), atol=0.05, rtol=0)
