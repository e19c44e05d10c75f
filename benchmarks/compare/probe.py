"""What a plain TCP transfer gets through a link: the measure of "busy". Runs as a program of its own in either node.

python probe.py receive ADDRESS PORT          accepts one connection and throws away what comes
python probe.py send ADDRESS PORT SECONDS     sends zeros for so long
"""

from __future__ import annotations

import socket
import sys
import time

_PIECE_BYTES = 1 << 20


def receive(address: str, port: int) -> None:
    with socket.create_server((address, port)) as server:
        connection, _ = server.accept()
        buffer = bytearray(_PIECE_BYTES)
        with connection:
            while connection.recv_into(buffer):
                pass


def send(address: str, port: int, seconds: float) -> None:
    piece = bytes(_PIECE_BYTES)
    end = time.monotonic() + seconds
    with socket.create_connection((address, port), timeout=10.0) as connection:
        while time.monotonic() < end:
            connection.sendall(piece)


if __name__ == "__main__":
    if sys.argv[1] == "receive":
        receive(sys.argv[2], int(sys.argv[3]))
    else:
        send(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
