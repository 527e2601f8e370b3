"""One output and what becomes of it: what is there, whether it may grow, and the step to the new table."""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from ..configuration_mome import quoted, shortened
from ..embedder import Embedder
from ..errors import RetrievalError, first_line
from .corpus import Corpus, digest_of
from .format import (
    FINISHED,
    FORMAT_VERSION,
    METADATA_KEY,
    ROW_GROUP_ROWS,
    TableInfo,
    parts_folder,
    read_info,
    replacing,
    table_schema,
    to_table,
    unreadable_file,
    write_table,
)
from .items import READING, Item, columns_of
from .store import Store
from .table import NORM_TOLERANCE

LOCK, JOB, LISTED, SCRATCH, REPLACED = ".lock", "job.json", "rows.arrow", "embeddings.f32", "replaced"
# What an image processor is, not what it does.
NOT_SETTINGS = {"auto_map", "image_processor_type", "processor_class", "device", "data_format", "return_tensors"}
PROBES = ("a red dot", "Größe, naïve – “it’s” 3.5%!", "snake_case PascalCase\tup/down", "🎁 火", "ab" * 40)


@dataclass(frozen=True)
class EmbeddingReport:
    """What a job did.

    Attributes:
        output: the table.
        rows: of the table. images, texts: how many of each.
        bad: how many images and texts could not be read; `unreadable_file` lists them.
        resumed: rows whose embeddings were there before this run.
        dropped: rows of the earlier table whose item is gone from the corpus.
        seconds: that this run took.
        left_out: reason → number of files and links in a folder that are not rows, and of metadata without a picture.
    """

    output: Path
    rows: int
    images: int
    texts: int
    bad: int
    resumed: int
    seconds: float
    left_out: dict[str, int] = field(default_factory=dict)
    dropped: int = 0

    @property
    def items_per_second(self) -> float:
        return (self.rows - self.resumed) / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        counts = [f"{self.images:,} images"] * bool(self.images) + [f"{self.texts:,} texts"] * bool(self.texts)
        text = f"{self.output}: {' and '.join(counts) or 'nothing'} embedded, {self.bad:,} could not be read"
        if self.bad:
            text += f" (see {unreadable_file(self.output)})"
        if self.resumed:
            text += f"; {self.resumed:,} rows were there already"
        if self.dropped:
            text += f"; {self.dropped:,} rows dropped that are gone from the corpus"
        if self.left_out:
            text += "; left out: " + ", ".join(f"{count:,} {reason}" for reason, count in self.left_out.items())
        return f"{text}; {self.items_per_second:,.1f} items/s"


def settings_of(corpus: Corpus, embedder: Embedder) -> dict[str, Any]:
    """Everything that a table depends on beside the content of its corpus, as JSON has it.

    What changes no embedding, such as batch size, workers, device or the folder of the model, is not here.
    """
    tokenizer, options = embedder.processor.tokenizer, corpus.options
    images = {
        f"image_processor.{name}": value
        for name, value in sorted(embedder.processor.image_processor.to_dict().items())
        if name not in NOT_SETTINGS and not name.startswith("_") and value is not None
    }
    settings = {
        "format_version": FORMAT_VERSION,
        "source": corpus.name,
        "split": corpus.split,
        "modalities": list(corpus.modalities),
        "image_column": options.image_column if "image" in corpus.modalities else None,
        "text_column": options.text_column if "text" in corpus.modalities else None,
        "model_fingerprint": embedder.fingerprint,
        "dimension": embedder.dimension,
        "dtype": embedder.precision,
        "reading": READING,
    }
    if "text" in corpus.modalities:
        settings["longest_text"] = embedder.longest_text
        settings["tokenizer"] = digest_of([tokenizer(text, verbose=False)["input_ids"] for text in PROBES])
    if "image" in corpus.modalities:
        settings |= images
    return json.loads(json.dumps(settings, default=str))


def first_difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """`name=old, now it is new` of the first setting that differs; `None` if all are the same."""
    for name in {**new, **old}:
        if old.get(name) != new.get(name):
            return f"{name}={quoted(old.get(name))}, now it is {quoted(new.get(name))}"
    return None


