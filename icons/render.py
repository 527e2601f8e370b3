"""Renders every drawing once to 64 x 64 pixels and keeps the result, so that new names never cost a new rendering.

Two processes render chunks of a set with resvg and store each as a parquet file in the cache; a chunk that is there is
not rendered again, and a changed drawing changes the name of its chunk. A drawing that kills or blocks its process is
found by halving the chunk and recorded as failed.
"""

import hashlib
import io
import math
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import resvg_py
from PIL import Image
from tqdm import tqdm

from .collect import SIDE, Icon

VERSION = "2"  # part of every chunk's name: to be raised when rendering changes
CHUNK = 500
LARGE = 256  # pixels of a drawing whose margins are cropped before it is scaled down
SECONDS_PER_CHUNK = 300
MODES = ("", "LA", "RGBA")


class Rendered(NamedTuple):
    """One rendered icon: PNG bytes, `LA`, `RGBA` or empty if it failed, hash (32 bytes), share of opaque pixels."""

    source_id: str
    png: bytes
    mode: str
    hash: bytes
    ink: float


def render_sets(icons: Iterable[Icon], cache: Path, processes: int = 2) -> Iterator[Rendered]:
    """Renders what the cache lacks and yields every icon that gave a picture, set by set.

    Args:
        icons: drawings, those of a set side by side.
        cache: folder for the chunks.
        processes: how many render at a time.
    """
    cache.mkdir(parents=True, exist_ok=True)
    chunks = list(_chunks(icons))
    missing = [chunk for chunk in chunks if not _chunk_path(cache, chunk).exists()]
    with tqdm(total=sum(map(len, missing)), desc="rendering", unit=" icons", disable=not missing) as progress:
        for chunk, rows in _in_processes(render_chunk, missing, processes):
            _write(_chunk_path(cache, chunk), rows)
            progress.update(len(chunk))
    for chunk in chunks:
        table = pq.read_table(_chunk_path(cache, chunk)).to_pydict()
        for values in zip(*(table[name] for name in Rendered._fields)):
            if values[2]:
                yield Rendered(*values)


def render_chunk(icons: Sequence[Icon]) -> list[Rendered]:
    """Renders one chunk; a drawing that resvg refuses gives an empty row."""
    rows = []
    for icon in icons:
        try:
            rows.append(_encode(icon.source_id, render(icon)))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a panic inside resvg is no Exception
            rows.append(_failed(icon))
    return rows


def render(icon: Icon, side: int = SIDE) -> Image.Image:
    """The drawing as an RGBA image of `side` x `side` pixels, centred, aspect ratio kept."""
    if isinstance(icon.drawing, Path) and icon.drawing.suffix != ".svg":
        image = Image.open(icon.drawing).convert("RGBA")
        return image.resize(
            (side, side), Image.Resampling.BOX if image.width % side == 0 else Image.Resampling.LANCZOS
        )
    svg = icon.drawing if isinstance(icon.drawing, str) else icon.drawing.read_text(errors="replace")
    width = max(LARGE, side) if icon.crop else side
    png = resvg_py.svg_to_bytes(svg_string=svg, width=width, skip_system_fonts=True, dpi=96)
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    return _fit(image, side) if icon.crop or image.size != (side, side) else image


