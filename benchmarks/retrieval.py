"""Retrieval beside what bounds it: the embedding job and a bare model loop, exact search and faiss.

    python -m mome.benchmarks.retrieval --threads 2 --rounds 5 --results evaluation/results.csv

- `embed`: images a second of `embed_corpus` (read, decode, embed, write the table) beside the model alone on tensors
  that are ready, batch for batch;
- `search`: queries a second of `ExactIndex` beside faiss's `IndexFlatIP`, at 100,000 and 1,000,000 rows of 256
  dimensions: the median (p50) of single queries that take turns, and batches of 128; both find the same rows;
- `memory`: peak memory of a process that opens such a table and searches it, beyond what it had before, beside the
  size of the embeddings; the first time, when the memory-mapped copy is made, and again.

faiss is an extra of this benchmark: `pip install --no-deps faiss-cpu==1.15.1`.
"""

import itertools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pyarrow as pa
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models
from torch.nn import functional as F
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast

from ..configuration_mome import MomeConfig
from ..data.images import pixel_scale
from ..evaluation.results import append_rows
from ..modeling_mome import MomeModel
from ..processing_mome import MomeProcessor
from ..retrieval import Embedder, ExactIndex, embed_corpus, load_table
from ..retrieval.corpus import open_source
from ..retrieval.format import TableInfo, table_schema, to_table, write_table
from ..retrieval.items import read_pixels
from .command import begin, parser_of
from .training import QUICK, SMALL

DIMENSION, TOP_K, BATCH, QUERIES = 256, 10, 128, 50
WRITTEN_AT_ONCE = 50_000


@dataclass
class Settings:
    """What the sections are told, and the rows that they measured."""

    rounds: int
    rows: list[int]
    images: int
    corpus: str | None
    model: str | None
    quick: bool
    measured: list[dict] = field(default_factory=list)

    def keep(self, data: str, metric: str, ours: list[float], peer: str, theirs: list[float]):
        """Rates of both, one for each round or query: medians, and the median of the ratios."""
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        value, peer_value, ratio = statistics.median(ours), statistics.median(theirs), statistics.median(ratios)
        low, high = min(ratios), max(ratios)
        print(f"{metric}: {value:.4g}; {peer}: {peer_value:.4g}; ratio {ratio:.3f} ({low:.3f}–{high:.3f})")
        row = {"data": f"{data}, {len(ratios)} rounds, ratio {low:.3f} to {high:.3f}", "metric": metric}
        row |= {"value": f"{value:.4g}", "peer": peer, "peer_value": f"{peer_value:.4g}", "ratio": f"{ratio:.3f}"}
        self.measured.append(row)


def seconds(run: Callable, *arguments) -> float:
    began = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - began


# ------------------------------------------------------------------------------------------------------ embedding


def random_embedder(quick: bool) -> Embedder:
    """Random weights of the icon model's size, with a processor for its images."""
    shape = QUICK if quick else SMALL
    torch.manual_seed(0)
    model = MomeModel(MomeConfig(**shape, max_position_embeddings=16, projection_dim=DIMENSION))
    side = {"height": shape["image_size"], "width": shape["image_size"]}
    image_processor = CLIPImageProcessor(size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_center_crop=False)
    words = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[UNK]")
    return Embedder(model, MomeProcessor(image_processor, tokenizer), "random weights")


def drawn_pictures(folder: Path, count: int) -> str:
    """Transparent 64-pixel drawings, as icons are."""
    folder.mkdir()
    for number in range(count):
        image = Image.new("RGBA", (64, 64))
        draw = ImageDraw.Draw(image)
        for step in range(4):
            left, top = (number * 7 + step * 11) % 40, (number * 3 + step * 17) % 40
            draw.ellipse((left, top, left + 20, top + 24), fill=(number % 256, step * 60, (number * 5) % 256, 255))
        image.save(folder / f"{number:06d}.png")
    return str(folder)


def embed(settings: Settings, folder: Path):
    embedder = Embedder.load(settings.model) if settings.model else random_embedder(settings.quick)
    corpus = settings.corpus or drawn_pictures(folder / "pictures", settings.images)
    source = open_source(corpus)
    rows = source.data.select(range(min(settings.images, len(source.data))))
    count = len(rows)
    ready, first = [], rows[: min(1024, count)][source.options.image_column]
    for start in range(0, len(first), 64):
        read = (read_pixels(image, embedder.processor.image_processor)[0] for image in first[start : start + 64])
        pixels = torch.cat([each for each in read if each is not None])
        scale = pixel_scale(embedder.processor.image_processor)
        ready.append(scale(pixels) if pixels.dtype == torch.uint8 else pixels)

    def bare():
        done = 0
        for pixel_values in itertools.cycle(ready):
            embedder.embed_pixel_values(pixel_values)
            done += len(pixel_values)
            if done >= count:
                return

    numbers = itertools.count()

    def job():
        output = folder / f"table-{next(numbers)}.parquet"
        report = embed_corpus(rows, output, embedder, progress=False)
        if report.bad:
            print(f"{report.bad} images could not be read")
        output.unlink()

    ours, theirs = [], []
    for turn in range(settings.rounds + 1):
        bare_rate, job_rate = count / seconds(bare), count / seconds(job)
        if turn:  # the first round warms up
            ours.append(job_rate)
            theirs.append(bare_rate)
    what = "the model given" if settings.model else "random weights"
    data = f"{count} images of {'the corpus given' if settings.corpus else 'drawings'}, {what}"
    settings.keep(
        data, "images of a corpus embedded, float32, per second: embed_corpus", ours, "bare model loop", theirs
    )


