"""One job: what of its output is there, the work that is left, and the end.

    table.parquet.parts/
        job.json               corpus, model and settings
        part-000000.parquet    whole or not there: the first `part_rows` rows of the corpus, and so on
    table.parquet              all parts, once the last one is there

A chunk of rows goes through decoding, model and table in one thread, and several threads are at it at the same time:
while one decodes, the others compute. On a CPU each thread has its share of the cores for itself, so that no core
waits for another at the end of every matrix product.
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
from dataclasses import dataclass
from pathlib import Path

import filelock
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm

from ..embedder import Embedder
from ..errors import RetrievalError
from ..processing_mome import warn_of_cut_texts
from .reading import digest_of
from .rows import embed_rows
from .sources import Source, SourceRow
from .table import TableInfo, read_info, replacing, table_schema, write_table

MOST_WORKERS = 8
LOCK, JOB = ".lock", "job.json"


@dataclass(frozen=True)
class EmbeddingReport:
    """What a job did.

    Attributes:
        output: the table.
        rows: of the table. images, texts: how many of each have an embedding. bad: how many rows have none.
        resumed: rows that were there before this run.
        seconds: of this run.
    """

    output: Path
    rows: int
    images: int
    texts: int
    bad: int
    resumed: int
    seconds: float

    @property
    def items_per_second(self) -> float:
        return (self.rows - self.resumed) / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        counts = [f"{self.images:,} images"] * bool(self.images) + [f"{self.texts:,} texts"] * bool(self.texts)
        text = f"{self.output}: {' and '.join(counts) or 'nothing'} embedded, {self.bad:,} could not be read"
        if self.resumed:
            text += f"; {self.resumed:,} rows were there already"
        return f"{text}; {self.items_per_second:,.1f} items/s"


class EmbeddingJob:
    """One output, from what is there to all of it."""

    def __init__(self, output: Path, corpus: Source, embedder: Embedder, modalities: tuple[str, ...], settings: dict):
        self.output, self.corpus, self.embedder, self.modalities = output, corpus, embedder, modalities
        self.settings = json.loads(json.dumps(settings))
        self.parts = output.with_name(output.name + ".parts")
        info = TableInfo(embedder.name, embedder.fingerprint, embedder.dimension, corpus.name, digest_of(settings))
        self.schema = table_schema(info, corpus.metadata)
        self.info = info
        self.cut: list[int] = []  # of each chunk, how many texts were too long

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from the same output; the lock goes with the process."""
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
            return report_of(self._files(), self.output, began, None)
        self._check_job(overwrite)
        part_rows = self.settings["part_rows"]
        done, resumed = self._parts_done()
        seen = self._ids() if self.corpus.count is None else None
        rows = self.corpus.rows(done * part_rows)
        count = self.corpus.count
        before = min(done * part_rows, count or done * part_rows)
        bar = tqdm(total=count, initial=before, unit=" rows", disable=not progress)
        with bar:
            for tables in self._in_parts(self._chunks(_unique(rows, seen, self.corpus), workers), bar):
                write_table(self._part(done), tables, self.schema)
                done += 1
        warn_of_cut_texts(sum(self.cut), self.embedder.longest_text)
        if not done:
            raise RetrievalError(f"{self.corpus.name or 'the data set'} has no rows in split {self.corpus.split!r}")
        self._finish(done)
        return report_of(self._files(), self.output, began, resumed)

    # ------------------------------------------------------------------------------------------ what is there

    def _is_finished(self) -> bool:
        """Whether the table is there, made by this very job.

        Raises:
            RetrievalError: the table is there, made by another job.
        """
        if not self.output.exists() or self._left() == self.settings:  # overwriting it was interrupted
            return False
        if self.output.is_dir() and not any(self.output.iterdir()):
            return False
        files = self._files()
        if files and read_info(files[0])[0].job == self.info.job:
            return True
        raise RetrievalError(
            f"{self.output} is there already, made of another corpus, model or settings: "
            "choose another output, or overwrite it (overwrite=True, --overwrite)"
        )

    def _left(self) -> dict | None:
        """The settings of the job that left parts here."""
        file = self.parts / JOB
        return json.loads(file.read_text()) if file.exists() else None

    def _check_job(self, overwrite: bool):
        """Writes down what this job is; what another one left is deleted or refused.

        Raises:
            RetrievalError: parts of a job with other settings are there.
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
        """How many parts are whole, from the first on, and their rows; what comes after them is deleted."""
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
        """Ids of source rows that are in the parts; those of texts begin with that of their row."""
        columns = [pq.read_table(file, columns=["id"])["id"] for file in sorted(self.parts.glob("part-*.parquet"))]
        return {id for column in columns for id in column.to_pylist()}

    # --------------------------------------------------------------------------------------------------- work

    def _chunks(self, rows: Iterable[SourceRow], workers: int | None) -> Iterator[pa.Table]:
        """Rows → tables of `batch_size` rows each, in order; a few are in work at the same time."""
        several = self.corpus.several_texts or len(self.modalities) > 1
        rows = iter(rows)

        def embed(chunk: list[SourceRow]) -> tuple[int, pa.Table]:
            return len(chunk), embed_rows(chunk, self.embedder, self.schema, self.modalities, several, self.cut.append)

        with _threads_shared(workers, self.embedder.device) as workers:
            pool = ThreadPoolExecutor(workers, thread_name_prefix="embed")
            waiting: deque = deque()
            try:
                while chunk := list(itertools.islice(rows, self.settings["batch_size"])):
                    waiting.append(pool.submit(embed, chunk))
                    while len(waiting) > 2 * workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _in_parts(self, chunks: Iterator[tuple[int, pa.Table]], bar: tqdm) -> Iterator[list[pa.Table]]:
        """The tables of one part after the other."""
        part, rows, bad = [], 0, 0
        for count, table in chunks:
            part.append(table)
            rows += count
            bad += len(table) - table["error"].null_count
            bar.update(count)
            if bad:
                bar.set_postfix(unreadable=bad, refresh=False)
            if rows >= self.settings["part_rows"]:
                yield part
                part, rows = [], 0
        if part:
            yield part

    # ------------------------------------------------------------------------------------------------ the end

    def _finish(self, count: int):
        """Makes the table of all parts, in one step."""
        if self.output.suffix == ".parquet" and not self.output.is_dir():
            write_table(self.output, (pq.read_table(self._part(number)) for number in range(count)), self.schema)
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
        """Refuses a folder at the place of the output that holds anything but a table."""
        for file in self.output.iterdir() if self.output.is_dir() else ():
            if not file.match("part-*.parquet") and file.name not in (JOB, LOCK):
                raise RetrievalError(f"{self.output} holds {file.name!r}, no part of a table: choose another output")


def report_of(files: list[Path], output: Path, began: float, resumed: int | None) -> EmbeddingReport:
    """Counts what is in a finished table; `resumed=None`: all of it was there before."""
    rows = images = bad = 0
    for file in files:
        table = pq.read_table(file, columns=["modality", "error"])
        good = table["error"].is_null()
        rows += len(table)
        bad += len(table) - pc.sum(good).as_py()
        images += pc.sum(pc.and_(good, pc.equal(table["modality"], "image"))).as_py()
    seconds = time.monotonic() - began
    return EmbeddingReport(
        output, rows, images, rows - bad - images, bad, rows if resumed is None else resumed, seconds
    )


def _unique(rows: Iterator[SourceRow], seen: set[str] | None, corpus: Source) -> Iterator[SourceRow]:
    """Rows of a stream, whose ids can't be compared beforehand."""
    for row in rows:
        if seen is not None:
            if row.id in seen or f"{row.id}#0" in seen:
                raise RetrievalError(f"{corpus.name or 'the data set'}: id {row.id!r} is there twice; set id_column")
            seen.add(row.id)
        yield row


@contextmanager
def _threads_shared(workers: int | None, device: torch.device) -> Iterator[int]:
    """The number of threads that embed; on a CPU they share torch's threads among them for as long as this lasts."""
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


__all__ = ["EmbeddingJob", "EmbeddingReport", "report_of"]
