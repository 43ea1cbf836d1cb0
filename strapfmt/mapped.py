"""Opens and memory-maps the files of a dataset, refusing anything that is not a plain file where one is expected."""

from __future__ import annotations

import ctypes
import mmap
import os
import stat
from pathlib import Path
from typing import Any

from strapfmt import spec
from strapfmt.errors import CorruptError, DatasetChangedError

__all__ = ["map_file", "read_file"]

_MAP_NORESERVE = 0x4000 if os.uname().sysname == "Linux" else 0
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def read_file(root: Path, name: str, limit_bytes: int) -> bytes:
    """Return the whole of a small file.

    Raises
    ------
    CorruptError
        If it is no plain file, or larger than the limit.
    FileNotFoundError
    """
    fd = _open(root, name)
    try:
        size = os.fstat(fd).st_size
        if size > limit_bytes:
            raise CorruptError(f"{root / name}: expected at most {limit_bytes} bytes, got {size}")
        with open(fd, "rb", closefd=False) as file:
            return file.read(limit_bytes)
    finally:
        os.close(fd)


def map_file(root: Path, name: str, n_bytes: int, *, writable: bool = False) -> memoryview:
    """Map the first `n_bytes` of a file.

    A write changes this process's pages of this map, never the file nor another map of it; without `writable` the
    memory says that it takes none, and one that is forced crashes nothing. The mapping lives as long as anything that
    refers to the returned memory (tensors, Arrow buffers), and holds no descriptor. A file that is still called
    `.arrow.open` in the manifest may have been sealed since; then the sealed file, which begins with the same bytes,
    is mapped.

    Raises
    ------
    CorruptError
        If the file is shorter, or no plain file.
    DatasetChangedError
        If there is no such file.
    """
    try:
        fd = _open(root, name)
    except FileNotFoundError as error:
        if name.endswith(spec.OPEN_SUFFIX):
            sealed = name.removesuffix(spec.OPEN_SUFFIX) + spec.DATA_SUFFIX
            return map_file(root, sealed, n_bytes, writable=writable)
        raise DatasetChangedError(
            f"{root / name}: the file is gone; if a writer is at work call refresh(), else the dataset is incomplete"
        ) from error
    try:
        size = os.fstat(fd).st_size
        if size < n_bytes:
            raise CorruptError(
                f"{root / name}: expected at least {n_bytes} bytes, got {size}; the file was cut"
            )
        if not n_bytes:
            return memoryview(b"")
        memory = memoryview(_Mapping.of(fd, n_bytes)).cast("B")
        return memory if writable else memory.toreadonly()
    finally:
        os.close(fd)


class _Mapping:
    """Makes ctypes arrays over mapped memory that unmap themselves when the last reference goes."""

    @staticmethod
    def of(fd: int, n_bytes: int) -> ctypes.Array[ctypes.c_char]:
        # Also what is handed out as read-only: who writes there by force shall not crash the process.
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        address = _libc.mmap(None, n_bytes, protection, mmap.MAP_PRIVATE | _MAP_NORESERVE, fd, 0)
        if address is None or address == ctypes.c_void_p(-1).value:
            code = ctypes.get_errno()
            raise OSError(code, f"mapping {n_bytes} bytes: {os.strerror(code)}")
        kind: Any = type("MappedArray", (ctypes.c_char * n_bytes,), {"__del__": _unmap})
        mapped: ctypes.Array[ctypes.c_char] = kind.from_address(address)
        return mapped


def _unmap(
    array: ctypes.Array[ctypes.c_char],
    # Held here because modules are emptied when Python exits, perhaps before the last array goes.
    munmap: Any = _libc.munmap,
    address: Any = ctypes.addressof,
    size: Any = ctypes.sizeof,
) -> None:
    munmap(address(array), size(array))


def _open(root: Path, name: str) -> int:
    """Open a plain file below `root`, following no symbolic link on the way."""
    *directories, file = name.split("/")
    at = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for directory in directories:
            inner = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            os.close(at)
            at = inner
        fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=at)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise CorruptError(
            f"{root / name}: expected a plain file below plain directories: {error.strerror}"
        ) from error
    finally:
        os.close(at)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CorruptError(f"{root / name}: expected a plain file")
    return fd
