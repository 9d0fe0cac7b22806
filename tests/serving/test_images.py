"""Images behind URLs: hosts on a list only, no private networks, no way around by redirects, bounded."""

import io
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from PIL import Image

from modeling_qzoom.processing_reading_qzoom import UnusableImage
from modeling_qzoom.serving.fetching import GuardedTransport, fetch_image, is_public


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        for _ in range(200 if self.path in ("/slow", "/large") else 1):
            try:
                self.wfile.write(
                    b"x" * (2**16 if self.path == "/large" else 1) if self.path != "/a.png" else picture()
                )
            except OSError:
                return
            time.sleep(0.05 if self.path == "/slow" else 0)

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture(scope="module")
def port():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()


def fetch(url: str, hosts=("images.test",), admits=lambda address: True, seconds: float = 5.0) -> bytes:
    """Every name leads to this machine, where the server of the test listens."""
    transport = GuardedTransport(hosts, resolver=lambda host, port: ["127.0.0.1"], admits=admits)
    return fetch_image(url, 2**20, seconds, transport).getvalue()


def test_a_host_on_the_list_is_asked_under_its_name(port) -> None:
    assert fetch(f"http://images.test:{port}/a.png") == picture()
    assert fetch(f"http://IMAGES.test:{port}/to//a.png") == picture()  # a redirect to the same host
    assert fetch(f"http://images.test:{port}/to/http://images.test:{port}/a.png") == picture()


@pytest.mark.parametrize("path", ["http://other.test:{port}/a.png", "http://images.test:{port}/to/http://other.test/"])
def test_other_hosts_are_refused_redirects_too(port, path) -> None:
    with pytest.raises(UnusableImage, match="does not fetch images from 'other.test'"):
        fetch(path.format(port=port))


def test_private_addresses_are_refused_whatever_their_name(port) -> None:
    with pytest.raises(UnusableImage, match="'images.test' is not an address of the open internet"):
        fetch(f"http://images.test:{port}/a.png", admits=is_public)
    transport = GuardedTransport(["a.test"], resolver=lambda host, port: ["93.184.215.14", "10.0.0.1"])
    with pytest.raises(UnusableImage, match="open internet"):  # one of several is enough
        fetch_image("http://a.test/x.png", 2**20, 5, transport)


def test_size_time_and_loops_are_bounded(port) -> None:
    began = time.monotonic()
    with pytest.raises(UnusableImage, match="holds more than 1 MiB"):
        fetch(f"http://images.test:{port}/large")
    with pytest.raises(UnusableImage, match="was not there after 0.5 seconds"):
        fetch(f"http://images.test:{port}/slow", seconds=0.5)
    assert time.monotonic() - began < 5
    with pytest.raises(UnusableImage, match="TooManyRedirects"):
        fetch(f"http://images.test:{port}" + "/to/" * 9)


@pytest.mark.parametrize(
    "address, public",
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:127.0.0.1", False),
        ("64:ff9b::a00:1", False),
        ("2002:a00:1::", False),
    ],
)
def test_what_counts_as_the_open_internet(address, public) -> None:
    assert is_public(address) is public
