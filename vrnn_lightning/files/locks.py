"""A folder that belongs to one process at a time."""

from __future__ import annotations

import fcntl
import os
import socket
import threading
from contextlib import ExitStack, suppress
from pathlib import Path

from vrnn_lightning.errors import UserError
from vrnn_lightning.files import explained

__all__ = ["FolderLock"]

HEARTBEAT, STALE = 10.0, 60.0
"""Seconds between two touches of a lock file, and the age from which on its process counts as dead."""


class FolderLock:
    """Keeps a folder to one process at a time, by a lock on its file ``.lock`` that ends with its process.

    On file systems without such locks (some network file systems) the lock is a file that names host and process. Its
    process touches it every few seconds, and counts as dead where it does not.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / ".lock"
        self.is_held = False
        """Whether this process has the folder."""
        self._held = ExitStack()

    def acquire(self) -> None:
        """Take the folder, which is made if it does not exist; raise if another process has it."""
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            while not self.is_held:
                handle = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o666)
                try:
                    fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except (BlockingIOError, PermissionError):
                    os.close(handle)
                    raise self._taken_error(self.file) from None
                except OSError:  # no locks on this file system
                    os.close(handle)
                    self._acquire_by_heartbeat()
                    return
                self.is_held = self.file.exists() and os.path.samestat(os.fstat(handle), self.file.stat())
                if not self.is_held:  # its last owner has removed it meanwhile
                    os.close(handle)
            self._held.callback(os.close, handle)
            self._held.callback(self.file.unlink, missing_ok=True)
            os.ftruncate(handle, 0)
            os.write(handle, self._owner())

    def release(self) -> None:
        """Release the folder."""
        self.is_held = False
        self._held.close()

    @staticmethod
    def _owner() -> bytes:
        return f"{socket.gethostname()} process {os.getpid()}".encode()

    def _taken_error(self, file: Path) -> UserError:
        owner = ""
        with suppress(OSError):
            owner = f" ({file.read_text(errors='replace')})"
        return UserError(
            f"{self.folder}: another run writes there{owner}. Fix: wait for it, leave the logger's `version` out, or "
            "test a copy of the checkpoint elsewhere"
        )

    def _acquire_by_heartbeat(self) -> None:
        file = self.file.with_suffix(".owner")
        for _ in range(2):
            try:
                with file.open("xb") as new:
                    new.write(self._owner())
            except FileExistsError:
                if self._is_alive(file):
                    raise self._taken_error(file) from None
                file.unlink(missing_ok=True)
            else:
                self.is_held, ended = True, threading.Event()
                threading.Thread(target=self._touch, args=(file, ended), daemon=True).start()
                self._held.callback(self.file.unlink, missing_ok=True)
                self._held.callback(file.unlink, missing_ok=True)
                self._held.callback(ended.set)
                return
        raise self._taken_error(file)

    def _is_alive(self, file: Path) -> bool:
        try:
            host, _, process = file.read_text().rpartition(" process ")
            self.file.touch()  # the clock of the file system, which may not be ours
            if self.file.stat().st_mtime - file.stat().st_mtime > STALE:
                return False
            if host == socket.gethostname() and process.isdigit():
                os.kill(int(process), 0)
        except (FileNotFoundError, ProcessLookupError):
            return False
        except PermissionError:  # another user's process or file
            return True
        return True

    @staticmethod
    def _touch(file: Path, ended: threading.Event) -> None:
        while not ended.wait(HEARTBEAT):
            with suppress(OSError):
                os.utime(file)
