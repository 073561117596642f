"""A web server on this machine that serves bytes, keeps count of what is asked for, and may misbehave."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class FileServer:
    """What a server serves and what happened.

    Attributes:
        url: its address, ending with a slash.
        files: content by path, without a leading slash.
        headers: further headers of an answer, or other values of the usual ones, by path; an empty one is not sent.
        requests: path and Range header of each request, in turn.
        drop_after: by path, how many bytes the next answers send before the connection breaks, in turn.
        statuses: by path, what the next requests are answered with, in turn.
        then: by path, what takes the place of its content once that was sent, in turn.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    agents: set[str] = field(default_factory=set)
    drop_after: dict[str, list[int]] = field(default_factory=dict)
    statuses: dict[str, list[int]] = field(default_factory=dict)
    then: dict[str, list[bytes]] = field(default_factory=dict)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: FileServer

    def do_GET(self) -> None:
        path = self.path.lstrip("/")
        state = self.state
        state.requests.append((path, self.headers.get("Range")))
        state.agents.add(self.headers.get("User-Agent", ""))
        if state.statuses.get(path):
            self.send_error(state.statuses[path].pop(0))
            return
        if path not in state.files:
            self.send_error(404)
            return
        content = state.files[path]
        if state.then.get(path):
            state.files[path] = state.then[path].pop(0)
        stamp = f'"{hash(content)}"'
        start = 0
        if self.headers.get("Range") and self.headers.get("If-Range") in (None, stamp):
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else 200)
        usual = {"ETag": stamp, "Content-Length": str(len(content) - start)}
        if start:
            usual["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        for name, value in (usual | state.headers.get(path, {})).items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if state.drop_after.get(path):
            content = content[: start + state.drop_after[path].pop(0)]
            self.close_connection = True
        self.wfile.write(content[start:])

    def log_message(self, *args: object) -> None:
        return


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # clients may go away when a test ends
            super().handle_error(*args)  # type: ignore[arg-type]


@contextmanager
def serve_files() -> Iterator[FileServer]:
    """Serve until the block ends."""
    state = FileServer()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": state}))
    state.url = f"http://127.0.0.1:{server.server_address[1]}/"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
