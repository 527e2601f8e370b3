"""Rows to batches: order, texts, bad rows, any kind of source."""

import io
import json
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from builders import build_processor
from mome.data.augment import build_augmentations
from mome.data.images import PixelScale, to_pixel_values
from mome.data.pairs import load_rows
from mome.errors import DataError, RecipeError
from mome.training.batches import Batches, Collator, Shard, epoch_of_batches

COLOURS = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


def png(index: int, side: int = 32) -> bytes:
    """An image whose first pixel tells its number."""
    image = Image.new("RGB", (side, side), list(COLOURS.values())[index % len(COLOURS)])
    image.putpixel((0, 0), (index, index, index))
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def text_of(index: int) -> str:
    return f"a {list(COLOURS)[index % len(COLOURS)]} square"


def image_folder(folder: Path, count: int = 20) -> Path:
    folder.mkdir(parents=True)
    for index in range(count):
        (folder / f"{index}.png").write_bytes(png(index))
    lines = [json.dumps({"file_name": f"{index}.png", "text": text_of(index)}) for index in range(count)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def as_dataset(count: int = 20, **columns) -> datasets.Dataset:
    values = {
        "image": [{"bytes": png(i), "path": None} for i in range(count)],
        "text": [text_of(i) for i in range(count)],
    }
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = datasets.Dataset.from_dict(values, features=features)
    for name, column in columns.items():
        rows = (
            rows.add_column(name, column) if name not in values else rows.remove_columns(name).add_column(name, column)
        )
    return rows


def collator(rows, image_column="image", **options) -> Collator:
    return Collator(build_processor(), 8, image_column, **options)


def numbers(batch) -> list[int]:
    """Which images a batch holds: their first pixel."""
    return batch.pixel_values[:, 0, 0, 0].tolist()


def load(folder: Path | str, **options):
    rows, image_column = load_rows(str(folder), options.pop("split", "train"), **options)
    return rows, image_column


# ---------------------------------------------------------------------------------------------------- sources


def webdataset(folder: Path) -> Path:
    folder.mkdir()
    with tarfile.open(folder / "shard-0.tar", "w") as archive:
        for index in range(20):
            for suffix, content in (("png", png(index)), ("txt", text_of(index).encode())):
                entry = tarfile.TarInfo(f"{index:04d}.{suffix}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return folder


def parquet(folder: Path) -> Path:
    folder.mkdir()
    as_dataset().to_parquet(folder / "train-00000.parquet")
    return folder


def saved(folder: Path) -> Path:
    as_dataset().save_to_disk(folder)
    return folder


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("source", [image_folder, parquet, webdataset, saved])
def test_anything_that_datasets_reads_becomes_the_same_pairs(source, streaming, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    options = {"text_column": "txt"} if source is webdataset else {}
    rows, image_column = load(source(tmp_path / "data"), streaming=streaming, **options)
    loader = epoch_of_batches(rows, collator(rows, image_column, **options), Shard(5), seed=0, epoch=0, buffer_size=7)
    batches = list(loader)
    seen = [number for batch in batches for number in numbers(batch)]
    assert sorted(seen) == list(range(20)) and seen != sorted(seen)
    assert [text for batch in batches for text in batch.texts] == [text_of(number) for number in seen]


def test_one_parquet_file_is_a_data_set_too(tmp_path):
    as_dataset().to_parquet(tmp_path / "pairs.parquet")
    rows, _ = load(tmp_path / "pairs.parquet")
    assert len(rows) == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_column": "texts"}, "has no column 'texts': did you mean 'text'?"),
        ({"image_column": "picture"}, "has no column 'picture'"),
        ({"further_columns": ("concept",)}, "has no column 'concept'"),
        ({"split": "test"}, "split 'test'"),
        ({"image_column": "number"}, "column 'number' of .* holds no images"),
    ],
)
def test_what_is_missing_is_named(options, message, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    as_dataset(number=list(range(20))).to_parquet(folder / "train.parquet")
    with pytest.raises(DataError, match=message):
        load(folder, **options)


def test_no_rows_and_no_data_set_are_errors(tmp_path):
    as_dataset().select([]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"no rows|no row|can't be read|corresponds to no data"):
        load(tmp_path / "train.parquet")
    with pytest.raises(DataError, match="nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(RecipeError, match="fewer than batch_size=64"):
        Batches(as_dataset(), collator(None), Shard(64), seed=0)


# ------------------------------------------------------------------------------------------------------ order


FOURS = Shard(4)


def order_of(rows, part=FOURS, epoch=0, start=0, seed=0, workers=0, **options) -> list[list[int]]:
    loader = epoch_of_batches(rows, collator(rows, **options), part, seed, epoch, start, num_workers=workers)
    return [numbers(batch) for batch in loader]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_order_is_that_of_seed_and_epoch_whoever_reads(streaming):
    rows = as_dataset().cast_column("image", datasets.Image(decode=False))
    rows = rows.to_iterable_dataset() if streaming else rows
    first = order_of(rows)
    assert first == order_of(rows) == order_of(rows, workers=2)
    assert first != order_of(rows, epoch=1) and first != order_of(rows, seed=1)
    assert order_of(rows, start=3) == first[3:]  # going on within an epoch
    halves = [order_of(rows, Shard(4, rank, 2)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*halves)] == first  # two processes share what one would see


def test_every_epoch_draws_one_of_several_texts():
    several = [[f"a {colour} square", f"a {colour} dot", "  "] for colour in list(COLOURS) * 5]
    rows = as_dataset(text=several).cast_column("image", datasets.Image(decode=False))
    texts = []
    for epoch in range(4):
        loader = epoch_of_batches(rows, collator(rows), Shard(20), 0, epoch)
        texts.append(next(iter(loader)).texts)
    assert {text.split()[-1] for text in sum(texts, [])} == {"square", "dot"}
    assert len({tuple(each) for each in texts}) == 4
    again = next(iter(epoch_of_batches(rows, collator(rows), Shard(20), 0, 3))).texts
    assert again == texts[3]


# -------------------------------------------------------------------------------------------------- bad rows


def test_bad_rows_keep_their_place_and_change_nothing_else():
    rows = as_dataset().cast_column("image", datasets.Image(decode=False))
    whole = epoch_of_batches(rows, collator(rows), Shard(20), 0, 0)
    whole = next(iter(whole))
    index = numbers(whole).index(7)

    def spoil(row, number):
        row = row | ({"image": {"bytes": row["image"]["bytes"][:40], "path": "seven.png"}} if number == 7 else {})
        return row | ({"text": "   "} if number == 9 else {})

    spoilt = [spoil(row, number) for number, row in enumerate(rows)]
    broken = datasets.Dataset.from_list(spoilt, features=rows.features)
    batch = next(iter(epoch_of_batches(broken, collator(broken), Shard(20), 0, 0)))
    assert (~batch.valid).sum() == 2 and not batch.valid[index]
    assert torch.equal(batch.captioned, batch.valid)
    keep = batch.valid
    torch.testing.assert_close(batch.pixel_values[keep], whole.pixel_values[keep])
    assert torch.equal(batch.input_ids[keep], whole.input_ids[keep])
    assert any("row 7 (seven.png)" in name for name in batch.bad) and any("row 9: no text" in n for n in batch.bad)


def test_an_augmentation_may_say_that_a_text_is_no_caption():
    rows = as_dataset().cast_column("image", datasets.Image(decode=False))

    def only_red_ones(examples, rng):
        return [each | {"captioned": "red" in each["text"]} for each in examples]

    batch = next(iter(epoch_of_batches(rows, collator(rows, augmentations=[only_red_ones]), Shard(20), 0, 0)))
    assert batch.captioned.tolist() == ["red" in text for text in batch.texts] and 0 < batch.captioned.sum() < 20


def test_positives_are_equal_texts_and_equal_groups():
    rows = as_dataset(concept=[index // 2 for index in range(20)]).cast_column("image", datasets.Image(decode=False))
    batch = Batches(rows, collator(rows, positive_column="concept"), Shard(20), 0)[0]
    order = numbers(batch)
    positives = (batch.positive_ids[:, None] == batch.positive_ids[None]).any(dim=2)
    expected = [[i == j or text_of(i) == text_of(j) or i // 2 == j // 2 for j in order] for i in order]
    assert positives.tolist() == expected


# ----------------------------------------------------------------------------------------- pixels, augmentation


@pytest.mark.parametrize("side", [32, 50])
def test_pixels_are_those_of_the_image_processor(side):
    image_processor = build_processor(32).image_processor
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (side, side + 7, 3), np.uint8)) for _ in range(3)]
    images += [Image.new("RGBA", (side, side), (10, 200, 30, 100)), Image.new("L", (side, side), 77)]
    from mome.processing_mome import load_rgb_image

    expected = image_processor([load_rgb_image(each) for each in images], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(to_pixel_values(images, image_processor), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pixels_as_shares_give_the_values_of_8_bit_pixels(dtype):
    scale = PixelScale(1 / 200, (0.4, 0.5, 0.3), (0.2, 0.25, 0.5))
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    made = scale.for_shares("cpu")((pixels / 255).to(dtype))
    assert made.dtype == dtype
    torch.testing.assert_close(made.float(), scale(pixels), atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)


def test_augmentations_are_what_the_recipe_lists():
    examples = [{"image": Image.fromarray(np.arange(3072, dtype=np.uint8).reshape(32, 32, 3)), "text": "a house"}] * 40
    entries = [
        {"name": "random_crop", "scale": [0.5, 0.6]},
        {"name": "colour_jitter", "brightness": 0.5},
        {"name": "horizontal_flip"},
        {"name": "text_template", "templates": ["an icon of {}"], "share": 0.5},
    ]
    for count in range(1, 5):
        made = examples
        for augment in build_augmentations(entries[:count]):
            made = augment(made, np.random.default_rng(0))
        again = examples
        for augment in build_augmentations(entries[:count]):
            again = augment(again, np.random.default_rng(0))
        assert [np.asarray(a["image"]).tolist() for a in made] == [np.asarray(b["image"]).tolist() for b in again]
        assert len({np.asarray(each["image"]).tobytes() for each in made}) > 20
    assert {each["text"] for each in made} == {"a house", "an icon of a house"}


def test_a_flip_never_makes_a_text_untrue():
    arrow = Image.fromarray(np.arange(3072, dtype=np.uint8).reshape(32, 32, 3))
    (flip,) = build_augmentations([{"name": "horizontal_flip", "share": 1.0}])
    left, house = flip(
        [{"image": arrow, "text": "an arrow to the Left"}, {"image": arrow, "text": "a house"}],
        np.random.default_rng(0),
    )
    assert left["image"] is arrow and np.asarray(house["image"])[:, ::-1].tolist() == np.asarray(arrow).tolist()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "random_crops"}, "did you mean 'random_crop'?"),
        ({"name": "random_crop", "size": 3}, "unexpected keyword argument 'size'"),
        ({"name": "mome.nowhere:function"}, "can't be loaded"),
        ({"scale": 3}, "has no name"),
    ],
)
def test_an_unknown_augmentation_is_refused(entry, message):
    with pytest.raises(DataError, match=message):
        build_augmentations([entry])


def test_a_batch_needs_an_equal_share_for_every_process():
    with pytest.raises(RecipeError, match="batch_size=5 is not a multiple of the 2 processes"):
        Shard(5, 0, 2)
