"""A folder that belongs to one process at a time."""

from __future__ import annotations

import errno
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from vrnn_lightning.errors import UserError
from vrnn_lightning.files import explained

__all__ = ["FolderLock"]


class FolderLock:
    """Keeps a folder to one process at a time, by a lock on its file ``.lock`` that ends with its process.

    On file systems without such locks (some network file systems) the lock is a file that names host and process.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / ".lock"
        self._lock: BaseFileLock = FileLock(self.file, thread_local=False)

    def __reduce__(self) -> tuple[type[FolderLock], tuple[Path]]:
        return FolderLock, (self.folder,)  # copies of a trainer hold nothing

    @property
    def is_held(self) -> bool:
        """Whether this process has the folder."""
        return self._lock.is_locked

    def acquire(self) -> None:
        """Take the folder, which is made if it does not exist; raise if another process has it."""
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(blocking=False)
            except Timeout:
                fix = "wait for it, leave the logger's `version` out, or test a copy of the checkpoint elsewhere"
                raise UserError(f"{self.folder}: another run writes there. Fix: {fix}") from None
            except (OSError, NotImplementedError) as error:
                if getattr(error, "errno", errno.ENOLCK) != errno.ENOLCK:
                    raise
                self._lock = SoftFileLock(self.file.with_suffix(".owner"), thread_local=False)
                self.acquire()

    def release(self) -> None:
        """Release the folder."""
        if self.is_held:
            self.file.unlink(missing_ok=True)  # while it is held: no other process can hold the removed file
            self._lock.release()
