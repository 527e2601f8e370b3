"""The Space with a tiny random model and a small gallery, served in a thread, for its tests."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from app import build_demo, launch
from builders import SPECIAL_TOKENS, WORDS, build_processor, build_tokenizer
from models import tiny_captioner
from mome_space.engine import Engine
from mome_space.gallery import GALLERY_FILE, Gallery, Index

SPACE = Path(__file__).resolve().parent.parent / "space"
ROUTED = {"experts_per_group": 4, "experts_per_token": 2, "expert_intermediate_size": 32}
PICTURES = 60


@dataclass
class Served:
    """A running Space: where it is, and what it was built from."""

    url: str
    engine: Engine
    index: Index


def small_gallery(folder: Path) -> Gallery:
    """Every hundredth picture of the Space's gallery."""
    table = pq.read_table(GALLERY_FILE)
    path = folder / "gallery.parquet"
    pq.write_table(table.take(np.arange(0, table.num_rows, table.num_rows // PICTURES)), path)
    return Gallery(path)


def tiny_engine(**overrides: Any) -> Engine:
    """A routed model of two layers that sees 4 × 4 patches, and whose captions are words of its tokenizer alone."""
    words = [*WORDS.split(), "circus", "tent"]  # which the page's examples say
    vocabulary = len(SPECIAL_TOKENS) + len(words)
    model = tiny_captioner("dense", image_size=32, vocab_size=vocabulary, **{**ROUTED, **overrides})
    end = model.config.eos_token_id
    model.generation_config.suppress_tokens = [id for id in range(len(SPECIAL_TOKENS)) if id != end]
    longest = model.config.max_position_embeddings
    processor = build_processor(image_size=32, max_length=longest)
    processor.tokenizer = build_tokenizer(words, longest)
    return Engine(model, processor)


def tiny_index(folder: Path, engine: Engine) -> Index:
    index = Index(engine, small_gallery(folder), shipped=folder / "none.npz", cache=folder / "cache")
    index.build()
    return index


@contextlib.contextmanager
def served(folder: Path) -> Iterator[Served]:
    engine = tiny_engine()
    index = tiny_index(folder, engine)
    demo = build_demo(engine.model, engine.processor, index)
    _, url, _ = launch(demo, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    try:
        yield Served(url, engine, index)
    finally:
        demo.close(verbose=False)


def write_picture(path: Path, seed: int = 0, side: int = 40) -> Path:
    """A picture of random colours."""
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)).save(path)
    return path
