"""A zoom report as a picture: heat map and box over the image, the crop beside it, a caption below.

Where the image is not at hand, as a drawing in text or as HTML for a notebook.
"""

import base64
import html
import io
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .errors_qzoom import InputError
from .processing_images_qzoom import ImageSlot, load_rgb


# cold to hot; brightness rises evenly, so the order survives grey-scale print and colour blindness
_HEAT_COLOURS = ((46, 20, 92), (122, 30, 126), (205, 56, 92), (247, 134, 46), (253, 231, 122))
_BOX_COLOUR = (0, 190, 255)
_DARK, _LIGHT, _MUTED = (22, 25, 32), (240, 243, 248), (160, 168, 182)
_ZOOMED, _NOT_ZOOMED = (72, 199, 116), (138, 146, 160)
_SMALLEST_SIDE = 384  # display pixels; smaller images are enlarged so that box and caption stay legible
_GUTTER = 12
_COLD = 0.06  # share of the peak below which a place is not tinted

_REASONS = {
    "gate_open": "zoomed: the gate asked for a closer look",
    "forced": "zoomed: without asking the gate",
    "gate_closed": "not zoomed: the gate found the coarse view enough",
    "gate_nan": "not zoomed: the gate computed no number (NaN)",
    "off": 'not zoomed: zoom="never"',
    "no_image": "not zoomed: no image in this row",
    "video": "not zoomed: videos pass unzoomed",
    "empty_map": "not zoomed: nothing stands out in the heat map",
    "map_nan": "not zoomed: the heat map holds no numbers (NaN)",
    "crop_failed": "not zoomed: the crop could not be made",
}

# why the gate was not asked, where the report knows whether there is one
_FORCED: dict[bool | None, str] = {
    True: 'zoomed: zoom="always", the gate was not asked',
    False: "zoomed: this checkpoint has no gate",
}
# which rule left the map empty, where it is not the threshold
_EMPTY = {
    "region_min_peak": "not zoomed: the heat map's peak is below region_min_peak",
    "region_min_contrast": "not zoomed: the heat map's peak over its mean is below region_min_contrast",
}
_SHADES = "·░▒▓█"  # cold to hot; the first is a place that an overlay does not tint
_WIDEST_MAP = 48  # cells in a line of text
_CELL_SIDE, _LARGEST_MAP = 24, 384  # display pixels of the heat map in a notebook


def heat_colours(values: np.ndarray) -> np.ndarray:
    """Colours of values in [0, 1]: (...) floats → (..., 3) floats in [0, 255]."""
    stops = np.linspace(0.0, 1.0, len(_HEAT_COLOURS))
    channels = np.array(_HEAT_COLOURS, dtype=np.float32).T
    return np.stack([np.interp(values, stops, channel) for channel in channels], axis=-1)


def _display_scale(width: int, height: int, max_side: int) -> float:
    longest = max(width, height)
    return min(max(1.0, _SMALLEST_SIDE / longest), max_side / longest)


def _scaled(image: Image.Image, scale: float) -> Image.Image:
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)


def _spread(heatmap: np.ndarray, size: tuple[int, int], rectangle: tuple[float, ...]) -> np.ndarray:
    """A (h, w) map over the part of an image that it covers.

    Args:
        size: (width, height) of the image.
        rectangle: (x0, y0, x1, y1) that the map covers, in the image's pixels; may reach beyond it.

    Returns:
        (height, width) in [0, 1]; 0 where the map covers nothing.
    """
    width, height = size
    x0, y0, x1, y1 = rectangle
    cells_y, cells_x = heatmap.shape
    padded = np.pad(heatmap, 2, mode="edge")  # interpolation needs neighbours beyond the outer cells
    # centres of the pixels, in cells
    x = (np.arange(width) + 0.5 - x0) / (x1 - x0) * cells_x
    y = (np.arange(height) + 0.5 - y0) / (y1 - y0) * cells_y
    inside = ((y >= 0) & (y <= cells_y))[:, None] & ((x >= 0) & (x <= cells_x))[None, :]
    columns = _interpolation(x + 1.5, cells_x + 4)
    rows = _interpolation(y + 1.5, cells_y + 4)
    return np.where(inside, rows @ padded @ columns.T, 0.0).clip(0, 1)


def _interpolation(places: np.ndarray, count: int) -> np.ndarray:
    """(n, count) weights that read a vector of `count` values at fractional places, with quadratic B-splines: smooth,
    and never outside the values' range."""
    distance = np.abs(places[:, None] - np.arange(count)[None, :])
    return np.where(distance < 0.5, 0.75 - distance**2, 0.5 * np.maximum(0.0, 1.5 - distance) ** 2)


