"""The one writer of files of this package, and the checks and errors that all readers share."""

from __future__ import annotations

import csv
import errno
import io
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import yaml

from vrnn_lightning.errors import UserError

__all__ = [
    "csv_line", "explained", "flush", "is_remote", "read_cell", "replacing", "require_bounded", "require_intact_zip",
    "require_local", "require_plain_yaml", "require_size", "temporary_name", "text_cell", "undamaged",
    "write_files", "zip_members",
]  # fmt: skip

MAX_GB = 4.0  # gigabytes that the content of one file may take, unless an option sets them
EXPANSION = 16  # times its own size that a file may take in any case
MAX_DEPTH, MAX_SIZE = 32, 200_000  # of nested containers; the values of repeated parts are counted each time
LONGEST_NAME = 40  # characters of a file's name in the name of its temporary file, which must not be too long
FORMULA = re.compile(r"'*[=+\-@\t\r]")  # the start of a text that a spreadsheet would run, or that text_cell wrote
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
FIXES = {
    errno.ENOSPC: "free some space, or choose a folder on another disk",
    errno.EACCES: "give yourself permission, or choose another path",
    errno.ENOENT: "check the path; the folder may have been deleted",
    errno.EISDIR: "remove the folder of that name, or choose another path",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.EEXIST: "remove the file that stands in place of a folder, or choose another path",
    errno.ENOTDIR: "remove the file that stands in place of a folder, or choose another path",
}


