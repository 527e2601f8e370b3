"""The command `mome`: embed a corpus, search it, caption and classify images.

    mome embed pictures/ --output table.parquet
    mome search table.parquet "red bicycle" --top-k 20 --sheet hits.html
    mome search table.parquet --image bicycle.jpg --where license=CC0-1.0 --json
    mome caption a.jpg b.jpg pictures/
    mome classify a.jpg --labels "bicycle,car,tree"
    mome export checkpoints/mome-icons --output icons-onnx

`python -m mome` is the same. Results alone are on stdout, all else is on stderr. Errors are one line; exit status 1
for what failed, 2 for a wrong command line, 130 for an interruption, 141 when nobody reads the results any more.
`caption` and `classify` need only the base install, the others name the extra that they need.
"""

import contextlib
import functools
import json
import logging as standard_logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import Pipeline, pipeline
from transformers.utils import logging

from . import __version__
from .commands import explain
from .configuration_mome import quoted
from .data.images import images_below
from .errors import first_line

DEFAULT_MODEL = Path(__file__).parent / "checkpoints" / "mome-icons"

RESUMABLE = {"embed": "; run the same command again to resume"}
HUB_ID = r"[A-Za-z0-9_][\w.-]*/[\w.-]+"

app = typer.Typer(
    name="mome",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # whose frames break long lines, and need more than ASCII
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Folder or Hub id of a checkpoint. Default: the one for icons.")
]
Backend = Annotated[
    str | None,
    typer.Option(help="torch, onnx, onnx-q8 or onnx-fp16. Default: what the model's folder holds."),
]
TopK = Annotated[int, typer.Option("--top-k", "-k", min=1, help="How many to show.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Files = Annotated[
    list[str], typer.Argument(help="Images: files, folders or URLs. After --, names may begin with a dash.")
]


def _show_version(wanted: bool):
    if wanted:
        print(f"mome {__version__}")
        raise typer.Exit()


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
):
    """Embed, search, caption and classify images and text with a MoME model."""


def in_one_line(command: Callable) -> Callable:
    """A command whose expected errors are one line on stderr and exit status 1."""

    @functools.wraps(command)
    def run(*arguments, **options):
        try:
            return command(*arguments, **options)
        except (KeyboardInterrupt, BrokenPipeError, ModuleNotFoundError) as error:
            status = explain("mome", error, RESUMABLE.get(command.__name__, ""))
            if status is None:
                raise
            raise typer.Exit(status) from None
        except (ValueError, OSError) as error:
            print(f"mome: {first_line(error)}", file=sys.stderr)
            raise typer.Exit(1) from None

    return run


def checkpoint(model: str | None) -> str:
    """The model that was asked for, or the one in a clone of the project.

    Raises:
        ValueError: it can be neither a folder nor an id of the Hub; or none was asked for, and an installed package
            has no weights.
    """
    if model is not None:
        if os.path.isfile(model):
            raise ValueError(f"model {quoted(model)} is a file: name the folder of the checkpoint")
        if not re.fullmatch(HUB_ID, model) and not os.path.isdir(model):
            raise ValueError(f"model {quoted(model)}: no such folder, and an id of the Hub is OWNER/NAME")
        return model
    if (DEFAULT_MODEL / "config.json").exists():
        return str(DEFAULT_MODEL)
    raise ValueError("no model: pass --model FOLDER or a Hub id, or work in a clone, which has checkpoints/mome-icons")


# ---------------------------------------------------------------------------------------------------- retrieval


@app.command()
@in_one_line
def embed(
    source: Annotated[str, typer.Argument(help="Folder of images, parquet, WebDataset shards, texts, or a Hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Parquet file, or a folder of parquet files.")],
    model: Model = None,
    modality: Annotated[list[str] | None, typer.Option(help="image, text, or twice for both.")] = None,
    split: Annotated[str, typer.Option(help="Split of a data set.")] = "train",
    image_column: Annotated[str | None, typer.Option(help="Default: the first column of images.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Default: text, texts, caption or captions.")] = None,
    id_column: Annotated[str | None, typer.Option(help="Unique values. Default: path or number.")] = None,
    metadata: Annotated[str | None, typer.Option(help="Columns to keep, separated by commas. Default: all.")] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="Do not copy the data set to the disk.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a batch.")] = 64,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads. Default: one for each core, up to 8.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Embed everything anew.")] = False,
    backend: Backend = None,
    daft: Annotated[str | None, typer.Option(help="native or ray: embed with the workers of Daft.")] = None,
):
    """Embed a corpus into a table. Run the same command again to resume, or when the corpus has changed."""
    options = {
        "split": split,
        "modalities": modality or None,
        "image_column": image_column,
        "text_column": text_column,
        "id_column": id_column,
        "metadata_columns": metadata and [name.strip() for name in metadata.split(",") if name.strip()],
        "streaming": streaming,
        "batch_size": batch_size,
        "overwrite": overwrite,
        "backend": backend,
    }
    if daft is None:
        from .retrieval import embed_corpus

        report = embed_corpus(source, output, checkpoint(model), workers=workers, **options)
    else:
        from .retrieval.embed_daft import embed_with_daft

        report = embed_with_daft(source, output, checkpoint(model), runner=daft, max_concurrency=workers, **options)
    print(str(report))
    if report.bad:
        _name_unreadable(report.output)


