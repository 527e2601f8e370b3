"""Embeds a corpus with Daft: on the cores of one machine, or on a Ray cluster, by its runner switch.

    corpus ── items (parquet, images still encoded) ── Daft: @daft.cls UDF ── sorted parquet ── table
                                                       a model in each worker

The table is row for row that of `embed_corpus`. `daft_embedder` is the UDF alone, for data frames of one's own:

```python
embedder = daft_embedder("me/my-model")
frame = daft.read_parquet("s3://bucket/pictures/*.parquet")
frame = frame.with_column("result", embedder.embed_images(frame["image"]))   # {"embedding": [...], "error": null}
frame.write_parquet("s3://bucket/embedded")
```
"""

import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import daft
import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from daft import DataType, Series

from ..embedder import BATCH_SIZE, Embedder
from ..errors import RetrievalError, first_line
from .embed import checked_modalities
from .job import EmbeddingReport, report_of
from .reading import Rows, digest_of
from .rows import Item, columns_of, embed_items, items_of
from .sources import Source, open_source
from .table import TableInfo, table_schema, to_table, write_table

ITEM_ROWS = 4096  # of a file of items: what a worker reads at a time
RESULT = DataType.struct({"embedding": DataType.list(DataType.float32()), "error": DataType.string()})
RESULT_NAMES = ["embedding", "error"]
RUNNERS = ("native", "ray")


def daft_embedder(
    model: str | Path, batch_size: int = BATCH_SIZE, gpus: float = 0, max_concurrency: int | None = None
) -> Any:
    """A Daft UDF with the methods `embed_images`, `embed_texts` and `embed`, whose workers load the model once each.

    Args:
        model: folder or Hub id; every worker has to find it there.
        batch_size: rows that go through the model together.
        gpus: of each worker.
        max_concurrency: the number of workers; default: Daft's choice.

    Returns:
        An instance whose methods take columns and give structs `{"embedding": list of float32, "error": string}`:
        of images, binary or `{"bytes": ..., "path": ...}`, of texts, or of modalities, images and texts. What can't be
        read gets a null embedding and the reason.
    """

    @daft.cls(gpus=gpus, max_concurrency=max_concurrency)
    class MomeEmbedder:
        def __init__(self, model: str):
            self.embedder = Embedder.load(model)

        @daft.method.batch(return_dtype=RESULT, batch_size=batch_size)
        def embed_images(self, images: Series) -> pa.Array:
            return _results([Item("", "image", image=_encoded(each)) for each in images.to_pylist()], self.embedder)

        @daft.method.batch(return_dtype=RESULT, batch_size=batch_size)
        def embed_texts(self, texts: Series) -> pa.Array:
            return _results([_text_item(text) for text in texts.to_pylist()], self.embedder)

        @daft.method.batch(return_dtype=RESULT, batch_size=batch_size)
        def embed(self, modalities: Series, images: Series, texts: Series) -> pa.Array:
            rows = zip(modalities.to_pylist(), images.to_pylist(), texts.to_pylist())
            items = [_text_item(text) if kind == "text" else Item("", kind, image=image) for kind, image, text in rows]
            return _results(items, self.embedder)

    return MomeEmbedder(str(Path(model).resolve()) if Path(model).is_dir() else str(model))


def _encoded(image: Any) -> Any:
    return {"bytes": image} if isinstance(image, bytes) else {"path": image} if isinstance(image, str) else image


def _text_item(text: str | None) -> Item:
    return Item("", "text", text=text, error=None if text and text.strip() else "no text")


def _results(items: list[Item], embedder: Embedder) -> pa.Array:
    embeddings = embed_items(items, embedder)
    rows = [None if item.error is not None else row for item, row in zip(items, embeddings.numpy())]
    vectors = pa.array(rows, pa.list_(pa.float32()))
    return pa.StructArray.from_arrays([vectors, pa.array([item.error for item in items], pa.string())], RESULT_NAMES)


