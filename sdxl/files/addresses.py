"""Fetch only from the public internet: refuse URLs that lead to this machine or into its network.

Knows addresses and how connections are made; does not know what is fetched. Each name is resolved once, every address that
it resolves to is checked, and the connection goes to a checked address. So a name cannot change its meaning between the
check and the connection, and redirects are checked like first requests.
"""

import contextlib
import ipaddress
import socket
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import NameResolutionError, NewConnectionError

from sdxl.errors import DownloadError

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""IPv6 addresses that stand for IPv4 ones (RFC 6052)."""


def is_public(address: str) -> bool:
    """Whether an IP address, IPv4 or IPv6, is one of the public internet: not loopback, private, link-local or reserved."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        # Addresses that carry an IPv4 address lead to that one.
        inner = [found.ipv4_mapped, found.sixtofour, *(found.teredo or ())]
        if found in _NAT64:
            inner.append(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF))
        carried = [part for part in inner if part is not None]
        if carried:
            return all(is_public(str(part)) for part in carried)
    return found.is_global and not found.is_multicast and not found.is_reserved


class _ToPublic:
    """A connection of urllib3 that is made to public addresses only."""

    def _new_conn(self: Any) -> socket.socket:
        try:
            found = socket.getaddrinfo(self._dns_host, self.port, type=socket.SOCK_STREAM)
        except (socket.gaierror, UnicodeError) as error:
            raise NameResolutionError(self.host, self, socket.gaierror(str(error))) from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if not addresses or not all(is_public(address) for address in addresses):
            raise DownloadError(
                f"{str(self.host)[:100]} is not an address on the public internet: give a URL that anybody can open."
            )
        for address in addresses:
            with contextlib.suppress(OSError):
                return socket.create_connection((address, self.port), self.timeout)
        raise NewConnectionError(self, "no address answered")


class _Http(_ToPublic, HTTPConnection):
    pass


class _Https(_ToPublic, HTTPSConnection):
    pass


class _HttpPool(HTTPConnectionPool):
    ConnectionCls = _Http  # type: ignore[assignment]


class _HttpsPool(HTTPSConnectionPool):
    ConnectionCls = _Https  # type: ignore[assignment]


class _PublicAdapter(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        self.poolmanager.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}


def session(*, public_only: bool) -> requests.Session:
    """A session for one download.

    public_only: refuse addresses that are not public, and send no passwords from a netrc file. A proxy that the environment
        names is trusted to do the same for what goes through it.
    """
    made = requests.Session()
    made.max_redirects = 5
    if public_only:
        made.auth = lambda request: request
        for scheme in ("http://", "https://"):
            made.mount(scheme, _PublicAdapter())
    return made
