"""What a hostile webhook is made of: a DNS server that says what it likes, and receivers that do."""

from __future__ import annotations

import re
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

import dns.message
import dns.rrset


class NameServer:
    """A DNS server on a loopback port. `answer` gets a name and the kind of address wanted (A, AAAA) and gives the
    addresses; None: it stays silent."""

    def __init__(self, answer: Callable[[str, str], list[str] | None]) -> None:
        self.asked: list[tuple[str, str]] = []
        self._answer = answer
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def _serve(self) -> None:
        while True:
            raw, whence = self._socket.recvfrom(4096)
            if not raw:
                return
            query = dns.message.from_wire(raw)
            question = query.question[0]
            name, kind = question.name.to_text(omit_final_dot=True), question.rdtype.name
            self.asked.append((name, kind))
            addresses = self._answer(name, kind)
            if addresses is not None:
                response = dns.message.make_response(query)
                if addresses:
                    response.answer.append(dns.rrset.from_text(question.name, 0, "IN", kind, *addresses))
                self._socket.sendto(response.to_wire(), whence)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.sendto(b"", self._socket.getsockname())
        self._thread.join()
        self._socket.close()


class Receiver:
    """A TCP server on `host` that hands every connection, once a request is there, to `serve`, in a thread. It
    keeps the heads, and how many connections it had at once."""

    def __init__(
        self, serve: Callable[[socket.socket, bytes], None], host: str = "127.0.0.2", tls: ssl.SSLContext | None = None
    ) -> None:
        self.heads: list[bytes] = []
        self.most_at_once = 0
        self._open: set[socket.socket] = set()
        self._serve, self._tls = serve, tls
        self._listener = socket.create_server((host, 0), backlog=128)
        self.port = self._listener.getsockname()[1]
        self.url = f"http{'s' if tls else ''}://{host}:{self.port}/hook"

    def ids(self) -> list[str]:
        """The `webhook-id` of every request."""
        lines = [line for head in list(self.heads) for line in head.decode().split("\r\n")]
        return [line.partition(": ")[2] for line in lines if line.startswith("webhook-id: ")]

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._open.add(connection)
                self.most_at_once = max(self.most_at_once, len(self._open))
                threading.Thread(target=self._handle, args=(connection,), daemon=True).start()

    def _handle(self, connection: socket.socket) -> None:
        with suppress(OSError):
            there = self._tls.wrap_socket(connection, server_side=True) if self._tls else connection
            head = b""
            while b"\r\n\r\n" not in head and (data := there.recv(65_536)):
                head += data
            if head:
                head, _, body = head.partition(b"\r\n\r\n")
                self.heads.append(head)
                length = int(re.search(rb"Content-Length: (\d+)", head)[1])  # type: ignore[index]
                while len(body) < length and (data := there.recv(65_536)):  # unread, it would have the answer lost
                    body += data
                self._serve(there, head)
            there.close()
        self._open.discard(connection)
        connection.close()

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def tarpit(connection: socket.socket, head: bytes) -> None:
    """Accepts and never answers."""
    while connection.recv(65_536):
        pass


def accept(connection: socket.socket, head: bytes) -> None:
    """Answers as it should, and ends the connection."""
    connection.sendall(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
