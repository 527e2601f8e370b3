"""The command `mome`: embed a corpus, search it, caption and classify pictures.

    mome embed pictures/ --output table.parquet
    mome search table.parquet "red bicycle" --top-k 20 --sheet hits.html
    mome search table.parquet --image bicycle.jpg --where license=CC0-1.0 --json
    mome caption a.jpg b.jpg
    mome classify a.jpg --labels "bicycle,car,tree"

What can't be used is told in one line; exit status 1 for what failed, 2 for a command that makes no sense, 130 for an
interruption.
"""

import functools
import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import pipeline
from transformers.utils import logging

DEFAULT_MODEL = Path(__file__).parent / "checkpoints" / "mome-icons"

app = typer.Typer(
    name="mome",
    help="Embeds, searches, captions and classifies images and text with a MoME model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str | None, typer.Option("--model", "-m", help="Folder or Hub id of a MoME checkpoint.")]
TopK = Annotated[int, typer.Option("--top-k", "-k", min=1, help="How many to show.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def in_one_line(command: Callable) -> Callable:
    """A command whose expected errors are one line on stderr and exit status 1."""

    @functools.wraps(command)
    def run(*arguments, **options):
        try:
            return command(*arguments, **options)
        except KeyboardInterrupt:
            typer.echo("mome: interrupted; the same command again goes on where a job was", err=True)
            raise typer.Exit(130) from None
        except ModuleNotFoundError as error:
            extra = "daft" if error.name in ("daft", "ray") else "retrieval"
            typer.echo(f"mome: {error.name} is not installed: pip install 'mome[{extra}]'", err=True)
            raise typer.Exit(1) from None
        except (ValueError, OSError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            typer.echo(f"mome: {lines[0]}", err=True)
            raise typer.Exit(1) from None

    return run


def checkpoint(model: str | None) -> str:
    """The model that was asked for, or the one that comes with the package.

    Raises:
        ValueError: none was asked for and none is there.
    """
    if model is not None:
        return model
    if (DEFAULT_MODEL / "config.json").exists():
        return str(DEFAULT_MODEL)
    raise ValueError("no model: pass --model with the folder or Hub id of a MoME checkpoint")


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
    metadata: Annotated[str | None, typer.Option(help="Columns to keep, with commas. Default: all.")] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="No copy of the data set on the disk.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that go through the model together.")] = 64,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads. Default: one for each core, up to 8.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    daft: Annotated[str | None, typer.Option(help="native or ray: embed with the workers of Daft.")] = None,
):
    """Embed a corpus into a table; the same command again goes on where it was interrupted."""
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
    }
    if daft is None:
        from .retrieval import embed_corpus

        report = embed_corpus(source, output, checkpoint(model), workers=workers, **options)
    else:
        from .retrieval.embed_daft import embed_with_daft

        report = embed_with_daft(source, output, checkpoint(model), runner=daft, max_concurrency=workers, **options)
    typer.echo(str(report))


@app.command()
@in_one_line
def search(
    table: Annotated[str, typer.Argument(help="Table of `mome embed`: a file, a folder, or a Hub id.")],
    query: Annotated[str | None, typer.Argument(help="What to look for, in words.")] = None,
    image: Annotated[str | None, typer.Option(help="Look for what is like this picture (a file or a URL).")] = None,
    id: Annotated[str | None, typer.Option(help="Look for what is like this row of the table.")] = None,
    top_k: TopK = 10,
    where: Annotated[list[str] | None, typer.Option(help="COLUMN=VALUE, COLUMN=A,B or COLUMN>=VALUE; repeat.")] = None,
    modality: Annotated[str | None, typer.Option(help="Only image or text rows.")] = None,
    model: Model = None,
    index: Annotated[str, typer.Option(help="exact, or the URI of a Milvus index of the table.")] = "exact",
    as_json: AsJson = False,
    sheet: Annotated[Path | None, typer.Option(help="Write the hits with pictures to this .html or .png.")] = None,
    open_sheet: Annotated[bool, typer.Option("--open", help="Show the hits with pictures in the browser.")] = False,
):
    """Search a table by words, by picture or by one of its rows."""
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
    searcher = Searcher.open(opened, model or _model_of(opened), index)
    hits = searcher.search(**given, top_k=top_k, where=conditions, modality=modality)
    if as_json:
        typer.echo(json.dumps([hit.as_dict() for hit in hits], default=str, ensure_ascii=False, indent=1))
    else:
        for hit in hits:
            typer.echo(f"{hit.score:.3f}  {hit.modality}  {hit.id}" + (f"  {hit.text}" if hit.text else ""))
    if open_sheet and sheet is None:
        sheet = Path(tempfile.mkdtemp(prefix="mome-")) / "hits.html"
    if sheet is not None:
        typer.echo(f"sheet: {write_sheet(hits, sheet, next(iter(given.values())))}", err=True)
    if open_sheet:
        typer.launch(str(sheet))


