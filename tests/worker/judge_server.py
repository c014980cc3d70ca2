"""A stand-in for a judge model: a real HTTP server on loopback that answers as a test tells it to, faults included."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

HANG = "hang"
DRIP = "drip"
HANG_UP = "hang up"


class Request(NamedTuple):
    path: str
    headers: dict[str, str]
    body: dict[str, Any]


class Status(NamedTuple):
    code: int
    location: str = ""


class Raw(NamedTuple):
    body: bytes


class Slow(NamedTuple):
    seconds: float
    mark: int


class JudgeServer(ThreadingHTTPServer):
    """Gives `replies` in turn, the last one for ever: a number is a mark, a text the content of a completion."""

    daemon_threads = True

    def __init__(self, replies: list[Any]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.replies = replies
        self.requests: list[Request] = []
        self.released = threading.Event()
        """What hangs goes on with a mark of 5."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is what some tests are about."""


@contextmanager
def judge_server(*replies: Any) -> Iterator[JudgeServer]:
    with JudgeServer(list(replies)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        number = len(self.server.requests)
        self.server.requests.append(Request(self.path, dict(self.headers), body))
        reply = self.server.replies[min(number, len(self.server.replies) - 1)]
        if isinstance(reply, Status):
            self._send(reply.code, b'{"error": "secret words of the judge"}', reply.location)
        elif isinstance(reply, Raw):
            self._send(200, reply.body)
        elif isinstance(reply, Slow):
            self.server.released.wait(reply.seconds)
            self._send(200, completion(reply.mark))
        elif reply == HANG:
            self.server.released.wait()
            self._send(200, completion(5))
        elif reply == DRIP:
            self._drip()
        elif reply == HANG_UP:
            self.close_connection = True
        else:
            self._send(200, completion(reply))

    def log_message(self, *_: Any) -> None:
        pass

    def _send(self, status: int, body: bytes, location: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if location:
            self.send_header("Location", location)
        self.end_headers()
        self.wfile.write(body)

    def _drip(self) -> None:
        """A byte now and then, so that no pause is ever long."""
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        while not self.server.released.is_set():
            self.wfile.write(b" ")
            time.sleep(0.02)


def completion(reply: Any) -> bytes:
    """A chat completion whose text is a mark, or any text."""
    content = json.dumps({"score": reply}) if isinstance(reply, int) else reply
    message = {"role": "assistant", "content": content}
    return json.dumps({"object": "chat.completion", "choices": [{"index": 0, "message": message}]}).encode()
