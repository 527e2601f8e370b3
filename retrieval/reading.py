"""Reads corpora from files, folders and the Hub, as `datasets` has them; nothing is decoded.

- a folder of images is listed by itself, so that every image in it counts, whatever its subfolders are called;
- WebDataset shards are streamed, all else lies in the cache of `datasets` or stays where it is.

Training reads with `mome.data.pairs`; a corpus also needs all files of a folder and a digest that shows changes.
"""

import csv
import glob
import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from PIL import Image

from ..data.pairs import BUILDERS, Rows
from ..errors import RetrievalError, first_line, unknown_name

# What reading a damaged file raises, in the libraries that read.
READING_ERRORS = (OSError, EOFError, tarfile.TarError, pa.ArrowException, datasets.exceptions.DatasetsError)
NOT_PICTURES = {".pdf", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr"}


def digest_of(*parts: Any) -> str:
    """16 hexadecimal digits of anything that JSON can write."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def read_corpus(name: str, split: str, streaming: bool) -> tuple[Rows, str]:
    """The rows of a corpus by its name, and a digest of its files.

    Raises:
        RetrievalError: no such corpus or split, a damaged file.
    """
    path = Path(name)
    try:
        if path.is_dir():
            return _read_folder(path, split, streaming)
        if path.suffix in BUILDERS:
            return _read_files(sorted(glob.glob(name)) or [name], BUILDERS[path.suffix], split, streaming)
        if path.is_file():
            raise RetrievalError(
                f"{name} is of no kind that can be read: {', '.join(BUILDERS)}, or a folder of images"
            )
        if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise RetrievalError(f"{name!r} is not there")
        return datasets.load_dataset(name, split=split, streaming=streaming), ""
    except FileNotFoundError as error:
        raise RetrievalError(f"{name!r} is not there: {first_line(error)}") from None
    except datasets.exceptions.DatasetNotFoundError as error:
        raise RetrievalError(f"{name!r} is not there: {first_line(error)}") from None
    except datasets.exceptions.DatasetGenerationError as error:
        raise RetrievalError(f"{name} can't be read: {first_line(error.__cause__ or error)}") from None
    except RetrievalError:
        raise
    except (ValueError, *READING_ERRORS) as error:
        raise RetrievalError(f"{name} can't be read: {first_line(error)}") from None


def _read_folder(path: Path, split: str, streaming: bool) -> tuple[Rows, str]:
    if (path / "dataset_dict.json").exists():
        saved = datasets.load_from_disk(str(path))
        if split not in saved:
            raise unknown_name(split, saved, f"{path}, among its splits,")
        return saved[split], ""
    if (path / "dataset_info.json").exists():
        return datasets.load_from_disk(str(path)), ""
    images, kinds = _walk(path)
    for suffix in (".parquet", ".tar"):
        if kinds.get(suffix):
            if suffix == ".tar":
                return _read_files(kinds[suffix], "webdataset", split, True)
            return datasets.load_dataset(str(path), split=split, streaming=streaming), ""
    if not images:
        raise RetrievalError(f"folder {str(path)!r} holds no images, parquet or WebDataset files")
    return _image_folder(path, images)


def _read_files(files: list[str], builder: str, split: str, streaming: bool) -> tuple[Rows, str]:
    stamps = [(str(file), os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
    streaming = streaming or builder == "webdataset"  # or a copy of all shards would be made
    data_files = {split: [str(Path(file).resolve()) for file in files]}
    return datasets.load_dataset(builder, data_files=data_files, split=split, streaming=streaming), digest_of(stamps)


def _walk(path: Path) -> tuple[list[str], dict[str, list[str]]]:
    """The images in a folder and all below, sorted; and parquet and tar files."""
    Image.init()
    extensions = set(Image.registered_extensions()) - NOT_PICTURES
    images, kinds = [], {}
    for folder, folders, names in os.walk(path, followlinks=True):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if suffix in extensions and not name.startswith("."):
                images.append(os.path.join(folder, name))
            elif suffix in (".parquet", ".tar") and name != "metadata.parquet":
                kinds.setdefault(suffix, []).append(os.path.join(folder, name))
    return sorted(images), {suffix: sorted(files) for suffix, files in kinds.items()}


def _image_folder(path: Path, images: list[str]) -> tuple[datasets.Dataset, str]:
    """All images of a folder, and what its `metadata.jsonl` or `metadata.csv` says of them by `file_name`."""
    described = _described(path)
    columns = {}
    for name in {name: None for row in described.values() for name in row if name not in ("file_name", "image")}:
        columns[name] = [described.get(image, {}).get(name) for image in images]
    kind = datasets.Image(decode=False)
    try:
        arrays = {name: pa.array(values) for name, values in columns.items()}
    except pa.ArrowException as error:
        raise RetrievalError(
            f"{path}: a column of its metadata has values of several types: {first_line(error)}"
        ) from None
    described_features = datasets.Features.from_arrow_schema(pa.table(arrays).schema)
    arrays = {"image": pa.array([{"bytes": None, "path": image} for image in images], kind.pa_type), **arrays}
    features = datasets.Features({"image": kind, **described_features})
    rows = datasets.Dataset(datasets.table.InMemoryTable(pa.table(arrays, schema=features.arrow_schema)))
    stamps = [(image, os.stat(image).st_size, os.stat(image).st_mtime_ns) for image in images]
    return rows, digest_of(stamps)


def _described(path: Path) -> dict[str, dict[str, Any]]:
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


__all__ = ["READING_ERRORS", "Rows", "digest_of", "read_corpus"]
