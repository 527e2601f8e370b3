"""Embeds a corpus into a table, in one call that can be made again after any interruption."""

from collections.abc import Sequence
from pathlib import Path

from ..embedder import BATCH_SIZE, Embedder
from ..errors import RetrievalError
from .job import EmbeddingJob, EmbeddingReport
from .reading import Rows
from .sources import Source, open_source
from .table import FORMAT_VERSION, MODALITIES

PART_ROWS = 2048


def embed_corpus(
    source: str | Path | Rows,
    output: str | Path,
    model: str | Path | Embedder,
    *,
    split: str = "train",
    modalities: Sequence[str] | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    id_column: str | None = None,
    metadata_columns: Sequence[str] | None = None,
    streaming: bool = False,
    batch_size: int = BATCH_SIZE,
    part_rows: int = PART_ROWS,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> EmbeddingReport:
    """Embeds images, texts or both into a table (`mome.retrieval.table`).

    The same call again after an interruption, a crash or `kill -9` goes on behind the last part that is whole; after
    the end it does nothing. An image that can't be read becomes a row with a null embedding and the reason in `error`.

    Args:
        source, split, image_column, text_column, id_column, metadata_columns, streaming: see `open_source`.
        output: a `.parquet` file; any other name is a folder of parquet files.
        model: folder or Hub id, or an `Embedder`.
        modalities: `("image",)`, `("text",)` or both; default: images if there are any, else texts. With both, each
            text of a row gets a row of its own, `ID#0`, `ID#1` and so on.
        batch_size: rows that go through the model together.
        part_rows: rows of a part: so much is lost at most by a crash.
        workers: threads that decode and compute; default: one for each of torch's threads, at most 8.
        overwrite: replaces what is at `output`, once the new table is whole.
        progress: shows a bar with items/s.

    Raises:
        RetrievalError: a corpus, column, model or output that can't be used; another process at the same output.
    """
    output = Path(output)
    for name, value in (("batch_size", batch_size), ("part_rows", part_rows), ("workers", workers or 1)):
        if not isinstance(value, int) or value < 1:
            raise RetrievalError(f"{name}={value!r} must be an integer of at least 1")
    columns = {"image_column": image_column, "text_column": text_column, "id_column": id_column}
    corpus = open_source(source, split, **columns, metadata_columns=metadata_columns, streaming=streaming)
    modalities = checked_modalities(modalities, corpus)
    corpus.check_ids()
    embedder = model if isinstance(model, Embedder) else Embedder.load(model)
    part_rows = max(1, part_rows // batch_size) * batch_size
    settings = {
        "source": corpus.name,
        "source_digest": corpus.digest,
        "split": split,
        "columns": [corpus.image_column, corpus.text_column, corpus.id_column, *corpus.metadata],
        "modalities": modalities,
        "model_fingerprint": embedder.fingerprint,
        "batch_size": batch_size,
        "part_rows": part_rows,
        "format_version": FORMAT_VERSION,
    }
    job = EmbeddingJob(output, corpus, embedder, modalities, settings)
    with job.locked():
        return job.run(workers, overwrite, progress)


def checked_modalities(modalities: Sequence[str] | None, corpus: Source) -> tuple[str, ...]:
    """What is to be embedded, images before texts.

    Raises:
        RetrievalError: no such modality, or none of it in the corpus.
    """
    columns = {"image": corpus.image_column, "text": corpus.text_column}
    if modalities is None:
        modalities = [name for name in MODALITIES if columns[name]][:1]
        if not modalities:
            raise RetrievalError(f"{corpus.name or 'the data set'} has no images and no texts: set a column")
    wanted = [modalities] if isinstance(modalities, str) else list(modalities)
    for name in wanted:
        if name not in MODALITIES:
            raise RetrievalError(f"modality {name!r}: choose among {', '.join(MODALITIES)}")
        if columns[name] is None:
            raise RetrievalError(f"{corpus.name or 'the data set'} has no column of {name}s: set {name}_column")
    if not wanted:
        raise RetrievalError("modalities is empty: choose 'image', 'text' or both")
    return tuple(name for name in MODALITIES if name in wanted)


__all__ = ["EmbeddingReport", "checked_modalities", "embed_corpus"]
