"""SVG drawings to pixels: read by rules, then rendered by resvg in a process of its own.

    bytes ── unzipped ── parsed, counted, written anew ── worker process: resvg ── picture with transparency

- `currentColor` is black; the larger side gets the number of pixels that is asked for;
- scripts, foreign markup and everything that leads out of the file (other files, the network) are left out;
- what would take too much is refused: by its bytes, elements, depth, entities and repetitions before it is rendered,
  by time and memory while it is. Only a process of its own can be stopped, and be lost: a drawing of 100 bytes can ask
  for more memory than there is, and resvg then ends its process.

resvg comes with `pip install resvg-py`; without it an error says so.
"""

import atexit
import importlib.util
import io
import os
import re
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from typing import Any
from xml.parsers import expat
from xml.sax.saxutils import escape, quoteattr

from PIL import Image

SVG_SUFFIXES = (".svg", ".svgz")
SVG_SIDE = 256  # pixels of the larger side, unless more are asked for
INSTALL_RESVG = 'SVG needs resvg-py: pip install resvg-py, or "mome[svg]"'

MOST_BYTES = 8 * 2**20  # unzipped
MOST_ELEMENTS = 50_000
MOST_DRAWN = 200_000  # elements, those counted again that are drawn again
MOST_DEPTH = 100
MOST_ENTITIES, LONGEST_ENTITY = 100, 1000
MOST_SECONDS = 10
MOST_MEMORY = 2 * 2**30  # of the worker process
STARTING_SECONDS = 60

SVG_NAMESPACE = "http://www.w3.org/2000/svg"
XLINK_NAMESPACE = "http://www.w3.org/1999/xlink"
LEFT_OUT = frozenset({"script", "foreignObject", "metadata", "title", "desc", "iframe", "audio", "video"})
EMBEDDED = re.compile(r"\s*data:image/(png|jpeg|jpg|gif|webp)[;,]", re.IGNORECASE)
REFERENCE = re.compile(r"url\(\s*[\"']?#([^\"')\s]+)")


def can_render_svg() -> bool:
    """Whether resvg is installed."""
    return importlib.util.find_spec("resvg_py") is not None


def looks_like_svg(head: bytes) -> bool:
    """Whether a file that begins so is an SVG drawing, packed (svgz) or not."""
    if head[:2] == b"\x1f\x8b":
        try:
            head = zlib.decompressobj(31).decompress(head, 2**16)
        except zlib.error:
            return False
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        head = head.decode("utf-16", "ignore").encode()
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    return head[:1] == b"<" and re.search(rb"<(\w+:)?svg[\s>/]", head) is not None


def render_svg(source: bytes | str, side: int = SVG_SIDE) -> Image.Image:
    """An SVG drawing as an RGBA picture whose larger side has `side` pixels.

    Args:
        source: the drawing, packed or not.

    Raises:
        ValueError: resvg is not installed; the drawing is broken, or refused.
    """
    if not can_render_svg():
        raise ValueError(INSTALL_RESVG)
    drawing = _Drawing(source)
    image = Image.open(io.BytesIO(_render(drawing.text, side, drawing.has_text)))
    image.load()
    return image


# --------------------------------------------------------------------------------------------------- reading


