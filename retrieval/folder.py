"""A folder of images as a data set: every image in it and below, with what its metadata files say.

    folder/
        metadata.jsonl or metadata.csv     rows with a `file_name`, relative to the metadata file; optional, also below
        a.png  red/b.jpg ...               every file that Pillow may read, whatever its subfolder is called

The images are listed here, not by `datasets`, which takes the names of subfolders for splits. Nothing is decoded.
"""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from PIL import Image

from ..errors import RetrievalError, first_line

NOT_PICTURES = {".pdf", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr"}  # Pillow lists them, but can't read them
CONTAINERS = (".parquet", ".tar")


def list_folder(path: Path) -> tuple[list[str], dict[str, list[str]]]:
    """Paths of the images in a folder and all below, sorted; and those of parquet and tar files, by suffix."""
    Image.init()
    extensions = set(Image.registered_extensions()) - NOT_PICTURES
    images, containers = [], {}
    for folder, folders, names in os.walk(path, followlinks=True):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if suffix in extensions and not name.startswith("."):
                images.append(os.path.join(folder, name))
            elif suffix in CONTAINERS and name != "metadata.parquet":
                containers.setdefault(suffix, []).append(os.path.join(folder, name))
    return sorted(images), {suffix: sorted(files) for suffix, files in containers.items()}


def image_folder(path: Path, images: list[str]) -> datasets.Dataset:
    """The images of a folder, still encoded, in the column `image`, beside the columns of its metadata files.

    Raises:
        RetrievalError: a metadata file that can't be read.
    """
    described = _read_metadata(path)
    columns = {}
    for name in {name: None for row in described.values() for name in row if name not in ("file_name", "image")}:
        columns[name] = [described.get(image, {}).get(name) for image in images]
    try:
        arrays = {name: pa.array(values) for name, values in columns.items()}
    except pa.ArrowException as error:
        raise RetrievalError(f"{path}: a metadata column mixes several types: {first_line(error)}") from None
    metadata = datasets.Features.from_arrow_schema(pa.table(arrays).schema)
    kind = datasets.Image(decode=False)
    arrays = {"image": pa.array([{"bytes": None, "path": image} for image in images], kind.pa_type), **arrays}
    features = datasets.Features({"image": kind, **metadata})
    return datasets.Dataset(datasets.table.InMemoryTable(pa.table(arrays, schema=features.arrow_schema)))


def _read_metadata(path: Path) -> dict[str, dict[str, Any]]:
    """Path of an image → its row in the metadata file of its folder or one above."""
    rows = {}
    for file in sorted([*path.rglob("metadata.jsonl"), *path.rglob("metadata.csv")]):
        try:
            with file.open(newline="") as lines:
                for row in _metadata_rows(lines, file.suffix):
                    rows[str(file.parent / row["file_name"])] = row
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            raise RetrievalError(f"{file} can't be read, each row needs a file_name: {first_line(error)}") from None
    return rows


def _metadata_rows(lines: Iterator[str], suffix: str) -> Iterator[dict[str, Any]]:
    if suffix == ".csv":
        return csv.DictReader(lines)
    return (json.loads(line) for line in lines if line.strip())


__all__ = ["image_folder", "list_folder"]