def _name_unreadable(table: Path, shown: int = 5):
    """The first of the items that could not be read, with the reason; all are in the file that the report names."""
    from .retrieval.format import unreadable_file

    with unreadable_file(table).open(encoding="utf-8") as lines:
        for line in islice(lines, shown):
            item = json.loads(line)
            print(f"mome: {item['id']}: {item['error']}", file=sys.stderr)


@app.command()
@in_one_line
def search(
    table: Annotated[str, typer.Argument(help="Table of `mome embed`: a file, a folder, or a Hub id.")],
    query: Annotated[str | None, typer.Argument(help="What to look for, in words.")] = None,
    image: Annotated[str | None, typer.Option(help="Find what is similar to this image (a file or URL).")] = None,
    id: Annotated[str | None, typer.Option(help="Find what is similar to this row of the table.")] = None,
    top_k: TopK = 10,
    where: Annotated[
        list[str] | None, typer.Option(help="COLUMN=VALUE, COLUMN=A,B or COLUMN>=VALUE; may be repeated.")
    ] = None,
    modality: Annotated[str | None, typer.Option(help="Only image or text rows.")] = None,
    model: Model = None,
    backend: Backend = None,
    index: Annotated[str, typer.Option(help="exact, or the URI of a Milvus index of the table.")] = "exact",
    as_json: AsJson = False,
    sheet: Annotated[
        Path | None, typer.Option(help="Write a contact sheet of the hits to this .html or .png.")
    ] = None,
    open_sheet: Annotated[
        bool, typer.Option("--open", help="Show a contact sheet of the hits in the browser.")
    ] = False,
):
    """Search a table by words, by image or by one of its rows."""
    from .retrieval import Searcher, load_table
    from .retrieval.filters import parse_expressions
    from .retrieval.sheet import checked_sheet, write_sheet

    given = {"text": query, "image": image, "id": id}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        raise typer.BadParameter("give one of QUERY, --image and --id", param_hint="QUERY")
    if sheet is not None:
        checked_sheet(sheet)
    opened = load_table(table)
    types = {name: opened.column(name).type for name in opened.rows.column_names if name != "embedding"}
    conditions = parse_expressions(where or [], types) or None
    searcher = Searcher.open(opened, model or _model_of(opened), index, backend=backend)
    hits = searcher.search(**given, top_k=top_k, where=conditions, modality=modality)
    if as_json:
        print(_json([hit.as_dict() for hit in hits], default=str, indent=1))
    else:
        for hit in hits:
            print(_line(f"{hit.score:.3f}  {hit.modality}  {hit.id}" + (f"  {hit.text}" if hit.text else "")))
    if open_sheet and sheet is None:
        sheet = Path(tempfile.mkdtemp(prefix="mome-")) / "hits.html"
    if sheet is not None:
        print(f"sheet: {write_sheet(hits, sheet, next(iter(given.values())))}", file=sys.stderr)
    if open_sheet:
        typer.launch(str(sheet))


def _model_of(table: Any) -> str:
    """The model that made the table, or, if that folder is gone, the default one."""
    name = table.info.model
    if not name or (Path(name).is_absolute() and not os.path.exists(name) and os.path.exists(DEFAULT_MODEL)):
        return checkpoint(None)
    return name


# ------------------------------------------------------------------------------------------------------ pipelines


def _read_all(task: str, files: list[str], model: str | None, **options) -> Iterable[tuple[str, list[dict]]]:
    """Each file with a pipeline's answer; unreadable files are named, and make the command fail."""
    files, failed = list(_expanded(files)), False
    with _quiet_pipeline():
        run = _load(task, checkpoint(model))
        # A generator, so that each answer comes as soon as it is there.
        for file, answer in zip(files, run((file for file in files), on_error="skip", **options)):
            if reason := answer[0].get("error"):
                print(f"mome: {reason}", file=sys.stderr)
                failed = True
            else:
                yield file, answer
    if failed:
        raise typer.Exit(1)


