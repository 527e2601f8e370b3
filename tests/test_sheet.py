"""Contact sheets: nothing is distorted, cut in silence or drawn over something else."""

import numpy as np
from PIL import Image

from mome.data.sheet import GAP, Cell, Grid, Line, Row, contact_sheet

RED = (255, 0, 0)


def box_of(sheet: Image.Image, colour=RED) -> tuple[int, int, int, int]:
    """Left, top, width and height of all that has a colour."""
    rows, columns = np.nonzero((np.asarray(sheet) == colour).all(axis=2))
    return columns.min(), rows.min(), columns.max() - columns.min() + 1, rows.max() - rows.min() + 1


def test_pictures_keep_their_shape_and_stand_in_the_middle():
    for size, expected in (((200, 50), (64, 16)), ((10, 20), (32, 64)), ((64, 64), (64, 64)), ((999, 1), (64, 1))):
        sheet = contact_sheet([Grid([Cell(Image.new("RGB", size, RED))], columns=3, side=64)])
        left, top, width, height = box_of(sheet)
        assert (width, height) == expected and sheet.size == (64 + GAP, 64 + GAP)
        assert abs(2 * left + width - sheet.width) <= 1 and abs(2 * top + height - sheet.height) <= 1


def test_pictures_may_be_arrays_and_transparent():
    array = np.zeros((8, 8, 3), np.uint8) + np.array(RED, np.uint8)
    assert box_of(contact_sheet([Grid([Cell(array)], 1, 8)]))[2:] == (8, 8)
    clear = contact_sheet([Grid([Cell(Image.new("RGBA", (8, 8), (255, 0, 0, 0)))], 1, 8)])
    assert np.asarray(clear).min() == 255


def test_lines_are_wrapped_between_words_and_what_is_cut_says_so():
    line = Line("a red dot on the left of a very blue line", most=2)
    whole = Line(line.text, most=99).wrapped(100)
    assert " ".join(whole) == line.text and all(line.font.getlength(each) <= 100 for each in whole)
    cut = line.wrapped(100)
    assert len(cut) == 2 and cut[0] == whole[0] and cut[1].endswith("…")
    assert whole[1].startswith(cut[1].rstrip("…").strip())
    assert Line("x" * 99, most=3).wrapped(60)[2].endswith("…")
    assert Line("a\n b").wrapped(100) == ["a b"] and Line("").wrapped(100) == [""]


def test_no_cell_draws_into_another():
    long = Line("word " * 40, colour="#ff0000", most=4)
    for beside in (False, True):
        cells = [Cell(Image.new("RGB", (9, 9), "white"), [long]), Cell(Image.new("RGB", (9, 9), "white"))]
        sheet = contact_sheet([Grid(cells, 1, 64, width=160, beside=beside), Grid(cells[1:], 1, 64)])
        pixels = np.asarray(sheet)
        below = 64 + GAP if beside else 64 + GAP + 4 * long.step
        assert (pixels[below + GAP :] == 255).all(), "the second cell is empty"
        assert sheet.width == 160 and (pixels[:, 160 - GAP // 2 :] == 255).all()


def test_blocks_stand_one_below_the_other_and_a_line_may_stand_for_a_picture():
    picture = Image.new("RGB", (30, 30), RED)
    row = Row([Line("an insect", bar=0.5)], [picture] * 3, side=30, frame=True)
    grid = Grid([Cell(Line("gone", "#666666"), [Line("0.5")])], 2, 30)
    sheet = contact_sheet([Line("title", size=16), grid, row])
    heights = [contact_sheet([each]).height for each in (Line("title", size=16), grid, row)]
    assert sheet.height == sum(heights)
    left, top, width, height = box_of(sheet)
    assert top >= heights[0] + heights[1] and height == 30 and width == 3 * 30 + 2 * (GAP // 2)
    assert box_of(sheet, (0x64, 0x70, 0xD8))[2] == 100  # half of the label's 200 pixels
    assert contact_sheet([]).size == (1, 1) and contact_sheet([Grid([], 3, 30)]).height == 1
