"""The base class of datamodules that read a file or folder."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from lightning_utilities.core.rank_zero import WarningCache

from vrnn_lightning.data.datamodule import SequenceDataModule
from vrnn_lightning.data.downloads import fetch
from vrnn_lightning.errors import UserError
from vrnn_lightning.files import MAX_GB

__all__ = ["FileDataModule", "data_root"]


class FileDataModule(SequenceDataModule):
    """Base class of datamodules that read the file or folder ``root``.

    A subclass whose data can be fetched names them by ``dataset`` and has an option ``download``.

    Args:
        root: The file or folder. It may lie elsewhere when a checkpoint is used again.
        max_gb: Gigabytes that the content of a file (the samples of a recording) may take, as a damaged or hostile one
            declares more than it holds; 16 times its own size is always allowed.
        options: The other options of :class:`~vrnn_lightning.SequenceDataModule`.
    """

    run_options: ClassVar[frozenset[str]] = SequenceDataModule.run_options | {"max_gb"}
    dataset: ClassVar[str] = ""

    def __init__(self, root: str, max_gb: float = MAX_GB, **options: Any) -> None:
        super().__init__(**options)
        self.download: bool = self.hparams.get("download", False)
        if self.download:
            self.hparams["download"] = False  # an option of this run: checkpoints do not repeat it
        if not max_gb > 0:
            raise UserError(f"--data.max_gb {max_gb}: must be positive, in gigabytes")
        self.root, self.max_gb = data_root(root), max_gb
        self._warnings = WarningCache()
        self._require_choices()

    def _require_choices(self) -> None:
        """Raise if an option whose type is a ``Literal`` has another value."""
        for base in type(self).__mro__:
            with suppress(NameError):  # a type that only type checkers import
                hints = get_type_hints(vars(base).get("__init__")) if issubclass(base, FileDataModule) else {}
                for option, kind in hints.items():
                    if get_origin(kind) is Literal and (value := self.hparams[option]) not in get_args(kind):
                        raise UserError(f"--data.{option} {value}: must be one of {', '.join(get_args(kind))}")

    def prepare_data(self) -> None:
        """Fetch the dataset into ``root``, if ``download`` asks for it."""
        if self.download:
            fetch(self.dataset, self.root)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the checkpoint's scaler, and forget the splits that ``setup`` found without it."""
        super().load_state_dict(state_dict)
        self._splits.clear()


def data_root(root: str) -> Path:
    """Return the file or folder of ``--data.root``, which need not be there; ``~`` is a user's home."""
    try:
        return Path(root).expanduser()
    except RuntimeError as error:  # no such user
        raise UserError(f"--data.root {root}: {str(error).rstrip('.')}. Fix: write the whole path") from error
