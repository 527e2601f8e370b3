"""Contact sheets: pictures with lines of text, drawn as one image.

contact_sheet([Line("a red dot", size=16), Grid(cells, columns=5), Row((Line("an insect"),), images)])

heading ─────────── Line
┌────┐ ┌────┐
│    │ │    │ ───── Grid: a picture and its lines below it or beside it, cell by cell
└────┘ └────┘
label  ▢ ▢ ▢ ▢ ──── Row: lines on the left, pictures or a text on the right
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..processing_mome import load_rgb_image

GAP = 12  # around every picture, half of it on each side
GREY, FAINT, BAR_COLOUR, BAR_HEIGHT = "#666666", "#dddddd", "#6470d8", 8


@dataclass(frozen=True)
class Line:
    """A text in one colour and size.

    Args:
        text: wrapped between words; ends in "…" where it doesn't fit.
        size: of the font, in pixels.
        most: as many lines as it may take.
        bar: a share, 0 to 1, drawn as a bar below the text.
    """

    text: str
    colour: str = "black"
    size: int = 13
    most: int = 1
    bar: float | None = None

    @property
    def font(self) -> ImageFont.FreeTypeFont:
        return _font(self.size)

    @property
    def step(self) -> int:
        """From one line of text to the next."""
        return round(1.3 * self.size)

    def height(self, width: int) -> int:
        return self.step * len(self.wrapped(width)) + (0 if self.bar is None else BAR_HEIGHT + 2)

    def wrapped(self, width: int) -> list[str]:
        """The text in lines of at most `width` pixels, `most` of them."""
        lines = [""]
        for word in self.text.split():
            longer = f"{lines[-1]} {word}".strip()
            if self.font.getlength(longer) <= width:
                lines[-1] = longer
                continue
            lines += [""] if lines[-1] else []
            for letter in word:  # a word that is wider than the line is broken
                if self.font.getlength(lines[-1] + letter) > width and lines[-1]:
                    lines.append("")
                lines[-1] += letter
        if len(lines) > self.most:
            lines = lines[: self.most]
            while lines[-1] and self.font.getlength(f"{lines[-1]}…") > width:
                lines[-1] = lines[-1].rpartition(" ")[0] or lines[-1][:-1]
            lines[-1] += "…"
        return lines

    def draw(self, pen: ImageDraw.ImageDraw, left: int, top: int, width: int) -> int:
        """Draws the lines and returns where the next one begins."""
        for text in self.wrapped(width):
            pen.text((left, top), text, fill=self.colour, font=self.font)
            top += self.step
        if self.bar is None:
            return top
        pen.rectangle((left, top, left + self.bar * (width - 1), top + BAR_HEIGHT - 1), fill=BAR_COLOUR)
        return top + BAR_HEIGHT + 2


@dataclass(frozen=True)
class Cell:
    """A picture and what is written to it.

    Args:
        image: as `load_rgb_image` takes it, or a `Line` in its place.
        lines: below it or beside it, see `Grid`.
    """

    image: Any
    lines: Sequence[Line] = ()


@dataclass(frozen=True)
class Grid:
    """Cells side by side, row by row.

    Args:
        cells: what is shown.
        columns: cells in a row, fewer if there are fewer.
        side: of the square that every picture is fitted into.
        width: of a cell; default: of the picture and a gap.
        beside: lines are to the right of their picture, not below.
        frame: the square has a thin frame.
    """

    cells: Sequence[Cell]
    columns: int
    side: int
    width: int | None = None
    beside: bool = False
    frame: bool = False

    @property
    def cell_width(self) -> int:
        return self.width or self.side + GAP

    @property
    def text_width(self) -> int:
        return self.cell_width - GAP - (self.side + GAP // 2 if self.beside else 0)

    @property
    def rows(self) -> list[Sequence[Cell]]:
        return [self.cells[start : start + self.columns] for start in range(0, len(self.cells), self.columns)]

    def size(self) -> tuple[int, int]:
        return self.cell_width * min(self.columns, len(self.cells)), sum(map(self._row_height, self.rows))

    def _row_height(self, row: Sequence[Cell]) -> int:
        text = max(sum(line.height(self.text_width) for line in cell.lines) for cell in row)
        return GAP + (max(self.side, text) if self.beside else self.side + text)

    def draw(self, sheet: Image.Image, top: int):
        for row in self.rows:
            for place, cell in enumerate(row):
                self._draw_cell(sheet, cell, place * self.cell_width + GAP // 2, top + GAP // 2)
            top += self._row_height(row)

    def _draw_cell(self, sheet: Image.Image, cell: Cell, left: int, top: int):
        pen = ImageDraw.Draw(sheet)
        if isinstance(cell.image, Line):
            cell.image.draw(pen, left, top, self.side)
        else:
            _paste(sheet, cell.image, left, top, self.side, self.frame)
        left, top = (left + self.side + GAP // 2, top) if self.beside else (left, top + self.side + 3)
        for line in cell.lines:
            top = line.draw(pen, left, top, self.text_width)


@dataclass(frozen=True)
class Row:
    """Lines on the left, pictures or a text on the right.

    Args:
        lines: the label.
        images: as `load_rgb_image` takes them.
        text: in place of pictures.
        side: of the square that every picture is fitted into.
        label_width: of the lines.
        text_width: of the text.
        frame: every square has a thin frame.
    """

    lines: Sequence[Line]
    images: Sequence[Any] = ()
    text: Line | None = None
    side: int = 80
    label_width: int = 200
    text_width: int = 560
    frame: bool = False

    def size(self) -> tuple[int, int]:
        label = sum(line.height(self.label_width) for line in self.lines)
        text = self.text.height(self.text_width) if self.text else 0
        images = self.side if self.images else 0
        right = self.text_width if self.text else len(self.images) * (self.side + GAP // 2)
        return self.label_width + 2 * GAP + right, GAP // 2 + max(label, text, images)

    def draw(self, sheet: Image.Image, top: int):
        pen, middle = ImageDraw.Draw(sheet), top + self.size()[1] // 2
        y = middle - sum(line.height(self.label_width) for line in self.lines) // 2
        for line in self.lines:
            y = line.draw(pen, GAP // 2, y, self.label_width)
        left = self.label_width + 2 * GAP
        if self.text:
            self.text.draw(pen, left, middle - self.text.height(self.text_width) // 2, self.text_width)
        for place, image in enumerate(self.images):
            _paste(sheet, image, left + place * (self.side + GAP // 2), middle - self.side // 2, self.side, self.frame)


def contact_sheet(blocks: Sequence[Line | Grid | Row]) -> Image.Image:
    """Headings, grids and rows, one below the other, on white.

    Raises:
        ValueError: a picture that can't be read.
    """
    blocks = [_Heading(block) if isinstance(block, Line) else block for block in blocks]
    sizes = [block.size() for block in blocks]
    width, height = (max(size[0] for size in sizes), sum(size[1] for size in sizes)) if sizes else (1, 1)
    sheet, top = Image.new("RGB", (max(width, 1), max(height, 1)), "white"), 0
    for block, (_, block_height) in zip(blocks, sizes):
        block.draw(sheet, top)
        top += block_height
    return sheet


@dataclass(frozen=True)
class _Heading:
    """A line over the whole sheet, which is as wide as the other blocks make it."""

    line: Line

    def size(self) -> tuple[int, int]:
        return GAP, self.line.step + GAP

    def draw(self, sheet: Image.Image, top: int):
        self.line.draw(ImageDraw.Draw(sheet), GAP // 2, top + GAP // 2, sheet.width - GAP)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _paste(sheet: Image.Image, image: Any, left: int, top: int, side: int, frame: bool):
    """Fits a picture into a square, whole and in the middle of it."""
    image = load_rgb_image(image)
    scale = side / max(image.size)
    width, height = (max(1, round(scale * length)) for length in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    sheet.paste(image, (left + (side - width) // 2, top + (side - height) // 2))
    if frame:
        ImageDraw.Draw(sheet).rectangle((left - 1, top - 1, left + side, top + side), outline=FAINT)


__all__ = ["GREY", "Cell", "Grid", "Line", "Row", "contact_sheet"]