def _model_of(table: Any) -> str:
    """The model that a table names, or, where that is gone, the one that comes with the package."""
    name = table.info.model
    if not name or (Path(name).is_absolute() and not Path(name).exists() and DEFAULT_MODEL.exists()):
        return checkpoint(None)
    return name


# ------------------------------------------------------------------------------------------------------ pipelines


def _read_all(task: str, files: list[str], model: str | None, **options) -> Iterable[tuple[str, list[dict]]]:
    """Each file with what a pipeline says of it; files that can't be read are named, and make the command fail."""
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a file that can't be read is reported below
    try:
        run = pipeline(task, model=checkpoint(model))
        answers = run(list(files), on_error="skip", **options)
    finally:
        logging.set_verbosity(verbosity)
    failed = False
    for file, answer in zip(files, answers):
        if reason := answer[0].get("error"):
            typer.echo(f"mome: {reason}", err=True)
            failed = True
        else:
            yield file, answer
    if failed:
        raise typer.Exit(1)


def _show(results: Iterable[tuple[str, list[dict]]], key: str, as_json: bool):
    for file, answers in results:
        if as_json:
            found = [{key: answer[key], "score": answer["score"]} for answer in answers]
            typer.echo(json.dumps({"file": file, "results": found}, ensure_ascii=False))
        else:
            for answer in answers:
                typer.echo(f"{file}: {answer[key]}  ({answer['score']:.3f})")


@app.command()
@in_one_line
def caption(
    files: Annotated[list[str], typer.Argument(help="Pictures: files or URLs.")],
    model: Model = None,
    num_captions: Annotated[int | None, typer.Option("--num-captions", "-n", min=1, help="For each picture.")] = None,
    guidance: Annotated[str | None, typer.Option(help="rerank, classifier-free, contrastive or none.")] = None,
    prompt: Annotated[str | None, typer.Option(help="How every caption begins.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest caption.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    as_json: AsJson = False,
):
    """Caption pictures; the number is the cosine of picture and caption. With --json, a line for each picture."""
    options = {"num_captions": num_captions, "guidance": guidance, "prompt": prompt, "max_new_tokens": max_new_tokens}
    options = {name: value for name, value in options.items() if value is not None}
    _show(_read_all("image-captioning", files, model, batch_size=batch_size, **options), "generated_text", as_json)


@app.command()
@in_one_line
def classify(
    files: Annotated[list[str], typer.Argument(help="Pictures: files or URLs.")],
    labels: Annotated[str, typer.Option("--labels", "-l", help="What to choose from, with commas.")],
    model: Model = None,
    template: Annotated[list[str] | None, typer.Option(help='Such as "a photo of a {}"; repeat for several.')] = None,
    top_k: TopK = 5,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    as_json: AsJson = False,
):
    """Classify pictures by any labels, best first, with probabilities. With --json, a line for each picture."""
    options = {"candidate_labels": labels, "top_k": top_k, "batch_size": batch_size}
    if template:
        options["templates"] = template
    _show(_read_all("open-vocabulary-image-classification", files, model, **options), "label", as_json)


def main():
    """Runs the command `mome`."""
    sys.exit(app())


if __name__ == "__main__":
    main()
