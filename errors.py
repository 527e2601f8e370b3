"""What goes wrong with things that are given to the package: one line each, naming the bad value and the fix."""

from collections.abc import Iterable

from .configuration_mome import did_you_mean


class MomeError(ValueError):
    """Something that was given can't be used."""


class DataError(MomeError):
    """A data set, a column, a row or an augmentation."""


class RecipeError(MomeError):
    """A training recipe; the line names field, value and fix."""


class RetrievalError(MomeError):
    """A corpus, a table, a query, a filter or an index."""


class ConversionError(MomeError):
    """A checkpoint to convert, or an option of the converter."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].strip()


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error that another library raised, without the rest of its explanations."""
    return first_line(error).split(". ")[0].rstrip(" .:")


def unknown_name(name: str, known: Iterable[str], what: str) -> RetrievalError:
    """`what` has no `name`, with the closest name that it has."""
    known = list(known)
    hint = did_you_mean(name, known, f"it has {', '.join(known) or 'none'}")
    return RetrievalError(f"{what} has no {name!r}: {hint}")


__all__ = [
    "ConversionError",
    "DataError",
    "MomeError",
    "RecipeError",
    "RetrievalError",
    "first_line",
    "first_sentence",
    "unknown_name",
]