def _fit(image: Image.Image, side: int) -> Image.Image:
    """Crops to what is visible, scales it to 60 of 64 parts and centres it."""
    box = image.getchannel("A").point(lambda alpha: 255 if alpha > 8 else 0).getbbox()
    if box is None:
        raise ValueError("nothing is visible")
    image = image.crop(box)
    scale = side * (1 - 4 / SIDE) / max(image.size)
    size = tuple(max(1, round(edge * scale)) for edge in image.size)
    canvas = Image.new("RGBA", (side, side))
    canvas.paste(image.resize(size, Image.Resampling.LANCZOS), ((side - size[0]) // 2, (side - size[1]) // 2))
    return canvas


def _encode(source_id: str, image: Image.Image) -> Rendered:
    pixels = np.asarray(image)
    alpha = pixels[..., 3]
    ink = float(alpha.mean() / 255)
    blank = ink < 0.004 or (ink > 0.98 and np.ptp(pixels[..., :3].reshape(-1, 3), axis=0).max() < 8)
    if blank:
        return Rendered(source_id, b"", "", b"", ink)
    # Black with any opacity is one colour: such an icon keeps its alpha only, and is painted when it is drawn.
    mono = not (pixels[..., :3][alpha > 24] > 24).any()
    if mono:
        image = Image.merge("LA", (Image.new("L", image.size), image.getchannel("A")))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Rendered(source_id, buffer.getvalue(), image.mode, perceptual_hash(pixels), ink)


def perceptual_hash(pixels: np.ndarray) -> bytes:
    """256-bit hash of the look of a picture: signs of its low cosine frequencies.

    Zauner, "Implementation and benchmarking of perceptual image hash functions" (2010), with 16 x 16 coefficients
    instead of 8 x 8, since icons differ in small marks. Everything is an integer: a symmetric picture has frequencies
    of exactly zero, whose signs would otherwise be those of rounding errors, and these differ between machines.

    Args:
        pixels: uint8, (64, 64, 4).
    """
    red, green, blue, alpha = np.moveaxis(pixels.astype(np.int64), -1, 0)
    light = (red + green + blue) * alpha + 3 * 255 * (255 - alpha)  # on white; 3 * 255 times the mean of the channels
    small = light.reshape(32, 2, 32, 2).sum(axis=(1, 3))
    low = (COSINES @ small @ COSINES.T).ravel()  # below 2 ** 58
    return np.packbits(low > np.sort(low[1:])[127]).tobytes()  # the median of 255


def _cosine_matrix(size: int, count: int) -> np.ndarray:
    """Cosines of the first frequencies as integers, 2 ** 14 for 1, (count, size)."""
    steps = np.outer(np.arange(count), 2 * np.arange(size) + 1)  # of pi / (2 * size)
    return np.array([[round(2**14 * math.cos(step * math.pi / (2 * size))) for step in row] for row in steps.tolist()])


COSINES = _cosine_matrix(32, 16)


def _failed(icon: Icon) -> Rendered:
    return Rendered(icon.source_id, b"", "", b"", 0.0)


def _chunks(icons: Iterable[Icon]) -> Iterator[list[Icon]]:
    chunk: list[Icon] = []
    for icon in icons:
        if chunk and (len(chunk) == CHUNK or chunk[0].set != icon.set):
            yield chunk
            chunk = []
        chunk.append(icon)
    if chunk:
        yield chunk


def _chunk_path(cache: Path, chunk: Sequence[Icon]) -> Path:
    digest = hashlib.sha256(VERSION.encode())
    for icon in chunk:
        drawing = icon.drawing if isinstance(icon.drawing, str) else icon.drawing.name
        digest.update(f"{icon.source_id}\0{drawing}\0".encode())
    return cache / f"{chunk[0].set}-{digest.hexdigest()[:16]}.parquet"


def _write(path: Path, rows: list[Rendered]) -> None:
    columns = {name: [getattr(row, name) for row in rows] for name in Rendered._fields}
    partial = path.with_suffix(".partial")
    pq.write_table(pa.table(columns), partial)
    partial.rename(path)  # a file with the final name is complete


def _in_processes(
    work: Callable[[Sequence[Icon]], list[Rendered]], chunks: Sequence[list[Icon]], processes: int
) -> Iterator[tuple[list[Icon], list[Rendered]]]:
    """Runs `work` on every chunk in child processes and outlives their death."""
    waiting, pool = deque(chunks), _new_pool(processes)
    running: deque[tuple[list[Icon], Future]] = deque()
    try:
        while waiting or running:
            while waiting and len(running) < 2 * processes:
                chunk = waiting.popleft()
                running.append((chunk, pool.submit(work, chunk)))
            chunk, future = running.popleft()
            try:
                rows = future.result(timeout=SECONDS_PER_CHUNK)
            except (BrokenProcessPool, FutureTimeout):
                _kill(pool)
                pool = _new_pool(processes)
                rows = [row for part in _halves(chunk) for row in _alone(work, part)]
                running = deque((other, pool.submit(work, other)) for other, _ in running)
            yield chunk, rows
    finally:  # also where the caller stops early or is interrupted
        _kill(pool)


def _new_pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, initializer=_end_with_parent)


def _end_with_parent() -> None:
    """Ends a child when its parent is killed; it would wait for work forever."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _halves(chunk: list[Icon]) -> list[list[Icon]]:
    return [chunk] if len(chunk) < 2 else [chunk[: len(chunk) // 2], chunk[len(chunk) // 2 :]]


def _alone(work: Callable[[Sequence[Icon]], list[Rendered]], chunk: list[Icon]) -> list[Rendered]:
    """Runs a chunk in a process of its own, halving it as long as the process dies."""
    pool = _new_pool(1)
    try:
        return pool.submit(work, chunk).result(timeout=SECONDS_PER_CHUNK if len(chunk) > 1 else 30)
    except (BrokenProcessPool, FutureTimeout):
        if len(chunk) == 1:
            return [_failed(chunk[0])]
        return [row for part in _halves(chunk) for row in _alone(work, part)]
    finally:
        _kill(pool)


def _kill(pool: ProcessPoolExecutor) -> None:
    for process in list((pool._processes or {}).values()):
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)