class TableJob:
    """The work on one output.

    Args:
        output: the table to be.
        corpus: what is embedded.
        embedder: with which model.
        part_rows: embeddings that are written together, and rows of a file where the output is a folder.
    """

    def __init__(self, output: Path, corpus: Corpus, embedder: Embedder, part_rows: int):
        self.output, self.corpus, self.part_rows = output, corpus, part_rows
        self.parts = parts_folder(output)
        self.settings = settings_of(corpus, embedder)
        self.info = TableInfo(embedder.name, embedder.fingerprint, embedder.dimension, corpus.name, self.settings)
        self.schema = table_schema(self.info, corpus.metadata)
        self.listed_schema = _without_embeddings(self.schema)
        origin = {METADATA_KEY: self.schema.metadata[METADATA_KEY]}
        self.store = Store(self.parts, embedder.dimension, origin, part_rows)
        self.earlier: list[Path] = []  # files of a table whose rows may be taken over

    # ------------------------------------------------------------------------------------------ what is there

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes away from the same output; the lock ends with the process."""
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self.parts.mkdir(exist_ok=True)
            lock = filelock.FileLock(self.parts / LOCK, timeout=0)
            lock.acquire()
        except filelock.Timeout:
            raise RetrievalError(
                f"another process is writing {shortened(self.output)}: wait for it, or choose another"
            ) from None
        except OSError as error:
            raise RetrievalError(f"{shortened(self.output)} can't be written: {error.strerror}") from None
        try:
            yield
        finally:
            for name in (LISTED, SCRATCH):
                (self.parts / name).unlink(missing_ok=True)
            if not any(self.parts.glob("part-*.parquet")) and not (self.parts / FINISHED).exists():
                shutil.rmtree(self.parts, ignore_errors=True)
            lock.release()

    def begin(self, overwrite: bool):
        """Takes what earlier runs have embedded.

        Raises:
            RetrievalError: at the output is something else, or a table that can't grow into this one.
        """
        self._complete_replacement()
        left = self._left()
        if left is not None and (difference := first_difference(left["settings"], self.settings)):
            if not overwrite:
                raise RetrievalError(
                    f"{self.parts} holds an unfinished job with {difference}: finish that one, choose another output, "
                    "or overwrite it (overwrite=True, --overwrite)"
                )
            left = None
        replaces = overwrite or (left is not None and left["overwrite"])  # whose replacement was interrupted
        if not replaces and self._is_there():
            self.earlier = self._files()
            self._check_growth()
        self._check_replaceable()
        if left is None:
            self._clear()
        for folder in self.parts.glob("daft-*"):  # of a killed run
            shutil.rmtree(folder, ignore_errors=True)
        with replacing(self.parts / JOB) as partial:
            partial.write_text(json.dumps({"settings": self.settings, "overwrite": replaces}, indent=1))
        self.store.read_table(self.earlier)
        self.store.read_parts()
        self.known = self.store.rows

    def _is_there(self) -> bool:
        return os.path.isfile(self.output) or (os.path.isdir(self.output) and any(self.output.iterdir()))

    def _files(self) -> list[Path]:
        return [self.output] if os.path.isfile(self.output) else sorted(self.output.glob("*.parquet"))

    def _check_growth(self):
        """Refuses to turn a table into that of another corpus, model or setting."""
        ways = "choose another output, or overwrite it (overwrite=True, --overwrite)"
        if not self.earlier:
            self._check_replaceable()
            raise RetrievalError(f"{self.output} is there already, and is no table: {ways}")
        for file in self.earlier:
            info, schema = read_info(file)
            if not info.settings or "content_digest" not in schema.names:
                made = "an earlier mome" if info.model else "other software"
                raise RetrievalError(
                    f"{file} was written by {made}, without what a table needs to grow: it can be searched as it is, "
                    f"else {ways}"
                )
            if difference := first_difference(info.settings, self.settings):
                raise RetrievalError(f"{self.output} is there already, made with {difference}: {ways}")

    def _left(self) -> dict | None:
        """The settings of the job that left parts here."""
        file = self.parts / JOB
        if not file.exists():
            return None
        left = json.loads(file.read_text())
        return left if "settings" in left else {"settings": left, "overwrite": False}

    def _check_replaceable(self):
        """Refuses to replace a folder that holds anything but a table."""
        own = (unreadable_file(self.output).name, JOB, LOCK)
        for file in self.output.iterdir() if os.path.isdir(self.output) else ():
            if not file.match("part-*.parquet") and file.name not in own:
                raise RetrievalError(
                    f"{self.output} holds {quoted(file.name)}, which is not part of a table: choose another output"
                )

    def _clear(self):
        for path in self.parts.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()

    # --------------------------------------------------------------------------------------- rows and the end

    @contextmanager
    def listing(self) -> Iterator[Callable[[list[Item]], None]]:
        """A function that lists items, in the order of the table; their embeddings may follow later."""
        path = self.parts / LISTED
        with path.open("wb") as sink, pa.ipc.new_stream(sink, self.listed_schema) as writer:

            def add(items: list[Item]):
                columns = columns_of(items, self.listed_schema)
                arrays = [pa.array(columns[each.name], each.type) for each in self.listed_schema]
                writer.write_table(pa.Table.from_arrays(arrays, schema=self.listed_schema))

            yield add

    def _listed(self) -> tuple[pa.Table, list[dict[str, str | None]]]:
        """The rows of the table without embeddings, and what is unreadable."""
        with pa.memory_map(str(self.parts / LISTED)) as source:
            rows = pa.ipc.open_stream(source).read_all()
        digests, errors = rows["content_digest"].to_pylist(), rows["error"].to_pylist()
        for row, digest in enumerate(digests):
            if errors[row] is None:
                errors[row] = self.store.error_of(digest)
        bad = pa.array([error is not None for error in errors], pa.bool_())
        lines = rows.filter(bad).select(["id", "modality", "uri"]).to_pylist()
        reasons = [error for error in errors if error is not None]
        unreadable = [{**line, "error": reason} for line, reason in zip(lines, reasons)]
        return rows.filter(pc.invert(bad)).drop_columns("error"), unreadable

    def finish(self, began: float) -> EmbeddingReport:
        """Writes the table, unless it is there and would not change, and says what was done.

        Raises:
            RetrievalError: an empty corpus, one that shares nothing with the table, or damaged embeddings.
        """
        rows, unreadable = self._listed()
        if not len(rows) and not unreadable:
            raise self.corpus.empty()
        if not len(rows):
            first = f"{shortened(unreadable[0]['id'])}: {unreadable[0]['error']}"
            raise RetrievalError(f"{self.corpus.title}: nothing can be read, for example {first}")
        places = np.array([self.store.place_of(digest) for digest in rows["content_digest"].to_pylist()])
        earlier = self._earlier_rows()
        if earlier is not None and not self.corpus.name and not self._shares_rows(rows, earlier):
            raise RetrievalError(
                f"the data set has no row in common with {self.output}: choose another output, or overwrite it "
                "(overwrite=True, --overwrite)"
            )
        dropped = 0 if earlier is None else _count_gone(earlier, rows, unreadable)
        if earlier is None or not self._is_same(earlier, rows):
            self._write(rows, places, unreadable)
        else:
            _write_unreadable(unreadable_file(self.output), unreadable)
        self._clear()
        images = pc.sum(pc.equal(rows["modality"], "image")).as_py()
        counts = {"images": images, "texts": len(rows) - images, "bad": len(unreadable), "dropped": dropped}
        resumed, seconds = int((places < self.known).sum()), time.monotonic() - began
        left_out = self.corpus.left_out
        return EmbeddingReport(self.output, len(rows), resumed=resumed, seconds=seconds, left_out=left_out, **counts)

    def _earlier_rows(self) -> pa.Table | None:
        if not self.earlier:
            return None
        return pa.concat_tables([_described(file) for file in self.earlier], promote_options="permissive")

    def _shares_rows(self, rows: pa.Table, earlier: pa.Table) -> bool:
        return pc.any(pc.is_in(rows["content_digest"], value_set=earlier["content_digest"].combine_chunks())).as_py()

    def _is_same(self, earlier: pa.Table, rows: pa.Table) -> bool:
        """Whether the table is there as it would be written; stamps of files don't count."""
        if any(dataclasses.asdict(read_info(file)[0]) != dataclasses.asdict(self.info) for file in self.earlier):
            return False
        names = [name for name in rows.column_names if name != "file_stamp"]
        if [name for name in earlier.column_names if name != "file_stamp"] != names:
            return False
        return earlier.select(names).equals(rows.select(names))

    def _tables(self, rows: pa.Table, places: np.ndarray, size: int) -> Iterator[pa.Table]:
        """The rows with their embeddings, `size` at a time."""
        embeddings = self.store.embeddings(self.parts / SCRATCH)
        for start in range(0, len(rows), size):
            some = rows.slice(start, size)
            vectors = torch.from_numpy(embeddings[places[start : start + size]])
            wrong = ~((torch.linalg.vector_norm(vectors, dim=1) - 1).abs() <= NORM_TOLERANCE)  # NaN is wrong
            if wrong.any():
                id = some["id"][int(wrong.int().argmax())].as_py()
                raise RetrievalError(
                    f"the embedding of {quoted(id)} is not finite or not of length 1: the model is broken, or "
                    f"{self.output} or {self.parts} is damaged; embed anew (overwrite=True, --overwrite)"
                )
            yield to_table({name: some[name].combine_chunks() for name in some.column_names}, vectors, self.schema)

    def _write(self, rows: pa.Table, places: np.ndarray, unreadable: list[dict[str, str | None]]):
        """Replaces the table in one step."""
        if self.output.suffix == ".parquet" and not os.path.isdir(self.output):
            write_table(self.output, self._tables(rows, places, ROW_GROUP_ROWS), self.schema)
            _write_unreadable(unreadable_file(self.output), unreadable)
            return
        partial = self.parts / f"{FINISHED}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for number, table in enumerate(self._tables(rows, places, self.part_rows)):
            write_table(partial / f"part-{number:06d}.parquet", [table], self.schema)
        _write_unreadable(unreadable_file(partial), unreadable)
        os.replace(partial, self.parts / FINISHED)  # from here on it is the table, whatever happens
        self._complete_replacement()

    def _complete_replacement(self):
        """Moves a finished folder to its place; readers find it until then."""
        finished, replaced = self.parts / FINISHED, self.parts / REPLACED
        if finished.is_dir():
            if self.output.is_dir():
                shutil.rmtree(replaced, ignore_errors=True)
                os.replace(self.output, replaced)
            os.replace(finished, self.output)
        shutil.rmtree(replaced, ignore_errors=True)


