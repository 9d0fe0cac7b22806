"""Drawn pages with known answers: coloured shapes that carry a small three-digit code.

A page has two to seven shapes, every (colour, shape) pair at most once, in a jittered 3 x 3 layout. Colours, shapes
and their number survive a strong reduction of the page; the codes do not. Everything is a function of the seed.
"""

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont


COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (38, 150, 70),
    "blue": (40, 90, 210),
    "yellow": (240, 205, 40),
    "purple": (130, 55, 175),
    "orange": (240, 130, 30),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "diamond", "cross")
CODE_LENGTH = 3
GLYPH_ASPECT = 0.57
"""Width of a digit of PIL's default font divided by the font size."""

Box = tuple[int, int, int, int]

CODE_QUESTIONS = (
    "what is the code on the {color} {shape}?",
    "which number is on the {color} {shape}?",
    "read the {color} {shape}.",
)
COLOR_QUESTION = "what color is the {shape}?"
SHAPE_QUESTION = "what shape is {color}?"
COUNT_QUESTION = "how many shapes are there?"


@dataclass(frozen=True)
class PageSettings:
    """How pages are drawn; the default is the distribution the published figures are measured on.

    Args:
        side: Range of the longer page side in pixels.
        aspect: Range of the shorter side divided by the longer one.
        items: Range of the number of shapes.
        digit_width: Range of a digit's width as a share of the page's longer side.
    """

    side: tuple[int, int] = (1024, 1400)
    aspect: tuple[float, float] = (0.8, 1.0)
    items: tuple[int, int] = (2, 7)
    digit_width: tuple[float, float] = (1 / 66, 1 / 58)


@dataclass(frozen=True)
class Item:
    """One shape of a page; boxes are (x0, y0, x1, y1) in page pixels, exclusive end."""

    color: str
    shape: str
    code: str
    box: Box
    code_box: Box
    digit_boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Page:
    """A drawn page and what is on it."""

    image: Image.Image
    items: tuple[Item, ...]
    digit_width: float


@dataclass(frozen=True)
class Question:
    """A question about a page, with its answer and the place that holds it.

    Args:
        text: The question.
        answer: The exact expected answer.
        kind: "fine" where the answer is a code, "coarse" otherwise.
        box: The code's box of a fine question, the shape's of a coarse one, the whole page for counting.
        item: Index into `Page.items`, None for counting.
    """

    text: str
    answer: str
    kind: str
    box: Box
    item: int | None


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


def _draw_item(
    draw: ImageDraw.ImageDraw, rng: random.Random, color: str, shape: str, x: float, y: float, r: float, width: float
) -> Item:
    """Draw one shape of radius `r` with a code of digits `width` pixels wide on a pale plate at its centre."""
    fill = tuple(min(255, max(0, c + rng.randint(-14, 14))) for c in COLORS[color])
    if shape == "circle":
        corners = [(x - r, y - r), (x + r, y + r)]
        draw.ellipse([x - r, y - r, x + r, y + r], fill=fill)
    else:
        corners = _polygon(shape, x, y, r)
        draw.polygon(corners, fill=fill)
    xs, ys = [p[0] for p in corners], [p[1] for p in corners]
    code = "".join(str(rng.randrange(10)) for _ in range(CODE_LENGTH))
    pitch, height = 1.3 * width, 1.3 * width
    left, top = x - pitch * CODE_LENGTH / 2, y - height / 2
    right, bottom = left + pitch * CODE_LENGTH, top + height
    plate = [left - 0.35 * width, top - 0.4 * width, right + 0.35 * width, bottom + 0.4 * width]
    draw.rectangle(plate, fill=(rng.randint(238, 255),) * 3)
    font = ImageFont.load_default(max(4.0, width / GLYPH_ASPECT))
    ink = (rng.randint(0, 50),) * 3
    ink_box = font.getbbox("0", anchor="mm")
    # the anchor is the middle of the line, which is not the middle of a digit
    middle = y - (ink_box[1] + ink_box[3]) / 2
    digit_boxes = []
    for place, digit in enumerate(code):
        centre = left + pitch * (place + 0.5)
        draw.text((centre, middle), digit, font=font, fill=ink, anchor="mm")
        digit_boxes.append(_to_box((centre - pitch / 2, top, centre + pitch / 2, bottom)))
    return Item(
        color=color,
        shape=shape,
        code=code,
        box=_to_box((min(xs), min(ys), max(xs), max(ys))),
        code_box=_to_box((left, top, right, bottom)),
        digit_boxes=tuple(digit_boxes),
    )


