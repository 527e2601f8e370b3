"""Which table of which model a collection holds: a manifest, kept with the collection."""

import hashlib
import json
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ...configuration_mome import quoted
from ...errors import RetrievalError
from ..table import EmbeddingTable

FORMAT_VERSION = 1
EMBEDDINGS_HASHED = 4096


def make_manifest(table: EmbeddingTable, index_type: str) -> str:
    """The manifest of a table's collection, as JSON."""
    info = table.info
    content = {
        "format_version": FORMAT_VERSION,
        "model": info.model,
        "source": info.source,
        "fingerprint": info.fingerprint,
        "dimension": info.dimension,
        "rows": len(table),
        "digest": table_digest(table),
        "index_type": index_type,
    }
    return json.dumps(content, sort_keys=True)


def is_manifest(text: str | None) -> bool:
    """Whether `text` is a manifest."""
    try:
        content = json.loads(text or "")
        return {"model", "fingerprint", "dimension", "rows", "digest"} <= set(content)
    except (ValueError, TypeError):
        return False


def check_manifest(stored: str, own: str, where: str, fix: str) -> bool:
    """Whether a collection holds the table; `False` if it holds an earlier state of it, of the same corpus and model.

    Args:
        stored: the manifest of the collection.
        own: the manifest of the table.
        where, fix: what error messages call the collection, and what they suggest.

    Raises:
        RetrievalError: it holds another table, or another index of it.
    """
    theirs, ours = json.loads(stored), json.loads(own)
    if theirs["digest"] != ours["digest"]:
        by = f"{theirs['model']}, weights {theirs['fingerprint']}, {theirs['dimension']} dimensions"
        if any(theirs[key] != ours[key] for key in ("fingerprint", "dimension")):
            raise RetrievalError(f"{where} holds embeddings of another model ({by}): {fix}")
        if ours["source"] and theirs.get("source") == ours["source"]:
            return False
        raise RetrievalError(f"{where} holds another table ({theirs['rows']} rows by {theirs['model']}): {fix}")
    for key in ("format_version", "index_type"):
        if theirs[key] != ours[key]:
            raise RetrievalError(f"{where} has {key}={quoted(theirs[key])}, not {quoted(ours[key])}: {fix}")
    return True


def table_digest(table: EmbeddingTable) -> str:
    """16 hexadecimal digits of a table's contents, however its rows are divided among files.

    Of the embeddings it takes the sum of all bits and `EMBEDDINGS_HASHED` rows; of the other columns, everything but
    the stamps of files.
    """
    digest = hashlib.sha256(f"{len(table)} {table.dimension}".encode())
    for name in table.rows.column_names:
        if name not in ("embedding", "file_stamp"):
            digest.update(f"{name} {table.column(name).type}".encode())
            for part in _column_bytes(table.column(name)):
                digest.update(part)
    total = torch.zeros((), dtype=torch.int64)
    for start, block in table.blocks:
        total += block[table.valid[start : start + len(block)]].view(torch.int32).sum(dtype=torch.int64)
    some = np.linspace(0, len(table) - 1, min(len(table), EMBEDDINGS_HASHED)).astype(int)
    rows = [row for row in some.tolist() if table.valid[row]]
    digest.update(total.numpy().tobytes())
    if rows:
        digest.update(table.embeddings(rows).numpy().tobytes())
    return digest.hexdigest()[:16]


def _column_bytes(column: pa.ChunkedArray, rows: int = 65_536) -> Iterator[bytes]:
    """A column as bytes that depend on its values only."""
    for start in range(0, len(column), rows):
        array = column.slice(start, rows).combine_chunks()
        yield array.is_null().to_numpy(zero_copy_only=False).tobytes()
        if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
            texts = pc.fill_null(array.cast(pa.large_string()), "")
            yield pc.binary_length(texts).to_numpy().tobytes()
            yield "".join(texts.to_pylist()).encode()
        else:
            yield repr(array.to_pylist()).encode()


__all__ = ["check_manifest", "is_manifest", "make_manifest", "table_digest"]
