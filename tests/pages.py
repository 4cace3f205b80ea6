"""The README, the documentation's pages, and their blocks of code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?"
    r"(?P<fence>```+)(?P<language>[\w{}-]+)[^\n]*\n(?P<text>.*?)^(?P=fence)$",
    re.DOTALL | re.MULTILINE,
)
SHELLS = ("sh", "bash", "console")


class Block(NamedTuple):
    """A block of code.

    Args:
        page: Its page, relative to the repository.
        line: Line of its first line of code.
        language: The word behind its fence.
        text: The code.
        reason: Why it is not run, or ``None`` if it is.
    """

    page: str
    line: int
    language: str
    text: str
    reason: str | None

    @property
    def file(self) -> str | None:
        """The file that its first line names, if it does: what it is written to."""
        named = re.match(r"# ([\w/]+\.(?:py|yaml))\n", self.text)
        return named[1] if named else None


def blocks_of(page: Path) -> list[Block]:
    """Return the blocks of a page."""
    text, name = page.read_text(), str(page.relative_to(ROOT))
    return [
        Block(name, text.count("\n", 0, m.start("text")) + 1, m["language"], m["text"], m["reason"])
        for m in BLOCK.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
FILES = {block.file: block.text for block in BLOCKS if block.file}
LINES = [(b.page, line.removeprefix("$ ")) for b in BLOCKS if b.language in SHELLS and not b.reason
         for line in b.text.replace("\\\n", " ").splitlines()]  # fmt: skip
COMMANDS = list(dict.fromkeys(line for _, line in LINES))
"""The lines of the blocks for a shell, each once."""


def block(language: str, beginning: str = "") -> str:
    """Return the first block in a language that begins so."""
    return next(found.text for found in BLOCKS if found.language == language and found.text.startswith(beginning))


def write_files(folder: Path) -> None:
    """Write the files that blocks name, except tests."""
    for name, text in FILES.items():
        if not name.startswith("tests/"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
