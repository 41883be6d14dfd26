"""Memory of this process as Linux counts it."""

from __future__ import annotations

from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_rss_mib() -> float:
    """The largest resident size so far, of this program alone: `getrusage` would keep that of who started it."""
    return _status_mib("VmHWM")


def file_rss_mib() -> float:
    """The resident pages of files, such as libraries; other processes that use them share these."""
    return _status_mib("RssFile")


def _status_mib(name: str) -> float:
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024
