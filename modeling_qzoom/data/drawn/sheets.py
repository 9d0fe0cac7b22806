"""Kinds of pages that only varied ones have: tables with lines, text in columns, and values in print of every size.

Their questions are worded as those of forms and of dense text, so that the wording does not give the kind away. On
pages of mixed print sizes it does not tell either whether the coarse view is enough.
"""

import math

from .documents import LETTER, cells_of, labelled_entry, labels_of, text_line, top_bar
from .pages import Canvas, Entry, Page, PageSettings, Style, to_box, union


LARGEST = 1 / 19
"""Width of the largest digits on a page of mixed print sizes, as a share of the page."""
LEGIBLE = 1 / 80
"""Width of a digit, as a share, at which `evaluation.witness` reads half of the codes at 64 tokens."""
LONG_CODES = 1 / 40
"""Width of a digit up to which codes may have more than three characters."""
LINE_PITCH, HEAD = 2.4, 2.4
"""Height of a line of small print in widths of a digit, and of a heading in widths of its letters."""
_RULE = (150,) * 3


def _entry_count(canvas: Canvas, settings: PageSettings) -> int:
    return canvas.rng.randint(max(2, settings.items[0]), max(2, settings.items[1]))


def draw_table(canvas: Canvas, settings: PageSettings, style: Style) -> Page:
    """A table with lines: in every row a label in large print, and in small print a code and a word or two."""
    rng, width_of_page = canvas.rng, canvas.image.width
    layout = rng.choice(("words first", "code last") if style.shifted else ("code first", "code between"))
    count = _entry_count(canvas, settings)
    words, absent = labels_of(canvas, style, "table", layout, count)
    width = canvas.long * rng.uniform(*settings.digit_width)
    bar = top_bar(canvas)
    shares = {"label": rng.uniform(0.36, 0.42), "code": rng.uniform(0.26, 0.3)}
    shares["words"] = 0.94 - sum(shares.values())
    order = {
        "code first": ("label", "code", "words"),
        "code between": ("words", "code", "label"),
        "words first": ("words", "label", "code"),
        "code last": ("code", "words", "label"),
    }[layout]
    edges, x = {}, 0.03 * width_of_page
    for name in order:
        edges[name], x = x, x + shares[name] * width_of_page
    right, gap = x, 0.5 * width
    letter = canvas.long * rng.uniform(*LETTER)
    letter = canvas.fitting(words, letter, shares["label"] * width_of_page - 2 * gap)
    places = [(top, tall) for _, top, _, tall in cells_of(canvas, 1, count)]
    thick, striped = max(1, canvas.long // 500), rng.random() < 0.5
    if striped:
        for top, tall in places[::2]:
            shade = tuple(int(0.94 * channel) for channel in canvas.paper)
            canvas.draw.rectangle([edges[order[0]], top, right, top + tall], fill=shade)
    entries = []
    for word, (top, tall) in zip(words, places, strict=True):
        middle = top + tall / 2
        mark = canvas.word(word, edges["label"] + gap, middle, letter)
        text_line(canvas, edges["words"] + gap, edges["words"] + shares["words"] * width_of_page - gap, middle, width)
        slack = shares["code"] * width_of_page - canvas.code_span(width) - 2 * gap
        printed = canvas.code(edges["code"] + gap + rng.uniform(0, max(0.0, slack)), middle, width, canvas.ink())
        entries.append(labelled_entry(word, mark, printed, width))
    bottom = places[-1][0] + places[-1][1]
    for y in [*(top for top, _ in places), bottom]:
        canvas.draw.line([edges[order[0]], y, right, y], fill=_RULE, width=thick)
    for x in [*edges.values(), right]:
        canvas.draw.line([x, places[0][0], x, bottom], fill=_RULE, width=thick)
    return Page("table", canvas.image, tuple(entries), bar, absent)


def draw_columns(canvas: Canvas, settings: PageSettings, style: Style) -> Page:
    """Text in two columns (three where layouts shift): headings in large print, each with lines of small print below.

    One of the lines holds a code. Entries are read down the first column, then down the next.
    """
    rng, (page_width, page_height) = canvas.rng, canvas.image.size
    columns = 3 if style.shifted else 2
    count = _entry_count(canvas, settings)
    words, absent = labels_of(canvas, style, "columns", str(columns), count)
    width = canvas.long * rng.uniform(*settings.digit_width)
    bar, wide, gap = top_bar(canvas), page_width / columns, 0.025 * page_width
    letter = canvas.fitting(words, canvas.long * rng.uniform(*LETTER), wide - 2 * gap)
    per_column = math.ceil(count / columns)
    cells = cells_of(canvas, columns, per_column * columns, (0.2, 0.32))
    letter = min(letter, (cells[0][3] - LINE_PITCH * width) / HEAD)  # room for one line below the heading
    ruled, head = rng.random() < 0.5, HEAD * letter
    entries: list[Entry] = []
    for place, word in enumerate(words):
        column, row = divmod(place, per_column)
        left, top, _, tall = cells[row * columns + column]
        mark = canvas.word(word, left + gap, top + head / 2, letter)
        pitch = LINE_PITCH * width
        lines = max(1, min(3, int((tall - head) / pitch)))
        holder, printed = rng.randrange(lines), None
        for line in range(lines):
            y = top + head + (line + 0.5) * pitch
            printed = text_line(canvas, left + gap, left + wide - gap, y, width, line == holder) or printed
        assert printed is not None  # one of the lines holds the code
        reach = to_box((left + gap, top + head, left + wide - gap, min(top + head + lines * pitch, page_height)))
        entries.append(labelled_entry(word, mark, printed, width, union(printed[2], reach)))
    if ruled:
        bottom = cells[-1][1] + cells[-1][3]
        for column in range(1, columns):
            canvas.draw.line([column * wide, cells[0][1], column * wide, bottom], fill=_RULE, width=2)
    return Page("columns", canvas.image, tuple(entries), bar, absent)


def _print_sizes(canvas: Canvas, settings: PageSettings, count: int) -> list[float]:
    """Widths of a digit by entry, as shares: evenly spread over their logarithm, at least one of them small."""
    least, most = math.log(settings.digit_width[0]), math.log(LARGEST)
    sizes = [math.exp(canvas.rng.uniform(least, most)) for _ in range(count)]
    sizes[canvas.rng.randrange(count)] = canvas.rng.uniform(*settings.digit_width)
    return sizes


def draw_sizes(canvas: Canvas, settings: PageSettings, style: Style) -> Page:
    """Fields whose values are printed in any size, from small print to headlines; labels are large.

    What the settings call small print counts as illegible even where they make it larger than `LEGIBLE`.
    """
    rng, page_width = canvas.rng, canvas.image.width
    layout = "left" if style.shifted else "right"
    count = _entry_count(canvas, settings)
    words, absent = labels_of(canvas, style, "sizes", layout, count)
    bar = top_bar(canvas)
    letter = canvas.fitting(words, canvas.long * rng.uniform(*LETTER), 0.36 * page_width)
    entries = []
    sizes, legible = _print_sizes(canvas, settings, count), max(LEGIBLE, settings.digit_width[1])
    for word, share, (left, top, _, tall) in zip(words, sizes, cells_of(canvas, 1, count), strict=True):
        width, middle = share * canvas.long, top + tall / 2
        text = canvas.new_code(short=share > LONG_CODES)
        slack = 0.52 * page_width - canvas.text_span(text, width)
        x_value = left + (0.04 if layout == "left" else 0.44) * page_width + rng.uniform(0, max(0.0, slack))
        mark = canvas.word(word, left + (0.6 if layout == "left" else 0.04) * page_width, middle, letter)
        printed = canvas.code(x_value, middle, width, canvas.ink(), text)
        entries.append(labelled_entry(word, mark, printed, width, large=share > legible))
    return Page("sizes", canvas.image, tuple(entries), bar, absent)
