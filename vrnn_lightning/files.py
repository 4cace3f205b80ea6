"""Files that are whole or not there: the one writer of this package, and what reading them has in common."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path

from vrnn_lightning.errors import UserError

__all__ = ["FolderLock", "explained", "flush", "replacing", "require_intact_zip", "write_files"]

PIECE = 2**20
"""Bytes that are read at once."""

HEARTBEAT, STALE = 10.0, 60.0
"""Seconds between two touches of a lock, and without one after which it counts as left behind."""

_numbers = count()


@contextmanager
def replacing(path: Path, option: str = "") -> Iterator[Path]:
    """Yield the path of a temporary file, which replaces ``path`` when the block ends without an error.

    The temporary file lies in the folder of ``path``, which is made if it does not exist, so that the replacement is
    one atomic step; file and folder are flushed to the disk (fsync). A crash, a kill or a full disk at any moment
    leaves the earlier file or the new one, never a part.

    Args:
        path: The file to write or replace.
        option: The option that names it, for the message.

    Raises:
        UserError: The system can't write there.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder) / "a.txt"
    ...     with replacing(path) as temporary:
    ...         _ = temporary.write_text("whole")
    ...     path.read_text()
    'whole'
    """
    with explained(path, option), ExitStack() as stack:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{next(_numbers)}.part")
        stack.callback(_remove, temporary)
        yield temporary
        _replace({temporary: path})


def write_files(files: Mapping[Path, bytes], option: str = "") -> None:
    """Write several files; none of them is replaced before all of them are on the disk.

    Args:
        files: Their contents by path.
        option: The option that names them, for the message.

    Raises:
        UserError: The system can't write one of them.
    """
    with ExitStack() as stack:
        written = {}
        for path, content in files.items():
            with explained(path, option):
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_name(f".{path.name}.{os.getpid()}-{next(_numbers)}.part")
                stack.callback(_remove, temporary)
                temporary.write_bytes(content)
                flush(temporary)
                written[temporary] = path
        with explained(next(iter(files), Path()), option):
            _replace(written)


@contextmanager
def explained(path: Path | str, option: str = "", fix: str = "") -> Iterator[None]:
    """Raise an OSError of the block as one line that names the path, the option and the fix.

    Args:
        path: What the block reads or writes.
        option: The option that names it.
        fix: What to do about it; by default what the error suggests.

    Raises:
        UserError: In place of the system's error.
    """
    try:
        yield
    except OSError as error:
        place = f"{option} {path}" if option else str(path)
        raise UserError(f"{place}: {error.strerror or error}. Fix: {fix or _fix(error)}") from error


class FolderLock:
    """Keeps a folder to one process at a time, by a lock of the operating system that ends with its process.

    On file systems without such locks (some network file systems) the lock is a file that names host and process and
    is touched every few seconds; it counts as left behind once it is not.

    Args:
        folder: The folder; a file ``.lock`` in it is what is locked.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / ".lock"
        self._handle: int | None = None
        self._ended: threading.Event | None = None

    @property
    def is_held(self) -> bool:
        """Whether this process has the folder."""
        return self._handle is not None or self._ended is not None

    def acquire(self) -> None:
        """Take the folder, which is made if it does not exist.

        Raises:
            UserError: Another process has it, or the system can't write there.
        """
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            while self._handle is None:
                handle = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o666)
                try:
                    fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except (BlockingIOError, PermissionError):
                    os.close(handle)
                    raise self._taken(self.file) from None
                except OSError:  # no locks on this file system
                    os.close(handle)
                    self._acquire_by_heartbeat()
                    return
                if self.file.exists() and os.path.samestat(os.fstat(handle), self.file.stat()):
                    self._handle = handle
                else:  # its last owner has removed it meanwhile
                    os.close(handle)
            os.ftruncate(self._handle, 0)
            os.write(self._handle, self._owner())

    def release(self) -> None:
        """Let others have the folder."""
        if self._handle is not None:
            _remove(self.file)
            os.close(self._handle)
        if self._ended is not None:
            self._ended.set()
            _remove(self.file.with_suffix(".owner"))
            _remove(self.file)
        self._handle = self._ended = None

    @staticmethod
    def _owner() -> bytes:
        return f"{socket.gethostname()} process {os.getpid()}".encode()

    def _taken(self, file: Path) -> UserError:
        owner = ""
        with suppress(OSError):
            owner = f" ({file.read_text(errors='replace')})"
        return UserError(
            f"{self.folder}: another run writes there{owner}. Fix: wait for it, or leave the logger's `version` out"
        )

    def _acquire_by_heartbeat(self) -> None:
        file = self.file.with_suffix(".owner")
        for _ in range(2):
            try:
                handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                if self._is_alive(file):
                    raise self._taken(file) from None
                _remove(file)
            else:
                os.write(handle, self._owner())
                os.close(handle)
                self._ended = threading.Event()
                threading.Thread(target=self._touch, args=(file, self._ended), daemon=True).start()
                return
        raise self._taken(file)

    def _is_alive(self, file: Path) -> bool:
        """Tell whether the process that a lock names may still run."""
        try:
            host, _, process = file.read_text().rpartition(" process ")
            self.file.touch()  # the clock of the file system, which may not be ours
            if self.file.stat().st_mtime - file.stat().st_mtime > STALE:
                return False
            if host == socket.gethostname() and process.isdigit():
                os.kill(int(process), 0)
        except (FileNotFoundError, ProcessLookupError):
            return False
        except PermissionError:
            return True
        return True

    @staticmethod
    def _touch(file: Path, ended: threading.Event) -> None:
        while not ended.wait(HEARTBEAT):
            with suppress(OSError):
                os.utime(file)


def require_intact_zip(path: Path, option: str = "", refuse: Callable[[str], UserError] = UserError) -> None:
    """Raise if a zip file (a checkpoint, an .npz archive) is damaged: every member is read and its CRC compared.

    Args:
        path: The file.
        option: The option that names it, for the message.
        refuse: Makes the exception of a line.

    Raises:
        UserError: It is no zip file, is truncated, or a member's bytes have another checksum than was stored.
    """
    place = f"{option} {path}" if option else str(path)
    try:
        with explained(path, option), zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                with archive.open(member) as content:
                    while content.read(PIECE):
                        pass
    except UserError:
        raise
    except Exception as error:  # damaged bytes raise anything: BadZipFile, zlib.error, struct.error ...
        raise refuse(f"{place}: is damaged ({error}). Fix: copy it again, or give an earlier one") from error


def _fix(error: OSError) -> str:
    fixes = {
        errno.ENOSPC: "free some space, or choose a folder on another disk",
        errno.EDQUOT: "free some of your quota, or choose another folder",
        errno.EACCES: "give yourself permission, or choose another folder",
        errno.EPERM: "give yourself permission, or choose another folder",
        errno.EROFS: "choose a folder that can be written to",
        errno.ENOENT: "check the path; the folder may have been deleted",
        errno.EISDIR: "remove the folder of that name, or choose another path",
        errno.ENOTDIR: "remove the file that stands in place of a folder, or choose another path",
        errno.EEXIST: "remove the file that stands in place of a folder, or choose another path",
        errno.ENAMETOOLONG: "choose a shorter path",
    }
    return fixes.get(error.errno or 0, "check the disk and the path")


def _replace(files: Mapping[Path, Path]) -> None:
    """Let temporary files take the places of others, and flush the folders."""
    for temporary in files:
        flush(temporary)
    for temporary, path in files.items():
        temporary.replace(path)
    for folder in {path.parent for path in files.values()}:
        with suppress(OSError):  # not every file system flushes folders
            flush(folder)


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)
