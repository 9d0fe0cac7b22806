import base64
import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from modeling_qzoom.processing_images_qzoom import (
    ImageSlot,
    covered_rectangle,
    images_by_row,
    load_rgb,
    match_placeholders,
    place_images,
    source_tensor,
)


def pixels_of(image, **kwargs) -> np.ndarray:
    """(H, W, 3) of an image after loading."""
    loaded = load_rgb(ImageSlot(image, 0), **kwargs)
    assert loaded.mode == "RGB"
    return np.array(loaded)


def encoded(image: Image.Image, kind: str = "PNG", **kwargs) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **kwargs)
    return buffer.getvalue()


def noise(width: int = 7, height: int = 5) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_paths_bytes_base64_and_data_urls_read_the_same_pixels(tmp_path):
    image = noise()
    (tmp_path / "a.png").write_bytes(encoded(image))
    text = base64.b64encode(encoded(image)).decode()
    broken_up = "\n".join(text[start : start + 60] for start in range(0, len(text), 60))
    data_url = f"data:image/png;base64,{text}"
    for given in (tmp_path / "a.png", str(tmp_path / "a.png"), encoded(image), text, broken_up, data_url):
        assert np.array_equal(pixels_of(given), np.array(image))


def test_the_callers_image_is_not_changed():
    image = noise()
    before = image.tobytes()
    source_tensor(load_rgb(ImageSlot(image, 0))).zero_()
    assert image.tobytes() == before


def test_source_tensor_is_contiguous_channels_first():
    tensor = source_tensor(noise(7, 5))
    assert tensor.shape == (3, 5, 7) and tensor.dtype == torch.uint8 and tensor.is_contiguous()
    assert torch.equal(tensor.permute(1, 2, 0), torch.from_numpy(np.array(noise(7, 5))))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = noise(6, 4)
    # what a camera stores so that a viewer, obeying the tag, shows `upright`
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright if orientation == 1 else upright.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(pixels_of(encoded(stored, exif=exif)), np.array(upright))


def test_grey_palette_and_one_bit():
    grey = Image.fromarray(np.array([[0, 100, 255]], np.uint8))
    assert np.array_equal(pixels_of(grey)[..., 1], [[0, 100, 255]])
    assert np.array_equal(pixels_of(grey.point(lambda level: level > 50, "1"))[0, :, 2], [0, 255, 255])
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert pixels_of(palette).tolist() == [[[10, 20, 30], [40, 50, 60]]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La"])
def test_transparency_shows_white(mode):
    half = Image.new("LA", (2, 1), (0, 255))
    half.putpixel((1, 0), (0, 0))
    image = half.convert("RGBA").convert(mode) if mode in ("RGBA", "RGBa") else half.convert(mode)
    assert pixels_of(image).tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_palette_with_alpha_shows_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30])
    image.putalpha(Image.fromarray(np.array([[255, 0]], np.uint8)))
    assert image.mode == "PA" and pixels_of(image).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_half_transparent_is_mixed_with_white():
    assert pixels_of(Image.new("RGBA", (1, 1), (200, 0, 0, 128)))[0, 0] == pytest.approx([227, 127, 127], abs=1)


def test_transparent_colours_of_png_show_white():
    grey = Image.fromarray(np.array([[0, 9]], np.uint8))
    assert pixels_of(encoded(grey, transparency=9)).tolist() == [[[0, 0, 0], [255, 255, 255]]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert pixels_of(encoded(palette, transparency=1)).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_cmyk():
    jpeg = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)
    assert Image.open(io.BytesIO(jpeg)).mode == "CMYK"
    assert pixels_of(jpeg)[4, 4] == pytest.approx([255, 0, 0], abs=3)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bits_are_scaled_not_clipped(mode):
    levels = np.array([[0, 257, 32896, 65535]])
    dtype = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
    image = Image.frombytes(mode, (4, 1), levels.astype(dtype).tobytes())
    assert pixels_of(image)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_float_mode():
    image = Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32))
    assert image.mode == "F" and pixels_of(image)[0, :, 0].tolist() == [0, 128, 255]


