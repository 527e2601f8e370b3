"""Embeds a corpus into a table, in one call that can be repeated: after an interruption, or when the corpus has grown.

    rows ── items ── identified ─┬─ known by their content ── embeddings that are there ─┐
                                 └─ missing ── embedded ── part-000000.parquet ...       ┴─ table, in one step

    table.parquet.parts/
        job.json               what the embeddings depend on
        part-000000.parquet    whole or not there: embeddings by content, in the order in which they were computed
    table.parquet              always whole: the earlier one until the new one is on the disk
    table.unreadable.jsonl     what could not be read, and why

A run goes through the corpus from its beginning. What the table of an earlier run or the parts of a killed one have
embedded is not embedded again, whatever it is called now; so resuming and growing are the same thing.

Each batch is decoded and embedded by one thread, and several threads work at the same time: while one decodes, others
compute. On a CPU the threads share the cores, so that no core waits for another at the end of every matrix product.
"""

import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..configuration_mome import quoted
from ..embedder import BATCH_SIZE, Embedder
from ..errors import RetrievalError
from ..inputs_mome import is_count
from ..onnx_embedder import load_embedder
from ..texts_mome import warn_of_cut_texts
from .corpus import Corpus, CorpusOptions, CorpusRow, Rows, open_corpus, records_of
from .items import Item, embed_items, identify, items_of
from .job import EmbeddingReport, TableJob

PART_ROWS = 2048
MOST_WORKERS = 8
IDENTIFIED_AT_ONCE = 8  # rows whose files a thread reads in one go

# Items to embed → those items, some at a time, with their embeddings (items, dimension); errors are in the items.
Engine = Callable[[Iterator[Item]], Iterator[tuple[Sequence[Item], torch.Tensor]]]


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
    backend: str | None = None,
    **options: Any,
) -> EmbeddingReport:
    """Embeds images, texts or both into a table (`mome.retrieval.table`), or brings a table up to date.

    After an interruption, a crash or `kill -9`, the same call goes on. Where a table is complete, what is new or
    changed in the corpus is embedded, what is gone is dropped, and the rest is taken over by its content: a file that
    was renamed, moved or only touched is not embedded again. An image that can't be read is listed in a file beside
    the table (`unreadable_file`), and tried again next time.

    Args:
        source: see `open_source`.
        output: a `.parquet` file; any other name is a folder of parquet files.
        model: folder or Hub id of a checkpoint or of an export, or an `Embedder`.
        batch_size: images or texts that go through the model together.
        part_rows: embeddings that are written together: a crash loses little more than this many.
        workers: threads that decode and compute; default: one for each of torch's threads, at most 8.
        overwrite: embed everything anew, and replace what is at `output` once the new table is complete.
        progress: show a bar.
        backend: what runs the model: see `load_embedder`.
        options: how the corpus is read and what of it is embedded: the fields of `CorpusOptions`.

    Raises:
        RetrievalError: a corpus, column, option or output that can't be used; a table at `output` of another corpus,
            model or setting that changes embeddings, which is named; another process at the same output.
        MomeError: a model that can't be loaded.
    """
    for name, value in (("batch_size", batch_size), ("part_rows", part_rows), ("workers", workers or 1)):
        if not is_count(value):
            raise RetrievalError(f"{name}={quoted(value)} must be an integer of at least 1")
    (corpus_options,) = records_of(options, "embed_corpus", CorpusOptions)
    corpus = open_corpus(source, corpus_options)
    corpus.check()
    embedder = model if isinstance(model, Embedder) else load_embedder(model, backend)
    job, cut = TableJob(Path(output), corpus, embedder, part_rows), []
    with job.locked(), _threads_shared(workers, embedder.device) as workers:
        with ThreadPoolExecutor(workers, thread_name_prefix="embed") as pool:

            def embed(items: Iterator[Item]) -> Iterator[tuple[Sequence[Item], torch.Tensor]]:
                def one(some: list[Item]) -> tuple[Sequence[Item], torch.Tensor]:
                    return some, embed_items(some, embedder, cut.append)

                yield from _several_at_once(one, _lists_of(items, batch_size), pool, workers)

            report = run_job(job, embed, pool, workers, overwrite, progress)
    warn_of_cut_texts(sum(cut), embedder.longest_text)
    return report


def run_job(
    job: TableJob, embed: Engine, pool: ThreadPoolExecutor, workers: int, overwrite: bool, progress: bool
) -> EmbeddingReport:
    """Goes through the corpus, has what is missing embedded, and writes the table; `job` is locked."""
    began = time.monotonic()
    job.begin(overwrite)
    try:
        with tqdm(total=job.corpus.count, unit=" rows", disable=not progress) as bar, job.listing() as listed:

            def missing() -> Iterator[Item]:
                bad = 0
                for rows, items in _identified(_unique(job.corpus), job, pool, workers):
                    listed(items)
                    bar.update(rows)
                    bad += sum(item.error is not None for item in items)
                    if bad:
                        bar.set_postfix(unreadable=bad, refresh=False)
                    yield from (item for item in items if item.error is None and job.store.lacks(item.digest))

            for items, embeddings in embed(missing()):
                job.store.add(items, embeddings)
        job.store.flush()
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        with suppress(Exception):  # or what is computed would be lost
            job.store.flush()
        raise
    return job.finish(began)


def _identified(
    rows: Iterator[CorpusRow], job: TableJob, pool: ThreadPoolExecutor, workers: int
) -> Iterator[tuple[int, list[Item]]]:
    """Rows → how many they were, and their items with digests, in order."""

    def one(some: list[CorpusRow]) -> tuple[int, list[Item]]:
        items = [item for row in some for item in items_of(row, job.corpus)]
        for item in items:
            identify(item, job.store.digest_of_file)
        return len(some), items

    return _several_at_once(one, _lists_of(rows, IDENTIFIED_AT_ONCE), pool, workers)


def _lists_of(values: Iterator[Any], size: int) -> Iterator[list]:
    while some := list(itertools.islice(values, size)):
        yield some


def _several_at_once(
    function: Callable[[Any], Any], arguments: Iterator[Any], pool: ThreadPoolExecutor, workers: int
) -> Iterator[Any]:
    """`map` in the threads of `pool`, in order; only so many arguments are taken beforehand as keep them busy."""
    waiting: deque = deque()
    for each in arguments:
        waiting.append(pool.submit(function, each))
        while len(waiting) > 2 * workers:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _unique(corpus: Corpus) -> Iterator[CorpusRow]:
    """The rows; the ids of a stream can't be compared beforehand."""
    seen = set() if corpus.count is None else None
    for row in corpus.rows():
        if seen is not None:
            if row.id in seen:
                raise RetrievalError(f"{corpus.title}: id {quoted(row.id)} occurs twice; set id_column")
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


__all__ = ["Engine", "EmbeddingReport", "embed_corpus", "run_job"]