def _to_box(edges: tuple[float, float, float, float]) -> Box:
    x0, y0, x1, y1 = edges
    return math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1)


def draw_page(seed: int, settings: PageSettings | None = None) -> Page:
    """Draw the page of a seed; the same seed and settings give the same page."""
    settings = settings or PageSettings()
    rng = random.Random(seed)
    long = rng.randint(*settings.side)
    short = round(long * rng.uniform(*settings.aspect))
    width, height = (long, short) if rng.random() < 0.5 else (short, long)
    paper = rng.randint(228, 255)
    image = Image.new("RGB", (width, height), tuple(min(255, paper + rng.randint(-6, 6)) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(0, 4)):
        ends = [rng.randrange(width), rng.randrange(height), rng.randrange(width), rng.randrange(height)]
        draw.line(ends, fill=(paper - 30,) * 3, width=max(1, long // 400))
    digit_width = long * rng.uniform(*settings.digit_width)
    pairs = [(color, shape) for color in COLORS for shape in SHAPES]
    count = rng.randint(*settings.items)
    items = []
    cell_w, cell_h = width / 3, height / 3
    for slot, (color, shape) in zip(rng.sample(range(9), count), rng.sample(pairs, count), strict=True):
        room = min(cell_w, cell_h) / 2
        r = min(max(rng.uniform(0.55, 0.74) * room, 3.1 * digit_width), 0.8 * room)
        slack_x, slack_y = max(0.0, cell_w / 2 - 1.2 * r), max(0.0, cell_h / 2 - 1.2 * r)
        x = (slot % 3 + 0.5) * cell_w + rng.uniform(-slack_x, slack_x)
        y = (slot // 3 + 0.5) * cell_h + rng.uniform(-slack_y, slack_y)
        items.append(_draw_item(draw, rng, color, shape, x, y, r, digit_width))
    return Page(image=image, items=tuple(items), digit_width=digit_width)


def code_question(page: Page, index: int, template: str = CODE_QUESTIONS[0]) -> Question:
    """The fine question about the code of item `index`."""
    item = page.items[index]
    text = template.format(color=item.color, shape=item.shape)
    return Question(text, item.code, "fine", item.code_box, index)


def coarse_questions(page: Page) -> list[Question]:
    """Every coarse question that has exactly one answer on the page."""
    colors, shapes = [item.color for item in page.items], [item.shape for item in page.items]
    questions = [Question(COUNT_QUESTION, str(len(page.items)), "coarse", (0, 0, *page.image.size), None)]
    for index, item in enumerate(page.items):
        if shapes.count(item.shape) == 1:
            text = COLOR_QUESTION.format(shape=item.shape)
            questions.append(Question(text, item.color, "coarse", item.box, index))
        if colors.count(item.color) == 1:
            text = SHAPE_QUESTION.format(color=item.color)
            questions.append(Question(text, item.shape, "coarse", item.box, index))
    return questions


def page_questions(page: Page, seed: int) -> tuple[Question, Question]:
    """One fine and one coarse question about a page, a function of the seed."""
    rng = random.Random(seed)
    fine = code_question(page, rng.randrange(len(page.items)), rng.choice(CODE_QUESTIONS))
    return fine, rng.choice(coarse_questions(page))


def question_corpus() -> list[str]:
    """Every question and answer that can occur, for building a tokenizer."""
    texts = [COUNT_QUESTION, *COLORS, *SHAPES, *(str(n) for n in range(10))]
    for color in COLORS:
        texts.append(SHAPE_QUESTION.format(color=color))
        for shape in SHAPES:
            texts += [template.format(color=color, shape=shape) for template in CODE_QUESTIONS]
    return texts + [COLOR_QUESTION.format(shape=shape) for shape in SHAPES]