@contextmanager
def replacing(path: Path | str, option: str = "") -> Iterator[Path]:
    """Yield the path of a temporary file, which replaces ``path`` when the block ends without an error.

    The temporary file lies in the folder of ``path``, which is made if it does not exist. The replacement is one atomic
    step, flushed to the disk (fsync): a crash, a kill or a full disk leaves the earlier file or the new one, never a
    part. Where the system can't write, a UserError names ``option``.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder) / "a.txt"
    ...     with replacing(path) as temporary:
    ...         _ = temporary.write_text("whole")
    ...     path.read_text()
    'whole'
    """
    with explained(path, option):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        temporary = path.with_name(temporary_name(path.name))
        try:
            yield temporary
            flush(temporary)
            temporary.replace(path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        with suppress(OSError):  # not every file system flushes folders
            flush(path.parent)


def write_files(files: Mapping[Path, bytes]) -> None:
    """Write several files, given their contents by path, and replace none of them before all are on the disk."""
    with ExitStack() as stack:
        for path in reversed(list(files)):  # the last to be written is the first to be replaced
            temporary = stack.enter_context(replacing(path))
            temporary.write_bytes(files[path])
            flush(temporary)


def is_remote(path: Path | str) -> bool:
    """Return True for a URL, which is not a path of this machine.

    >>> is_remote("s3://bucket/runs"), is_remote("runs")
    (True, False)
    """
    return isinstance(path, str) and "://" in path


def require_local(path: Path | str, option: str) -> Path:
    """Return the path of a folder that an option names, or raise if it is the URL of a remote one."""
    if is_remote(path):
        raise UserError(f"{option} {path}: is remote. Fix: give a folder of this machine, and copy it when it is done")
    return Path(path)


def text_cell(text: str) -> str:
    """Return a text as a cell of a csv file that a spreadsheet does not run: an apostrophe stands before a formula.

    A formula is a text that begins with ``=``, ``+``, ``-``, ``@``, a tab or a carriage return and is not a number. A
    text that begins with apostrophes and one of these gets one more apostrophe, so that :func:`read_cell` restores it.

    >>> [text_cell(text) for text in ("=1+1", "'=1+1", "-1.5", "it's")]
    ["'=1+1", "''=1+1", '-1.5', "it's"]
    """
    return f"'{text}" if FORMULA.match(text) and not NUMBER.fullmatch(text) else text


def read_cell(cell: str) -> str:
    """Return the text from which :func:`text_cell` made a cell.

    >>> [read_cell(cell) for cell in ("'=1+1", "''=1+1", "-1.5", "it's")]
    ['=1+1', "'=1+1", '-1.5', "it's"]
    """
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell


def csv_line(cells: Iterable[object]) -> str:
    r"""Return a line of a csv file, its texts as :func:`text_cell` writes them.

    >>> csv_line(["=1+1", 2, "a,b"])
    '\'=1+1,2,"a,b"\n'
    """
    content = io.StringIO()
    csv.writer(content).writerow([text_cell(cell) if isinstance(cell, str) else cell for cell in cells])
    return content.getvalue()[: -len("\r\n")] + "\n"


def temporary_name(name: str) -> str:
    """Return a name for a temporary file that no other process chooses."""
    return f".{name[:LONGEST_NAME]}.{os.urandom(6).hex()}.part"


@contextmanager
def explained(path: Path | str, option: str = "", fix: str = "") -> Iterator[None]:
    """Raise an OSError of the block as one line, a UserError that names the path, its option and the fix.

    The path is the file or folder that the block reads or writes; the fix is by default one that suits the error.
    """
    place = f"{option} {path}" if option else str(path)
    try:
        yield
    except OSError as error:
        if error.filename and not str(error.filename).endswith(".part"):
            place = f"{option} {error.filename}" if option else str(error.filename)
        fix = fix or FIXES.get(error.errno or 0, "check the disk and the path")
        raise UserError(f"{place}: {error.strerror or error}. Fix: {fix}") from error
    except ValueError as error:
        if "null byte" not in str(error) and "null character" not in str(error):
            raise
        raise UserError(f"{place!r}: holds a null byte. Fix: choose another path") from error


def require_intact_zip(path: Path, option: str = "") -> None:
    """Raise if a zip file (a checkpoint, an .npz archive) is damaged: every member is read and its CRC compared."""
    place = f"{option} {path}" if option else str(path)
    with (
        explained(path, option),
        undamaged(f"{place}: is damaged", "copy it again, or give an earlier one"),
        zipfile.ZipFile(path) as archive,
    ):
        zip_members(archive)
        if (broken := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"bad CRC-32 or header of its part {broken!r}")


def zip_members(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """Return the members of a zip file; raise BadZipFile if its directory is damaged and hides the first one."""
    members = archive.infolist()
    if min((member.header_offset for member in members), default=-1):
        raise zipfile.BadZipFile("its directory lacks members")
    return members


@contextmanager
def undamaged(problem: str, fix: str) -> Iterator[None]:
    """Raise the error of a reader on a damaged file as one line; errors of the system and of memory stay."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # damaged bytes raise anything: BadZipFile, zlib.error, SyntaxError, struct.error ...
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{problem} ({reason}). Fix: {fix}") from error


def require_bounded(value: object, source: str) -> None:
    """Raise if nested containers are too deep or too large, as repeated or cyclic parts make them."""
    level, size = [value], 0
    for _ in range(MAX_DEPTH):
        containers = [part for part in level if isinstance(part, (Mapping, list, tuple, set, frozenset))]
        size += sum(map(len, containers))
        if size > MAX_SIZE:
            raise UserError(f"{source}: holds more than {MAX_SIZE} values. Fix: shorten it")
        level = [x for part in containers for x in (part.values() if isinstance(part, Mapping) else part)]
        if not level:
            return
    raise UserError(f"{source}: is nested more than {MAX_DEPTH} deep. Fix: flatten it")


def require_plain_yaml(text: str, place: str) -> None:
    """Raise as :func:`require_bounded` does for YAML, of which only containers and texts are made, no object.

    A text that is not YAML passes: its reader raises.

    >>> require_plain_yaml("{a: &a [1, 2], b: [*a, *a]}", "a.yaml")
    """
    with suppress(yaml.YAMLError, ValueError):
        try:
            value = yaml.load(text, Loader=yaml.BaseLoader)
        except RecursionError:
            raise UserError(f"{place}: is nested more than {MAX_DEPTH} deep. Fix: flatten it") from None
        require_bounded(value, place)


def require_size(path: Path, needed: int, max_gb: float, option: str = "--data.max_gb") -> None:
    """Raise if a file asks for much more memory than it has bytes; call it before the memory is taken.

    Its content takes ``needed`` bytes, as it declares. Any file may take ``max_gb``, which ``option`` sets, and a large
    one 16 times its size.
    """
    size = path.stat().st_size
    if needed > max(max_gb * 1e9, EXPANSION * size):
        raise UserError(
            f"{path}: its {size} bytes declare {needed / 1e9:,.1f} GB of content, more than {option} {max_gb:g}. "
            f"Fix: copy the file again if it is damaged, or raise {option}"
        )


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
