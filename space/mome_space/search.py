"""The search tab: words, a picture, or a hit → the nearest pictures of the gallery."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from . import markup
from .gallery import Entry, Index
from .limits import (
    HITS,
    QUICK_REQUESTS,
    SESSION_SECONDS,
    TEXT_CHARACTERS,
    checked_choices,
    checked_number,
    checked_text,
    quoted,
    refuse,
)
from .style import picture_input
from .uploads import read_picture
from .zero_gpu import on_gpu

API_HITS = 24
EXAMPLE_QUERIES = ["circus tent", "a part of the body", "animal", "laptop computer", "hospital", "listening to music"]
EMPTY = "Type what you look for, or drop a picture to find others like it."

PROGRESS = gr.Progress()  # Gradio finds it as a default value, and shows what it is told


@dataclass
class Query:
    """What a visitor looks for: its embedding (projection_dim,), its description, and the hit it came from."""

    vector: np.ndarray
    shown: str
    entry: int | None = None


class Search:
    """What the tab and its API endpoint do.

    Args:
        index: the gallery and its embeddings.
    """

    def __init__(self, index: Index):
        self.index, self.gallery, self.engine = index, index.gallery, index.engine
        self.embed_texts, self.embed_images = on_gpu(index.engine.embed_texts), on_gpu(index.engine.embed_images)

    # Queries.

    def of_words(self, words: Any) -> Query:
        words = checked_text(words, "The search", required=True)
        self.engine.check_words(words, "The search")
        if self.engine.count_tokens(words) > self.engine.max_tokens:
            gr.Warning("The text is longer than the model reads: only its beginning was searched for.")
        return Query(self.embed_texts([words])[0], quoted(words))

    def of_picture(self, upload: Any) -> Query:
        picture = read_picture(upload, self.engine.rgb)
        return Query(self.embed_images([picture])[0], "your picture")

    def of_hit(self, number: Any) -> Query:
        if not isinstance(number, int) or not 0 <= number < len(self.gallery):
            raise refuse("This picture is not in the gallery: search again.")
        return Query(self.index.embeddings.images[number], quoted(self.gallery.entries[number].name), number)

    def find(self, query: Query, sets: Any, styles: Any, count: Any) -> list[tuple[Entry, float]]:
        sets = checked_choices(sets, "The set", self.gallery.sets)
        styles = checked_choices(styles, "The style", self.gallery.styles)
        count = int(checked_number(count, "The number of hits", 1, HITS))
        return self.index.search(query.vector, sets, styles, count, without=query.entry)

    # What the page calls.

    def show_words(self, words, sets, styles, count, progress=PROGRESS):
        self.index.wait(progress)
        return self._shown(self.of_words(words), sets, styles, count)

    def show_picture(self, upload, sets, styles, count, progress=PROGRESS):
        self.index.wait(progress)
        return self._shown(self.of_picture(upload), sets, styles, count)

    def show_like(self, sets, styles, count, event: gr.EventData):
        self.index.wait()
        return self._shown(self.of_hit(getattr(event, "index", None)), sets, styles, count)

    def show_again(self, query, sets, styles, count):
        if query is None:
            return query, markup.nothing(EMPTY)
        return self._shown(query, sets, styles, count)

    def _shown(self, query: Query, sets, styles, count) -> tuple[Query, str]:
        return query, self.render(query, self.find(query, sets, styles, count))

    # What programs call.

    def search(
        self,
        query: str | None = None,  # the defaults make them optional in clients; those of the rest stand in the page
        image: dict | None = None,
        sets: Sequence[str] = (),
        styles: Sequence[str] = (),
        count: int = API_HITS,
    ) -> list[dict]:
        """The gallery's pictures nearest to words, or else to an image: names, sets, licences and cosines."""
        self.index.wait()
        found = self.find(self.of_words(query) if image is None else self.of_picture(image), sets, styles, count)
        return [
            {
                "name": entry.name,
                "names": entry.texts,
                "score": round(score, 4),
                "id": entry.id,
                "set": entry.set,
                "style": entry.style,
                "author": entry.author,
                "license": entry.license,
                "image": markup.data_uri(entry.png),
            }
            for entry, score in found
        ]

    # What the page shows.

    def render(self, query: Query, hits: list[tuple[Entry, float]]) -> str:
        detail = "" if query.entry is None else self._detail(self.gallery.entries[query.entry])
        if not hits:
            return f'<div class="mome">{detail}</div>' + markup.nothing("No picture has this set and this style.")
        many = f"{len(hits)} of {len(self.gallery):,} pictures, nearest to {query.shown} first"
        cards = "".join(self._card(entry, score) for entry, score in hits)
        return (
            f'<div class="mome">{detail}<p class="mome-status" role="status">{markup.escape(many)}</p>'
            f'<ul class="mome-hits" aria-label="Hits">{cards}</ul></div>'
        )

    @staticmethod
    def _card(entry: Entry, score: float) -> str:
        name, uri = markup.escape(entry.name), markup.data_uri(entry.png)
        return (
            f'<li class="mome-hit"><button type="button" data-pick="{entry.index}" title="Find pictures like this" '
            f'aria-label="{name}, of {markup.escape(entry.set)}, similarity {score:.2f}: find pictures like it">'
            f'<span class="mome-tile"><img src="{uri}" alt=""></span><span class="mome-name">{name}</span>'
            f'<span class="mome-set">{markup.escape(entry.set)}</span></button>'
            f'<div class="mome-hit-actions"><span class="mome-score" title="cosine, -1 to 1">{score:.2f}</span>'
            f'<button type="button" class="mome-icon-button" data-copy="{name}" title="Copy the name" '
            f'aria-label="Copy the name {name}">{markup.COPY_ICON}</button>'
            f'<a class="mome-icon-button" href="{uri}" download="{markup.escape(entry.file_name)}" '
            f'title="Download the picture" aria-label="Download {name}">{markup.DOWNLOAD_ICON}</a></div></li>'
        )

    @staticmethod
    def _detail(entry: Entry) -> str:
        name, uri = markup.escape(entry.name), markup.data_uri(entry.png)
        others = ", ".join(entry.texts[1:])
        also = f"<p>also: {markup.escape(others)}</p>" if others else ""
        license = markup.link(entry.license_url, entry.license)
        return (
            f'<section class="mome-detail" aria-label="The picture that is searched by"><span class="mome-tile">'
            f'<img src="{uri}" alt="{name}"></span><div class="mome-detail-text"><h2>{name}</h2>{also}'
            f"<p>Set: {markup.link(entry.set_url, entry.set)} by {markup.escape(entry.author)}</p>"
            f"<p>Licence: {license} · Style: {markup.escape(entry.style)} · <code>{markup.escape(entry.id)}</code></p>"
            f'<div class="mome-actions">{markup.copy_button(entry.name, "Copy name")}'
            f"{markup.copy_button(entry.credit, 'Copy credit')}"
            f'<a class="mome-action" href="{uri}" download="{markup.escape(entry.file_name)}">{markup.DOWNLOAD_ICON}'
            f"Download PNG</a></div></div></section>"
        )


