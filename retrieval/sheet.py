"""Contact sheets of hits: an HTML page that needs no other file, or one PNG."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..configuration_mome import quoted
from ..data.sheet import GREY, Cell, Grid, Line, contact_sheet
from ..errors import RetrievalError, first_line
from .corpus import open_image
from .index import Hit

SIDE, COLUMNS = 180, 5
SUFFIXES = (".html", ".htm", ".png")

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 14px system-ui, sans-serif; margin: 24px; color: #222; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); gap: 16px; }}
figure {{ margin: 0; }} img {{ width: 180px; height: 180px; object-fit: contain; border: 1px solid #ddd; }}
.text {{ width: 160px; height: 160px; padding: 10px; border: 1px solid #ddd; overflow: hidden; }}
figcaption {{ overflow-wrap: anywhere; }} small {{ color: #666; }}
</style></head><body><h1>{title}</h1><main>
{figures}
</main></body></html>
"""
FIGURE = "<figure>{picture}<figcaption>{score:.3f} {text}<br><small>{id}</small></figcaption></figure>"


def write_sheet(hits: Sequence[Hit], path: str | Path, title: str = "") -> Path:
    """Writes hits with their pictures; one whose picture is gone is shown by its reason.

    Args:
        hits: of one query, best first.
        path: ends in `.html` or `.png`.
        title: what was asked for.

    Raises:
        RetrievalError: another ending, or a place that can't be written to.
    """
    path = checked_sheet(path)
    thumbnails = [_thumbnail(hit) for hit in hits]
    try:
        if path.suffix.lower() == ".png":
            _picture(hits, thumbnails, title).save(path)
        else:
            path.write_text(_page(hits, thumbnails, title), encoding="utf-8")
    except OSError as error:
        raise RetrievalError(f"sheet {quoted(path)} can't be written: {error.strerror or first_line(error)}") from None
    return path


def checked_sheet(path: str | Path) -> Path:
    """The name of a sheet, before any work is done for it.

    Raises:
        RetrievalError: it doesn't end in one of `SUFFIXES`.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise RetrievalError(f"sheet {quoted(path)}: choose a name that ends in {' or '.join(SUFFIXES)}")
    return path


def _thumbnail(hit: Hit) -> Image.Image | str:
    """The picture of a hit, or the words to show in its place."""
    if hit.modality != "image":
        return hit.text or ""
    if not hit.uri:
        return "no uri"
    try:
        image = open_image(hit.uri)
    except ValueError as error:
        return first_line(error)
    image.thumbnail((SIDE, SIDE))
    return image


def _page(hits: Sequence[Hit], thumbnails: Sequence[Image.Image | str], title: str) -> str:
    figures = []
    for hit, shown in zip(hits, thumbnails):
        if isinstance(shown, str):
            picture = f'<div class="text">{html.escape(shown)}</div>'
        else:
            data = io.BytesIO()
            shown.save(data, "PNG")
            source = base64.b64encode(data.getvalue()).decode()
            picture = f'<img alt="{html.escape(hit.id)}" src="data:image/png;base64,{source}">'
        text = html.escape(hit.text or "") if not isinstance(shown, str) else ""
        figures.append(FIGURE.format(picture=picture, score=hit.score, text=text, id=html.escape(hit.id)))
    return PAGE.format(title=html.escape(title), figures="\n".join(figures))


def _picture(hits: Sequence[Hit], thumbnails: Sequence[Image.Image | str], title: str) -> Image.Image:
    cells = []
    for hit, shown in zip(hits, thumbnails):
        in_place = isinstance(shown, str)
        label = Line(f"{hit.score:.3f} {'' if in_place else hit.text or hit.id}", size=14, most=3)
        cells.append(Cell(Line(shown, GREY, size=14, most=9) if in_place else shown, [label]))
    return contact_sheet([Line(title, size=14), Grid(cells, COLUMNS, SIDE)])


__all__ = ["checked_sheet", "write_sheet"]
