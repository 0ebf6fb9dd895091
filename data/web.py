"""Shards on http(s) servers: byte ranges over reused connections, cut bodies completed.

`Connections` and `Response` are the transport, on the standard library's http.client: blocking
calls with a deadline, nothing that a forked worker could inherit half alive.
"""

import contextlib
import http.client
import io
import math
import os
import time
import urllib.request
from typing import BinaryIO, cast
from urllib.parse import SplitResult, urljoin, urlsplit

from data.errors import DataError
from data.retry import Retry, TransientError

_READ_BYTES = 256 * 1024
_DRAINED_BYTES = 64 * 1024
_STREAM_BYTES = 4 * 2**20
_REDIRECTS = (301, 302, 303, 307, 308)
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
_MAX_REDIRECTS = 5
_NETWORK_ERRORS = (OSError, http.client.HTTPException)


class Connections:
    """Keep-alive connections by server, shared by the stores of one reader."""

    def __init__(self) -> None:
        self._idle: dict[tuple[str, str], list[http.client.HTTPConnection]] = {}
        self._pid = os.getpid()

    def get(self, url: str, byte_range: str, timeout_s: float) -> "Response":
        """The response to a GET, `byte_range` being the Range header or ""; its status unread."""
        parts = urlsplit(url)
        while True:
            reused = self._take(parts)
            connection = reused or _connect(parts, timeout_s)
            try:
                answer = _ask(connection, parts, byte_range, timeout_s)
            except _NETWORK_ERRORS as error:
                connection.close()
                if reused is None:
                    raise TransientError(_describe(error)) from None
                continue  # the server had closed the idle connection: no failure
            return Response(self, parts, connection, answer, timeout_s)

    def give_back(self, parts: SplitResult, connection: http.client.HTTPConnection) -> None:
        """Keep a connection whose response was read to its end."""
        self._idle.setdefault((parts.scheme, parts.netloc), []).append(connection)

    def close(self) -> None:
        """Close the idle connections."""
        for connections in self._idle.values():
            while connections:
                connections.pop().close()

    def _take(self, parts: SplitResult) -> http.client.HTTPConnection | None:
        if self._pid != os.getpid():  # two processes on one connection would mix their answers
            self._idle, self._pid = {}, os.getpid()
        try:
            return self._idle[parts.scheme, parts.netloc].pop()
        except LookupError:
            return None


