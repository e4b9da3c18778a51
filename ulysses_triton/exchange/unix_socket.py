"""Frames between the processes of one host, over one Unix stream socket per pair of ranks.

A frame is a kind, a length and a payload, and may carry descriptors of open files. A rank that waits sleeps in poll();
a peer that died shows as the end of its stream at once. What arrives before it is asked for waits in a queue per peer
and kind, so a peer that is a step ahead disturbs nobody.
"""

from __future__ import annotations

import array
import os
import select
import shutil
import socket
import struct
import tempfile
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

_HEAD = struct.Struct("<cI")  # kind, bytes of payload
_END = b"."  # kind of the frame ahead of an end in order
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_CHUNK = 1 << 16
_LONGEST = 3600.0  # seconds of one poll(), which counts milliseconds in 32 bits
_MOST_DESCRIPTORS = 253  # of one message; Linux's SCM_MAX_FD
_ANCILLARY = socket.CMSG_SPACE(_MOST_DESCRIPTORS * array.array("i").itemsize)


class Listener:
    """Where peers connect: a socket file that only this user can reach, gone when all have."""

    def __init__(self, size: int) -> None:
        self._folder = tempfile.mkdtemp(prefix="ulysses_triton-")  # mode 0700
        self.address = str(Path(self._folder, "socket"))
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _at(self.address, self.socket.bind)
            os.chmod(self.address, 0o600)
            self.socket.listen(size)  # so connecting never waits for `accept`
        except BaseException:
            self.close()
            raise

    def accept(self, pids: Sequence[int], rank: int, timeout: timedelta) -> dict[int, socket.socket]:
        """The connections of all ranks above `rank`; raises PermissionError for one of somebody else."""
        found: dict[int, socket.socket] = {}
        self.socket.settimeout(timeout.total_seconds())
        while len(found) < len(pids) - rank - 1:
            peer, _ = self.socket.accept()
            pid, uid = _credentials(peer)
            expected = [r for r in range(rank + 1, len(pids)) if pids[r] == pid and r not in found]
            if not expected or uid != os.getuid():
                peer.close()
                raise PermissionError(f"refused a connection of process {pid} of user {uid}, which is no peer's")
            found[expected[0]] = peer
        return found

    def close(self) -> None:
        """Idempotent."""
        self.socket.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def connect(address: str, pid: int) -> socket.socket:
    """A connection to the listener at `address`; raises PermissionError unless process `pid` of this user listens."""
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _at(address, peer.connect)
        found = _credentials(peer)
        if found != (pid, os.getuid()):
            raise PermissionError(f"{address} is not process {pid} of this user: process {found[0]} of user {found[1]}")
    except BaseException:
        peer.close()
        raise
    return peer


def _at(address: str, call: Callable[[str], object]) -> None:
    """bind or connect by way of the folder's descriptor: a socket's address has room for 107 bytes only."""
    folder, name = os.path.split(address)
    descriptor = os.open(folder, os.O_PATH | os.O_CLOEXEC)
    try:
        call(f"/proc/self/fd/{descriptor}/{name}")
    finally:
        os.close(descriptor)


def _credentials(peer: socket.socket) -> tuple[int, int]:
    """Process and user at the other end, as the kernel says."""
    pid, uid, _ = _CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid


