"""Images behind addresses: only from hosts on a list, never from private networks, bounded in bytes and time."""

import ipaddress
import socket
from collections.abc import Callable, Iterable
from io import BytesIO
from typing import Any

from huggingface_hub.utils import httpx

from ..messages_qzoom import shown
from ..processing_reading_qzoom import UnusableImage, download


_MOST_REDIRECTS = 3
_TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")

# (host, port) → addresses
Resolver = Callable[[str, int], Iterable[str]]


def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host."""
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def is_public(address: str) -> bool:
    """Whether an address is one of the open internet: neither private, local, reserved nor multicast."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    inner = _embedded(ip) if isinstance(ip, ipaddress.IPv6Address) else None
    meant = ip if inner is None else inner
    return meant.is_global and not meant.is_multicast


def _embedded(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The older address that an address stands for where networks are translated, None for none."""
    if ip in _TRANSLATED:
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour


class GuardedTransport(httpx.BaseTransport):
    """Sends requests to hosts on a list, redirects included, at an address that was looked up and judged first.

    The connection goes to that very address, so a name that points somewhere else a moment later gains nothing.

    Args:
        hosts: names, in lower case.
        resolver: looks a name up.
        admits: whether an address may be contacted.
        inner: what sends the request.
    """

    def __init__(
        self,
        hosts: Iterable[str],
        resolver: Resolver = resolve,
        admits: Callable[[str], bool] = is_public,
        inner: Any = None,
    ) -> None:
        self.hosts = frozenset(host.lower() for host in hosts)
        self.resolver, self.admits = resolver, admits
        self.inner = inner or httpx.HTTPTransport(retries=0)

    def handle_request(self, request: Any) -> Any:
        """Sends one request, which may be the target of a redirect.

        Raises:
            UnusableImage: the host is not on the list, unknown, or in a private network.
        """
        host, port = request.url.host.lower(), request.url.port or (443 if request.url.scheme == "https" else 80)
        if host not in self.hosts:
            raise UnusableImage(
                f"cannot be read: this server does not fetch images from {shown(host)}. Send the image itself as a "
                "data URL"
            )
        try:
            addresses = list(self.resolver(host, port))
        except OSError as error:
            raise UnusableImage(f"cannot be read: there is no host {shown(host)}: {error}") from error
        if not addresses or not all(map(self.admits, addresses)):
            raise UnusableImage(f"cannot be read: {shown(host)} is not an address of the open internet")
        # the name stays in the Host header and in what the certificate is checked against
        pinned = httpx.Request(
            request.method,
            request.url.copy_with(host=addresses[0]),
            headers=request.headers,
            extensions={**request.extensions, "sni_hostname": host},
        )
        return self.inner.handle_request(pinned)

    def close(self) -> None:
        """Ends what is under way."""
        self.inner.close()


def fetch_image(url: str, max_bytes: int, seconds: float, transport: GuardedTransport) -> BytesIO:
    """The bytes behind an address of an image.

    Args:
        url: http or https.
        max_bytes: largest body.
        seconds: for the whole of it.
        transport: which hosts it may contact; closed afterwards.

    Raises:
        UnusableImage: the reason, without the image's place.
    """
    with httpx.Client(
        transport=transport, timeout=seconds, follow_redirects=True, max_redirects=_MOST_REDIRECTS, trust_env=False
    ) as client:
        return download(url, client, max_bytes, seconds)
