"""The evaluation of guided captions: metrics by hand, pairs from parquet, rows of the results file."""

import csv
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from builders import build_processor
from models import tiny_captioner
from mome.data.pairs import load_pairs
from mome.experiments.guidance import main, measure, settings


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    images = [{"bytes": png(seed), "path": None} for seed in range(6)]
    texts = [["red dot", "a dot"], ["cat"], [], ["blue line"], ["dog", " "], ["the cat"]]
    for number in range(2):
        rows = slice(3 * number, 3 * number + 3)
        pq.write_table(pa.table({"image": images[rows], "texts": texts[rows]}), folder / f"test-{number}.parquet")
    return sorted(folder.glob("*.parquet"))


def test_pairs_come_in_order_and_those_without_a_text_are_left_out(data):
    pairs = load_pairs(data, "image", "texts")
    assert [pair.texts for pair in pairs] == [["red dot", "a dot"], ["cat"], ["blue line"], ["dog"], ["the cat"]]
    assert pairs[0].open().size == (16, 16) and len(load_pairs(data, "image", "texts", limit=2)) == 2
    with pytest.raises(ValueError, match="no column 'caption': it has image, texts"):
        load_pairs(data, "image", "caption")


def test_metrics_are_those_of_the_definitions():
    image_embeds = torch.eye(3)
    text_embeds = torch.tensor([[1.0, 0, 0], [0.8, 0.6, 0], [0, 0, 1.0]])  # the second finds the first image
    references = [["a red dot"], ["cat", "a cat"], ["blue line"]]
    scores = measure(["a red dot", "a dog", "Blue line!"], references, image_embeds, text_embeds)
    assert scores["cosine"] == pytest.approx((1 + 0.6 + 1) / 3) and scores["R@1"] == pytest.approx(2 / 3)
    assert scores["exact match"] == pytest.approx(2 / 3)
    assert scores["token F1"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert scores["BLEU-4"] >= 0 and scores["CIDEr"] > 0
    assert measure(["x"] * 3, references, image_embeds, text_embeds)["CIDEr"] == 0


def test_every_setting_says_all_that_a_checkpoint_might_say_otherwise():
    chosen = settings([0.5], [2.0], [1.0])
    assert list(chosen) == ["unguided", "beam 4", "re-ranked λ=0.5 of 4", "classifier-free γ=2", "contrastive β=1"]
    fields = {"guidance_scale", "contrastive_weight", "rerank_weight", "num_beams", "do_sample"}
    assert all(fields <= options.keys() for options in chosen.values())


@pytest.mark.parametrize("judged", [False, True])
def test_a_run_prints_its_table_and_appends_its_rows(judged, data, tmp_path, capsys):
    processor = build_processor(image_size=16)
    for seed, name in enumerate(("captioner", "judge")):
        captioner = tiny_captioner(seed=seed, vocab_size=len(processor.tokenizer), max_position_embeddings=16)
        captioner.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    results = tmp_path / "results.csv"
    command = ["--checkpoint", str(tmp_path / "captioner"), "--data", *map(str, data), "--results", str(results)]
    command += ["--max-new-tokens", "4", "--guidance-scale", "2", "--contrastive-weight", "2", "--batch-size", "2"]
    scores = main(command + (["--judge", str(tmp_path / "judge")] if judged else []))
    assert list(scores) == ["unguided", "beam 4", "re-ranked λ=0.5 of 4", "classifier-free γ=2", "contrastive β=2"]
    assert "| captions | cosine | R@1 | exact match | token F1 | BLEU-4 | CIDEr |" in capsys.readouterr().out
    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 * 6 and all(row["peer"] == "unguided" and row["command"] for row in rows)
    row = next(row for row in rows if row["metric"] == "captions, cosine: re-ranked λ=0.5 of 4")
    assert float(row["value"]) == pytest.approx(scores["re-ranked λ=0.5 of 4"]["cosine"], rel=1e-3, abs=1e-4)
    assert ("judged by" in row["data"]) == judged and "5 images" in row["data"]
    if not judged:  # re-ranking looks at the cosine that is measured
        assert scores["re-ranked λ=0.5 of 4"]["cosine"] > scores["beam 4"]["cosine"]