def _expanded(files: list[str]) -> Iterator[str]:
    """The files, with the images in and below a folder in its place; each once.

    Raises:
        ValueError: there is no image in a folder.
    """
    seen = set()
    for name in files:
        found = images_below(Path(name)) if os.path.isdir(name) else [name]
        if not found:
            raise ValueError(f"no image in folder {quoted(name)}: PNG, JPEG, WebP, GIF and the like are read")
        for file in found:
            if file not in seen:
                seen.add(file)
                yield file


@contextlib.contextmanager
def _quiet_pipeline() -> Iterator[None]:
    """No progress bars, and bad files told once, by us; other warnings of the pipeline are told."""
    bars = logging.is_progress_bar_enabled()
    logger = standard_logging.getLogger("mome.pipeline_mome")

    def told_elsewhere(record: standard_logging.LogRecord) -> bool:
        return not record.getMessage().startswith("skipped ")

    logging.disable_progress_bar()
    logger.addFilter(told_elsewhere)
    try:
        yield
    finally:
        logger.removeFilter(told_elsewhere)
        if bars:
            logging.enable_progress_bar()


def _load(task: str, model: str) -> Pipeline:
    """The pipeline of a checkpoint; an error names the checkpoint, which those of transformers do not always.

    What transformers warns of while it loads is not told unless TRANSFORMERS_VERBOSITY asks for it.
    """
    verbosity = logging.get_verbosity()
    if not os.environ.get("TRANSFORMERS_VERBOSITY"):
        logging.set_verbosity_error()
    try:
        return pipeline(task, model=model)
    except (ValueError, OSError) as error:
        reason = first_line(error)
        raise ValueError(reason if model in reason else f"model {quoted(model)} can't be loaded: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)


def _show(results: Iterable[tuple[str, list[dict]]], key: str, as_json: bool):
    for file, answers in results:
        if as_json:
            found = [{key: answer[key], "score": answer["score"]} for answer in answers]
            print(_json({"file": file, "results": found}))
        else:
            for answer in answers:
                print(_line(f"{file}: {answer[key]}  ({answer['score']:.3f})"))


def _json(value: Any, **options) -> str:
    """JSON in the characters of stdout's encoding; all others are escaped as JSON has it."""
    text = json.dumps(value, ensure_ascii=False, **options)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, **options)
    return text


def _line(text: str) -> str:
    """The text as one line: what would break it or steer the terminal, in a file's name or a text, is escaped."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: repr(found[0])[1:-1], text)


@app.command()
@in_one_line
def caption(
    files: Files,
    model: Model = None,
    num_captions: Annotated[
        int | None, typer.Option("--num-captions", "-n", min=1, help="Captions of each image.")
    ] = None,
    guidance: Annotated[str | None, typer.Option(help="rerank, classifier-free, contrastive or none.")] = None,
    prompt: Annotated[str | None, typer.Option(help="How every caption begins.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest caption.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 8,
    as_json: AsJson = False,
):
    """Caption images. The number is the cosine of image and caption. With --json, one line for each image."""
    options = {"num_captions": num_captions, "guidance": guidance, "prompt": prompt, "max_new_tokens": max_new_tokens}
    options = {name: value for name, value in options.items() if value is not None}
    _show(_read_all("image-captioning", files, model, batch_size=batch_size, **options), "generated_text", as_json)


@app.command()
@in_one_line
def classify(
    files: Files,
    labels: Annotated[str, typer.Option("--labels", "-l", help="Labels to choose from, separated by commas.")],
    model: Model = None,
    template: Annotated[list[str] | None, typer.Option(help='Such as "a photo of a {}"; may be repeated.')] = None,
    top_k: TopK = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 8,
    as_json: AsJson = False,
):
    """Classify images by any labels, best first, with probabilities. With --json, one line for each image."""
    options = {"candidate_labels": labels, "top_k": top_k, "batch_size": batch_size}
    if template:
        options["templates"] = template
    _show(_read_all("open-vocabulary-image-classification", files, model, **options), "label", as_json)


@app.command()
@in_one_line
def export(
    checkpoint: Annotated[str, typer.Argument(help="Folder or Hub id of a checkpoint.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to make. Default: ./NAME-onnx.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="fp32, q8 or fp16; may be repeated. Default: fp32 and q8.")
    ] = None,
):
    """Write a checkpoint as ONNX files, each checked against it."""
    from .export.__main__ import run

    run(checkpoint, output, dtype)


def main():
    """Runs the command `mome`."""
    sys.exit(app(prog_name="mome"))


if __name__ == "__main__":
    main()
