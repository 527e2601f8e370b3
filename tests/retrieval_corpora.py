"""Small tables, checkpoints and folders of pictures, for the tests of retrieval."""

import functools
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.nn import functional as F

from builders import build_processor
from models import TINY, tiny_captioner
from mome.retrieval.format import TableInfo, table_schema, to_table, write_table

COLOURS = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}


@functools.cache
def random_vectors(rows: int, dimension: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dimension, generator=generator), dim=1)


def make_table(
    path: Path, rows: int = 1000, dimension: int = 16, bad: tuple[int, ...] = (), prefix: str = "", **changes
) -> Path:
    """A table of random embeddings; every third row is a text; metadata `year` (2000, 2001, ...) and `colour`.

    `changes`: columns in place of the usual ones; `embeddings`, `info` as well. With `bad` rows, which have no
    embedding, it is a table as earlier versions made them, its embeddings as lists of any length.
    """
    embeddings = changes.pop("embeddings", None)
    embeddings = random_vectors(rows, dimension) if embeddings is None else embeddings
    info = changes.pop("info", TableInfo(model="a-model", fingerprint="0123456789abcdef", dimension=dimension))
    names = list(COLOURS)
    columns = {
        "id": [f"{prefix}{row}" for row in range(rows)],
        "modality": ["text" if row % 3 == 2 else "image" for row in range(rows)],
        "uri": [f"/pictures/{row}.png" for row in range(rows)],
        "text": [None if row % 2 else f"picture {row}" for row in range(rows)],
        "year": [2000 + row % 20 if row % 7 else None for row in range(rows)],
        "colour": [names[row % 4] for row in range(rows)],
    } | changes
    metadata = datasets.Features({"year": datasets.Value("int32"), "colour": datasets.Value("string")})
    schema = table_schema(info, metadata)
    table = to_table(columns, embeddings, schema)
    if bad:
        error = pa.array(["not an image" if row in bad else None for row in range(rows)], pa.string())
        vectors = pa.array([None if row in bad else each for row, each in enumerate(embeddings.numpy())])
        described = table.drop_columns(["content_digest", "file_stamp", "embedding"]).append_column("error", error)
        pq.write_table(described.append_column("embedding", vectors.cast(pa.list_(pa.float32()))), path)
    else:
        write_table(path, [table], schema)
    return path


def save_checkpoint(folder: Path, seed: int = 0, **overrides) -> Path:
    """A tiny random checkpoint with a processor whose words `retrieval_corpora` uses."""
    processor = build_processor(image_size=TINY["image_size"])
    tiny_captioner(seed=seed, **overrides).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def draw(colour: tuple[int, int, int], number: int = 0, size: int = 20) -> Image.Image:
    """A picture in one colour with a small mark that makes it one of its own."""
    image = Image.new("RGB", (size, size), colour)
    image.paste((number * 37 % 256, number * 91 % 256, number * 53 % 256), (number % 10, 2, number % 10 + 8, 10))
    return image


def make_pictures(folder: Path, count: int = 12) -> list[Path]:
    """Pictures in subfolders named by their colour."""
    paths = []
    for number in range(count):
        name, colour = list(COLOURS.items())[number % 4]
        path = folder / name / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(colour, number).save(path)
        paths.append(path)
    return paths
