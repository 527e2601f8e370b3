"""The pictures that can be searched: a table, and their embeddings, kept as long as weights and pictures stay.

gallery.parquet ──────────────── pictures, names, sets, styles, licences
embeddings.npz ── fingerprint ─┬ equal: read
                               └ not:   embedded once, in the background, and kept in the temp folder
"""

import hashlib
import io
import os
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from . import TEMP_FOLDER
from .engine import Engine
from .limits import refuse

FOLDER = Path(__file__).resolve().parents[1]
GALLERY_FILE = FOLDER / "gallery.parquet"
EMBEDDINGS_FILE = FOLDER / "embeddings.npz"
UNLABELLED = "other"  # the style of sets that don't say theirs
BATCH = 128


@dataclass(frozen=True)
class Entry:
    """A picture of the gallery."""

    index: int
    png: bytes
    name: str
    texts: list[str]  # all names, `name` first
    style: str
    id: str  # of the picture in its set, "set:name"
    set: str
    author: str
    set_url: str
    license: str
    license_url: str

    @property
    def file_name(self) -> str:
        return "".join(letter if letter.isalnum() else "-" for letter in self.id) + ".png"

    def open(self) -> Image.Image:
        return Image.open(io.BytesIO(self.png))

    @property
    def credit(self) -> str:
        return f"{self.set} by {self.author}, {self.license}"


class Gallery:
    """The table of pictures.

    Raises:
        FileNotFoundError: there is no such file.
    """

    def __init__(self, path: Path = GALLERY_FILE):
        columns = pq.read_table(path).to_pydict()
        count = len(columns["name"])
        rows = (dict(zip(columns, values)) for values in zip(*columns.values()))
        self.entries = [Entry(index=index, **row) for index, row in zip(range(count), rows)]
        self.set_of, self.sets = _numbered([entry.set for entry in self.entries])
        self.style_of, self.styles = _numbered([entry.style for entry in self.entries])

    def __len__(self) -> int:
        return len(self.entries)

    def matching(self, sets: list[str], styles: list[str]) -> np.ndarray:
        """(pictures,) bool: of one of the sets and one of the styles; no set or style means all."""
        of_set = np.isin(self.set_of, [self.sets.index(each) for each in sets]) if sets else True
        of_style = np.isin(self.style_of, [self.styles.index(each) for each in styles]) if styles else True
        return np.logical_and(of_set, of_style) & np.ones(len(self), dtype=bool)

    @cached_property
    def digest(self) -> str:
        digest = hashlib.sha256()
        for entry in self.entries:
            digest.update(entry.png)
        return digest.hexdigest()


def _numbered(values: list[str]) -> tuple[np.ndarray, list[str]]:
    """Values → their numbers, (pictures,), and the distinct values in alphabetical order."""
    distinct = sorted(set(values), key=str.casefold)
    numbers = {value: number for number, value in enumerate(distinct)}
    return np.array([numbers[value] for value in values]), distinct


