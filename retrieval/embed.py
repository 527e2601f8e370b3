"""Embeds a corpus into a table, in one call that can be repeated after any interruption.

    table.parquet.parts/
        job.json               corpus, model and settings
        part-000000.parquet    whole or not there: the first `part_rows` rows of the corpus, and so on
    table.parquet              all parts, once the last one is there

Each chunk of rows is decoded, embedded and put into a table by one thread, and several threads work at the same time:
while one decodes, others compute. On a CPU the threads share the cores, so that no core waits for another at the end
of every matrix product.
"""

import itertools
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm

from ..embedder import BATCH_SIZE, Embedder
from ..errors import RetrievalError
from ..texts_mome import warn_of_cut_texts
from .corpus import Corpus, CorpusOptions, CorpusRow, Rows, digest_of, open_corpus, records_of
from .items import embed_rows
from .table import FORMAT_VERSION, TableInfo, read_info, read_tables, replacing, table_schema, write_table

PART_ROWS = 2048
MOST_WORKERS = 8
LOCK, JOB = ".lock", "job.json"


def embed_corpus(
    source: str | Path | Rows,
    output: str | Path,
    model: str | Path | Embedder,
    *,
    batch_size: int = BATCH_SIZE,
    part_rows: int = PART_ROWS,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
    **options: Any,
) -> "EmbeddingReport":
    """Embeds images, texts or both into a table (`mome.retrieval.table`).

    After an interruption, a crash or `kill -9`, the same call resumes after the last complete part; once the table is
    complete, it does nothing. An image that can't be read becomes a row with a null embedding and the reason in
    `error`.

    Args:
        source: see `open_source`.
        output: a `.parquet` file; any other name is a folder of parquet files.
        model: folder or Hub id, or an `Embedder`.
        batch_size: rows that go through the model together.
        part_rows: rows of a part: a crash loses at most this many.
        workers: threads that decode and compute; default: one for each of torch's threads, at most 8.
        overwrite: replace what is at `output`, once the new table is complete.
        progress: show a bar with items/s.
        options: how the corpus is read and what of it is embedded: the fields of `CorpusOptions`.

    Raises:
        RetrievalError: a corpus, column, option or output that can't be used; another process at the same output.
        MomeError: a model that can't be loaded.
    """
    for name, value in (("batch_size", batch_size), ("part_rows", part_rows), ("workers", workers or 1)):
        if not isinstance(value, int) or value < 1:
            raise RetrievalError(f"{name}={value!r} must be an integer of at least 1")
    (corpus_options,) = records_of(options, "embed_corpus", CorpusOptions)
    corpus = open_corpus(source, corpus_options)
    corpus.check()
    embedder = model if isinstance(model, Embedder) else Embedder.load(model)
    job = EmbeddingJob(Path(output), corpus, embedder, batch_size, max(1, part_rows // batch_size) * batch_size)
    with job.locked():
        return job.run(workers, overwrite, progress)


@dataclass(frozen=True)
class EmbeddingReport:
    """What a job did.

    Attributes:
        output: the table.
        rows: of the table. images, texts: how many of each have an embedding. bad: how many rows have none.
        resumed: rows that were there before this run.
        seconds: that this run took.
        left_out: reason → number of files and links in a folder that are not rows.
    """

    output: Path
    rows: int
    images: int
    texts: int
    bad: int
    resumed: int
    seconds: float
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def items_per_second(self) -> float:
        return (self.rows - self.resumed) / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        counts = [f"{self.images:,} images"] * bool(self.images) + [f"{self.texts:,} texts"] * bool(self.texts)
        text = f"{self.output}: {' and '.join(counts) or 'nothing'} embedded, {self.bad:,} could not be read"
        if self.resumed:
            text += f"; {self.resumed:,} rows were there already"
        if self.left_out:
            text += "; left out: " + ", ".join(f"{count:,} {reason}" for reason, count in self.left_out.items())
        return f"{text}; {self.items_per_second:,.1f} items/s"


class EmbeddingJob:
    """The work on one output: what of it is there, what is missing, and the end.

    Args:
        output: the table to be.
        corpus: what is embedded.
        embedder: with which model.
        batch_size: rows of a chunk.
        part_rows: rows of a part, a multiple of `batch_size`.
    """

    def __init__(self, output: Path, corpus: Corpus, embedder: Embedder, batch_size: int, part_rows: int):
        self.output, self.corpus, self.embedder = output, corpus, embedder
        self.batch_size, self.part_rows = batch_size, part_rows
        self.parts = output.with_name(output.name + ".parts")
        self.settings = self._settings()
        job = digest_of(self.settings)
        self.info = TableInfo(embedder.name, embedder.fingerprint, embedder.dimension, corpus.name, job)
        self.schema = table_schema(self.info, corpus.metadata)
        self.cut: list[int] = []  # of each chunk, how many texts were too long

    def _settings(self) -> dict[str, Any]:
        """Everything that a job must share with an interrupted one to resume it, as JSON has it."""
        corpus, options = self.corpus, self.corpus.options
        return {
            "source": corpus.name,
            "source_digest": corpus.digest,
            "split": options.split,
            "columns": [options.image_column, options.text_column, options.id_column, *corpus.metadata],
            "modalities": list(corpus.modalities),
            "model_fingerprint": self.embedder.fingerprint,
            "batch_size": self.batch_size,
            "part_rows": self.part_rows,
            "format_version": FORMAT_VERSION,
        }

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes away from the same output; the lock ends with the process."""
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self.parts.mkdir(exist_ok=True)
            lock = filelock.FileLock(self.parts / LOCK, timeout=0)
            lock.acquire()
        except filelock.Timeout:
            raise RetrievalError(f"another process is writing {self.output}: wait for it, or choose another") from None
        except OSError as error:
            raise RetrievalError(f"{self.output} can't be written: {error.strerror}") from None
        try:
            yield
        finally:
            if not any(self.parts.glob("part-*.parquet")):
                shutil.rmtree(self.parts, ignore_errors=True)
            lock.release()

    def run(self, workers: int | None, overwrite: bool, progress: bool) -> EmbeddingReport:
        began = time.monotonic()
        if not overwrite and self._is_finished():
            self._clear()
            return report_of(self._files(), self.output, self.corpus, began, None)
        self._check_job(overwrite)
        done, resumed = self._parts_done()
        count, start = self.corpus.count, done * self.part_rows
        seen = self._ids() if count is None else None
        rows = self.corpus.rows(start)
        with tqdm(total=count, initial=min(start, count or start), unit=" rows", disable=not progress) as bar:
            for tables in self._in_parts(self._chunks(_unique(rows, seen, self.corpus), workers), bar):
                write_table(self._part(done), tables, self.schema)
                done += 1
        warn_of_cut_texts(sum(self.cut), self.embedder.longest_text)
        if not done:
            raise self.corpus.empty()
        self._finish(done)
        return report_of(self._files(), self.output, self.corpus, began, resumed)

    # ------------------------------------------------------------------------------------------ what is there

    def _is_finished(self) -> bool:
        """Whether the table is there, made by this same job.

        Raises:
            RetrievalError: the table is there, made by another job.
        """
        if not self.output.exists() or self._left() == self.settings:  # its replacement was interrupted
            return False
        if self.output.is_dir() and not any(self.output.iterdir()):
            return False
        files = self._files()
        if files and read_info(files[0])[0].job == self.info.job:
            return True
        raise RetrievalError(
            f"{self.output} is there already, made from another corpus, model or settings: "
            "choose another output, or overwrite it (overwrite=True, --overwrite)"
        )

    def _left(self) -> dict | None:
        """The settings of the job that left parts here."""
        file = self.parts / JOB
        return json.loads(file.read_text()) if file.exists() else None

    def _check_job(self, overwrite: bool):
        """Writes the settings of this job; parts that another job left are deleted or refused.

        Raises:
            RetrievalError: there are parts of a job with other settings, and `overwrite` is false.
        """
        left = self._left()
        if left == self.settings:
            return
        if left is not None and not overwrite:
            name = next(name for name in {**self.settings, **left} if left.get(name) != self.settings.get(name))
            raise RetrievalError(
                f"{self.parts} holds an unfinished job with {name}={left.get(name)!r}, now it is "
                f"{self.settings.get(name)!r}: finish that one, choose another output, or overwrite it "
                "(overwrite=True, --overwrite)"
            )
        self._check_replaceable()
        self._clear()
        with replacing(self.parts / JOB) as partial:
            partial.write_text(json.dumps(self.settings, indent=1))

    def _files(self) -> list[Path]:
        return [self.output] if self.output.is_file() else sorted(self.output.glob("*.parquet"))

    def _part(self, number: int) -> Path:
        return self.parts / f"part-{number:06d}.parquet"

    def _parts_done(self) -> tuple[int, int]:
        """The number of complete parts, from the first on, and of their rows; anything after them is deleted."""
        done, rows = 0, 0
        while self._part(done).exists():
            try:
                rows += pq.read_metadata(self._part(done)).num_rows
            except (pa.ArrowException, OSError):
                break
            done += 1
        for file in self.parts.glob("part-*"):
            if file.name > self._part(done - 1).name:
                file.unlink()
        return done, rows

    def _ids(self) -> set[str]:
        """Ids of the rows in all parts; the id of a text begins with that of its corpus row."""
        columns = [pq.read_table(file, columns=["id"])["id"] for file in sorted(self.parts.glob("part-*.parquet"))]
        return {id for column in columns for id in column.to_pylist()}

    # --------------------------------------------------------------------------------------------------- work

    def _chunks(self, rows: Iterable[CorpusRow], workers: int | None) -> Iterator[tuple[int, pa.Table]]:
        """Rows → numbers of corpus rows, `batch_size` at a time, with their tables, in order; several at once."""
        rows = iter(rows)

        def embed(chunk: list[CorpusRow]) -> tuple[int, pa.Table]:
            return len(chunk), embed_rows(chunk, self.corpus, self.embedder, self.schema, self.cut.append)

        with _threads_shared(workers, self.embedder.device) as workers:
            pool = ThreadPoolExecutor(workers, thread_name_prefix="embed")
            waiting: deque = deque()
            try:
                while chunk := list(itertools.islice(rows, self.batch_size)):
                    waiting.append(pool.submit(embed, chunk))
                    while len(waiting) > 2 * workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _in_parts(self, chunks: Iterator[tuple[int, pa.Table]], bar: tqdm) -> Iterator[list[pa.Table]]:
        """The tables of each part, one part after the other."""
        part, rows, bad = [], 0, 0
        for count, table in chunks:
            part.append(table)
            rows += count
            bad += len(table) - table["error"].null_count
            bar.update(count)
            if bad:
                bar.set_postfix(unreadable=bad, refresh=False)
            if rows >= self.part_rows:
                yield part
                part, rows = [], 0
        if part:
            yield part

    # ------------------------------------------------------------------------------------------------ the end

    def _finish(self, count: int):
        """Turns all parts into the table, in one step."""
        if self.output.suffix == ".parquet" and not self.output.is_dir():
            parts = map(self._part, range(count))
            write_table(self.output, (table for part in parts for table in read_tables(part)), self.schema)
            self._clear()
        else:
            if self.output.is_dir():
                shutil.rmtree(self.output)
            os.replace(self.parts, self.output)
            for name in (JOB, LOCK):
                (self.output / name).unlink(missing_ok=True)

    def _leftovers(self) -> list[Path]:
        return [file for file in self.parts.glob("*") if file.name != LOCK]

    def _clear(self):
        for file in self._leftovers():
            file.unlink()

    def _check_replaceable(self):
        """Refuses to replace a folder that holds anything but a table."""
        for file in self.output.iterdir() if self.output.is_dir() else ():
            if not file.match("part-*.parquet") and file.name not in (JOB, LOCK):
                raise RetrievalError(
                    f"{self.output} holds {file.name!r}, which is not part of a table: choose another output"
                )


def report_of(files: list[Path], output: Path, corpus: Corpus, began: float, resumed: int | None) -> EmbeddingReport:
    """Counts the rows of a finished table; `resumed=None`: all of them were there before."""
    rows = images = bad = 0
    for file in files:
        table = pq.read_table(file, columns=["modality", "error"])
        good = table["error"].is_null()
        rows += len(table)
        bad += len(table) - pc.sum(good).as_py()
        images += pc.sum(pc.and_(good, pc.equal(table["modality"], "image"))).as_py()
    seconds = time.monotonic() - began
    resumed = rows if resumed is None else resumed
    return EmbeddingReport(output, rows, images, rows - bad - images, bad, resumed, seconds, corpus.left_out)


def _unique(rows: Iterator[CorpusRow], seen: set[str] | None, corpus: Corpus) -> Iterator[CorpusRow]:
    """The rows; those of a stream, whose ids can't be compared beforehand, are compared with the ids `seen`."""
    for row in rows:
        if seen is not None:
            if row.id in seen or f"{row.id}#0" in seen:
                raise RetrievalError(f"{corpus.title}: id {row.id!r} occurs twice; set id_column")
            seen.add(row.id)
        yield row


@contextmanager
def _threads_shared(workers: int | None, device: torch.device) -> Iterator[int]:
    """The number of threads that embed; on a CPU they share torch's threads for as long as the context lasts."""
    threads = torch.get_num_threads()
    if device.type != "cpu":
        yield workers or min(MOST_WORKERS, os.cpu_count() or 1)
        return
    workers = workers or min(MOST_WORKERS, threads)
    torch.set_num_threads(max(1, threads // workers))
    try:
        yield workers
    finally:
        torch.set_num_threads(threads)


__all__ = ["EmbeddingJob", "EmbeddingReport", "embed_corpus", "report_of"]