def _without_embeddings(schema: pa.Schema) -> pa.Schema:
    fields = [schema.field(name) for name in schema.names if name != "embedding"]
    return pa.schema([*fields, pa.field("error", pa.string())])


def _described(file: Path) -> pa.Table:
    try:
        names = [name for name in pq.read_schema(file).names if name != "embedding"]
        return pq.read_table(file, columns=names)
    except (pa.ArrowException, OSError) as error:
        raise RetrievalError(f"{file} can't be read, it may be damaged: {first_line(error)}") from None


def _count_gone(earlier: pa.Table, rows: pa.Table, unreadable: list[dict[str, str | None]]) -> int:
    """Rows of the earlier table of which neither the id nor the content is left."""
    ids = pa.array([*rows["id"].to_pylist(), *(line["id"] for line in unreadable)], pa.string())
    left = pc.is_in(earlier["id"], value_set=ids)
    content = pc.is_in(earlier["content_digest"], value_set=rows["content_digest"].combine_chunks())
    return len(earlier) - pc.sum(pc.or_(left, content)).as_py()


def _write_unreadable(path: Path, lines: list[dict[str, str | None]]):
    if not lines:
        path.unlink(missing_ok=True)
        return
    text = "".join(json.dumps(line) + "\n" for line in lines)
    if not path.exists() or path.read_text(encoding="utf-8", errors="replace") != text:
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")


__all__ = ["EmbeddingReport", "TableJob", "first_difference", "settings_of"]