class Response:
    """A response whose body is read in pieces.

    Until `unhurry` the whole body has to come within the timeout; after it, each piece.
    """

    def __init__(
        self,
        connections: Connections,
        parts: SplitResult,
        connection: http.client.HTTPConnection,
        answer: http.client.HTTPResponse,
        timeout_s: float,
    ) -> None:
        self.status, self.reason, self.headers = answer.status, answer.reason, answer.headers
        self._connections, self._parts, self._connection = connections, parts, connection
        self._answer, self._timeout_s = answer, timeout_s
        self._deadline = time.monotonic() + timeout_s

    @property
    def missing(self) -> int:
        """Bytes of the body that have not been read; -1 when the server did not say."""
        return -1 if self._answer.length is None else self._answer.length

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, none at the end; TransientError at a cut, a stall, the deadline."""
        missing = self.missing
        if missing == 0:
            return b""
        try:
            left_s = min(self._deadline - time.monotonic(), self._timeout_s)
            if left_s <= 0:
                raise TimeoutError(f"took longer than {self._timeout_s:g} s")
            if self._connection.sock is not None:
                self._connection.sock.settimeout(left_s)
            piece = self._answer.read1(min(size, _READ_BYTES))
            if not piece and missing > 0:
                raise ConnectionError(f"the body was cut, {missing} bytes are missing")
        except _NETWORK_ERRORS as error:
            self._connection.close()
            raise TransientError(_describe(error)) from None
        return piece

    def unhurry(self) -> "Response":
        """Drop the deadline of the whole: a stream is as slow as who reads it."""
        self._deadline = math.inf
        return self

    def close(self) -> None:
        """Done with it: the connection is kept if little of the body is left to read."""
        if not self._answer.will_close and 0 <= self.missing <= _DRAINED_BYTES:
            with contextlib.suppress(*_NETWORK_ERRORS):
                self._answer.read()
                self._connections.give_back(self._parts, self._connection)
                return
        self._connection.close()


class HttpStore:
    """A shard behind http(s). Its size and ETag (or Last-Modified) must stay what they were."""

    def __init__(
        self, url: str, retry: Retry | None = None, connections: Connections | None = None
    ) -> None:
        self.url = url
        self.retry = retry or Retry()
        self._connections = connections or Connections()
        self._is_owner = connections is None
        self._location = url  # where redirects led; asked directly while that works
        self._version: tuple[int, str] | None = None
        self._seekable = False

    @property
    def seekable(self) -> bool:
        """Whether the server honours byte ranges; asks it once."""
        self.version()
        return self._seekable

    def version(self) -> tuple[int, str]:
        """Size and ETag (or Last-Modified), from a request for the first byte."""
        if self._version is None:
            self.retry.run(self.url, lambda: self._open_range(0, 1).close())
        return cast(tuple[int, str], self._version)

    def read_at(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; fewer only at the end of the shard."""
        have = bytearray()
        self.retry.run(self.url, lambda: self._read_missing(have, offset, size))
        return bytes(have)

    def stream(self) -> BinaryIO:
        """The whole body, from front to back; a cut is mended on the way."""
        return cast(BinaryIO, io.BufferedReader(_Body(self), _STREAM_BYTES))

    def close(self) -> None:
        """Close the idle connections, unless they are shared."""
        if self._is_owner:
            self._connections.close()

    def open_from(self, position: int) -> Response:
        """The body from `position` on, to be read to its end."""
        if self.seekable:
            return self._open_range(position, None).unhurry()
        response = self._open("").unhurry()
        while position:  # no ranges: read past what is already there
            piece = response.read(position)
            if not piece:
                raise TransientError("the body ended before the place where it was cut")
            position -= len(piece)
        return response

    def __reduce__(self) -> tuple[type["HttpStore"], tuple[str, Retry]]:
        return HttpStore, (self.url, self.retry)

    def _read_missing(self, have: bytearray, offset: int, size: int) -> None:
        if len(have) == size:
            return
        response = self._open_range(offset + len(have), size - len(have))
        if not self._seekable:
            response.close()
            raise DataError(f"{self.url}: the server ignores byte ranges; read its stream()")
        before = len(have)
        try:
            while response.status == 206 and (piece := response.read(size)):
                have += piece
        except TransientError as error:
            error.progress = len(have) > before
            raise
        response.close()

    def _open_range(self, offset: int, size: int | None) -> Response:
        """The response to a range request, checked; notes version and whether ranges work."""
        response = self._open(f"bytes={offset}-{'' if size is None else offset + size - 1}")
        if response.status == 200:
            self._note(response, response.missing, seekable=False)
            return response
        content_range = response.headers.get("Content-Range", "")
        if response.status == 206 and not content_range.startswith(f"bytes {offset}-"):
            response.close()
            raise DataError(f"{self.url}: asked for byte {offset}, got {content_range!r}")
        total = content_range.rpartition("/")[2]
        self._note(response, int(total) if total.isdigit() else -1, seekable=True)
        return response

    def _note(self, response: Response, total: int, *, seekable: bool) -> None:
        tag = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        if self._version is None:
            self._version, self._seekable = (total, tag), seekable
        elif (total, tag) != self._version and response.status != 416:
            response.close()
            raise DataError(
                f"{self.url}: changed while it was read: (size, version) was {self._version}, "
                f"is {(total, tag)}; start again with a new index"
            )

    def _open(self, byte_range: str) -> Response:
        """A response with status 200, 206 or 416; follows redirects."""
        for _ in range(_MAX_REDIRECTS + 1):
            response = self._connections.get(self._location, byte_range, self.retry.timeout_s)
            if response.status in (200, 206, 416):
                return response
            response.close()
            if response.status in _REDIRECTS:
                self._location = urljoin(self._location, response.headers.get("Location", ""))
            else:
                self._raise_status(response)
        raise DataError(f"{self.url}: more than {_MAX_REDIRECTS} redirects")

    def _raise_status(self, response: Response) -> None:
        answer = f"{response.status} {response.reason}"
        if self._location != self.url:
            self._location = self.url  # a signed address that has expired, or one bad mirror
            raise TransientError(f"{answer} behind a redirect")
        if response.status in _TRANSIENT:
            pause = response.headers.get("Retry-After", "")
            raise TransientError(answer, wait_s=float(pause) if pause.isdigit() else 0.0)
        raise DataError(f"{self.url}: the server answers {answer}; check the name and the access")


class _Body(io.RawIOBase):
    """The body of a store as a stream; where it is cut, it is asked for again from there."""

    def __init__(self, store: HttpStore) -> None:
        self._store = store
        self._position = self._opened_at = 0
        self._response: Response | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        piece = self._store.retry.run(self._store.url, lambda: self._next(len(buffer)))
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def close(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None
        super().close()

    def _next(self, size: int) -> bytes:
        try:
            if self._response is None:
                self._response = self._store.open_from(self._position)
                self._opened_at = self._position
            return self._response.read(size)
        except TransientError as error:
            error.progress = self._response is not None and self._position > self._opened_at
            self._response = None
            raise


def _connect(parts: SplitResult, timeout_s: float) -> http.client.HTTPConnection:
    host, proxy = parts.hostname or "", urllib.request.getproxies().get(parts.scheme)
    is_tls = parts.scheme == "https"
    kind = http.client.HTTPSConnection if is_tls else http.client.HTTPConnection
    local = host in ("localhost", "127.0.0.1", "::1")
    if not proxy or local or urllib.request.proxy_bypass(host):
        return kind(host, parts.port, timeout=timeout_s)
    address = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    connection = kind(address.hostname or "", address.port, timeout=timeout_s)
    if is_tls:
        connection.set_tunnel(host, parts.port)
    return connection


def _ask(
    connection: http.client.HTTPConnection, parts: SplitResult, byte_range: str, timeout_s: float
) -> http.client.HTTPResponse:
    if connection.sock is not None:
        connection.sock.settimeout(timeout_s)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if isinstance(connection, http.client.HTTPSConnection) or connection.host == parts.hostname:
        target = path
    else:  # a plain proxy wants the whole address
        target = f"{parts.scheme}://{parts.netloc}{path}"
    headers = {"Host": parts.netloc, "Accept-Encoding": "identity", "User-Agent": "nsphere"}
    if byte_range:
        headers["Range"] = byte_range
    connection.request("GET", target, headers=headers)
    return connection.getresponse()


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
