"""Embeds a corpus with Daft: on the cores of one machine, or on a Ray cluster (extra `daft`).

    corpus ── items (parquet, images still encoded) ── Daft: @daft.cls UDF ── sorted parquet ── table
                                                       a model in each worker

The table is row for row that of `embed_corpus`. `daft_embedder` is the UDF alone, for your own data frames:

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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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
from .corpus import Corpus, CorpusOptions, Rows, digest_of, open_corpus, records_of
from .embed import EmbeddingReport, report_of
from .items import Item, columns_of, embed_items, items_of
from .table import TableInfo, table_schema, to_table, write_table

ITEM_ROWS = 4096  # of a file of items, which a worker reads at a time
RESULT = DataType.struct({"embedding": DataType.list(DataType.float32()), "error": DataType.string()})
RESULT_NAMES = ["embedding", "error"]
RUNNERS = ("native", "ray")


def daft_embedder(
    model: str | Path, batch_size: int = BATCH_SIZE, gpus: float = 0, max_concurrency: int | None = None
) -> Any:
    """A Daft UDF with the methods `embed_images`, `embed_texts` and `embed`; each worker loads the model once.

    Args:
        model: folder or Hub id, the same for every worker.
        batch_size: rows that go through the model together.
        gpus: for each worker.
        max_concurrency: the number of workers; default: Daft's choice.

    Returns:
        An instance whose methods take columns and return structs `{"embedding": list of float32, "error": string}`:
        `embed_images` takes images, binary or `{"bytes": ..., "path": ...}`; `embed_texts` takes texts; `embed` takes
        modalities, images and texts. What can't be read gets a null embedding and the reason.
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


@dataclass(frozen=True)
class DaftOptions:
    """Where Daft runs: keywords of `embed_with_daft`.

    Attributes:
        runner: `"native"` or `"ray"`; default: what `DAFT_RUNNER` or `daft.set_runner_...` says.
        ray_address: of the cluster; default: by Ray's own rules, which end with a new one on this machine.
        work_folder: for intermediate files, visible to all workers; default: a new folder beside the output.
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
    **options: Any,
) -> EmbeddingReport:
    """Embeds a corpus into a table, as `embed_corpus` does, with Daft's workers.

    Args:
        source: see `open_source`.
        output: a `.parquet` file.
        model: folder or Hub id, the same for every worker.
        batch_size: rows that go through the model together.
        overwrite: replace what is at `output`, once the new table is complete.
        options: the fields of `DaftOptions` and `CorpusOptions`.

    Raises:
        RetrievalError: a corpus, column, option, runner or output that can't be used. MomeError: a model that can't be
            loaded.
    """
    began = time.monotonic()
    output = Path(output)
    daft_options, corpus_options = records_of(options, "embed_with_daft", DaftOptions, CorpusOptions)
    if output.suffix != ".parquet":
        raise RetrievalError(f"output {str(output)!r}: choose a name that ends in .parquet")
    if output.exists() and not overwrite:
        raise RetrievalError(f"{output} is there already: choose another output, or overwrite it (overwrite=True)")
    corpus = open_corpus(source, corpus_options)
    corpus.check()
    local = Embedder.load(model)  # for its dimension and fingerprint; a model that doesn't load is refused at once
    _choose_runner(daft_options.runner, daft_options.ray_address)
    output.parent.mkdir(parents=True, exist_ok=True)
    schema = table_schema(_info(local, corpus), corpus.metadata)
    embedder = daft_embedder(local.name, batch_size, daft_options.gpus, daft_options.max_concurrency)
    folder = Path(tempfile.mkdtemp(prefix=f"{output.name}.daft-", dir=daft_options.work_folder or output.parent))
    try:
        write_items(corpus, folder / "items", schema)
        frame = daft.read_parquet(str(folder / "items" / "*.parquet"))
        result = embedder.embed(frame["modality"], frame["image"], frame["text"])
        frame = frame.with_column("result", result).exclude("image").sort("row")
        frame.write_parquet(str(folder / "results"))
        write_table(output, _sorted_tables(folder / "results", schema), schema)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return report_of([output], output, corpus, began, 0)


def _info(embedder: Embedder, corpus: Corpus) -> TableInfo:
    options = corpus.options
    columns = [options.image_column, options.text_column, options.id_column]
    job = digest_of(corpus.name, corpus.digest, options.split, corpus.modalities, columns, embedder.fingerprint)
    return TableInfo(embedder.name, embedder.fingerprint, embedder.dimension, corpus.name, job)


def _choose_runner(runner: str | None, ray_address: str | None):
    if runner is not None and runner not in RUNNERS:
        raise RetrievalError(f"runner={runner!r}: choose {' or '.join(RUNNERS)}")
    if ray_address is not None and runner != "ray":
        raise RetrievalError(f"ray_address={ray_address!r} is of use only with runner='ray'")
    try:
        if runner == "ray":
            daft.set_runner_ray(ray_address, noop_if_initialized=True)
        elif runner == "native":
            daft.set_runner_native()
    except Exception as error:  # Ray and Daft raise almost anything; a process can have only one runner
        raise RetrievalError(f"runner {runner!r} can't be used: {first_line(error)}") from None


def write_items(corpus: Corpus, folder: Path, schema: pa.Schema) -> int:
    """Writes what is to be embedded as parquet files of `ITEM_ROWS` items each; returns the number of items.

    Columns: `row`, the place in the table; the table's columns without the embedding; `image`, still encoded.
    """
    fields = [schema.field(name) for name in schema.names if name != "embedding"]
    written = pa.schema(
        [pa.field("row", pa.int64()), *fields, pa.field("image", datasets.Image(decode=False).pa_type)]
    )
    folder.mkdir(parents=True)
    items: Iterable[Item] = (item for row in corpus.rows() for item in items_of(row, corpus))
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
        raise corpus.empty()
    return count


def _sorted_tables(folder: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    """The rows that Daft wrote, in the order of the table; each file holds a range of them."""
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


__all__ = ["DaftOptions", "daft_embedder", "embed_with_daft", "write_items"]