def test_arrays_of_either_layout_and_kind():
    levels = np.array(noise())
    for array in (
        levels,
        levels.transpose(2, 0, 1),
        levels.astype(np.int64),
        levels.astype(np.float32),
        (levels / 255).astype(np.float64),
        levels.astype(np.uint16) * 257,
        torch.from_numpy(levels.copy()),
        torch.from_numpy(levels.copy()).permute(2, 0, 1).float() / 255,
    ):
        assert np.array_equal(pixels_of(array), levels)


def test_bfloat16_tensor():
    grey = torch.tensor([[0.0, 0.25, 1.0]], dtype=torch.bfloat16)
    assert pixels_of(grey)[0, :, 0].tolist() == [0, 64, 255]


def test_grey_boolean_and_alpha_arrays():
    assert pixels_of(np.array([[True, False]]))[0, :, 0].tolist() == [255, 0]
    assert pixels_of(np.full((4, 5, 1), 7, np.uint8)).shape == (4, 5, 3)
    rgba = np.zeros((4, 5, 4), np.uint8)  # wholly transparent
    assert (pixels_of(rgba) == 255).all() and (pixels_of(rgba.transpose(2, 0, 1)) == 255).all()


def test_layout_may_be_told():
    ambiguous = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    assert pixels_of(ambiguous).shape == (4, 3, 3)  # channels first, as everywhere in transformers
    assert np.array_equal(pixels_of(ambiguous, data_format="channels_last"), ambiguous)
    assert pixels_of(np.zeros((4, 9, 3), np.uint8)).shape == (4, 9, 3)  # four rows, not four channels


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[-1.7, 2.1]]), "floats from -1.7 to 2.1"),
        (np.array([[np.nan, 0.0]]), "floats from nan"),
        (np.array([[-1, 3]]), "integers from -1 to 3"),
        (np.array([[70000]]), "integers from 70000"),
        (np.array([["a"]]), "holds <U1 values"),
        (np.zeros((2, 3, 4, 5), np.uint8), r"has shape \(2, 3, 4, 5\)"),
        (np.zeros((7, 5, 6), np.uint8), r"shape \(7, 5, 6\)"),
        (np.zeros((0, 5, 3), np.uint8), "no pixels: its size is 5 × 0"),
    ],
)
def test_unusable_arrays(array, message):
    with pytest.raises(ValueError, match=f"image 0 .*{message}"):
        pixels_of(array)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "is a NoneType"),
        (3, "is a int"),
        ("/no/such/file.png", "neither a URL, nor an existing file, nor base64 text: '/no/such/file.png'"),
        (b"no image at all", "cannot be read: UnidentifiedImageError"),
        (base64.b64encode(b"no image").decode(), "cannot be read: UnidentifiedImageError"),
        (encoded(noise(64, 64))[:2000], "cannot be read"),
        (Image.new("RGB", (0, 5)), "no pixels: its size is 0 × 5"),
    ],
)
def test_unusable_images_are_named(given, message):
    with pytest.raises(ValueError, match=r"^image 3 \(row 1, image 0\) .*" + message):
        load_rgb(ImageSlot(given, 3, 1, 0))


def test_long_base64_is_not_echoed():
    with pytest.raises(ValueError) as caught:
        pixels_of("?" * 5000)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("given", [noise(7, 5), encoded(noise(7, 5)), np.array(noise(7, 5))])
def test_limit_of_pixels(given):
    assert pixels_of(given, max_pixels=35).shape == (5, 7, 3)
    with pytest.raises(ValueError, match="7 × 5 = 35 pixels, more than max_source_pixels = 34.*max_source_pixels ="):
        pixels_of(given, max_pixels=34)


def test_limit_is_checked_before_decoding():
    # only the header exists: unpacking would fail in another way
    header = encoded(noise(64, 64))[:100]
    with pytest.raises(ValueError, match="64 × 64 = 4096 pixels"):
        pixels_of(header, max_pixels=4095)


