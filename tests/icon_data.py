"""A small data set of icons in the files that the build writes, for the tests of training on a device."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageDraw

from builders import build_tokenizer
from mome.icons.captions import STYLE_ADJECTIVES
from mome.icons.palette import NAMES
from mome.icons.phrases import FRAMES, ICON_OF

SIDE = 32
SHAPES = ("ball", "box", "tent", "ladder", "clock", "scissors", "upload", "apple")
TAGS = {"ball": ["sphere"], "box": ["square", "crate"], "scissors": ["cut"], "upload": ["send"], "apple": ["fruit"]}
RELATED = {"ball": ["toy"], "apple": ["food", "plant"], "tent": ["shelter"], "box": ["container"]}
GLOSSES = {"ball": "a round thing to play with", "apple": "a fruit with red skin", "tent": "a shelter of cloth"}


def words() -> list[str]:
    """Every word that names, tags, definitions and sentences of this data set are made of."""
    sentence = "a an the of for stands shows in on background is this icon emoji drawing pictogram art line ."
    texts = [*SHAPES, *RELATED, *GLOSSES.values(), *NAMES, *FRAMES, ICON_OF, sentence]
    texts += [text for each in (*TAGS.values(), *RELATED.values(), *STYLE_ADJECTIVES.values()) for text in each]
    # "hand-drawn" is three tokens for the tokenizer of the tests.
    return list(dict.fromkeys(word for text in texts for word in text.replace("-", " - ").split()))


def tokenizer(max_length: int = 16):
    return build_tokenizer(words(), max_length)


def draw_shape(shape: str, seed: int) -> Image.Image:
    """An opacity of its own for each name, shifted by the seed; an apple has colours."""
    generator = np.random.default_rng(seed)
    left, top = generator.integers(0, 5, 2).tolist()
    box = (left + 3, top + 3, left + 24, top + 24)
    alpha = Image.new("L", (SIDE, SIDE))
    pen = ImageDraw.Draw(alpha)
    match SHAPES.index(shape):
        case 0 | 7:
            pen.ellipse(box, fill=255)
        case 1:
            pen.rectangle(box, fill=255)
        case 2:
            pen.polygon([(box[0], box[3]), (box[2], box[3]), ((box[0] + box[2]) // 2, box[1])], fill=255)
        case 3:
            for step in range(4):
                pen.line((box[0], box[1] + 6 * step, box[2], box[1] + 6 * step), fill=255, width=2)
        case 4:
            pen.ellipse(box, outline=255, width=3)
        case 5:
            pen.line((box[0], box[1], box[2], box[3]), fill=255, width=3)
            pen.line((box[2], box[1], box[0], box[3]), fill=255, width=3)
        case 6:
            pen.rectangle((box[0] + 8, box[1], box[0] + 13, box[3]), fill=255)
    if shape != "apple":
        return Image.merge("LA", (Image.new("L", alpha.size), alpha))
    red = [Image.new("L", alpha.size, value) for value in (220, 20, 30)]
    return Image.merge("RGBA", (*red, alpha))


def rows(count: int, start: int = 0) -> list[dict]:
    made = []
    for number in range(start, start + count):
        name = SHAPES[number % len(SHAPES)]
        buffer = io.BytesIO()
        draw_shape(name, number).save(buffer, "PNG")
        made.append(
            {
                "image": {"bytes": buffer.getvalue(), "path": None},
                "texts": [name, *TAGS.get(name, [])],
                "name": name,
                "set": "noto" if number % 5 == 0 else "mdi",
                "style": ("", "outline", "filled", "negative")[number % 4],
                "license": "MIT",
                "source_id": f"mdi:{name}-{number}",
                "related": RELATED.get(name, []),
                "gloss": GLOSSES.get(name, ""),
            }
        )
    return made


def write_data(folder: Path, counts: dict[str, int]) -> Path:
    """Parquet files with so many rows for each split."""
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    for split, count in counts.items():
        pq.write_table(pa.Table.from_pylist(rows(count, start)), folder / f"{split}-00000-of-00001.parquet")
        start += count
    return folder


def write_teacher(path: Path, texts: list[str], axes: int = 24) -> Path:
    """Random embeddings of texts."""
    embeddings = torch.randn(len(texts), axes, generator=torch.Generator().manual_seed(5))
    column = pa.array(embeddings.tolist(), pa.list_(pa.float32()))
    pq.write_table(pa.table({"text": texts, "embedding": column}), path)
    return path