def search_tab(index: Index, examples: list[Path]):
    """The tab's components and events; to be called within `gr.Blocks`."""
    search = Search(index)
    count = (
        f"{len(index.gallery):,} pictures of {len(index.gallery.sets)} open icon sets; the model never saw one of them"
    )
    gr.Markdown(f"Find pictures by meaning: {count}.", elem_classes="mome-note")
    state = gr.State(None, time_to_live=SESSION_SECONDS)
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280):
            words = gr.Textbox(
                label="What do you look for?",
                placeholder="a circus tent",
                max_length=TEXT_CHARACTERS,
                submit_btn="Search",
                elem_id="search-words",
            )
            picture = picture_input(
                "Or a picture to search by", "The picture that is searched by", "search-picture", height=200
            )
            with gr.Accordion("Filters", open=False, elem_id="search-filters"):
                sets = gr.Dropdown(index.gallery.sets, multiselect=True, label="Icon sets", elem_id="search-sets")
                styles = gr.Dropdown(index.gallery.styles, multiselect=True, label="Styles", elem_id="search-styles")
                hits = gr.Slider(6, HITS, 30, step=6, label="Hits", elem_id="search-count")
            tried = gr.Examples([[each] for each in EXAMPLE_QUERIES], [words], label="Try words", elem_id="search-try")
            dropped = gr.Examples(
                [[str(each)] for each in examples], [picture], label="Try a picture", elem_id="search-try-picture"
            )
        with gr.Column(scale=2, min_width=320):
            results = markup.output("search-results", EMPTY)
    options = {
        "outputs": [state, results],
        "preprocess": False,
        "api_visibility": "private",
        "concurrency_id": "quick",
        "concurrency_limit": QUICK_REQUESTS,
        "show_progress_on": results,
    }
    filters = [sets, styles, hits]
    words.submit(search.show_words, [words, *filters], **options)
    picture.upload(search.show_picture, [picture, *filters], **options)
    tried.load_input_event.then(search.show_words, [words, *filters], **options)
    dropped.load_input_event.then(search.show_picture, [picture, *filters], **options)
    results.pick(search.show_like, filters, **options)
    for each in filters:
        each.input(search.show_again, [state, *filters], **options, trigger_mode="always_last")
    with gr.Row(visible=False):
        gr.Button().click(
            search.search,
            [gr.Textbox(label="query"), gr.Image(label="image"), *_api_filters(index)],
            gr.JSON(label="hits"),
            preprocess=False,
            api_name="search",
            concurrency_id="quick",
            concurrency_limit=QUICK_REQUESTS,
        )


def _api_filters(index: Index) -> list[gr.components.Component]:
    return [
        gr.Dropdown(index.gallery.sets, value=[], multiselect=True, label="sets"),
        gr.Dropdown(index.gallery.styles, value=[], multiselect=True, label="styles"),
        gr.Number(API_HITS, precision=0, label="count"),
    ]
