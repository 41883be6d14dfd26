"""Line: a connection between two ranks that carries JSON arrays, one to a line. No pickle, no torch."""

from __future__ import annotations

import hmac
import json
import secrets
import socket
from pathlib import Path
from typing import Any

from inference_shardformer.distributed.tensor_parallel import TensorParallelGroup
from inference_shardformer.errors import EnvironmentMismatchError

_SEND_TIMEOUT_S = 2.0


class Line:
    """One end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._socket.settimeout(_SEND_TIMEOUT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._rest = b""

    def fileno(self) -> int:
        """For a selector."""
        return self._socket.fileno()

    def send(self, *message: Any) -> None:
        """Send one message. A peer that is gone is found out by `receive`."""
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return

    def receive_first(self) -> Any:
        """The first message, and nothing of what follows it; `None` where none comes in time."""
        try:
            head, end, _ = self._socket.recv(1 << 16, socket.MSG_PEEK).partition(b"\n")
            self._socket.recv(len(head + end))
        except OSError:
            return None
        return json.loads(head) if end else None

    def receive(self) -> list[list[Any]] | None:
        """The messages that have arrived; `None` once the peer is gone. Waits when nothing is there."""
        try:
            data = self._socket.recv(1 << 16)
        except OSError:
            return None
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


def connect_to_leader(group: TensorParallelGroup, *, timeout_s: float) -> dict[int, Line]:
    """Lines of a star around group rank 0: all the others there, `{0: line}` elsewhere. All ranks must call this."""
    hosts = group.all_gather_bytes(_host_identity())
    if group.rank != 0:
        address, port, token = json.loads(group.broadcast_bytes(None))
        return {0: call(group.rank, address, port, token=token, timeout_s=timeout_s)}
    all_here = len(set(hosts)) == 1
    with socket.create_server(("127.0.0.1" if all_here else "", 0), backlog=group.size) as server:
        address = "127.0.0.1" if all_here else socket.getfqdn()
        token = secrets.token_hex(16)
        group.broadcast_bytes(json.dumps([address, server.getsockname()[1], token]).encode())
        return answer(server, size=group.size, token=token, timeout_s=timeout_s)


def call(rank: int, address: str, port: int, *, token: str, timeout_s: float) -> Line:
    """Connect to the leader and say who this is."""
    try:
        line = Line(socket.create_connection((address, port), timeout=timeout_s))
    except OSError as exc:
        raise EnvironmentMismatchError(
            f"rank {rank} cannot reach rank 0 at {address}:{port}: {exc}",
            remedy="open the ports between the hosts of one tensor-parallel group, or place it on one host",
        ) from exc
    line.send("hello", token, rank)
    return line


def answer(server: socket.socket, *, size: int, token: str, timeout_s: float) -> dict[int, Line]:
    """Wait for the calls of all other ranks; who does not know the token is turned away."""
    lines: dict[int, Line] = {}
    server.settimeout(timeout_s)
    while len(lines) < size - 1:
        try:
            connection, _ = server.accept()
        except TimeoutError as exc:
            for line in lines.values():
                line.close()
            missing = sorted(set(range(1, size)) - set(lines))
            raise EnvironmentMismatchError(
                f"ranks {missing} did not connect to rank 0 within {timeout_s:g} s",
                remedy="see what these ranks printed; raise timeout_s when they are only slow",
            ) from exc
        line = Line(connection)
        rank = _rank_of_caller(line, token)
        if rank is None:
            line.close()
        else:
            lines[rank] = line
    return lines


def _rank_of_caller(line: Line, token: str) -> int | None:
    """Who is calling, or `None` for a stranger: anybody on the host may connect to an open port.

    A caller does not wait to be answered, so its reports may already lie behind its name.
    """
    try:
        first = line.receive_first()
    except ValueError:
        return None
    match first:
        case ["hello", str(given), int(rank)] if hmac.compare_digest(given.encode(), token.encode()):
            return rank
    return None


def _host_identity() -> bytes:
    """Equal on ranks that reach each other over the loopback interface."""
    boot, network = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/net")
    if boot.exists() and network.exists():
        return f"{boot.read_text().strip()} {network.readlink()}".encode()
    return socket.gethostname().encode()
