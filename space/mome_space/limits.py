"""What a visitor may ask for. Everything beyond is refused in words, before any heavy work."""

import html

import gradio as gr

FILE_BYTES = 10 * 2**20
PIXELS = 40_000_000  # checked in the header of a picture, before it is unpacked
PICTURES = 8  # in one request for captions
TEXT_CHARACTERS = 200
LABELS = 100
TEMPLATES = 8
LABEL_TEXTS = 400  # labels times templates
CANDIDATES = 5
HITS = 96

QUEUE = 100  # requests that may wait
QUICK_REQUESTS = 2  # of search, classification and routing at a time
CAPTION_REQUESTS = 1
SESSIONS = 500  # whose state is kept
SESSION_SECONDS = 30 * 60
UPLOAD_SECONDS = 60 * 60  # how long an uploaded file stays


def refuse(message: str) -> gr.Error:
    """The error that a visitor sees. Gradio shows messages as HTML, so that what a visitor typed must be escaped."""
    return gr.Error(html.escape(message, quote=False), title="That didn't work", duration=12, print_exception=False)


def quoted(text: str, characters: int = 40) -> str:
    """What a visitor typed, short enough for a message."""
    text = " ".join(text.split())
    return f"“{text[:characters]}…”" if len(text) > characters else f"“{text}”"


def checked_text(value: object, what: str, required: bool = False, characters: int = TEXT_CHARACTERS) -> str:
    """One line of text from a visitor."""
    text = " ".join(str(value or "").split())
    if required and not text:
        raise refuse(f"{what} is empty: type a few words.")
    if len(text) > characters:
        raise refuse(f"{what} has {len(text):,} characters, at most {characters} are read: shorten it.")
    return text


def checked_lines(value: object, what: str, count: int) -> list[str]:
    """Texts from a visitor, one a line, without empty ones and repetitions."""
    text = "\n".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value or "")
    if len(text) > count * (TEXT_CHARACTERS + 1):
        raise refuse(f"{what} have {len(text):,} characters: shorten them.")
    lines = [checked_text(line, f"{what}: a line") for line in text.splitlines()]
    lines = list(dict.fromkeys(line for line in lines if line))
    if len(lines) > count:
        raise refuse(f"{len(lines)} {what.lower()} are too many: give at most {count}.")
    return lines


def checked_number(value: object, what: str, lowest: float, highest: float) -> float:
    """A number from a visitor; `None` or what is no number is refused as well."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not lowest <= value <= highest:
        raise refuse(f"{what} is {quoted(str(value))}: choose from {lowest:g} to {highest:g}.")
    return value


def checked_choices(value: object, what: str, choices: list[str]) -> list[str]:
    """Several of some choices from a visitor."""
    chosen = [] if value is None else [value] if isinstance(value, str) else list(value)
    for each in chosen:
        if each not in choices:
            raise refuse(f"{what} {quoted(str(each))} is not in the gallery: choose from the list.")
    return chosen