def embed_with_daft(
    source: str | Path | Rows,
    output: str | Path,
    model: str | Path,
    *,
    runner: str | None = None,
    ray_address: str | None = None,
    work_folder: str | Path | None = None,
    split: str = "train",
    modalities: Sequence[str] | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    id_column: str | None = None,
    metadata_columns: Sequence[str] | None = None,
    streaming: bool = False,
    batch_size: int = BATCH_SIZE,
    gpus: float = 0,
    max_concurrency: int | None = None,
    overwrite: bool = False,
) -> EmbeddingReport:
    """Embeds a corpus into a table, as `embed_corpus` does, with Daft's workers.

    Args:
        source, split, image_column, text_column, id_column, metadata_columns, streaming: see `open_source`.
        output: a `.parquet` file. modalities, overwrite: see `embed_corpus`.
        model: folder or Hub id, which every worker has to find.
        runner: `"native"` or `"ray"`; default: what `DAFT_RUNNER` or `daft.set_runner_...` says.
        ray_address: of the cluster; default: Ray's own rules, and at last one on this machine.
        work_folder: for items and results in between, seen by all workers; default: a new one beside the output.
        batch_size, gpus, max_concurrency: see `daft_embedder`.

    Raises:
        RetrievalError: a corpus, column, model, runner or output that can't be used.
    """
    began = time.monotonic()
    output = Path(output)
    if output.suffix != ".parquet":
        raise RetrievalError(f"output {str(output)!r}: choose a name that ends in .parquet")
    if output.exists() and not overwrite:
        raise RetrievalError(f"{output} is there already: choose another output, or overwrite it (overwrite=True)")
    columns = {"image_column": image_column, "text_column": text_column, "id_column": id_column}
    corpus = open_source(source, split, **columns, metadata_columns=metadata_columns, streaming=streaming)
    modalities = checked_modalities(modalities, corpus)
    corpus.check_ids()
    local = Embedder.load(model)  # for its dimension and fingerprint; a model that doesn't load is refused at once
    job = digest_of(corpus.name, corpus.digest, split, list(modalities), list(columns.values()), local.fingerprint)
    schema = table_schema(TableInfo(local.name, local.fingerprint, local.dimension, corpus.name, job), corpus.metadata)
    _choose_runner(runner, ray_address)
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{output.name}.daft-", dir=work_folder or output.parent))
    try:
        write_items(corpus, modalities, folder / "items", schema)
        embedder = daft_embedder(local.name, batch_size, gpus, max_concurrency)
        frame = daft.read_parquet(str(folder / "items" / "*.parquet"))
        result = embedder.embed(frame["modality"], frame["image"], frame["text"])
        frame = frame.with_column("result", result).exclude("image").sort("row")
        frame.write_parquet(str(folder / "results"))
        write_table(output, _sorted_tables(folder / "results", schema), schema)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return report_of([output], output, began, 0)


def _choose_runner(runner: str | None, ray_address: str | None):
    if runner is not None and runner not in RUNNERS:
        raise RetrievalError(f"runner={runner!r}: choose {' or '.join(RUNNERS)}")
    if ray_address is not None and runner != "ray":
        raise RetrievalError(f"ray_address={ray_address!r} is of use with runner='ray' only")
    try:
        if runner == "ray":
            daft.set_runner_ray(ray_address, noop_if_initialized=True)
        elif runner == "native":
            daft.set_runner_native()
    except Exception as error:  # Ray and Daft raise what they like; a process can have one runner only
        raise RetrievalError(f"runner {runner!r} can't be had: {first_line(error)}") from None


def write_items(corpus: Source, modalities: Sequence[str], folder: Path, schema: pa.Schema) -> int:
    """Writes what is to be embedded as parquet files, `ITEM_ROWS` items each; returns the number of items.

    Columns: `row`, the place in the table; those of the table without embedding; `image`, still encoded.
    """
    several = corpus.several_texts or len(modalities) > 1
    fields = [schema.field(name) for name in schema.names if name != "embedding"]
    written = pa.schema(
        [pa.field("row", pa.int64()), *fields, pa.field("image", datasets.Image(decode=False).pa_type)]
    )
    folder.mkdir(parents=True)
    items: Iterable[Item] = (item for row in corpus.rows() for item in items_of(row, modalities, several))
    count = 0
    while some := list(islice(items, ITEM_ROWS)):
        columns = {
            "row": range(count, count + len(some)),
            **columns_of(some, schema),
            "image": [item.image for item in some],
        }
        table = pa.table({field.name: pa.array(columns[field.name], field.type) for field in written})
        pq.write_table(table, folder / f"items-{count:012d}.parquet", compression="none")
        count += len(some)
    if not count:
        raise RetrievalError(f"{corpus.name or 'the data set'} has no rows in split {corpus.split!r}")
    return count


def _sorted_tables(folder: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    """The rows that Daft wrote, in the order of their places; each file holds a range of them."""
    firsts = {}
    for file in folder.rglob("*.parquet"):
        rows = pq.read_table(file, columns=["row"])["row"]
        if len(rows):
            firsts[file] = rows[0].as_py()
    expected = 0
    dimension = schema.field("embedding").type.list_size
    for file in sorted(firsts, key=firsts.__getitem__):
        table = pq.read_table(file)
        rows = table["row"].to_pylist()
        if rows != list(range(expected, expected + len(rows))):
            raise RetrievalError(f"Daft returned rows {rows[0]} to {rows[-1]} where {expected} was next")
        expected += len(rows)
        columns = {name: table[name].to_pylist() for name in schema.names if name != "embedding"}
        results = table["result"].to_pylist()
        columns["error"] = [each["error"] for each in results]
        embeddings = torch.zeros(len(rows), dimension)
        good = [place for place, each in enumerate(results) if each["error"] is None]
        if good:
            embeddings[good] = torch.tensor([results[place]["embedding"] for place in good])
        yield to_table(columns, embeddings, schema)


__all__ = ["daft_embedder", "embed_with_daft", "write_items"]
