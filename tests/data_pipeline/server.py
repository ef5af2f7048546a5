"""A web server that fails in the ways real ones do."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Fault = str | None
"""reset, error (503), a status ("403"; "429 7": try again in 7 s), short, wrong, stall; None: good."""


class FaultyServer:
    """Serves the files of a folder; `faults(path, n)` says what goes wrong with the nth request of a path.

    `heads` does so for HEAD requests.
    """

    def __init__(self, folder: Path, faults: Callable[[str, int], Fault], heads: Callable[[str, int], Fault]):
        self.folder, self.faults, self.heads = folder, faults, heads
        self.asked: Counter[str] = Counter()  # GET requests of each path
        self.heads_asked: Counter[str] = Counter()
        self.served: Counter[str] = Counter()  # whole good answers
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                outer.answer(self, body=False)

            def do_GET(self) -> None:
                outer.answer(self, body=True)

            def log_message(self, *_: object) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        name = request.path.lstrip("/")
        file = self.folder / name
        with self.lock:
            self.asked[name] += body
            self.heads_asked[name] += not body
            fault = self.faults(name, self.asked[name]) if body else self.heads(name, self.heads_asked[name])
        if not file.is_file():
            request.send_error(404)
            return
        status, _, later = ("503" if fault == "error" else fault or "").partition(" ")
        if status.isdecimal():
            request.send_response(int(status))
            if later:
                request.send_header("Retry-After", later)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        data = file.read_bytes()
        request.send_response(200)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if not body:
            return
        if fault == "wrong":
            data = data[:600] + bytes([data[600] ^ 1]) + data[601:]
        cut = len(data) // 2 if fault in ("reset", "short", "stall") else len(data)
        request.wfile.write(data[:cut])
        request.wfile.flush()
        if fault == "reset":
            linger = struct.pack("ii", 1, 0)
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        if fault == "stall":
            time.sleep(2)
        if fault:
            request.close_connection = True
            request.connection.close()
        else:
            with self.lock:
                self.served[name] += 1


@contextmanager
def faulty_server(
    folder: Path,
    faults: Callable[[str, int], Fault] = lambda *_: None,
    heads: Callable[[str, int], Fault] = lambda *_: None,
) -> Iterator[FaultyServer]:
    server = FaultyServer(folder, faults, heads)
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()
