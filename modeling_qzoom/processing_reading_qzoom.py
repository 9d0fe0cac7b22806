"""Encoded images, from wherever they lie: opened lazily, bounded in bytes and time, refused by name and format."""

import base64
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import unquote, unquote_to_bytes
from urllib.request import url2pathname

from huggingface_hub.utils import httpx
from PIL import Image, UnidentifiedImageError

from .messages_qzoom import shown


DOWNLOAD_SECONDS = 60  # for the whole of a download: look-up, redirects, headers and body
MAX_DOWNLOAD_BYTES = 512 * 2**20
_BYTES_PER_PIXEL = 8  # 16 bits, four channels, not compressed
_HEADER_BYTES = 64 * 2**20  # colour profiles, thumbnails, text
_HEAD = 1024  # bytes that tell a format

# what a file begins with, what that is, and what to do about it
_DAMAGED = "It is damaged, cut short, or of a variant that this PIL lacks: save it again, or convert it to PNG or JPEG"
_CONVERT = "Convert it to PNG or JPEG"
_RENDER = "Render it to PNG or JPEG first"
_FRAMES = "Take the frames that you need out of it as images"
_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (b"\x89PNG", "a PNG file", _DAMAGED),
    (b"\xff\xd8\xff", "a JPEG file", _DAMAGED),
    (b"GIF8", "a GIF file", _DAMAGED),
    (b"II*\0", "a TIFF or camera raw file", _DAMAGED),
    (b"MM\0*", "a TIFF or camera raw file", _DAMAGED),
    (b"\xff\x0a", "a JPEG XL image", _CONVERT),
    (b"\0\0\0\x0cJXL ", "a JPEG XL image", _CONVERT),
    (b"%PDF", "a PDF document", "Render its pages to PNG or JPEG first"),
    (b"%!PS", "a PostScript document", _RENDER),
    (b"PK\x03\x04", "a ZIP archive", "Unpack it and pass the images in it"),
    (b"\x1f\x8b", "compressed by gzip", "Unpack it first"),
    (b"\x1a\x45\xdf\xa3", "a Matroska or WebM video", _FRAMES),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "Fetch the file with: git lfs pull"),
)
_BRANDS = {
    b"avi": ("an AVIF image", "Convert it to PNG or JPEG, or install a PIL that reads AVIF (pillow 11.3 or newer)"),
    b"hei": ("a HEIC image", "Convert it to PNG or JPEG, or call pillow_heif.register_heif_opener() before"),
    b"hev": ("a HEIC image", "Convert it to PNG or JPEG, or call pillow_heif.register_heif_opener() before"),
    b"mif1": ("a HEIF image", "Convert it to PNG or JPEG, or call pillow_heif.register_heif_opener() before"),
}


class UnusableImage(ValueError):
    """The reason why a source cannot be used, without its place."""


def _recognise(head: bytes) -> tuple[str, str] | None:
    """What a file is by its first bytes, and the way out; None where nothing is known of it."""
    for signature, kind, way_out in _SIGNATURES:
        if head.startswith(signature):
            return kind, way_out
    if head[4:8] == b"ftyp":
        brands = (value for brand, value in _BRANDS.items() if head[8:12].startswith(brand))
        return next(brands, ("a video", _FRAMES))
    if head[:4] == b"RIFF":
        return ("a WebP image", _DAMAGED) if head[8:12] == b"WEBP" else ("a video or sound", _FRAMES)
    text = head.decode("latin-1").lstrip("\xef\xbb\xbf \t\r\n").lower()
    if text.startswith("<") and "<svg" in text:
        return "an SVG drawing", _RENDER
    if text.startswith(("<!doctype html", "<html", "<head", "<body")) or (text.startswith("<") and "<html" in text):
        return "a web page (HTML)", "Pass the address of the image itself, or log in where the page asks for it"
    if text.startswith(("<?xml", "{", "[")):
        return "XML or JSON text", "Look into it: servers answer so when they refuse"
    return None


def _explain(name: str, head: bytes, error: Exception) -> str:
    """Why an image that is there cannot be read."""
    if not head:
        return f"cannot be read: {name} is empty (0 bytes). Save or download it again"
    if not isinstance(error, UnidentifiedImageError):
        return f"cannot be read: {type(error).__name__}: {error} (in {name}). {_DAMAGED}"
    recognised = _recognise(head)
    if recognised is None:
        return f"cannot be read: UnidentifiedImageError: PIL knows no image format like that of {name}. {_CONVERT}"
    return f"cannot be read: {name} is {recognised[0]}. {recognised[1]}"


def _fetch(client: Any, url: str, max_bytes: int, answer: "SimpleQueue[BytesIO | Exception]") -> None:
    """Puts the body of a URL, or what went wrong, into `answer`."""
    too_large = UnusableImage(
        f"cannot be read: {shown(url)} holds more than {max_bytes / 2**20:g} MiB. If you trust it, "
        "download it yourself and pass its path"
    )
    try:
        # nothing to unpack, so that few bytes cannot become many
        with client.stream("GET", url, headers={"Accept-Encoding": "identity"}) as response:
            response.raise_for_status()
            packing = response.headers.get("Content-Encoding", "identity").lower()
            if packing not in ("identity", "gzip", "deflate", ""):
                raise UnusableImage(f"cannot be read: {shown(url)} comes packed ({packing}). Pass it unpacked")
            if packing in ("identity", "") and int(response.headers.get("Content-Length", 0)) > max_bytes:
                raise too_large
            body = BytesIO()
            for chunk in response.iter_bytes():
                body.write(chunk)
                if body.tell() > max_bytes:
                    raise too_large
        answer.put(body)
    except Exception as error:  # handed over to the thread that waits
        answer.put(error)