@dataclass(frozen=True)
class Embeddings:
    """What a checkpoint makes of the gallery.

    Attributes:
        images: (pictures, projection_dim) float32, L2-normalised.
        image_shares, text_shares: (layers, experts), how often each expert takes a token of the pictures and of their
            names; `None` without learned routing.
    """

    images: np.ndarray
    image_shares: np.ndarray | None = None
    text_shares: np.ndarray | None = None

    def save(self, path: Path, fingerprint: str):
        """Writes the file in one go, so that no half of it is ever read."""
        arrays = {"fingerprint": np.array(fingerprint), "images": self.images.astype(np.float16)}
        if self.image_shares is not None:
            arrays |= {"image_shares": self.image_shares, "text_shares": self.text_shares}
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        with part.open("wb") as file:
            np.savez(file, **arrays)
        part.replace(path)

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> "Embeddings | None":
        """What the file holds, or `None` if there is none, it is broken or of other weights or pictures."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                if str(arrays["fingerprint"]) != fingerprint:
                    return None
                images = arrays["images"].astype(np.float32)
                shares = [arrays[name] if name in arrays else None for name in ("image_shares", "text_shares")]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        return cls(images / np.linalg.norm(images, axis=1, keepdims=True), *shares)


def embed_gallery(engine: Engine, gallery: Gallery, report: Callable[[int], None] = lambda done: None) -> Embeddings:
    """Embeds every picture; shows a progress bar in the terminal and calls `report` with how many are done."""
    images, image_counts, text_counts = [], 0, 0
    with tqdm(total=len(gallery), desc="embedding the gallery", unit="pictures") as bar:
        for start in range(0, len(gallery), BATCH):
            entries = gallery.entries[start : start + BATCH]
            pairs = [entry.open() for entry in entries], [entry.name for entry in entries]
            embeds, of_image, of_text = engine.embed_pairs(*pairs)
            images.append(embeds)
            if of_image is not None:
                image_counts, text_counts = image_counts + of_image, text_counts + of_text
            bar.update(len(entries))
            report(bar.n)
    shares = [
        None
        if isinstance(counts, int)
        else (counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)).astype(np.float32)
        for counts in (image_counts, text_counts)
    ]
    return Embeddings(np.concatenate(images), *shares)


class Index:
    """A gallery and its embeddings, which may still be in the making.

    Args:
        engine: who embeds.
        gallery: what is searched.
        shipped: the file that comes with the Space.
        cache: where embeddings are kept that had to be made.
    """

    def __init__(
        self,
        engine: Engine,
        gallery: Gallery,
        shipped: Path = EMBEDDINGS_FILE,
        cache: Path = TEMP_FOLDER / "embeddings",
    ):
        self.engine, self.gallery = engine, gallery
        self.fingerprint = hashlib.sha256(f"{engine.fingerprint()} {gallery.digest}".encode()).hexdigest()
        self._kept = cache / f"{self.fingerprint[:32]}.npz"
        self._ready, self._failure = threading.Event(), None
        self.done = 0
        self.embeddings = Embeddings.load(shipped, self.fingerprint) or Embeddings.load(self._kept, self.fingerprint)
        if self.embeddings is not None:
            self._ready.set()

    @property
    def ready(self) -> bool:
        return self._ready.is_set()

    def build(self):
        """Embeds the gallery unless that is done, and keeps the result."""
        if self.ready:
            return
        try:
            self.embeddings = embed_gallery(self.engine, self.gallery, self._report)
            self.embeddings.save(self._kept, self.fingerprint)
        except OSError as error:  # a full disk: this run can search, the next one embeds again
            print(f"The embeddings of the gallery could not be kept in {self._kept}: {error}")
        except Exception as error:
            self._failure = error
            raise
        finally:
            self._ready.set()

    def build_in_background(self):
        if not self.ready:
            threading.Thread(target=self.build, name="gallery", daemon=True).start()

    def _report(self, done: int):
        self.done = done

    def wait(self, progress: Callable[..., None] | None = None):
        """Returns when the gallery can be searched; tells `progress`, a `gr.Progress`, how far it is."""
        while not self._ready.wait(0.25):
            if progress is not None:
                shown = f"Embedding the gallery, once: {self.done:,} of {len(self.gallery):,} pictures"
                progress(self.done / len(self.gallery), desc=shown)
        if self.embeddings is None:
            print(f"The gallery could not be embedded: {self._failure!r}")
            raise refuse("The gallery could not be prepared, so that there is nothing to search. The other tabs work.")

    def search(
        self, query: np.ndarray, sets: list[str], styles: list[str], count: int, without: int | None = None
    ) -> list[tuple[Entry, float]]:
        """The pictures nearest to a query (projection_dim,) and their cosines, best first, `without` left out."""
        cosines = self.embeddings.images @ query
        allowed = self.gallery.matching(sets, styles)
        if without is not None:
            allowed[without] = False
        candidates = np.flatnonzero(allowed)
        order = candidates[np.argsort(-cosines[candidates], kind="stable")[:count]]
        return [(self.gallery.entries[index], float(cosines[index])) for index in order]
