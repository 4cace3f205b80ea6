"""The project's language: no text uses the words of ``lint/words.txt``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINES = (Path(__file__).parents[1] / "lint" / "words.txt").read_text().splitlines()
WORDS = dict(line.split("\t") for line in LINES if line and not line.startswith("#"))
PLACES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md", "docs/**/*.md", "configs/*.yaml")
CODE = ("vrnn_lightning/**/*.py", "datamodules/*.py", "benchmarks/*.py")
FILES = [file for pattern in (*CODE, *PLACES) for file in sorted(ROOT.glob(pattern))]


@pytest.mark.parametrize("word", WORDS)
def test_texts_do_without_it(word):
    """Code, messages, help texts and documents: the line is named, and what to write instead."""
    used = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for file in FILES
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if re.search(word, line)
    ]
    assert not used, f"write: {WORDS[word]}\n" + "\n".join(used)


def test_the_list_finds_what_it_lists():
    for text in ("drawn anew", "it goes on", "is no number", "mended it", "the cure is", "values are no numbers"):
        assert any(re.search(word, text) for word in WORDS), text
    for text in ("there is no file", "There is no", "it is no longer there", "from here on", "continues", "recommend"):
        assert not any(re.search(word, text) for word in WORDS), text
