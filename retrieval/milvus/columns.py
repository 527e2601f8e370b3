"""A table in terms of Milvus: its columns as fields, its rows as entities, filters as expressions.

    column of the table                   field
    the row's number                      row, INT64, the primary key
    string                                VARCHAR, at most 65,535 bytes: longer texts are cut
    integer, date, time                   INT64 (dates and times as Arrow counts them)
    float                                 DOUBLE
    boolean                               BOOL
    embedding                             FLOAT_VECTOR
    anything else                         none: Milvus can't filter by it

A field has the name of its column where Milvus allows that name.
"""

import re
from typing import Any

import pyarrow as pa
import pyarrow.types as kinds
import torch
from pymilvus import CollectionSchema, DataType, MilvusClient

from ...configuration_mome import quoted, shortened
from ...errors import RetrievalError
from ..filters import Condition, matching_rows
from ..table import EmbeddingTable

PRIMARY_KEY = "row"
VECTOR = "embedding"
MAX_BYTES = 65_535  # of a VARCHAR
RESERVED_WORDS = frozenset("and or not in like is null exists true false iso interval meta".split()) | {PRIMARY_KEY}
ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"})


def fields_of(table: EmbeddingTable) -> dict[str, tuple[str, DataType]]:
    """Column → name and type of its field; columns without a field are left out."""
    fields = {}
    for number, name in enumerate(table.rows.column_names):
        kind = None if name == "file_stamp" else _field_type(table.column(name).type)
        if kind is not None:
            plain = re.fullmatch(r"[A-Za-z_]\w{0,254}", name, re.ASCII) and name.lower() not in RESERVED_WORDS
            fields[name] = (name if plain else f"column_{number}", kind)
    return fields


def _field_type(kind: pa.DataType) -> DataType | None:
    if kinds.is_string(kind) or kinds.is_large_string(kind):
        return DataType.VARCHAR
    if kinds.is_boolean(kind):
        return DataType.BOOL
    if kinds.is_integer(kind) or kinds.is_temporal(kind) and not kinds.is_interval(kind):
        return DataType.INT64
    return DataType.DOUBLE if kinds.is_floating(kind) else None


def collection_schema(table: EmbeddingTable, description: str) -> CollectionSchema:
    """The schema of a collection that holds the table."""
    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False, description=description)
    schema.add_field(PRIMARY_KEY, DataType.INT64, is_primary=True)
    for field, kind in fields_of(table).values():
        length = {"max_length": MAX_BYTES} if kind == DataType.VARCHAR else {}
        schema.add_field(field, kind, nullable=True, **length)
    schema.add_field(VECTOR, DataType.FLOAT_VECTOR, dim=table.dimension)
    return schema


def entities(table: EmbeddingTable, rows: torch.Tensor, vectors: torch.Tensor) -> list[dict[str, Any]]:
    """Rows of a table as Milvus takes them.

    Args:
        table: the table.
        rows: (rows,) int64, their numbers, ascending and close together.
        vectors: (rows, dimension) float32, their embeddings.
    """
    first, last = int(rows[0]), int(rows[-1])
    taken = pa.array((rows - first).numpy())
    columns = {PRIMARY_KEY: rows.tolist()}
    for name, (field, kind) in fields_of(table).items():
        columns[field] = _values(table.column(name).slice(first, last - first + 1).take(taken), kind)
    columns[VECTOR] = list(vectors.numpy())
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def _values(column: pa.ChunkedArray | pa.Array, kind: DataType) -> list:
    if kind == DataType.VARCHAR:
        return [None if text is None else cut(text) for text in column.to_pylist()]
    if kind == DataType.BOOL:
        return column.to_pylist()
    if kind == DataType.DOUBLE:
        return column.cast(pa.float64()).to_pylist()
    if column.type.bit_width == 32:  # Arrow casts dates and times of 32 bits to int32 only
        column = column.cast(pa.int32()) if kinds.is_temporal(column.type) else column
    return column.cast(pa.int64()).to_pylist()


def cut(text: str) -> str:
    data = text.encode()
    return text if len(data) <= MAX_BYTES else data[:MAX_BYTES].decode(errors="ignore")


# ---------------------------------------------------------------------------------------------------- filters


def expression_for(conditions: tuple[Condition, ...], table: EmbeddingTable) -> str:
    """The conditions as a Milvus expression; empty if there are none.

    Raises:
        RetrievalError: a value that the column's type can't be compared with, or a column that has no field.
    """
    matching_rows(conditions, table.rows.data.slice(0, 0))  # refuses what exact search refuses
    fields = fields_of(table)
    parts = []
    for condition in conditions:
        if condition.column not in fields:
            kind = shortened(str(table.column(condition.column).type))
            raise RetrievalError(
                f"filter on {quoted(condition.column)}: Milvus has no type for {kind}; use index='exact'"
            )
        parts.append(_expression(condition, *fields[condition.column], table.column(condition.column).type))
    return " and ".join(parts)


def _expression(condition: Condition, field: str, kind: DataType, column: pa.DataType) -> str:
    if condition.value is None:
        return f"{field} is null" if condition.operator == "==" else f"{field} is not null"
    values = condition.value if condition.operator == "in" else (condition.value,)
    literals = [_literal(value) for value in _values(pa.array(values).cast(column), kind)]
    if condition.operator == "in":
        return f"{field} in [{', '.join(literals)}]"
    comparison = f"{field} {condition.operator} {literals[0]}"
    return f"({comparison} and {field} is not null)" if condition.operator == "!=" else comparison


def _literal(value: str | bool | int | float) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value.translate(ESCAPES)}"'
    return repr(value)


__all__ = ["PRIMARY_KEY", "VECTOR", "collection_schema", "cut", "entities", "expression_for", "fields_of"]