# --------------------------------------------------------------------------------------------------------- search


def random_vectors(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, DIMENSION, generator=generator), dim=1)


def random_table(path: Path, rows: int) -> Path:
    """A table of random unit vectors."""
    schema = table_schema(TableInfo("random", "0" * 16, DIMENSION))

    def blocks() -> Iterator[pa.Table]:
        for start in range(0, rows, WRITTEN_AT_ONCE):
            count = min(WRITTEN_AT_ONCE, rows - start)
            columns = {"id": [str(row) for row in range(start, start + count)], "modality": ["image"] * count}
            columns |= dict.fromkeys(("uri", "text"), [None] * count)
            yield to_table(columns, random_vectors(count, start), schema)

    write_table(path, blocks(), schema)
    return path


def search(settings: Settings, folder: Path):
    try:
        import faiss
    except ModuleNotFoundError:
        print("faiss is left out: pip install --no-deps faiss-cpu==1.15.1")
        return
    faiss.omp_set_num_threads(torch.get_num_threads())
    for rows in settings.rows:
        table = load_table(random_table(folder / f"{rows}.parquet", rows), cache_dir=folder / "cache")
        flat = faiss.IndexFlatIP(DIMENSION)
        for _, block in table.blocks:
            flat.add(block.numpy())
        index, queries = ExactIndex(table), random_vectors(max(QUERIES, BATCH), -1 % 2**31)
        found, theirs_found = index.search_rows(queries[:BATCH], TOP_K), flat.search(queries[:BATCH].numpy(), TOP_K)
        agreement = (found[1].numpy() == theirs_found[1]).mean()
        if agreement < 0.99:  # rounding may swap neighbours
            raise SystemExit(f"exact search and faiss agree on {agreement:.1%} of the rows only")
        one_ours, one_theirs, many_ours, many_theirs = [], [], [], []
        for query in queries[:QUERIES].split(1):
            one_theirs.append(1 / seconds(flat.search, query.numpy(), TOP_K))
            one_ours.append(1 / seconds(index.search_rows, query, TOP_K))
        for _ in range(settings.rounds):
            many_theirs.append(BATCH / seconds(flat.search, queries[:BATCH].numpy(), TOP_K))
            many_ours.append(BATCH / seconds(index.search_rows, queries[:BATCH], TOP_K))
        what = f"exact search of {rows:,} × {DIMENSION}, top {TOP_K}"
        data = f"random unit vectors, agreement {agreement:.4f}"
        p50 = f"{data}, p50 {1000 / statistics.median(one_ours):.3g} ms"
        settings.keep(p50, f"{what}, one query, per second: MoME", one_ours, "faiss", one_theirs)
        settings.keep(data, f"{what}, {BATCH} queries, per second: MoME", many_ours, "faiss", many_theirs)
        del table, flat, index  # before the next, larger ones are made


# --------------------------------------------------------------------------------------------------------- memory


def _status(name: str) -> float:
    """MiB of this process. `ru_maxrss` is no use here: a process starts with its parent's."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) / 1024


def _peak(path: Path, cache: Path, threads: int, connection):
    torch.set_num_threads(threads)
    queries = random_vectors(BATCH, 1)
    queries @ queries.T  # starts the threads
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far was that of the imports
    index = ExactIndex(load_table(path, cache_dir=cache))
    for query in queries[:8]:
        index.search(query, TOP_K)
    index.search(queries, TOP_K)
    connection.send(_status("VmHWM") - before)


def memory(settings: Settings, folder: Path):
    datasets.disable_progress_bars()
    context = multiprocessing.get_context("spawn")
    for rows in settings.rows:
        path, size = random_table(folder / f"memory-{rows}.parquet", rows), rows * DIMENSION * 4 / 2**20
        for when in ("opened for the first time", "opened again"):
            ours, theirs = context.Pipe()
            process = context.Process(target=_peak, args=(path, folder / "memory", torch.get_num_threads(), theirs))
            process.start()
            theirs.close()
            peak = ours.recv()
            process.join()
            metric = f"exact search of {rows:,} × {DIMENSION}, peak memory in MiB, {when}: MoME"
            print(f"{metric}: {peak:.0f}; embeddings: {size:.0f}; ratio {peak / size:.3f}")
            row = {"data": "random unit vectors, single queries and a batch of 128", "metric": metric}
            row |= {"value": f"{peak:.4g}", "peer": "size of the embeddings", "peer_value": f"{size:.4g}"}
            settings.measured.append(row | {"ratio": f"{peak / size:.3f}"})


SECTIONS = {"embed": embed, "search": search, "memory": memory}


def main(argv: list[str] | None = None) -> list[dict]:
    parser = parser_of(__doc__, SECTIONS, "jobs, loops and batches are")
    parser.add_argument("--rows", default="100000,1000000", metavar="N,...", help="sizes of the tables")
    parser.add_argument("--images", type=int, default=8192, help="of the corpus that is embedded")
    parser.add_argument("--corpus", help="images to embed, as `mome embed` takes them; default: drawings")
    parser.add_argument("--model", help="folder or Hub id; default: random weights of the icon model's size")
    options, sections, common = begin(parser, "retrieval", argv)
    rows, images = [int(count) for count in options.rows.split(",")], options.images
    if options.quick:
        rows, images = [5000], 192
    settings = Settings(options.rounds, rows, images, options.corpus, options.model, options.quick)
    with tempfile.TemporaryDirectory() as folder:
        for section in sections:
            SECTIONS[section](settings, Path(folder))
    if options.results:
        append_rows(options.results, [common | row for row in settings.measured])
    return settings.measured


if __name__ == "__main__":
    main()
