"""A folder of images as a data set: every image in it and below, with what its metadata files say.

    folder/
        metadata.jsonl, .csv or .tsv    rows with a `file_name`, relative to the metadata file; optional, also below
        a.png  red/b.svg ...            every file that Pillow or resvg may read, whatever its subfolder is called

The images are listed here, not by `datasets`, which takes the names of subfolders for splits. Nothing is decoded.
"""

import os
import uuid
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pyarrow as pa

from ..data.images import image_suffixes, optional_kinds
from .metadata import METADATA_FILES, read_metadata

CONTAINERS = (".parquet", ".tar")
OUR_FILES = ("metadata.parquet",)
REPEATED = "links to what is listed already"
CLOSED = "folders that can't be opened"
UNSPELLABLE = "files whose names are not UTF-8"  # a table's texts are


@dataclass
class FolderListing:
    """What is in a folder and all below.

    Attributes:
        images: paths of images, sorted; dead links are among them, so that they are counted like any image that can't
            be read.
        containers: paths of parquet and tar files by suffix, sorted.
        metadata: paths of metadata files, sorted.
        left_out: reason → number of entries that were left out for it.
    """

    images: list[str] = field(default_factory=list)
    containers: dict[str, list[str]] = field(default_factory=dict)
    metadata: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def add(self, path: str, kind: str | None = None):
        """Adds a file to those of its kind; files of other kinds are counted by their suffix."""
        kind = kind or _kind_of(path)
        if kind is not None and any("\ud800" <= letter <= "\udfff" for letter in path):
            self.left_out[UNSPELLABLE] += 1
        elif kind == "metadata":
            self.metadata.append(Path(path))
        elif kind == "image":
            self.images.append(path)
        elif kind is not None:
            self.containers.setdefault(kind, []).append(path)
        elif os.path.basename(path) not in OUR_FILES:
            self.left_out[_reason_of(path)] += 1


def _kind_of(path: str) -> str | None:
    """ "image", "metadata", the suffix of a container, or `None`."""
    name = os.path.basename(path)
    if name in METADATA_FILES:
        return "metadata"
    if name.startswith(".") or name in OUR_FILES:
        return None
    suffix = os.path.splitext(path)[1].lower()
    return "image" if suffix in image_suffixes() else suffix if suffix in CONTAINERS else None


def _reason_of(path: str) -> str:
    """Why a file is left out: what its kind needs, or its suffix."""
    suffix = os.path.splitext(path)[1].lower()
    needs = next((hint for kinds, usable, hint in optional_kinds() if suffix in kinds and not usable), None)
    if needs is not None:
        return f"{suffix} files ({needs})"
    return f"{suffix} files" if suffix else "files without a suffix"


def list_folder(path: Path) -> FolderListing:
    """Lists a folder and all below; hidden files and folders are skipped.

    Links are followed, and each file is listed once: by its own path if that is in the folder, else by the first link
    to it. Links to folders that hold this one are left out: they lead in a circle.
    """
    listing, root = FolderListing(), os.path.realpath(path)
    folders, folder_links, file_links = deque([str(path)]), deque(), []
    opened: set[str] = set()
    while folders or folder_links:
        folder = (folders or folder_links).popleft()  # links wait until everything has been listed by its own path
        real = os.path.realpath(folder)
        if real in opened or real != root and Path(root).is_relative_to(real):
            listing.left_out[REPEATED] += 1
            continue
        opened.add(real)
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError:
            listing.left_out[CLOSED] += 1
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not entry.is_symlink():
                folders.append(entry.path) if entry.is_dir() else listing.add(entry.path)
            else:
                (folder_links if os.path.isdir(entry.path) else file_links).append(entry.path)
    _add_links(sorted(file_links), opened, listing)
    listing.images.sort()
    listing.metadata.sort()
    listing.containers = {suffix: sorted(files) for suffix, files in listing.containers.items()}
    return listing


def _add_links(links: list[str], opened: set[str], listing: FolderListing):
    """Adds files that only links lead to, and dead links; one without a suffix may have been a folder of images."""
    targets = set()
    for link in links:
        kind, target = _kind_of(link), os.path.realpath(link)
        if not os.path.exists(link):
            listing.add(link, None if os.path.splitext(link)[1] else "image")
        elif target in targets or (kind and os.path.dirname(target) in opened and _kind_of(target) == kind):
            listing.left_out[REPEATED] += 1
        else:
            targets.add(target)
            listing.add(link)


def image_folder(path: Path, listing: FolderListing) -> datasets.Dataset:
    """The images of a folder, still encoded, in the column `image`, beside the columns of its metadata files.

    Raises:
        RetrievalError: a metadata file that can't be read.
    """
    arrays, left_out = read_metadata(listing.metadata, listing.images)
    listing.left_out.update(left_out)
    metadata = datasets.Features.from_arrow_schema(pa.table(arrays).schema)
    kind = datasets.Image(decode=False)
    images = pa.array([{"bytes": None, "path": image} for image in listing.images], kind.pa_type)
    features = datasets.Features({"image": kind, **metadata})
    rows = pa.table({"image": images, **arrays}, schema=features.arrow_schema)
    return datasets.Dataset(datasets.table.InMemoryTable(rows), fingerprint=uuid.uuid4().hex)


__all__ = ["FolderListing", "image_folder", "list_folder"]
