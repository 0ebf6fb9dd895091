"""A real HTTP server on 127.0.0.1 whose faults a test chooses: what stores are tested against."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Faults:
    """What the server does wrong; counts go down as they are used."""

    num_503: int = 0
    """Requests that are answered 503."""
    cut_after: int = -1
    """Bytes of the body after which the connection is cut; -1: never."""
    num_cuts: int = 1 << 30
    """Requests that are cut."""
    stall_s: float = 0.0
    """Pause before the body, in the first `num_stalls` requests."""
    num_stalls: int = 0
    ranges: bool = True
    etags: list[str] = field(default_factory=lambda: ['"one"'])
    """ETag of each request in turn, the last one for ever; "" sends none."""
    redirect: dict[str, str] = field(default_factory=dict)
    """Path -> Location."""


@dataclass
class RangeServer:
    """The running server: files by path, its faults, and the requests it has seen."""

    port: int
    files: dict[str, bytes]
    faults: Faults
    requests: list[tuple[str, str]] = field(default_factory=list)
    """(path, Range header) in order."""
    connections: set[int] = field(default_factory=set)
    """Client ports: one a connection."""

    def url(self, path: str) -> str:
        """The address of a path."""
        return f"http://127.0.0.1:{self.port}/{path}"


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: RangeServer

    def do_GET(self) -> None:
        served, faults = self.served, self.served.faults
        wanted = self.headers.get("Range", "")
        served.requests.append((self.path, wanted))
        served.connections.add(self.client_address[1])
        if faults.num_503 > 0:
            faults.num_503 -= 1
            return self._plain(503)
        if self.path in faults.redirect:
            return self._plain(302, {"Location": faults.redirect[self.path]})
        data = served.files.get(self.path)
        if data is None:
            return self._plain(404)
        return self._body(data, wanted if faults.ranges else "")

    def _body(self, data: bytes, wanted: str) -> None:
        faults = self.served.faults
        etag = faults.etags[0] if len(faults.etags) == 1 else faults.etags.pop(0)
        headers = {"ETag": etag} if etag else {}
        body, status = data, 200
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            start, end = int(first), min(int(last or len(data)) + 1, len(data))
            if start >= len(data):
                return self._plain(416, {"Content-Range": f"bytes */{len(data)}"})
            body, status = data[start:end], 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        length, whole = len(body), True
        # Decided before the client hears of it: what it sets next is for the next request.
        if 0 <= faults.cut_after < length and faults.num_cuts > 0:
            faults.num_cuts -= 1
            body, whole = body[: faults.cut_after], False
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()
        if faults.num_stalls > 0:
            faults.num_stalls -= 1
            time.sleep(faults.stall_s)
        self.close_connection = self.close_connection or not whole
        try:
            self.wfile.write(body)
        except OSError:
            self.close_connection = True

    def _plain(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": "0"}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Say nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is part of the tests."""


@contextmanager
def serve(files: dict[str, bytes], faults: Faults | None = None) -> Iterator[RangeServer]:
    """Serve `files` (path without the leading slash -> bytes) on a free port."""
    served = RangeServer(0, {f"/{path}": data for path, data in files.items()}, faults or Faults())
    answers = type("Answers", (_Answers,), {"served": served})
    with _Server(("127.0.0.1", 0), answers) as server:
        served.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()
