"""Messages between the ranks of a run: JSON objects with a length, over a socket."""

import contextlib
import dataclasses
import json
import socket
import struct
from typing import Any

GREETING = b"kdjax ranks 1\n"  # tells a rank from whoever else uses the port
_LENGTH = struct.Struct(">I")
_MAX_BYTES = 16 * 2**20  # of a message
_SEND_SECONDS = 10.0  # until a peer whose buffers are full counts as lost


class NotARank(ConnectionError):
    """What is at the other end of a connection is no rank of a run."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """One process of a run."""

    index: int
    num: int  # processes of the run
    host: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.index} of {self.num} (host {self.host}, pid {self.pid})"


class Connection:
    """A socket to another rank, with the bytes that have come of the next message.

    Args:
      stream: a connected socket.
    """

    def __init__(self, stream: socket.socket) -> None:
        stream.settimeout(_SEND_SECONDS)
        with contextlib.suppress(OSError):  # of a socket pair
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = stream
        self.rank: Rank | None = None  # at the other end, when it has said so
        self.heard = 0.0  # when, monotonic seconds
        self._bytes = bytearray()
        self._greeted = False

    def fileno(self) -> int:
        """Return the descriptor, for `select`."""
        return self.socket.fileno()

    def greet(self) -> None:
        """Send what tells a rank from others; it comes before all messages."""
        self.socket.sendall(GREETING)

    def send(self, kind: str, **values: Any) -> None:
        """Send a message.

        Raises:
          OSError: the other end is gone, or does not read.
        """
        content = json.dumps({"kind": kind} | values).encode()
        self.socket.sendall(_LENGTH.pack(len(content)) + content)

    def receive(self) -> list[dict[str, Any]]:
        """Return the messages that are there; waits for the next bytes.

        Raises:
          EOFError: the other end has closed.
          NotARank: it is no rank of a run.
          OSError: the connection is broken.
        """
        content = self.socket.recv(1 << 16)
        if not content:
            raise EOFError
        self._bytes += content
        if not self._greeted:
            if not GREETING.startswith(bytes(self._bytes[: len(GREETING)])):
                raise NotARank
            if len(self._bytes) < len(GREETING):
                return []
            del self._bytes[: len(GREETING)]
            self._greeted = True
        messages = []
        while len(self._bytes) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._bytes)
            if length > _MAX_BYTES:
                raise NotARank
            end = _LENGTH.size + length
            if len(self._bytes) < end:
                break
            messages.append(_parse(bytes(self._bytes[_LENGTH.size : end])))
            del self._bytes[:end]
        return messages

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()


def _parse(content: bytes) -> dict[str, Any]:
    try:
        message = json.loads(content)
    except ValueError:
        raise NotARank from None
    if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
        raise NotARank
    return message
