"""A real FTP server on 127.0.0.1 (RFC 959, 3659) whose faults a test chooses: a remote store."""

import shutil
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class FtpStore:
    """The running server: its folder, its faults, and what was asked of it."""

    root: Path
    port: int = 0
    down: bool = False
    """Every connection is closed as soon as it speaks."""
    num_cuts: int = 0
    """Uploads that are cut off after `cut_after` bytes; what came stays there."""
    cut_after: int = 1000
    slow_s: float = 0.0
    """Pause before each upload."""
    asked: list[str] = field(default_factory=list)

    def url(self, path: str) -> str:
        """The address of a folder."""
        return f"ftp://127.0.0.1:{self.port}/{path}"

    def stored(self) -> list[str]:
        """Files, in the order of their names."""
        files = (path for path in self.root.rglob("*") if path.is_file())
        return sorted(str(path.relative_to(self.root)) for path in files)


class _Session(socketserver.StreamRequestHandler):
    store: FtpStore

    def handle(self) -> None:
        self.listening: socketserver.TCPServer | None = None
        self.offset = 0
        self.say("220 ready")
        for line in self.rfile:
            if self.store.down:
                return
            word, _, argument = line.decode().strip().partition(" ")
            self.store.asked.append(line.decode().strip())
            answer = getattr(self, f"do_{word.lower()}", None)
            if answer is None:
                self.say("502 not known")
                continue
            try:
                answer(argument)
            except OSError as error:
                self.say(f"550 {error.strerror}")

    def say(self, line: str) -> None:
        with suppress(OSError):
            self.wfile.write(f"{line}\r\n".encode())

    def path(self, name: str) -> Path:
        return self.store.root / name.lstrip("/")

    def do_user(self, _: str) -> None:
        self.say("230 welcome")

    def do_type(self, _: str) -> None:
        self.say("200 fine")

    def do_pwd(self, _: str) -> None:
        self.say('257 "/"')

    def do_rest(self, offset: str) -> None:
        self.offset = int(offset)
        self.say("350 from there")

    def do_quit(self, _: str) -> None:
        self.say("221 bye")

    def do_mkd(self, name: str) -> None:
        self.path(name).mkdir()
        self.say(f'257 "{name}"')

    def do_rmd(self, name: str) -> None:
        self.path(name).rmdir()
        self.say("250 gone")

    def do_dele(self, name: str) -> None:
        self.path(name).unlink()
        self.say("250 gone")

    def do_epsv(self, _: str) -> None:
        self.listening = socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        self.say(f"229 Entering (|||{self.listening.server_address[1]}|)")

    def do_pasv(self, _: str) -> None:
        self.listening = socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        high, low = divmod(self.listening.server_address[1], 256)
        self.say(f"227 Entering (127,0,0,1,{high},{low})")

    def data(self):
        assert self.listening is not None
        connection, _ = self.listening.get_request()
        self.listening.server_close()
        return connection

    def do_mlsd(self, name: str) -> None:
        lines = []
        for entry in sorted(self.path(name).iterdir()):
            kind = "dir" if entry.is_dir() else "file"
            lines.append(f"type={kind};size={entry.stat().st_size}; {entry.name}\r\n")
        self.say("150 here")
        with self.data() as connection:
            connection.sendall("".join(lines).encode())
        self.say("226 done")

    def do_retr(self, name: str) -> None:
        content = self.path(name).read_bytes()
        self.say("150 here")
        with self.data() as connection:
            connection.sendall(content)
        self.say("226 done")

    def do_stor(self, name: str) -> None:
        threading.Event().wait(self.store.slow_s)
        cut = self.store.num_cuts > 0
        self.store.num_cuts -= cut
        offset, self.offset = self.offset, 0
        with self.path(name).open("r+b" if offset else "wb") as file:
            file.seek(offset)
            self.say("150 go on")
            with self.data() as connection:
                while piece := connection.recv(1 << 16):
                    room = self.store.cut_after - file.tell()
                    file.write(piece[:room] if cut else piece)
                    if cut and room <= len(piece):
                        break
        if cut:
            self.connection.close()
            raise ConnectionAbortedError
        self.say("226 done")


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is part of the tests."""


@contextmanager
def serve(root: Path, port: int = 0) -> Iterator[FtpStore]:
    """Serve a folder, made empty, on a free port."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    store = FtpStore(root)
    session = type("Session", (_Session,), {"store": store})
    with _Server(("127.0.0.1", port), session) as server:
        store.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield store
        finally:
            server.shutdown()
            thread.join()
