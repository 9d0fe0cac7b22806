"""Scenes: coloured shapes, each with a small code on a pale plate."""

import math

from .pages import (
    COLORS,
    PITCH,
    SHAPES,
    Canvas,
    Entry,
    Page,
    PageSettings,
    Style,
    layout_of_split,
    to_box,
    union,
)


LARGE_DIGIT = 1 / 21
"""Share of the page that a digit takes where the coarse view is to show it."""


def _polygon(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    """Corners of a shape around its centre (x, y)."""
    if shape == "square":
        s = 0.88 * r
        return [(x - s, y - s), (x + s, y - s), (x + s, y + s), (x - s, y + s)]
    if shape == "diamond":
        return [(x, y - 1.1 * r), (x + 1.1 * r, y), (x, y + 1.1 * r), (x - 1.1 * r, y)]
    if shape == "triangle":
        return [(x, y - 1.15 * r), (x + 1.1 * r, y + 0.8 * r), (x - 1.1 * r, y + 0.8 * r)]
    if shape == "cross":
        a, b = 0.42 * r, 1.05 * r
        right = [(a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b)]
        left = [(-u, -v) for u, v in right]
        return [(x + u, y + v) for u, v in right + left]
    points = []
    for corner in range(10):
        reach = 1.15 * r if corner % 2 == 0 else 0.52 * r
        angle = -math.pi / 2 + corner * math.pi / 5
        points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    return points


def _draw_shape(
    canvas: Canvas, color: str, shape: str, x: float, y: float, r: float, width: float, large: bool
) -> Entry:
    """Draw one shape of radius `r` around (x, y) with a code of digits `width` pixels wide."""
    fill = canvas.tint(color)
    if shape == "circle":
        corners = [(x - r, y - r), (x + r, y + r)]
        canvas.draw.ellipse([x - r, y - r, x + r, y + r], fill=fill)
    else:
        corners = _polygon(shape, x, y, r)
        canvas.draw.polygon(corners, fill=fill)
    xs, ys = [p[0] for p in corners], [p[1] for p in corners]
    mark = to_box((min(xs), min(ys), max(xs), max(ys)))
    text, height = canvas.new_code(short=large), PITCH * width
    span = canvas.text_span(text, width)
    left, right = x - span / 2, x + span / 2
    plate = [left - 0.35 * width, y - height / 2 - 0.4 * width, right + 0.35 * width, y + height / 2 + 0.4 * width]
    canvas.draw.rectangle(plate, fill=(canvas.rng.randint(238, 255),) * 3)
    code, digit_boxes, code_box = canvas.code(left, y, width, canvas.ink(), text)
    return Entry(
        name=f"{color} {shape}",
        code=code,
        code_box=code_box,
        digit_boxes=tuple(digit_boxes),
        digit_width=width,
        mark=mark,
        box=union(mark, code_box),
        line=code_box,
        color=color,
        shape=shape,
        large=large,
    )


def _slots(canvas: Canvas, style: Style, count: int) -> list[tuple[float, float, float, float]]:
    """Cells (x, y, width, height) of the shapes, in reading order: of a 3 × 3 grid, or 4 × 2 where layouts shift."""
    columns, rows = (4, 2) if style.shifted else (3, 3)
    while True:
        places = sorted(canvas.rng.sample(range(columns * rows), count))
        if layout_of_split(("scene", places), style.split):
            break
    width, height = canvas.image.width / columns, canvas.image.height / rows
    return [(slot % columns * width, slot // columns * height, width, height) for slot in places]


def draw_scene(canvas: Canvas, settings: PageSettings, style: Style) -> Page:
    """Two to seven shapes, every (colour, shape) pair at most once."""
    rng = canvas.rng
    pairs = [(color, shape) for color in COLORS for shape in SHAPES]
    rng.shuffle(pairs)
    small = canvas.long * rng.uniform(*settings.digit_width)
    count = rng.randint(*settings.items)
    large_one = rng.randrange(count) if rng.random() < settings.large_share else -1
    entries = []
    for place, (left, top, width, height) in enumerate(_slots(canvas, style, count)):
        large = place == large_one
        digit = canvas.long * LARGE_DIGIT if large else small
        room = min(width, height) / 2
        low, high = (0.7, 0.78) if large else (0.55, 0.74)
        r = min(max(rng.uniform(low, high) * room, 3.1 * small), 0.8 * room)
        slack_x, slack_y = max(0.0, width / 2 - 1.2 * r), max(0.0, height / 2 - 1.2 * r)
        x = left + width / 2 + rng.uniform(-slack_x, slack_x)
        y = top + height / 2 + rng.uniform(-slack_y, slack_y)
        entries.append(_draw_shape(canvas, *pairs[place], x, y, r, digit, large))
    absent = tuple(f"{color} {shape}" for color, shape in pairs[count:])
    return Page("scene", canvas.image, tuple(entries), absent=absent)