class _Drawing:
    """A drawing, parsed and written anew: what was checked is what is rendered.

    Attributes:
        text: of the new drawing. has_text: whether it needs fonts.
    """

    def __init__(self, source: bytes | str):
        data = source.encode() if isinstance(source, str) else _unzipped(bytes(source))
        if len(data) > MOST_BYTES:
            raise ValueError(f"the SVG has more than {MOST_BYTES // 2**20} MiB")
        self.has_text = False
        self._parts: list[str] = []
        self._written, self._entities, self._skipped = 0, 0, 0  # `_skipped`: how deep we are in what is left out
        self._names: list[str] = []  # of the open elements
        self._open: list[int] = []  # their numbers
        self._leads_to: list[list[int | str]] = []  # of each element: children, and ids that it refers to
        self._ids: dict[str, int] = {}
        parser = expat.ParserCreate("utf-8" if isinstance(source, str) else None)
        parser.buffer_text = parser.ordered_attributes = True
        parser.StartElementHandler, parser.EndElementHandler = self._start, self._end
        parser.CharacterDataHandler, parser.EntityDeclHandler = self._characters, self._entity
        try:
            parser.Parse(data, True)
        except (expat.ExpatError, LookupError, UnicodeError) as error:
            raise ValueError(f"a broken SVG: {error}") from None
        if not self._leads_to:
            raise ValueError("a broken SVG: no element <svg>")
        self._count_drawn()
        self.text = "".join(self._parts)

    def _write(self, text: str):
        self._written += len(text)
        if self._written > 2 * MOST_BYTES:
            raise ValueError("the SVG is blown up by its entities")
        self._parts.append(text)

    def _entity(self, name: str, is_parameter: bool, value: str | None, *place: Any):
        self._entities += 1
        if is_parameter or value is None or "&" in value or "<" in value:
            raise ValueError(f"the SVG has an entity, {name[:40]!r}, that is more than plain text")
        if self._entities > MOST_ENTITIES or len(value) > LONGEST_ENTITY:
            raise ValueError("the SVG has too many or too long entities")

    def _start(self, name: str, attributes: list[str]):
        prefix, _, local = name.rpartition(":")
        if not self._leads_to and local != "svg":
            raise ValueError(f"not an SVG but an XML file: its first element is <{name[:40]}>")
        if self._skipped or local in LEFT_OUT or prefix not in ("", "svg"):
            self._skipped += 1
            return
        number = len(self._leads_to)
        if number >= MOST_ELEMENTS:
            raise ValueError(f"the SVG has more than {MOST_ELEMENTS:,} elements")
        if len(self._open) >= MOST_DEPTH:
            raise ValueError(f"the SVG is nested more than {MOST_DEPTH} deep")
        self.has_text |= local == "text"
        if self._open:
            self._leads_to[self._open[-1]].append(number)
        self._leads_to.append([])
        kept = list(self._attributes(local, dict(zip(attributes[::2], attributes[1::2])), number))
        if not number:
            kept += [("xmlns", SVG_NAMESPACE), ("xmlns:xlink", XLINK_NAMESPACE)]
        self._write(f"<{local}{''.join(f' {key}={quoteattr(value)}' for key, value in kept)}>")
        self._names.append(local)
        self._open.append(number)

    def _attributes(self, element: str, attributes: dict[str, str], number: int) -> Iterator[tuple[str, str]]:
        """The attributes to keep, of which those that refer to elements are noted."""
        for key, value in attributes.items():
            prefix, _, local = key.rpartition(":")
            if key.startswith(("xmlns", "on")) or prefix not in ("", "xlink", "xml", "svg"):
                continue
            if local == "href":
                if value.strip().startswith("#"):
                    self._leads_to[number].append(value.strip()[1:])
                elif element not in ("image", "feImage") or not EMBEDDED.match(value):
                    continue
            elif local == "id":
                self._ids.setdefault(value, number)
            self._leads_to[number] += REFERENCE.findall(value)
            yield (key if prefix in ("xlink", "xml") else local), value

    def _end(self, name: str):
        if self._skipped:
            self._skipped -= 1
        else:
            self._open.pop()
            self._write(f"</{self._names.pop()}>")

    def _characters(self, text: str):
        if not self._skipped and self._names and self._names[-1] in ("style", "text", "tspan", "textPath"):
            self._write(escape(text))

    def _count_drawn(self):
        """Refuses a drawing whose elements are drawn again and again by `<use>`, masks and patterns within others."""
        counts: dict[int, tuple[int, int]] = {}  # element → (elements that are drawn, depth)

        def count(number: int, level: int) -> tuple[int, int]:
            if level > 2 * MOST_DEPTH:
                raise ValueError(f"the SVG is nested more than {2 * MOST_DEPTH} deep")
            counts[number] = (0, 0)  # what leads back to itself is not drawn
            drawn, depth = 1, 0
            for each in self._leads_to[number]:
                target = self._ids.get(each) if isinstance(each, str) else each
                if target is None:
                    continue
                more, below = counts[target] if target in counts else count(target, level + 1)
                drawn, depth = drawn + more, max(depth, below + 1)
                if drawn > MOST_DRAWN or depth > 2 * MOST_DEPTH:
                    raise ValueError(f"the SVG repeats itself: more than {MOST_DRAWN:,} elements would be drawn")
            counts[number] = (drawn, depth)
            return counts[number]

        count(0, 0)


