"""Encoded images from files, addresses and text: what is bounded, what is opened lazily, what an error says."""

import base64
import gzip
import io
import os
import threading
import time
import tracemalloc
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from modeling_qzoom import processing_reading_qzoom
from modeling_qzoom.processing_images_qzoom import ImageSlot, load_rgb
from tests.processing_fixtures import noise, qwen_processor


PICTURE = noise(9, 6)


def encoded(kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    PICTURE.save(buffer, kind)
    return buffer.getvalue()


def load(image, max_pixels: int | None = 10**6) -> np.ndarray:
    return np.array(load_rgb(ImageSlot(image, 0), max_pixels))


def assert_is_picture(image) -> None:
    assert np.array_equal(load(image), np.array(PICTURE))


class Handler(BaseHTTPRequestHandler):
    """Answers by path; endless answers end when the client leaves, the test is over, or after 15 seconds."""

    def do_GET(self):
        getattr(self, f"answer_{self.path.strip('/').split('.')[0]}")()

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def answer_image(self):
        self._send(200, encoded())

    def answer_packed(self):
        self._send(200, gzip.compress(encoded()), Content_Encoding="gzip")

    def answer_strange(self):
        self._send(200, encoded(), Content_Encoding="zstd")

    def answer_bomb(self):
        self._send(200, gzip.compress(bytes(2**23)), Content_Encoding="gzip")

    def answer_plainly(self):
        asked = self.headers.get("Accept-Encoding", "anything")
        self._send(200 if asked == "identity" else 406, encoded())

    def answer_moved(self):
        self._send(302, Location="/image.png")

    def answer_circle(self):
        self._send(302, Location="/circle")

    def answer_elsewhere(self):
        self._send(302, Location="file:///etc/hostname")

    def answer_leads(self):
        self._send(302, Location="/endless")

    def answer_missing(self):
        self._send(404)

    def answer_page(self):
        self._send(200, b"<!DOCTYPE html><html><body>Please log in</body></html>")

    def answer_announced(self):
        self._send(200, Content_Length=str(10**12))
        self._drip()

    def answer_endless(self):
        self._send(200)
        self._drip(b"x" * 2**18, pause=0)

    def answer_slow(self):
        self._send(200)
        self._drip()

    def answer_headless(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        self._drip()

    def _drip(self, piece: bytes = b"x", pause: float = 0.05) -> None:
        until = time.monotonic() + 15  # so that a reader without a limit of time fails and does not hang
        try:
            while not self.server.is_over.wait(pause) and time.monotonic() < until:
                self.wfile.write(piece)
        except OSError:
            pass

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.is_over, server.daemon_threads = threading.Event(), True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.is_over.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("path", ["image.png", "moved", "packed", "plainly"])
def test_addresses(address, path):
    assert_is_picture(f"{address}/{path}")
    assert_is_picture(f"{address}/{path}".replace("http", "HTTP"))


def test_files_by_address(tmp_path):
    (tmp_path / "a page.png").write_bytes(encoded())
    (tmp_path / "100%20.png").write_bytes(encoded())
    assert_is_picture(f"file://{tmp_path}/a page.png")
    assert_is_picture((tmp_path / "a page.png").as_uri())  # escaped
    assert_is_picture(f"file://localhost{tmp_path}/a%20page.png")
    assert_is_picture(f"FILE://{tmp_path}/100%20.png")
    assert_is_picture(os.fsencode(tmp_path / "a page.png").decode())


def test_data_addresses():
    text = base64.b64encode(encoded()).decode()
    assert_is_picture(f"data:image/png;base64,{text}")
    assert_is_picture(f"DATA:application/octet-stream;base64,{text}")
    with pytest.raises(ValueError, match="the data URL .data:image/svg.*is an SVG drawing. Render it"):
        load("data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg'/%3E")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("endless", "holds more than 1 MiB.*download it yourself"),
        ("leads", "holds more than 1 MiB"),
        ("announced", "holds more than 1 MiB"),
        ("bomb", "holds more than 1 MiB"),
        ("slow", "was not there after 1 seconds. Download it yourself"),
        ("headless", "was not there after 1 seconds"),
        ("circle", "TooManyRedirects"),
        ("elsewhere", "UnsupportedProtocol"),
        ("strange", r"comes packed \(zstd\)"),
        ("missing", "HTTPStatusError.*404"),
        ("page", "is a web page"),
    ],
)
def test_addresses_that_bring_no_image(address, path, message, monkeypatch):
    monkeypatch.setattr(processing_reading_qzoom, "DOWNLOAD_SECONDS", 1)
    monkeypatch.setattr(processing_reading_qzoom, "MAX_DOWNLOAD_BYTES", 2**20)
    began = time.monotonic()
    with pytest.raises(ValueError, match=f"^image 0 cannot be read: .*{message}") as caught:
        load(f"{address}/{path}", None)
    assert time.monotonic() - began < 5
    assert f"{address}/{path}" in str(caught.value)


def test_servers_that_do_not_answer_are_named():
    with pytest.raises(ValueError, match=r"ConnectError: .*\('http://127\.0\.0\.1:9/a\.png'\)"):
        load("http://127.0.0.1:9/a.png")


def test_threads_of_given_up_downloads_end(address, monkeypatch):
    monkeypatch.setattr(processing_reading_qzoom, "DOWNLOAD_SECONDS", 0.2)
    before = set(threading.enumerate())
    with pytest.raises(ValueError, match="was not there"):
        load(f"{address}/headless")
    until = time.monotonic() + 10
    while {thread for thread in set(threading.enumerate()) - before if "_fetch" in thread.name}:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_files_are_opened_not_read(tmp_path):
    path = tmp_path / "long.png"
    path.write_bytes(encoded())
    os.truncate(path, 2**27)
    tracemalloc.start()
    try:
        assert load(path, None).shape == (6, 9, 3)
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()
    path.unlink()  # nobody holds it open


