"""A relay of TCP connections that holds every byte back for a while each way: delay, where the kernel has no netem.

It holds twice what is on its way at the link's rate, and no more. Prints the address at which it listens, and carries
until it is killed.

    python -m benchmarks.relay HOST TARGET --rate 1e8 --delay 0.02
"""

import socket
import threading
import time
from collections import deque
from typing import Annotated

import typer

from cola_common.rpc.addresses import split

CHUNK = 1 << 18
"""Bytes read at a time: at 1 Gbit/s a few hundred reads a second, which is little for Python."""


class Held:
    """What is on its way, in its order: at most so many bytes, and none comes out before it is due."""

    def __init__(self, seconds: float, most: int) -> None:
        self._seconds = seconds
        self._most = most
        self._waiting: deque[tuple[float, bytes]] = deque()
        self._nbytes = 0
        self._changed = threading.Condition()

    def put(self, data: bytes) -> None:
        """Waits for room. Nothing more follows no bytes."""
        with self._changed:
            self._changed.wait_for(lambda: self._nbytes < self._most)
            self._waiting.append((time.monotonic() + self._seconds, data))
            self._nbytes += len(data)
            self._changed.notify_all()

    def get(self) -> bytes:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting)
            due, data = self._waiting.popleft()
        time.sleep(max(0.0, due - time.monotonic()))
        with self._changed:  # only now: what is on its way takes room
            self._nbytes -= len(data)
            self._changed.notify_all()
        return data


def carry(source: socket.socket, sink: socket.socket, seconds: float, most: int) -> None:
    """From one socket to the other, until there is no more; two threads."""
    held = Held(seconds, most)

    def deliver() -> None:
        try:
            while data := held.get():
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            source.close()  # the reader learns it

    threading.Thread(target=deliver, daemon=True).start()
    try:
        while data := source.recv(CHUNK):
            held.put(data)
    except OSError:
        pass
    held.put(b"")


def main(
    host: Annotated[str, typer.Argument(help="Where it listens, at a free port.")],
    target: Annotated[str, typer.Argument(help="HOST:PORT to which it carries.")],
    rate: Annotated[float, typer.Option(help="Of the link, bit/s.")] = 1e9,
    delay: Annotated[float, typer.Option(help="Seconds each way.")] = 0.02,
) -> None:
    """Relay until killed."""
    listener = socket.create_server((host, 0))
    print("{}:{}".format(*listener.getsockname()), flush=True)
    most = max(CHUNK, round(2 * rate / 8 * delay))
    while True:
        near, _ = listener.accept()
        far = socket.create_connection(split(target))
        for each in (near, far):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for source, sink in ((near, far), (far, near)):
            threading.Thread(target=carry, args=(source, sink, delay, most), daemon=True).start()


if __name__ == "__main__":
    typer.run(main)
