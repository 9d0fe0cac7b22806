"""Forms (a label in large print, its value in small print) and dense text (a keyword, then lines of small print)."""

from ...zoom_regions_qzoom import Box
from .pages import (
    COLORS,
    FILLER,
    WORDS,
    Canvas,
    Entry,
    Page,
    PageSettings,
    Style,
    layout_of_split,
    to_box,
    union,
)


LETTER = (1 / 30, 1 / 26)
"""Share of the page that a letter of a label takes: legible in the coarse view."""
BAR = 0.06


def labels_of(canvas: Canvas, style: Style, kind: str, layout: str, count: int) -> tuple[list[str], tuple[str, ...]]:
    """Labels in reading order, and those that are left over."""
    while True:
        words = canvas.rng.sample(WORDS, len(WORDS))
        if layout_of_split((kind, layout, words[:2]), style.split):
            return words[:count], tuple(words[count:])


def top_bar(canvas: Canvas) -> tuple[Box, str]:
    """A coloured bar at the top."""
    color = canvas.rng.choice(list(COLORS))
    box = to_box((0, 0, canvas.image.width, BAR * canvas.image.height))
    canvas.draw.rectangle(box, fill=canvas.tint(color))
    return box, color


def cells_of(
    canvas: Canvas, columns: int, count: int, heights: tuple[float, float] = (0.13, 0.2)
) -> list[tuple[float, float, float, float]]:
    """Cells (x, y, width, height) below the bar, row by row.

    Args:
        heights: Range of a cell's height as a share of the page's; less where they would not fit.
    """
    top, rows = (BAR + 0.03) * canvas.image.height, -(-count // columns)
    height = min((canvas.image.height - top) / rows, canvas.rng.uniform(*heights) * canvas.image.height)
    width = canvas.image.width / columns
    return [(place % columns * width, top + place // columns * height, width, height) for place in range(count)]


def labelled_entry(
    word: str,
    mark: Box,
    printed: tuple[str, list[Box], Box],
    width: float,
    line: Box | None = None,
    large: bool = False,
) -> Entry:
    """An entry of a label and a code, from what `Canvas.word` and `Canvas.code` gave."""
    code, digit_boxes, code_box = printed
    line = line or code_box
    return Entry(
        name=word,
        code=code,
        code_box=code_box,
        digit_boxes=tuple(digit_boxes),
        digit_width=width,
        mark=mark,
        box=union(mark, line),
        line=line,
        word=word,
        large=large,
    )


def draw_form(canvas: Canvas, settings: PageSettings, style: Style) -> Page:
    """Two to seven fields in one column (value beside its label) or as a table of cells (value below its label)."""
    rng = canvas.rng
    layout = rng.choice(("right", "three") if style.shifted else ("list", "cells"))
    count = rng.randint(max(2, settings.items[0]), settings.items[1])
    words, absent = labels_of(canvas, style, "form", layout, count)
    width = canvas.long * rng.uniform(*settings.digit_width)
    letter = canvas.long * rng.uniform(*LETTER)
    span, bar = canvas.code_span(width), top_bar(canvas)
    columns = {"cells": 2, "three": 3}.get(layout, 1)
    value_share = rng.uniform(0.42, 0.66)
    entries, margin = [], 0.04 * canvas.image.width
    if canvas.look is not None:  # plain pages keep their labels, of which a few reach the value
        room = {"list": value_share, "right": 0.36}.get(layout, 1 / columns) * canvas.image.width - 1.5 * margin
        letter = canvas.fitting(words, letter, room)
    for word, (left, top, wide, tall) in zip(words, cells_of(canvas, columns, count), strict=True):
        if columns == 1:
            x_value = left + margin if layout == "right" else left + value_share * wide + rng.uniform(0, 0.1) * wide
            x_label = left + 0.62 * wide if layout == "right" else left + margin
            y_label = y_value = top + tall / 2
        else:
            letter = min(letter, canvas.image.width / columns / 7)
            x_label, y_label = left + margin, top + 0.3 * tall
            x_value, y_value = left + margin + rng.uniform(0, 0.3) * wide, top + 0.7 * tall
            canvas.draw.rectangle([left, top, left + wide, top + tall], outline=(190,) * 3, width=2)
        mark = canvas.word(word, x_label, y_label, letter)
        rule = y_value + 1.1 * width
        canvas.draw.line([x_value - 0.3 * width, rule, x_value + span + 0.3 * width, rule], fill=(150,) * 3, width=2)
        entries.append(labelled_entry(word, mark, canvas.code(x_value, y_value, width, canvas.ink()), width))
    return Page("form", canvas.image, tuple(entries), bar, absent)


def text_line(
    canvas: Canvas, left: float, right: float, middle: float, width: float, holds_code: bool = False
) -> tuple[str, list[Box], Box] | None:
    """A line of small print from `left` to about `right`, with a code between two words if it is to hold one."""
    rng, size = canvas.rng, canvas.size_of(width)
    font, span = canvas.sized_font(size), canvas.code_span(width)
    # the code starts anywhere in the line, so that the coarse view cannot know where
    code_at = rng.uniform(left, right - span - width) if holds_code else right
    x, printed, ink = left, None, canvas.ink()
    while True:
        if holds_code and printed is None and x >= code_at:
            printed = canvas.code(x, middle, width, ink)
            x += canvas.text_span(printed[0], width) + 0.5 * size
        word = rng.choice(FILLER)
        end = x + font.getlength(word)
        if holds_code and printed is None and end > right - span:
            code_at = x
            continue
        if end > right:
            return printed
        canvas.draw.text((x, middle), word, font=font, fill=ink, anchor="lm")
        x = end + 0.45 * size


def draw_text(canvas: Canvas, settings: PageSettings, style: Style) -> Page:
    """Two to six entries: a keyword in large print, beside it two lines of small print, one of which holds a code."""
    rng = canvas.rng
    count = rng.randint(max(2, settings.items[0]), min(6, settings.items[1]))
    layout = "right" if style.shifted else "left"
    words, absent = labels_of(canvas, style, "text", layout, count)
    width = canvas.long * rng.uniform(*settings.digit_width)
    letter = canvas.long * rng.uniform(*LETTER)
    bar, page_width = top_bar(canvas), canvas.image.width
    key = 5.6 * letter  # room for the longest keyword
    letter = canvas.fitting(words, letter, 0.96 * key)  # in wide fonts it would leave the page
    length = rng.uniform(0.44, 0.56) * page_width
    entries = []
    for word, (left, top, _, tall) in zip(words, cells_of(canvas, 1, count), strict=True):
        margin = 0.03 * page_width
        x_text = left + margin if layout == "right" else left + margin + key
        mark = canvas.word(
            word, left + page_width - key if layout == "right" else left + margin, top + tall / 2, letter
        )
        holder, printed = rng.randrange(2), None
        for line in range(2):
            y = top + tall / 2 + (line - 0.5) * min(2.6 * width, 0.42 * tall)
            printed = text_line(canvas, x_text, x_text + length, y, width, line == holder) or printed
        assert printed is not None  # one of the two lines holds the code
        box = printed[2]
        reach = to_box((x_text, top + tall / 2 - 2.2 * width, x_text + length, top + tall / 2 + 2.2 * width))
        entries.append(labelled_entry(word, mark, printed, width, union(box, reach)))
    return Page("text", canvas.image, tuple(entries), bar, absent)
