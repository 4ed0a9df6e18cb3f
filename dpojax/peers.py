"""A line between the processes of a run: who is asked to stop, who has failed, who is gone.

Process 0 listens, the others connect. A process that ends says so; of one that is killed the
operating system closes the line at once, and of a machine that is lost within `LOST` seconds. The
processes that are left then end with a sentence that names it: alone they would wait in a
collective.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import threading
from typing import Any

from dpojax import stopping

LOST = 30  # seconds of silence after which a machine counts as lost
CONNECT = 20.0  # seconds in which the line must stand
FIRST = 0  # the process that the others are connected to
LAST = 2.0  # seconds that process 0 leaves to the others for ending
# The status of a process that ends because another one was killed: 75 is EX_TEMPFAIL of sysexits.h,
# "try again". A launcher restarts it: the run itself has not failed.
DEAD = 75


class Link:
    """This process's end of the line; see `connect`.

    Attributes:
      index: of this process.
      count: of all processes.
    """

    def __init__(self, index: int, count: int):
        self.index, self.count = index, count
        self._peers: dict[int, socket.socket] = {}  # of process 0: all others; else process 0
        self._gone: set[int] = set()  # processes that have said that they are done
        self._lock = threading.Lock()
        self._send_lock = threading.Lock()
        self._calls = 0  # answered calls of `agreed`
        self._frozen = False  # a stop was asked for, and the call to stop at is being chosen
        self._counts: dict[int, int] = {}  # of process 0: the calls that each process has answered
        self._stop_at: int | None = None
        self._decided = threading.Event()
        self._ended = False

    # How the processes choose the call of `agreed` at which all of them stop.

    def ask_to_stop(self) -> None:
        """Make `agreed` say True, in all processes at the same call."""
        if self.index == FIRST:
            self._freeze_all()
        else:
            self._send(FIRST, kind="stop")

    def agreed(self) -> bool:
        """Whether to stop now. All processes call it equally often; their answers are the same.

        Once True it stays True. While the call is being chosen it waits for the choice.
        """
        with self._lock:
            call = self._calls + 1
            waits = self._frozen and self._stop_at is None
            if not waits:
                self._calls = call
        if waits:
            self._decided.wait()
            self._calls = call
        return self._stop_at is not None and call >= self._stop_at

    def _freeze_all(self) -> None:
        with self._lock:
            if self._frozen:
                return
        for peer in self._peers:
            self._send(peer, kind="freeze")
        self._count(FIRST, self._freeze())

    def _freeze(self) -> int:
        """From now on `agreed` waits for the choice; return how many calls it has answered."""
        with self._lock:
            self._frozen = True
            return self._calls

    def _count(self, peer: int, calls: int) -> None:
        """Of process 0: once all counts are there, choose the first call that none has answered."""
        with self._lock:
            self._counts[peer] = calls
            if len(self._counts) < self.count:
                return
            stop_at = max(self._counts.values()) + 1
        for other in self._peers:
            self._send(other, kind="stop_at", call=stop_at)
        self._choose(stop_at)

    def _choose(self, call: int) -> None:
        self._stop_at = call
        self._decided.set()

    @property
    def has_agreed(self) -> bool:
        """Whether all processes stop at the same call of `agreed`."""
        return self._stop_at is not None

    # How the processes learn that one of them has ended.

    def end(self, status: int, why: str) -> None:
        """Tell the others that this process ends before the run does; they end with `status`."""
        if self._ended:
            return
        self._ended = True
        for peer in self._peers:
            self._send(peer, kind="end", process=self.index, status=status, why=why)

    def close(self) -> None:
        """Tell the others that this process is done; that it closes the line is no fault then."""
        if not self._ended:
            self._ended = True
            for peer in self._peers:
                self._send(peer, kind="done")

    def _send(self, peer: int, **message: Any) -> None:
        with self._send_lock, contextlib.suppress(OSError):
            self._peers[peer].sendall(json.dumps(message).encode() + b"\n")

    def add(self, peer: int, line: socket.socket) -> None:
        """Use a line that stands, and listen to it."""
        _keep_alive(line)
        self._peers[peer] = line
        threading.Thread(
            target=self._listen, args=(peer, line), daemon=True, name=f"process {peer}"
        ).start()

    def _listen(self, peer: int, line: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), line, line.makefile("rb") as messages:
            for text in messages:
                self._receive(peer, json.loads(text))
        if not self._ended and peer not in self._gone:
            self._end_all(peer, DEAD, "was killed, or its machine is lost")

    def _receive(self, peer: int, message: dict) -> None:
        kind = message["kind"]
        if kind == "stop":
            self._freeze_all()
        elif kind == "freeze":
            self._send(FIRST, kind="count", calls=self._freeze())
        elif kind == "count":
            self._count(peer, message["calls"])
        elif kind == "stop_at":
            self._choose(message["call"])
        elif kind == "done":
            self._gone.add(peer)
        elif kind == "end":
            self._end_all(message["process"], message["status"], message["why"])

    def _end_all(self, process: int, status: int, why: str) -> None:
        """End this process because another one has ended; process 0 tells the others first."""
        self._ended = True
        for peer in self._peers:
            if peer != process:
                self._send(peer, kind="end", process=process, status=status, why=why)
        if self.index == FIRST:  # JAX aborts a process whose coordinator is gone before it is
            threading.Event().wait(LAST)
        text = f"process {process} of {self.count} {why}; process {self.index} ends, too"
        stopping.end_now(status, f"{text}; {stopping.GO_ON}")


_link: Link | None = None  # of this process, which is one of several


def use(link: Link) -> None:
    """Make this the line of the process: a signal that ends it alone ends the others, too."""
    global _link
    _link = link
    stopping.on_end(link.end)


def current() -> Link | None:
    """The line of this process; None where it is alone, or where none could be opened."""
    return _link


def listen() -> tuple[socket.socket, int, int]:
    """Open the listening socket of process 0; return it, its port and a number that others show."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    server = socket.create_server(("", 0), family=family, dualstack_ipv6=family == socket.AF_INET6)
    return server, server.getsockname()[1], secrets.randbits(31)


def accept(link: Link, server: socket.socket, secret: int) -> None:
    """Of process 0: wait until all others have connected.

    Raises:
      OSError: one has not within `CONNECT` seconds.
    """
    server.settimeout(CONNECT)
    waiting = set(range(link.count)) - {FIRST}
    with server:
        while waiting:
            line, _ = server.accept()
            line.settimeout(CONNECT)
            with contextlib.suppress(OSError, ValueError):
                hello = json.loads(_read_line(line))
                if hello.get("secret") == secret and hello.get("process") in waiting:
                    line.settimeout(None)
                    waiting.remove(hello["process"])
                    link.add(hello["process"], line)
                    continue
            line.close()


def connect(link: Link, host: str, port: int, secret: int) -> None:
    """Of the others: connect to process 0.

    Raises:
      OSError: it cannot be reached.
    """
    line = socket.create_connection((host, port), timeout=CONNECT)
    line.settimeout(None)
    hello = {"process": link.index, "secret": secret}
    line.sendall(json.dumps(hello).encode() + b"\n")
    link.add(FIRST, line)


def _read_line(line: socket.socket) -> bytes:
    """Read a short line byte by byte: what follows it is for another reader."""
    text = b""
    while not text.endswith(b"\n") and len(text) < 200 and (byte := line.recv(1)):
        text += byte
    return text


def _keep_alive(line: socket.socket) -> None:
    """Let the operating system notice that the other machine is gone."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
