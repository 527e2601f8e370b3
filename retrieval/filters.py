"""Filters on the columns of a table, the same for every index.

    where={"modality": "image", "license": ["MIT", "CC0-1.0"], "width": {">=": 64, "<": 512}, "style": None}

A plain value must be equal, a list holds the allowed values, a dict compares, and `None` asks for a missing value. All
conditions must hold. A comparison with a missing value is false.
"""

import operator
import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..configuration_mome import quoted, shortened
from ..errors import RetrievalError, first_line, unknown_name
from .metadata import is_number

COMPARISONS = {
    "==": pc.equal,
    "!=": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}
ORDERINGS = ("<", "<=", ">", ">=")
OPERATORS = (*COMPARISONS, "in")
Where = Mapping[str, Any]


@dataclass(frozen=True)
class Condition:
    """`column operator value`; the operator is one of `OPERATORS`; `== None` and `!= None` ask for missing values."""

    column: str
    operator: str
    value: Any


def parse_where(where: Where | None, columns: list[str]) -> tuple[Condition, ...]:
    """A filter as conditions, all of which must hold; hashable.

    Args:
        where: see the top of this module.
        columns: those that may be filtered by.

    Raises:
        RetrievalError: no such column or operator, a value that can't be compared.
    """
    if where is None:
        return ()
    if not isinstance(where, Mapping):
        raise RetrievalError(
            f"where={quoted(where)} is of type {type(where).__name__}: pass a dict from columns to values"
        )
    conditions = []
    for column, wanted in where.items():
        if column not in columns:
            raise unknown_name(column, columns, "the table, for a filter,")
        wanted = plain_values(wanted)
        pairs = wanted if isinstance(wanted, Mapping) else {_operator_for(wanted): wanted}
        for symbol, value in pairs.items():
            conditions.append(_condition(column, symbol, value))
    return tuple(conditions)


def plain_values(value: Any) -> Any:
    """Python's own values of NumPy, pandas, Arrow or torch; anything else as it is."""
    for name in ("to_pylist", "as_py", "tolist"):
        if hasattr(value, name):
            return getattr(value, name)()
    return value


def _operator_for(wanted: Any) -> str:
    return "in" if isinstance(wanted, (list, tuple, set, frozenset, range)) else "=="


def _condition(column: str, symbol: str, value: Any) -> Condition:
    if symbol not in OPERATORS:
        raise RetrievalError(
            f"filter on {quoted(column)}: operator {quoted(symbol)} is not one of {', '.join(OPERATORS)}"
        )
    value = plain_values(value)
    if symbol == "in":
        if not isinstance(value, (list, tuple, set, frozenset, range)) or not len(value):
            raise RetrievalError(f"filter on {quoted(column)}: {quoted(value)} is not a list of values")
        value = tuple(sorted(value, key=str)) if isinstance(value, (set, frozenset)) else tuple(value)
    for each in value if symbol == "in" else (value,):
        if not isinstance(each, Hashable) or isinstance(each, tuple) or (each is None and symbol not in ("==", "!=")):
            raise RetrievalError(f"filter on {quoted(column)}: {quoted(each)} can't be compared with {quoted(symbol)}")
    return Condition(column, symbol, value)


def parse_expressions(expressions: list[str], types: Mapping[str, pa.DataType]) -> dict[str, dict[str, Any]]:
    """Filters as typed on a command line, such as `license=MIT,CC0-1.0` or `width>=64` → `where`.

    Raises:
        RetrievalError: no operator, no such column, a value that isn't of the column's type.
    """
    where: dict[str, dict[str, Any]] = {}
    for expression in expressions:
        match = re.fullmatch(r"\s*([^=<>!]+?)\s*(==|=|!=|<=|>=|<|>)\s*(.*?)\s*", expression)
        if match is None:
            raise RetrievalError(
                f"filter {quoted(expression)}: write COLUMN=VALUE, COLUMN=VALUE,VALUE or COLUMN>=VALUE"
            )
        column, symbol, value = match.groups()
        if column not in types:
            raise unknown_name(column, types, "the table, for a filter,")
        symbol = "==" if symbol == "=" else symbol
        values = [_typed(column, each.strip(), types[column]) for each in value.split(",")]
        if len(values) > 1 and symbol != "==":
            raise RetrievalError(f"filter {quoted(expression)}: {symbol} takes a single value")
        where.setdefault(column, {}).update({"in": values} if len(values) > 1 else {symbol: values[0]})
    return where


def _typed(column: str, text: str, kind: pa.DataType) -> Any:
    try:
        return pa.scalar(text).cast(kind).as_py()
    except pa.ArrowException:
        raise RetrievalError(
            f"filter on {quoted(column)}: {quoted(text)} is not of its type, {shortened(str(kind))}"
        ) from None


def matching_rows(conditions: tuple[Condition, ...], table: pa.Table) -> np.ndarray:
    """(rows,) bool: which rows of an Arrow table meet all conditions.

    Raises:
        RetrievalError: a value that the column's type can't be compared with.
    """
    masks = [_mask(condition, table.column(condition.column)) for condition in conditions]
    return reduce(operator.and_, masks, np.ones(len(table), dtype=bool))


def _mask(condition: Condition, column: pa.ChunkedArray) -> np.ndarray:
    if condition.value is None:
        mask = column.is_null() if condition.operator == "==" else column.is_valid()
        return mask.to_numpy().astype(bool)
    _check_order(condition, column.type)
    try:
        if condition.operator == "in":
            mask = pc.is_in(column, value_set=pa.array(condition.value).cast(column.type))
        else:
            mask = COMPARISONS[condition.operator](column, pa.scalar(condition.value).cast(column.type))
    except (pa.ArrowException, TypeError, OverflowError) as error:
        reason = f"{quoted(condition.value)} doesn't fit: {first_line(error)}"
        raise RetrievalError(
            f"filter on {quoted(condition.column)} of type {shortened(str(column.type))}: {reason}"
        ) from None
    return pc.fill_null(mask, False).to_numpy().astype(bool)


def _check_order(condition: Condition, kind: pa.DataType):
    """Refuses to compare words with a number by size: as words, 999 is more than 1000."""
    value, words = condition.value, pa.types.is_string(kind) or pa.types.is_large_string(kind)
    numeric = isinstance(value, (int, float)) or (isinstance(value, str) and is_number(value))
    if words and numeric and condition.operator in ORDERINGS:
        raise RetrievalError(
            f"filter on {quoted(condition.column)}: the column holds words, of which {condition.operator} "
            f"{shortened(value)} would compare the letters; embed the corpus again with numbers in it"
        )


__all__ = ["OPERATORS", "Condition", "Where", "matching_rows", "parse_expressions", "parse_where", "plain_values"]
