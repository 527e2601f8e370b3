"""Embeds a corpus with Daft: on the cores of one machine, or on a Ray cluster (extra `daft`).

    missing items ── parquet, images still encoded ── Daft: @daft.cls UDF ── parquet ── parts ── table
    (embed.py)       a block at a time                a model in each worker

The table is row for row that of `embed_corpus`, and resumes and grows as that does, by blocks. `daft_embedder` is the
UDF alone, for your own data frames:

```python
embedder = daft_embedder("me/my-model")
frame = daft.read_parquet("s3://bucket/pictures/*.parquet")
frame = frame.with_column("result", embedder.embed_images(frame["image"]))   # {"embedding": [...], "error": null}
frame.write_parquet("s3://bucket/embedded")
```
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import daft
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from daft import DataType, Series

from ..configuration_mome import quoted
from ..embedder import BATCH_SIZE, Embedder
from ..errors import RetrievalError, first_line
from ..onnx_embedder import load_embedder
from .corpus import CorpusOptions, Rows, open_corpus, records_of
from .embed import MOST_WORKERS, PART_ROWS, Engine, run_job
from .items import Item, embed_items, load_bytes
from .job import EmbeddingReport, TableJob

ITEM_ROWS = 4096  # of a file of items, which a worker reads at a time
FILE_BYTES, BLOCK_BYTES = 64 << 20, 2 << 30  # of encoded images in a file, and in all files of a block
BLOCK_ROWS = 65_536  # a kill loses at most a block
RESULT = DataType.struct({"embedding": DataType.list(DataType.float32()), "error": DataType.string()})
RESULT_NAMES = ["embedding", "error"]
RUNNERS = ("native", "ray")
KEPT_COLUMNS = ("uri", "file_stamp", "content_digest")
ITEM_SCHEMA = pa.schema(
    [(name, pa.string()) for name in (*KEPT_COLUMNS, "modality", "text")] + [("image", pa.large_binary())]
)


def daft_embedder(
    model: str | Path,
    batch_size: int = BATCH_SIZE,
    gpus: float = 0,
    max_concurrency: int | None = None,
    backend: str | None = None,
) -> Any:
    """A Daft UDF with the methods `embed_images`, `embed_texts` and `embed`; each worker loads the model once.

    Args:
        model: folder or Hub id, the same for every worker.
        batch_size: rows that go through the model together.
        gpus: for each worker.
        max_concurrency: the number of workers; default: Daft's choice.
        backend: what runs the model: see `load_embedder`.

    Returns:
        An instance whose methods take columns and return structs `{"embedding": list of float32, "error": string}`:
        `embed_images` takes images, binary or `{"bytes": ..., "path": ...}`; `embed_texts` takes texts; `embed` takes
        modalities, images and texts. What can't be read gets a null embedding and the reason.
    """

    @daft.cls(gpus=gpus, max_concurrency=max_concurrency)
    class MomeEmbedder:
        def __init__(self, model: str, backend: str | None):
            self.embedder = load_embedder(model, backend)

        @daft.method.batch(return_dtype=RESULT, batch_size=batch_size)
        def embed_images(self, images: Series) -> pa.Array:
            return _results([Item("", "image", image=_encoded(each)) for each in images.to_pylist()], self.embedder)

        @daft.method.batch(return_dtype=RESULT, batch_size=batch_size)
        def embed_texts(self, texts: Series) -> pa.Array:
            return _results([_text_item(text) for text in texts.to_pylist()], self.embedder)

        @daft.method.batch(return_dtype=RESULT, batch_size=batch_size)
        def embed(self, modalities: Series, images: Series, texts: Series) -> pa.Array:
            rows = zip(modalities.to_pylist(), images.to_pylist(), texts.to_pylist())
            items = [
                _text_item(text) if kind == "text" else Item("", kind, image=_encoded(image))
                for kind, image, text in rows
            ]
            return _results(items, self.embedder)

    return MomeEmbedder(str(Path(model).resolve()) if os.path.isdir(model) else str(model), backend)


def _encoded(image: Any) -> Any:
    return {"bytes": image} if isinstance(image, bytes) else {"path": image} if isinstance(image, str) else image


def _text_item(text: str | None) -> Item:
    return Item("", "text", text=text, error=None if text and text.strip() else "no text")


def _results(items: list[Item], embedder: Embedder) -> pa.Array:
    embeddings = embed_items(items, embedder)
    rows = [None if item.error is not None else row for item, row in zip(items, embeddings.numpy())]
    vectors = pa.array(rows, pa.list_(pa.float32()))
    return pa.StructArray.from_arrays([vectors, pa.array([item.error for item in items], pa.string())], RESULT_NAMES)


@dataclass(frozen=True)
class DaftOptions:
    """Where Daft runs: keywords of `embed_with_daft`.

    Attributes:
        runner: `"native"` or `"ray"`; default: what `DAFT_RUNNER` or `daft.set_runner_...` says.
        ray_address: of the cluster; default: by Ray's own rules, which end with a new one on this machine.
        work_folder: for intermediate files, visible to all workers; default: beside the output.
        gpus, max_concurrency: see `daft_embedder`.
    """

    runner: str | None = None
    ray_address: str | None = None
    work_folder: str | Path | None = None
    gpus: float = 0
    max_concurrency: int | None = None


def embed_with_daft(
    source: str | Path | Rows,
    output: str | Path,
    model: str | Path,
    *,
    batch_size: int = BATCH_SIZE,
    overwrite: bool = False,
    backend: str | None = None,
    **options: Any,
) -> EmbeddingReport:
    """Embeds a corpus into a table, as `embed_corpus` does, with Daft's workers.

    Args:
        source: see `open_source`.
        output: a `.parquet` file; any other name is a folder of parquet files.
        model: folder or Hub id, the same for every worker.
        batch_size: images or texts that go through the model together.
        overwrite: embed everything anew, and replace what is at `output` once the new table is complete.
        backend: what runs the model: see `load_embedder`.
        options: the fields of `DaftOptions` and `CorpusOptions`.

    Raises:
        RetrievalError: a corpus, column, option or runner that can't be used; a table at `output` that can't grow into
            this one. MomeError: a model that can't be loaded.
    """
    daft_options, corpus_options = records_of(options, "embed_with_daft", DaftOptions, CorpusOptions)
    corpus = open_corpus(source, corpus_options)
    corpus.check()
    # For its dimension and fingerprint; a model that doesn't load is refused at once.
    local = load_embedder(model, backend)
    job = TableJob(Path(output), corpus, local, PART_ROWS)
    _choose_runner(daft_options.runner, daft_options.ray_address)
    with job.locked(), ThreadPoolExecutor(MOST_WORKERS) as pool:
        workers = daft_options.gpus, daft_options.max_concurrency
        embedder = daft_embedder(local.name, batch_size, *workers, backend)
        engine = _engine(embedder, daft_options.work_folder or job.parts, local.dimension)
        return run_job(job, engine, pool, MOST_WORKERS, overwrite, False)


def _choose_runner(runner: str | None, ray_address: str | None):
    if runner is not None and runner not in RUNNERS:
        raise RetrievalError(f"runner={quoted(runner)}: choose {' or '.join(RUNNERS)}")
    if ray_address is not None and runner != "ray":
        raise RetrievalError(f"ray_address={quoted(ray_address)} is of use only with runner='ray'")
    try:
        if runner == "ray":
            daft.set_runner_ray(ray_address, noop_if_initialized=True)
        elif runner == "native":
            daft.set_runner_native()
    except Exception as error:  # Ray and Daft raise almost anything; a process can have only one runner
        raise RetrievalError(f"runner {quoted(runner)} can't be used: {first_line(error)}") from None


def _engine(embedder: Any, place: str | Path, dimension: int) -> Engine:
    """Embeds items with Daft, a block at a time, which lies in a folder in `place`."""

    def embed(items: Iterator[Item]) -> Iterator[tuple[Sequence[Item], torch.Tensor]]:
        count, unread = 1, []
        while count or unread:
            with tempfile.TemporaryDirectory(prefix="daft-", dir=place, ignore_cleanup_errors=True) as folder:
                block = Path(folder)
                count, unread = write_items(items, block / "items")
                if unread:
                    yield unread, torch.zeros(len(unread), dimension)
                if count:
                    frame = daft.read_parquet(str(block / "items" / "*.parquet"))
                    result = embedder.embed(frame["modality"], frame["image"], frame["text"])
                    frame = frame.with_column("result", result).select(*KEPT_COLUMNS, "result")
                    frame.write_parquet(str(block / "results"))
                    yield from _results_of(block / "results", count, dimension)

    return embed


def write_items(items: Iterator[Item], folder: Path) -> tuple[int, list[Item]]:
    """Writes a block of items as parquet files; returns how many, and those that could not be read again.

    Columns: those of `ITEM_SCHEMA`, images still encoded, with their bytes.
    """
    folder.mkdir(parents=True)
    count, block_bytes, unread = 0, 0, []
    waiting: list[Item] = []
    waiting_bytes = 0

    def write():
        nonlocal count, waiting, waiting_bytes
        columns = {
            "uri": [item.uri for item in waiting],
            "file_stamp": [item.stamp for item in waiting],
            "content_digest": [item.digest for item in waiting],
            "modality": [item.modality for item in waiting],
            "text": [item.text for item in waiting],
            "image": [item.image and item.image["bytes"] for item in waiting],
        }
        table = pa.table({each.name: pa.array(columns[each.name], each.type) for each in ITEM_SCHEMA})
        pq.write_table(table, folder / f"items-{count:012d}.parquet", compression="none")
        count, waiting, waiting_bytes = count + len(waiting), [], 0

    for item in items:
        if item.modality == "image":
            load_bytes(item)
        if item.error is not None:
            unread.append(item)
        else:
            size = len(item.image["bytes"]) if item.modality == "image" else 0
            waiting.append(item)
            waiting_bytes, block_bytes = waiting_bytes + size, block_bytes + size
        if len(waiting) >= ITEM_ROWS or waiting_bytes >= FILE_BYTES:
            write()
        if count + len(waiting) + len(unread) >= BLOCK_ROWS or block_bytes >= BLOCK_BYTES:
            break
    if waiting:
        write()
    return count, unread


def _results_of(folder: Path, count: int, dimension: int) -> Iterator[tuple[Sequence[Item], torch.Tensor]]:
    """What Daft wrote, a file at a time.

    Raises:
        RetrievalError: it lost or repeated rows.
    """
    returned = 0
    for file in sorted(folder.rglob("*.parquet")):
        rows = pq.read_table(file)
        if not len(rows):
            continue
        returned += len(rows)
        results = rows["result"].to_pylist()
        columns = zip(*(rows[name].to_pylist() for name in KEPT_COLUMNS), results)
        items = [
            Item("", "", uri, stamp=stamp, digest=digest, error=each["error"]) for uri, stamp, digest, each in columns
        ]
        embeddings = torch.zeros(len(items), dimension)
        good = [place for place, each in enumerate(results) if each["error"] is None]
        if good:
            embeddings[good] = torch.tensor([results[place]["embedding"] for place in good])
        yield items, embeddings
    if returned != count:
        raise RetrievalError(f"Daft returned {returned} of {count} items: run it again")


__all__ = ["DaftOptions", "daft_embedder", "embed_with_daft", "write_items"]