def _unzipped(data: bytes) -> bytes:
    if data[:2] != b"\x1f\x8b":
        return data
    try:
        return zlib.decompressobj(31).decompress(data, MOST_BYTES + 1)
    except zlib.error as error:
        raise ValueError(f"a broken svgz file: {error}") from None


# ------------------------------------------------------------------------------------------------- rendering

# The worker: requests and answers have a length in front. It ends with its input.
_WORKER = """
import signal, struct, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
except Exception:
    pass
import resvg_py
take, give = sys.stdin.buffer, sys.stdout.buffer
give.write(b"!")
give.flush()
while len(head := take.read(9)) == 9:
    length, side, fonts = struct.unpack(">II?", head)
    text = take.read(length).decode()
    try:
        answer, good = resvg_py.svg_to_bytes(
            svg_string=text, width=side, height=side, skip_system_fonts=not fonts, dpi=96
        ), True
    except BaseException as error:
        answer, good = str(error).encode(), False
    give.write(struct.pack(">?I", good, len(answer)) + bytes(answer))
    give.flush()
""".replace("MEMORY", str(MOST_MEMORY))


class _Worker:
    """A process that renders one drawing after the other."""

    def __init__(self):
        if not sys.executable:
            raise ValueError("SVG can't be rendered here: there is no Python executable to do it in")
        # -P: modules are not looked for in the current folder.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        if self._within(STARTING_SECONDS, lambda: self.process.stdout.read(1)) != b"!":
            self.stop()
            raise ValueError("SVG can't be rendered here: resvg does not start")

    def render(self, text: str, side: int, fonts: bool) -> tuple[bool, bytes] | None:
        """Whether it went well, and a PNG file or the reason; `None` from a process that had to be stopped."""
        data = text.encode()

        def ask() -> tuple[bool, bytes] | None:
            self.process.stdin.write(struct.pack(">II?", len(data), side, fonts) + data)
            self.process.stdin.flush()
            head = self.process.stdout.read(5)
            if len(head) < 5:
                return None
            good, length = struct.unpack(">?I", head)
            answer = self.process.stdout.read(length)
            return (good, answer) if len(answer) == length else None

        try:
            return self._within(MOST_SECONDS, ask)
        except OSError:
            return None

    def _within(self, seconds: float, work: Any) -> Any:
        timer = threading.Timer(seconds, self.process.kill)
        timer.daemon = True
        timer.start()
        try:
            return work()
        finally:
            timer.cancel()

    def stop(self):
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            try:
                stream.close()
            except OSError:  # what was not sent
                pass


class _Workers:
    """Workers at rest: a thread takes one, or starts one, and puts it back."""

    def __init__(self):
        self.lock, self.idle = threading.Lock(), []

    def take(self) -> _Worker:
        with self.lock:
            if self.idle:
                return self.idle.pop()
        return _Worker()

    def put(self, worker: _Worker):
        with self.lock:
            if len(self.idle) < (os.cpu_count() or 1):
                self.idle.append(worker)
                return
        worker.stop()

    def stop(self):
        while self.idle:
            self.idle.pop().stop()


_workers = _Workers()
atexit.register(lambda: _workers.stop())


def _forget_workers():
    """In a forked process: the workers are the parent's, and two must not talk to one."""
    global _workers
    _kept.append(_workers)  # not deleted, which would look after processes that are not ours
    _workers = _Workers()


_kept: list[_Workers] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_workers)


def _render(text: str, side: int, fonts: bool) -> bytes:
    worker = _workers.take()
    answer = worker.render(text, side, fonts)
    if answer is None:
        worker.stop()
        raise ValueError(f"the SVG is refused: it takes more than {MOST_SECONDS} seconds or too much memory")
    _workers.put(worker)
    good, content = answer
    if not good:
        raise ValueError(f"a broken SVG: {content.decode(errors='replace')[:200]}")
    return content


__all__ = ["INSTALL_RESVG", "SVG_SIDE", "SVG_SUFFIXES", "can_render_svg", "looks_like_svg", "render_svg"]
