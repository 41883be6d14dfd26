"""Segment: memory that all ranks of one host have mapped, and that is gone with the last of them.

The memory is a file without a name (`memfd_create`) that the first rank makes and the others open through `/proc`, so
that nothing is left behind however ranks end. Each rank holds a lock on the byte of its rank: it is released when the
process ends, whatever ends it, and that is how the others learn of a death.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
import weakref

_FLOCK = "hhqqi4x"  # struct flock with 64-bit offsets: type, whence, start, length, process


class Segment:
    """Shared memory of `num_bytes`, zero at first. Lives as long as this object."""

    def __init__(self, fd: int, *, num_bytes: int, rank: int) -> None:
        """Takes the file over. Raises `OSError` when it cannot be mapped or locked."""
        self.fd = fd
        self._close = weakref.finalize(self, os.close, fd)
        self._memory = mmap.mmap(fd, num_bytes)
        self._view = ctypes.c_char.from_buffer(self._memory)
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, rank, 1, 0))

    @property
    def address(self) -> int:
        """Where it is mapped."""
        return ctypes.addressof(self._view)

    @classmethod
    def create(cls, name: str, *, num_bytes: int, rank: int) -> Segment:
        """Make the memory, all of it at once. Raises `OSError` when there is too little."""
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(fd, 0, num_bytes)
        except OSError:
            os.close(fd)
            raise
        return cls(fd, num_bytes=num_bytes, rank=rank)

    @classmethod
    def open(cls, path: str, *, num_bytes: int, rank: int) -> Segment:
        """Map what another rank has made. Raises `OSError` when it cannot be reached."""
        return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC), num_bytes=num_bytes, rank=rank)

    @property
    def path(self) -> str:
        """Where other processes find it, as long as this one lives."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    def sees(self, rank: int) -> bool:
        """Whether another rank holds its lock. Raises `OSError` where locks cannot be asked for."""
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, rank, 1, 0)
        kind = struct.unpack(_FLOCK, fcntl.fcntl(self.fd, fcntl.F_OFD_GETLK, asked))[0]
        return kind != fcntl.F_UNLCK