def download(url: str, client: Any, max_bytes: int, seconds: float) -> BytesIO:
    """The body of a URL, in a thread of its own: nothing else bounds the time of a server that sends byte by byte.

    Args:
        url: an address that the client understands.
        client: an open httpx client, which decides about redirects; closing it ends the thread.
        max_bytes: largest body.
        seconds: for the whole of it: look-up, redirects, headers and body.

    Raises:
        UnusableImage: it cannot be had, is too large, or takes too long.
    """
    answer: SimpleQueue[BytesIO | Exception] = SimpleQueue()
    threading.Thread(target=_fetch, args=(client, url, max_bytes, answer), daemon=True).start()
    try:
        body = answer.get(timeout=seconds)
    except Empty:
        raise UnusableImage(
            f"cannot be read: {shown(url)} was not there after {seconds:g} seconds. Download it yourself and pass "
            "its path"
        ) from None
    if isinstance(body, UnusableImage):
        raise body
    if isinstance(body, Exception):
        raise UnusableImage(f"cannot be read: {type(body).__name__}: {body} ({shown(url)})") from body
    body.seek(0)
    return body


def _download(url: str) -> BytesIO:
    with httpx.Client(timeout=DOWNLOAD_SECONDS, follow_redirects=True) as client:
        return download(url, client, MAX_DOWNLOAD_BYTES, DOWNLOAD_SECONDS)


def _check_bytes(name: str, count: int, max_pixels: int | None) -> None:
    if max_pixels is not None and count > max_pixels * _BYTES_PER_PIXEL + _HEADER_BYTES:
        raise UnusableImage(
            f"cannot be read: {name} has {count} bytes, more than an image of max_source_pixels = {max_pixels} can "
            "have. Downscale it, or raise the limit if you trust it: processor.max_source_pixels = ... (None for none)"
        )


def _file_of_url(url: str) -> str:
    """The path of a file:// URL; paths that were put behind file:// as they are count too."""
    path = url[len("file://") :]
    if path.startswith("localhost/"):
        path = path[len("localhost") :]
    return path if os.path.exists(path) else url2pathname(unquote(path))


def decode_text(text: str, max_pixels: int | None) -> tuple[str, bytes]:
    """What to call a data URL or base64 text, and the bytes that it stands for."""
    header, comma, payload = text.partition(",")
    is_url = bool(comma) and header[:5].lower() == "data:"
    name = f"the data URL {shown(text)}" if is_url else f"the base64 text {shown(text)} (no file has that path)"
    payload = payload if is_url else text
    _check_bytes(name, len(payload) * 3 // 4, max_pixels)
    try:
        return name, base64.b64decode("".join(payload.split()), validate=True)
    except ValueError:
        if is_url and not header.lower().endswith(";base64"):
            return name, unquote_to_bytes(payload)
        raise UnusableImage(
            f"is neither a URL, nor an existing file, nor base64 text: {shown(text)}. Check the path"
        ) from None


def _locate(source: str | os.PathLike | bytes | bytearray, max_pixels: int | None) -> tuple[str, str | BytesIO]:
    """What to call an encoded image in an error, and its path or bytes."""
    if isinstance(source, (bytes, bytearray)):
        name = f"what was passed ({len(source)} bytes)"
        _check_bytes(name, len(source), max_pixels)
        return name, BytesIO(source)
    text = os.fsdecode(source)
    if not text.strip():
        raise UnusableImage("is an empty text; expected a path, a URL, a data URL or base64 text")
    scheme = text[:32].split("://", 1)[0].lower() if "://" in text[:32] else ""
    if scheme in ("http", "https"):
        return shown(text), _download(text)
    path = _file_of_url(text) if scheme == "file" else text
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # text of any kind may be asked for as a path
        if scheme == "file":
            raise UnusableImage(f"cannot be read: there is no file {shown(path)}. Check the path") from None
        if scheme:
            raise UnusableImage(
                f"cannot be read: {shown(text)} is an address of a kind ({scheme}://) that is not fetched. "
                "Download it yourself and pass its path"
            ) from None
        name, data = decode_text(text, max_pixels)
        return name, BytesIO(data)
    if stat.S_ISDIR(status.st_mode):
        raise UnusableImage(f"cannot be read: {shown(path)} is a folder. Pass the path of an image in it")
    if not stat.S_ISREG(status.st_mode):
        raise UnusableImage(f"cannot be read: {shown(path)} is a device or a pipe. Pass the path of a file")
    _check_bytes(shown(path), status.st_size, max_pixels)
    return shown(path), path


def _head_of(data: str | BytesIO) -> bytes:
    """The first bytes of a file."""
    if isinstance(data, BytesIO):
        return data.getvalue()[:_HEAD]
    with open(data, "rb") as file:
        return file.read(_HEAD)


@contextmanager
def opened_image(source: str | os.PathLike | bytes | bytearray, max_pixels: int | None) -> Iterator[Image.Image]:
    """An encoded image, opened but not decoded; what goes wrong while it is used is explained by its name and format.

    Args:
        source: a path, a URL (http, https, file, data), base64 text, or the bytes themselves.
        max_pixels: largest accepted width × height, from which a limit of bytes follows; None for no limit.

    Raises:
        UnusableImage: it is not there, too large, or no image.
    """
    name, data = _locate(source, max_pixels)
    try:
        with Image.open(data) as image:
            yield image
    except (UnusableImage, MemoryError, PermissionError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise
    except Exception as error:  # decoders raise whatever the bytes lead them to
        raise UnusableImage(_explain(name, _head_of(data), error)) from error
