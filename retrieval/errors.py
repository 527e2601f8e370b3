"""What goes wrong with corpora, tables and indexes, each as one line that names the bad value and the fix."""

import difflib
from collections.abc import Iterable


class RetrievalError(ValueError):
    """Something given to `mome.retrieval` can't be used: a corpus, a table, a query, a filter or an index."""


def first_line(error: BaseException) -> str:
    """The reason in one line; of a chain of errors, that of the first cause that says something."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].strip()


def unknown_name(name: str, known: Iterable[str], what: str) -> RetrievalError:
    """`what` has no `name`, with the closest name that it has."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known) or 'none'}"
    return RetrievalError(f"{what} has no {name!r}: {hint}")


__all__ = ["RetrievalError", "first_line", "unknown_name"]