class _Peer:
    """One connection, and what has come in by it and was not asked for yet."""

    def __init__(self, rank: int, end: socket.socket) -> None:
        self.rank = rank
        self.socket = end
        self.number = end.fileno()
        self.gone = False
        self.frames: dict[bytes, deque[bytes]] = defaultdict(deque)
        self.descriptors: deque[int] = deque()
        self._begun = bytearray()  # of a frame

    def read(self) -> None:
        """Take in what there is. Raises RuntimeError when there is no room for descriptors."""
        try:
            data, ancillary, flags, _ = self.socket.recvmsg(_CHUNK, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except ConnectionError:  # it left something of ours unread
            data, ancillary, flags = b"", [], 0
        for _, _, content in ancillary:
            whole = len(content) - len(content) % 4
            self.descriptors.extend(array.array("i", content[:whole]))
        if flags & socket.MSG_CTRUNC:
            raise RuntimeError("this process can open no more files: raise its limit (ulimit -n)")
        self.gone = not data
        begun = self._begun
        begun += data
        while len(begun) >= _HEAD.size:
            kind, length = _HEAD.unpack_from(begun)
            stop = _HEAD.size + length
            if len(begun) < stop:
                break
            self.frames[kind].append(bytes(begun[_HEAD.size : stop]))
            del begun[:stop]


class Mesh:
    """The connections of one rank to all others."""

    def __init__(self, sockets: dict[int, socket.socket], timeout: timedelta) -> None:
        self._peers = [_Peer(rank, sockets[rank]) for rank in sorted(sockets)]
        self._by_number = {peer.number: peer for peer in self._peers}
        self._seconds = timeout.total_seconds()
        self._poll = select.poll()
        for peer in self._peers:
            peer.socket.setblocking(False)
            self._poll.register(peer.number, select.POLLIN)
        _open.add(self)

    def send(self, kind: bytes, payload: bytes = b"", descriptors: Sequence[int] = ()) -> None:
        """A frame to every peer, with open files on the way. A peer that is gone is found when it is waited for."""
        frame = _HEAD.pack(kind, len(payload)) + payload
        for peer in self._peers:
            rest, files = memoryview(frame), descriptors
            while rest and not peer.gone:
                try:
                    if files:
                        sent = socket.send_fds(peer.socket, [rest], list(files))
                    else:
                        sent = peer.socket.send(rest)
                except BlockingIOError:
                    self._make_room(peer)
                except ConnectionError:
                    break
                else:
                    rest, files = rest[sent:], ()

    def receive(self, kind: bytes) -> dict[int, bytes]:
        """The next frame of a kind from every peer. Raises RuntimeError when one is gone, and at the deadline."""
        deadline = 0.0
        while missing := [peer.rank for peer in self._peers if not peer.frames[kind]]:
            gone = [peer.rank for peer in self._peers if peer.gone and peer.rank in missing]
            if gone:
                how = "it closed the group" if self.ended()[gone[0]] else "its connection closed"
                raise RuntimeError(f"waiting for ranks {missing}: rank {gone[0]} is gone ({how})")
            deadline = deadline or time.monotonic() + self._seconds
            if not self._read(deadline):
                raise RuntimeError(f"waiting for ranks {missing}: no sign of them within {self._seconds:g} s")
        return {peer.rank: peer.frames[kind].popleft() for peer in self._peers}

    def descriptor_of(self, rank: int) -> int:
        """The next open file that came with a frame of `rank`; the caller closes it."""
        return next(peer for peer in self._peers if peer.rank == rank).descriptors.popleft()

    def ended(self) -> dict[int, bool]:
        """The ranks whose connections have ended, and whether in order."""
        while ready := self._poll.poll(0):
            self._take(ready)
        return {peer.rank: bool(peer.frames[_END]) for peer in self._peers if peer.gone}

    def close(self, in_order: bool = False) -> None:
        """End all connections: peers that wait for this rank raise. Idempotent."""
        for peer in self._peers:
            try:
                if in_order:
                    peer.socket.send(_HEAD.pack(_END, 0))
            except OSError:
                pass  # it is gone already, or has no room
            try:
                peer.socket.shutdown(socket.SHUT_RDWR)  # the end even where a forked process still has the socket
            except OSError:
                pass  # it is gone already
        self.abandon()

    def abandon(self) -> None:
        """Close what this process has of the connections, and do not end them."""
        for peer in self._peers:
            if peer.socket.fileno() != -1 and not peer.gone:
                self._poll.unregister(peer.number)
            peer.gone = True
            peer.socket.close()
            while peer.descriptors:
                os.close(peer.descriptors.popleft())

    def _read(self, deadline: float) -> bool:
        """Sleep until something arrives and take it in; False at the deadline."""
        ready: list[tuple[int, int]] = []
        while not ready and (left := deadline - time.monotonic()) > 0:
            ready = self._poll.poll(min(left, _LONGEST) * 1000)
        self._take(ready)
        return bool(ready)

    def _take(self, ready: Sequence[tuple[int, int]]) -> None:
        for number, event in ready:
            peer = self._by_number[number]
            if event & ~select.POLLOUT:
                peer.read()
            if peer.gone:
                self._poll.unregister(number)

    def _make_room(self, peer: _Peer) -> None:
        """Until `peer` can be sent to; what arrives meanwhile is taken in, as its sender may wait for the same."""
        self._poll.modify(peer.number, select.POLLIN | select.POLLOUT)
        if not self._read(time.monotonic() + self._seconds):
            raise RuntimeError(f"rank {peer.rank} takes nothing: no sign of it within {self._seconds:g} s")
        if not peer.gone:
            self._poll.modify(peer.number, select.POLLIN)


_open: weakref.WeakSet[Mesh] = weakref.WeakSet()


def _abandon_all() -> None:
    for mesh in _open:
        mesh.abandon()


# A forked process, such as a data loader's worker, would keep the connections of a rank that dies open.
os.register_at_fork(after_in_child=_abandon_all)
