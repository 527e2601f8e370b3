"""Pieces of HTML that several tabs show. Whatever comes from data or visitors is escaped here."""

import base64
import html
import io

import gradio as gr
from PIL import Image

from .style import SCRIPT

COPY_ICON = (
    '<svg viewBox="0 0 24 24" fill="none" stroke="currentColor" stroke-width="2" aria-hidden="true">'
    '<rect x="9" y="9" width="11" height="11" rx="2"/><path d="M5 15V6a2 2 0 0 1 2-2h9"/></svg>'
)
DOWNLOAD_ICON = (
    '<svg viewBox="0 0 24 24" fill="none" stroke="currentColor" stroke-width="2" aria-hidden="true">'
    '<path d="M12 4v11m0 0-4-4m4 4 4-4M5 20h14"/></svg>'
)
THUMBNAIL_SIDE = 256


def output(elem_id: str, empty: str) -> gr.HTML:
    """A place for results; until there are any it says what to do."""
    return gr.HTML(nothing(empty), elem_id=elem_id, js_on_load=SCRIPT, apply_default_css=False)


def nothing(message: str) -> str:
    return f'<div class="mome"><div class="mome-empty" role="status">{escape(message)}</div></div>'


def escape(text: str) -> str:
    """For text and for attributes. Gradio renders HTML through a JavaScript template: `${` must not open one."""
    return html.escape(text, quote=True).replace("$", "&#36;").replace("{", "&#123;").replace("}", "&#125;")


def data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def thumbnail(picture: Image.Image, size: tuple[int, int] | None = None) -> str:
    """A picture as a data URI, small, or squeezed to `size`."""
    picture = picture.convert("RGB")
    if size is None:
        picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    else:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return data_uri(buffer.getvalue())


def copy_button(text: str, label: str = "Copy", announce: str | None = None) -> str:
    """A button with words that copies `text`; `announce` is what a screen reader calls it."""
    name = f' aria-label="{escape(announce)}"' if announce else ""
    return (
        f'<button type="button" class="mome-action" data-copy="{escape(text)}"{name}>{COPY_ICON}'
        f"<span data-said>{escape(label)}</span></button>"
    )


def link(url: str, text: str) -> str:
    """A link that opens beside the Space; only to the web."""
    if not url.startswith(("https://", "http://")):
        return escape(text)
    return f'<a href="{escape(url)}" target="_blank" rel="noopener noreferrer">{escape(text)}</a>'