def _tint(image: Image.Image, heat: np.ndarray, alpha: float) -> Image.Image:
    """Lays (H, W) heat over an image; cold places stay as they are."""
    weight = (alpha * ((heat - _COLD).clip(0) / (1 - _COLD)) ** 0.6)[..., None]
    pixels = np.asarray(image, dtype=np.float32)
    return Image.fromarray(np.rint(pixels * (1 - weight) + heat_colours(heat) * weight).astype(np.uint8))


def _outline(image: Image.Image, box: tuple[float, ...], line: int) -> None:
    """Draws a box with a dark rim, which shows on light and dark ground alike."""
    draw = ImageDraw.Draw(image)
    x0, y0, x1, y1 = box
    # PIL's end is inclusive, and the whole line must stay on the image
    x1, y1 = min(round(x1), image.width) - 1, min(round(y1), image.height) - 1
    x0, y0 = min(round(x0), x1), min(round(y0), y1)
    draw.rectangle((x0, y0, x1, y1), outline=_DARK, width=line + 2)
    if x1 - x0 > 2 and y1 - y0 > 2:
        draw.rectangle((x0 + 1, y0 + 1, x1 - 1, y1 - 1), outline=_BOX_COLOUR, width=line)


def _main_panel(source: Image.Image, report: Any, heat: np.ndarray | None, alpha: float, scale: float) -> Image.Image:
    panel = _scaled(source, scale)
    x_scale, y_scale = panel.width / source.width, panel.height / source.height
    if heat is not None:
        covered = report.grid_box or (0, 0, source.width, source.height)
        rectangle = tuple(edge * factor for edge, factor in zip(covered, (x_scale, y_scale) * 2, strict=True))
        panel = _tint(panel, _spread(heat, panel.size, rectangle), alpha)
    if report.box is not None:
        box = tuple(edge * factor for edge, factor in zip(report.box, (x_scale, y_scale) * 2, strict=True))
        _outline(panel, box, line=max(2, max(panel.size) // 300))
    return panel


def _beside(left: Image.Image, right: Image.Image) -> Image.Image:
    height = max(left.height, right.height)
    both = Image.new("RGB", (left.width + _GUTTER + right.width, height), _DARK)
    both.paste(left, (0, (height - left.height) // 2))
    both.paste(right, (left.width + _GUTTER, (height - right.height) // 2))
    return both


def caption_lines(report: Any) -> list[str]:
    """What a report says, in two short lines.

    Args:
        report: a `ZoomReport` or anything with its attributes.
    """
    happened = _REASONS.get(report.reason, f"{'zoomed' if report.zoomed else 'not zoomed'}: {report.reason}")
    has_gate = getattr(report, "has_gate", None)
    if report.reason == "forced":
        happened = _FORCED.get(has_gate, happened)
    happened = _EMPTY.get(getattr(report, "empty_rule", None) or "", happened)
    gate = "gate not run" if report.gate_probability is None else f"gate {report.gate_probability:.3f}"
    details = ["no gate" if has_gate is False else gate, f"{report.coarse_tokens} coarse tokens"]
    if report.crop_tokens:
        details.append(f"{report.crop_tokens} crop tokens")
    if report.box is not None:
        details.append("box {}, {} to {}, {}".format(*report.box))
    if report.heatmap is not None and report.heatmap.numel():
        details.append(f"heat peak {float(report.heatmap.max()):.2f}")
    return [happened, " | ".join(details)]


def _relative_heat(report: Any) -> np.ndarray | None:
    """A report's (h, w) heat map as shares of its peak; None where nothing stands out."""
    if report.heatmap is None or report.reason == "empty_map" or not report.heatmap.numel():
        return None
    peak = float(report.heatmap.max())
    return report.heatmap.float().numpy() / peak if peak > 0 else None


def _smaller(heat: np.ndarray, widest: int) -> np.ndarray:
    """The map in fewer cells, each the hottest of those that it stands for, so that small regions survive."""
    step = -(-heat.shape[1] // widest)
    if step == 1:
        return heat
    rows, columns = (-(-side // step) for side in heat.shape)
    padded = np.zeros((rows * step, columns * step), dtype=heat.dtype)
    padded[: heat.shape[0], : heat.shape[1]] = heat
    return padded.reshape(rows, step, columns, step).max(axis=(1, 3))


def text_picture(report: Any, *, widest: int = _WIDEST_MAP) -> str:
    """What a report says, and its heat map as a drawing in text: two characters a cell, hotter is darker.

    The map is scaled to its peak, as in `overlay`. A row that was not looked at has no drawing; a map in which nothing
    stands out is all dots.

    Args:
        report: a `ZoomReport` or anything with its attributes.
        widest: most cells in a line; larger maps are drawn in fewer cells.

    Raises:
        InputError: `widest` is not positive.
    """
    if widest < 1:
        raise InputError(f"widest must be a positive number of cells, got {widest}.")
    lines = caption_lines(report)
    if report.heatmap is not None and report.heatmap.numel():
        heat = _relative_heat(report)
        heat = _smaller(np.zeros(tuple(report.heatmap.shape)) if heat is None else heat, widest)
        share = (heat - _COLD).clip(0) / (1 - _COLD)
        shades = np.ceil(share * (len(_SHADES) - 1)).astype(int)
        lines += ["".join(2 * _SHADES[shade] for shade in row) for row in shades]
    return "\n".join(lines)


def notebook_html(report: Any) -> str:
    """What a notebook shows of a report: its caption, and its heat map alone, since a report keeps no image.

    Args:
        report: a `ZoomReport` or anything with its attributes.
    """
    happened, details = (html.escape(line) for line in caption_lines(report))
    parts = [f"<b>{happened}</b><br>{details}"]
    heat = _relative_heat(report)
    if heat is not None:
        side = max(1, min(_CELL_SIDE, _LARGEST_MAP // max(heat.shape)))
        size = heat.shape[1] * side, heat.shape[0] * side
        colours = heat_colours(_spread(heat, size, (0, 0, *size)))
        encoded = io.BytesIO()
        Image.fromarray(np.rint(colours).astype(np.uint8)).save(encoded, "PNG")
        data = base64.b64encode(encoded.getvalue()).decode()
        parts.append(f'<br><img alt="heat map" src="data:image/png;base64,{data}">')
    return f"<div>{''.join(parts)}</div>"


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Breaks a text between words so that its lines fit a width in pixels; a longer word stays whole."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _with_caption(picture: Image.Image, lines: list[str], colour: tuple[int, int, int]) -> Image.Image:
    """Adds a bar below, at least wide enough to be read, its text wrapped."""
    width = max(picture.width, _SMALLEST_SIDE)
    size = min(22, max(13, width // 48))
    font = ImageFont.load_default(size)
    margin, dot = size, size * 2 // 3
    room = width - 3 * margin - dot
    wrapped = [(part, index) for index, line in enumerate(lines) for part in _wrap(line, font, room)]
    step = round(size * 1.5)
    bar = Image.new("RGB", (width, margin + step * len(wrapped) + margin // 2), _DARK)
    draw = ImageDraw.Draw(bar)
    draw.ellipse((margin, margin + size // 4, margin + dot, margin + size // 4 + dot), fill=colour)
    for row, (part, index) in enumerate(wrapped):
        place = (2 * margin + dot, margin + row * step)
        draw.text(place, part, font=font, fill=_LIGHT if index == 0 else _MUTED)
    framed = Image.new("RGB", (width, picture.height + bar.height), _DARK)
    framed.paste(picture, ((width - picture.width) // 2, 0))
    framed.paste(bar, (0, picture.height))
    return framed


def overlay(
    image: Any,
    report: Any,
    *,
    alpha: float = 0.6,
    max_side: int = 1024,
    show_crop: bool = True,
    show_caption: bool = True,
) -> Image.Image:
    """Draws what the model looked at.

    The heat map is scaled to its peak (the caption gives its value). A row that was not zoomed, or whose map is empty,
    shows the plain image and a caption that says so.

    Args:
        image: the source image the report is about, a PIL image or uint8 tensor (3, H, W); with several images in the
            row, the one at `report.image_index`.
        report: a `ZoomReport` or anything with its attributes.
        alpha: opacity of the hottest cell, in [0, 1].
        max_side: longest side of the image in the picture, in pixels.
        show_crop: put the zoomed region beside the image.
        show_caption: add the bar with reason, gate probability and token counts.

    Returns:
        An RGB image: the (scaled) source, with crop and caption if asked for.

    Raises:
        InputError: an option out of range, or a box outside the image, which is then not the one zoomed into.
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha must lie in [0, 1], got {alpha}.")
    if max_side < 1:
        raise InputError(f"max_side must be a positive number of pixels, got {max_side}.")
    source = load_rgb(ImageSlot(image, index=report.image_index or 0))
    if report.box is not None:
        x0, y0, x1, y1 = report.box
        if not (0 <= x0 < x1 <= source.width and 0 <= y0 < y1 <= source.height):
            raise InputError(
                f"box {tuple(report.box)} does not lie in an image of {source.width} × {source.height} pixels: pass "
                "the source image that was zoomed into, in its own resolution."
            )
    scale = _display_scale(*source.size, max_side)
    picture = _main_panel(source, report, _relative_heat(report), alpha, scale)
    if show_crop and report.box is not None:
        crop = source.crop(report.box)
        crop = _scaled(crop, min(picture.width / crop.width, picture.height / crop.height))
        _outline(crop, (0, 0, *crop.size), line=max(2, max(picture.size) // 300))
        picture = _beside(picture, crop)
    if show_caption:
        picture = _with_caption(picture, caption_lines(report), _ZOOMED if report.zoomed else _NOT_ZOOMED)
    return picture
