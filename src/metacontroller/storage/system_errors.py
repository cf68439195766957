"""What the system refuses, such as space on a disk, in one sentence and with an exit status each."""

from __future__ import annotations

import errno
import os
import re
from typing import NamedTuple

NO_SPACE, NO_ACCESS, NO_MEMORY = 4, 5, 6
BROKEN_PIPE = 141
"""128 and the number of SIGPIPE, as of a shell's commands."""

_SPACE = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|Cannot allocate memory")
_ACCESS = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), "change its permissions, or choose another"),
    errno.EROFS: "choose a place that can be written",
    **dict.fromkeys((errno.EEXIST, errno.ENOTEMPTY), "something is in the way: move it, or choose another"),
    errno.ENOTDIR: "a file is in the way where a folder was expected: move it, or choose another",
    errno.EISDIR: "a folder is in the way where a file was expected: move it, or choose another",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "its links lead in a circle: put the file itself there",
    errno.EIO: "the disk fails: choose another",
    errno.ENXIO: "put a regular file there",
    errno.EBUSY: "something else uses it: end that, or choose another",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n), or take fewer workers",
    errno.ENFILE: "too many files are open on this machine: end other work",
}


class Refusal(NamedTuple):
    """A sentence without its last dot, and the exit status."""

    sentence: str
    status: int


def refusal(error: BaseException) -> Refusal | None:
    """What the system refused, if that is what an exception says; None for any other."""
    if isinstance(error, BrokenPipeError):
        return Refusal("what read the output has ended", BROKEN_PIPE)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _MEMORY.search(str(error))):
        return Refusal("there is not enough memory; lower batch_size or the widths, or take fewer workers", NO_MEMORY)
    number = error.errno if isinstance(error, OSError) else None
    if type(error).__name__ == "SafetensorError" and (match := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(match[1])
    if number is None:
        return None
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)
    where = "a file" if name is None else str(name)
    where = where if len(where) <= 200 else f"{where[:197]}..."
    if number in _SPACE:
        return Refusal(f"no space is left for {where} ({os.strerror(number)}); free some, or choose another", NO_SPACE)
    if number == errno.ENOMEM:
        return Refusal("there is not enough memory; take fewer workers", NO_MEMORY)
    if number in _ACCESS:
        return Refusal(f"{where} cannot be used ({os.strerror(number)}); {_ACCESS[number]}", NO_ACCESS)
    return None