@pytest.mark.parametrize("kind", ["path", "file", "bytes", "base64", "data"])
def test_more_bytes_than_an_image_can_have(kind, tmp_path):
    size = 66 * 2**20
    path = tmp_path / "huge.png"
    path.write_bytes(b"")
    os.truncate(path, size)
    text = "A" * (size * 4 // 3)
    given = {
        "path": str(path),
        "file": path.as_uri(),
        "bytes": bytes(size) if kind == "bytes" else None,
        "base64": text,
        "data": f"data:image/png;base64,{text}",
    }[kind]
    with pytest.raises(
        ValueError, match="has 692.* bytes, more than an image of max_source_pixels = 1000 can have"
    ) as caught:
        load(given, 1000)
    assert len(str(caught.value)) < 500


CONTENTS = {
    "photo.heic": (b"\0\0\0\x1cftypheix" + bytes(40), "is a HEIC image. .*pillow_heif"),
    "burst.heic": (b"\0\0\0\x1cftyphevc" + bytes(40), "is a HEIC image"),
    "sequence.heif": (b"\0\0\0\x1cftypmif1" + bytes(40), "is a HEIF image"),
    "small.avif": (b"\0\0\0\x1cftypavis" + bytes(40), "(is an AVIF image|damaged, cut short)"),  # by what PIL reads
    "clip.mp4": (b"\0\0\0\x20ftypisom" + bytes(40), "is a video"),
    "clip.webm": (b"\x1a\x45\xdf\xa3" + bytes(40), "is a Matroska or WebM video. Take the frames"),
    "sound.wav": (b"RIFF\x24\0\0\0WAVEfmt " + bytes(40), "is a video or sound"),
    "cut.webp": (b"RIFF\x24\0\0\0WEBPVP9 " + bytes(40), "is a WebP image. It is damaged"),
    "paper.pdf": (b"%PDF-1.4\n" + bytes(40), "is a PDF document. Render its pages"),
    "paper.ps": (b"%!PS-2.0\n" + bytes(40), "is a PostScript document. Render it"),
    "plan.svg": (b'<?xml version="1.0"?>\n<svg width="4"></svg>', "is an SVG drawing. Render it"),
    "login.jpg": (b"\n<html><body>login</body></html>", r"is a web page \(HTML\)"),
    "denied.png": (b'{"error": "denied"}', "is XML or JSON text"),
    "answer.xml": (b"<?xml version='1.0'?><Error/>", "is XML or JSON text"),
    "pages.gz": (b"\x1f\x8b\x08" + bytes(40), "is compressed by gzip. Unpack it"),
    "pages.zip": (b"PK\x03\x04" + bytes(40), "is a ZIP archive. Unpack it"),
    "pointer.png": (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer.*git lfs pull"),
    "new.jxl": (b"\xff\x0a" + bytes(40), "is a JPEG XL image. Convert it"),
    "boxed.jxl": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40), "is a JPEG XL image. Convert it"),
    "head.gif": (encoded("GIF")[:8], "is a GIF file. It is damaged"),
    "head.jpg": (b"\xff\xd8\xff\xe0", "is a JPEG file. It is damaged"),
    "raw.dng": (b"II*\0", "is a TIFF or camera raw file. It is damaged"),
    "raw.tif": (b"MM\0*", "is a TIFF or camera raw file. It is damaged"),
    "head.png": (encoded()[:14], "damaged, cut short"),
    "half.png": (encoded()[:90], "damaged, cut short"),
    "nothing.png": (b"", r"is empty \(0 bytes\). Save or download it again"),
    "words.png": (b"some words of nobody", "PIL knows no image format like that .*Convert it to PNG or JPEG"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_contents_that_are_no_image(name, tmp_path):
    content, message = CONTENTS[name]
    path = tmp_path / name
    path.write_bytes(content)
    for given, shown in ((str(path), name), (path, name), (content, f"what was passed ({len(content)} bytes)")):
        with pytest.raises(ValueError, match=f"^image 0 cannot be read: .*{message}") as caught:
            load(given)
        assert shown in str(caught.value) and " at 0x" not in str(caught.value)


def test_places_that_hold_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for given, message in (
        (tmp_path, "is a folder. Pass the path of an image in it"),
        (f"file://{tmp_path}", "is a folder"),
        (os.devnull, "is a device or a pipe"),
        (tmp_path / "pipe", "is a device or a pipe"),
        (f"file://{tmp_path}/none.png", "there is no file '.*none.png'"),
        ("s3://bucket/a.png", r"address of a kind \(s3://\) that is not fetched. Download it yourself"),
        ("", "is an empty text"),
        ("  ", "is an empty text"),
        ("pages", "neither a URL, nor an existing file, nor base64 text: 'pages'. Check the path"),
        ("data/page", "neither a URL, nor an existing file"),
        ("data/pages12", r"the base64 text 'data/pages12' \(no file has that path\)"),
    ):
        with pytest.raises(ValueError, match=f"image 0 .*{message}"):
            load(given)


def test_a_processor_names_row_and_file(tmp_path):
    processor = qwen_processor()
    (tmp_path / "b.pdf").write_bytes(b"%PDF-1.7")
    with pytest.raises(ValueError, match=r"^image 1 \(row 1, image 0\) cannot be read: '.*b\.pdf' is a PDF document"):
        processor(images=[PICTURE, str(tmp_path / "b.pdf")], text=[processor.image_token] * 2)


def test_the_callers_open_image_stays_open(tmp_path):
    PICTURE.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert_is_picture(image)
        assert image.getpixel((0, 0)) == PICTURE.getpixel((0, 0))