def test_pils_own_bomb_error_and_warning(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(ValueError, match=r"image 0 is larger than PIL's own limit .*MAX_IMAGE_PIXELS = 20"):
        pixels_of(encoded(noise(9, 5)), max_pixels=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="PIL's own limit"):
            pixels_of(encoded(noise(7, 5)), max_pixels=1000)


def test_text_chunk_bombs_are_named(monkeypatch):
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("comment", "a" * 500_000, zip=True)
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 1000)
    with pytest.raises(ValueError, match="image 0 cannot be read"):
        pixels_of(encoded(noise(), pnginfo=chunks))


def test_images_by_row():
    a, b, c = "abc"
    assert images_by_row(None) == ([], None)
    assert images_by_row(a) == ([a], None)
    assert images_by_row((a, b)) == ([a, b], None)
    assert images_by_row([[a], [], [b, c]]) == ([a, b, c], [1, 0, 2])
    assert images_by_row([a, None, [b, c]]) == ([a, b, c], [1, 0, 2])
    assert images_by_row([[], []]) == ([], [0, 0])
    stack = np.zeros((2, 4, 5, 3))
    assert len(images_by_row(stack)[0]) == len(images_by_row([stack])[0]) == 2
    assert images_by_row([[stack], [np.zeros((4, 5, 3))]])[1] == [2, 1]


def test_places():
    assert [str(slot) for slot in place_images(["a", "b", "c"], [1, 0, 2])] == [
        "image 0 (row 0, image 0)",
        "image 1 (row 2, image 0)",
        "image 2 (row 2, image 1)",
    ]
    assert str(place_images(["a"], None)[0]) == "image 0"


def test_match_placeholders():
    assert match_placeholders(None, None, 3, "@") is None
    assert match_placeholders(["@", "", "@@"], None, 3, "@") == [1, 0, 2]
    with pytest.raises(ValueError, match=r"2 image placeholder\(s\) @ \(row 0: 0, row 1: 2\), but 1 image"):
        match_placeholders(["", "@@"], None, 1, "@")
    with pytest.raises(ValueError, match=r"^row 1 has 2 image placeholder\(s\) @ but 1 image\(s\)\.$"):
        match_placeholders(["@", "@@"], [1, 1], 2, "@")
    with pytest.raises(ValueError, match="images has 1 rows, but there are 2 prompts"):
        match_placeholders(["@", ""], [1], 1, "@")


@pytest.mark.parametrize(
    ("size", "settings", "expected"),
    [
        ((60, 40), {}, (0, 0, 60, 40)),
        ((60, 40), {"do_resize": True, "size": {"height": 20, "width": 20}}, (0, 0, 60, 40)),
        ((60, 40), {"do_pad": True}, (0, -10, 60, 50)),
        ((40, 61), {"do_pad": True, "do_resize": True, "size": {"shortest_edge": 20}}, (-10, 0, 51, 61)),
        ((60, 40), {"do_resize": True, "size": 20, "do_center_crop": True, "crop_size": 20}, (10, 0, 50, 40)),
        (
            (640, 480),
            {"do_resize": True, "size": {"shortest_edge": 336}, "do_center_crop": True}
            | {"crop_size": {"height": 336, "width": 336}},
            (80, 0, 560, 480),
        ),
        ((30, 20), {"do_center_crop": True, "crop_size": 40}, (-5, -10, 35, 30)),
        # at least one pixel, whichever way its ends round
        ((1, 8), {"do_resize": True, "size": 20, "do_center_crop": True, "crop_size": 20}, (0, 4, 1, 5)),
        ((12, 1), {"do_resize": True, "size": 30, "do_center_crop": True, "crop_size": 30}, (6, 0, 7, 1)),
        ((12, 1), {"do_resize": True, "size": 30, "do_center_crop": True, "crop_size": 6}, (6, 0, 7, 1)),
    ],
)
def test_covered_rectangle(size, settings, expected):
    assert covered_rectangle(*size, settings) == expected


def test_unknown_resize_is_refused():
    with pytest.raises(ValueError, match="a resize to .* is unknown"):
        covered_rectangle(4, 4, {"do_resize": True, "size": {"longest_edge": 3}})
