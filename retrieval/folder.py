"""A folder of images as a data set: every image in it and below, with what its metadata files say.

    folder/
        metadata.jsonl or metadata.csv     rows with a `file_name`, relative to the metadata file; optional, also below
        a.png  red/b.jpg ...               every file that Pillow may read, whatever its subfolder is called

The images are listed here, not by `datasets`, which takes the names of subfolders for splits. Nothing is decoded.
"""

import csv
import json
import os
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from ..data.images import image_suffixes
from ..errors import RetrievalError, first_line

CONTAINERS = (".parquet", ".tar")
METADATA_FILES = ("metadata.jsonl", "metadata.csv")
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
        """Adds a file to those of its kind; files of other kinds are skipped."""
        kind = kind or _kind_of(path)
        if kind is not None and any("\ud800" <= letter <= "\udfff" for letter in path):
            self.left_out[UNSPELLABLE] += 1
        elif kind == "metadata":
            self.metadata.append(Path(path))
        elif kind == "image":
            self.images.append(path)
        elif kind is not None:
            self.containers.setdefault(kind, []).append(path)


def _kind_of(path: str) -> str | None:
    """ "image", "metadata", the suffix of a container, or `None`."""
    name = os.path.basename(path)
    if name in METADATA_FILES:
        return "metadata"
    if name.startswith(".") or name == "metadata.parquet":
        return None
    suffix = os.path.splitext(path)[1].lower()
    return "image" if suffix in image_suffixes() else suffix if suffix in CONTAINERS else None


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
        elif kind is not None:
            targets.add(target)
            listing.add(link)


def image_folder(path: Path, listing: FolderListing) -> datasets.Dataset:
    """The images of a folder, still encoded, in the column `image`, beside the columns of its metadata files.

    Raises:
        RetrievalError: a metadata file that can't be read.
    """
    described = _read_metadata(listing.metadata)
    columns = {}
    for name in {name: None for row in described.values() for name in row if name not in ("file_name", "image")}:
        columns[name] = [described.get(image, {}).get(name) for image in listing.images]
    try:
        arrays = {name: pa.array(values) for name, values in columns.items()}
    except pa.ArrowException as error:
        raise RetrievalError(f"{path}: a metadata column mixes several types: {first_line(error)}") from None
    metadata = datasets.Features.from_arrow_schema(pa.table(arrays).schema)
    kind = datasets.Image(decode=False)
    images = pa.array([{"bytes": None, "path": image} for image in listing.images], kind.pa_type)
    features = datasets.Features({"image": kind, **metadata})
    rows = pa.table({"image": images, **arrays}, schema=features.arrow_schema)
    return datasets.Dataset(datasets.table.InMemoryTable(rows))


def _read_metadata(files: list[Path]) -> dict[str, dict[str, Any]]:
    """Path of an image → its row in a metadata file."""
    rows = {}
    for file in files:
        try:
            with file.open(newline="") as lines:
                for row in _metadata_rows(lines, file.suffix):
                    rows[str(file.parent / row["file_name"])] = row
        except OSError as error:
            raise RetrievalError(f"{file} can't be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            raise RetrievalError(f"{file} can't be read, each row needs a file_name: {first_line(error)}") from None
    return rows


def _metadata_rows(lines: Iterator[str], suffix: str) -> Iterator[dict[str, Any]]:
    if suffix == ".csv":
        return csv.DictReader(lines)
    return (json.loads(line) for line in lines if line.strip())


__all__ = ["FolderListing", "image_folder", "list_folder"]
