"""Signals that end a command, at once or after a fit has saved."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Interruption", "Stopped", "interruption"]


class Stopped(SystemExit):
    """A signal ended the command: exits with 128 + its number, as a shell expects."""

    def __init__(self, signum: int, saved: str | None = None) -> None:
        super().__init__(128 + signum)
        self.signum = signum
        self.saved = saved or ""
        """The checkpoint that was written before."""
        self.is_agreed = saved is not None
        """Whether all processes of the run end for it, at the same moment of a fit."""


class Interruption:
    """The signal that this process has received, which ends it at once, or at the next moment that a fit can save.

    A second signal ends the process at once.
    """

    def __init__(self) -> None:
        self.signum = 0
        """The signal that was received, 0 if none."""
        self.is_deferred = False
        """Whether a fit is running, which reads :attr:`signum` itself."""

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.signum:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self.signum = signum
        if not self.is_deferred:
            raise Stopped(signum)

    @contextmanager
    def watching(self, *signals: int) -> Iterator[None]:
        """Handle signals within a block; without effect outside the main thread, which alone receives them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.signum, self.is_deferred = 0, False
        earlier = {signum: signal.signal(signum, self) for signum in signals}
        try:
            yield
        finally:
            self.signum, self.is_deferred = 0, False  # the signal is not meant for a later fit from Python
            for signum, handler in earlier.items():
                signal.signal(signum, handler)

    @property
    def is_watching(self) -> bool:
        """Whether signals are handled here."""
        return signal.getsignal(signal.SIGTERM) is self


interruption = Interruption()
"""That of this process; the command line watches it."""
