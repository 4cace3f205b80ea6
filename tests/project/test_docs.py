"""The code of README and documentation runs as it stands there, and its commands are commands."""

from __future__ import annotations

import re
import shlex
from functools import partial

import numpy as np
import pytest
from pages import BLOCKS, FILES, LINES, PAGES, README, ROOT, SHELLS, blocks_of, write_files

from vrnn_lightning import discovery
from vrnn_lightning.cli.argv import mentions, with_configs
from vrnn_lightning.cli.command import CLI
from vrnn_lightning.datamodules import local
from vrnn_lightning.testing import CHECKS

EXAMPLES = ("configs/NAME.yaml", "datamodules/mydata.py", "tests/datasets/test_mydata.py")
TRAINING = ("README.md", "docs/quickstart.md")
CODE = {
    page.relative_to(ROOT).as_posix(): [b for b in blocks_of(page) if b.language == "python" and not b.reason]
    for page in PAGES
}
LIGHTNING = [(page, line.partition("lightning ")[2]) for page, line in LINES if re.search(r"(^|&& )lightning ", line)]


@pytest.fixture
def here(folder, monkeypatch):
    """An empty working directory with the files that the pages write; modules imported from it stay, see ``folder``."""
    write_files(folder)
    monkeypatch.syspath_prepend(folder)
    local.use_working_directory()  # as a new process does
    return folder


def run_page(page: str) -> dict:
    """Execute the blocks of a page from top to bottom; return their names."""
    names = {"__name__": "page"}
    for block in CODE[page]:
        if not block.file:
            code = "\n" * (block.line - 1) + block.text  # so that a traceback names the page's line
            exec(compile(code, page, "exec"), names)
    return names


@pytest.mark.parametrize("page", [page for page, blocks in CODE.items() if blocks and page not in TRAINING])
def test_code_runs(page, here):
    run_page(page)


@pytest.mark.parametrize("page", TRAINING)
def test_code_that_trains_runs(page, here):
    found = run_page(page)
    assert found["sequences"].shape == (8, 50, 3)
    assert found["futures"].shape == (100, 8, 24, 3)
    if page == "README.md":
        return
    assert [nats.shape for nats in found["scores"]] == [(50,)] * 8
    assert [draws.shape for draws in found["filled"]] == [(20, 50, 3)] * 8
    assert not any(draws.isnan().any() for draws in found["filled"])
    assert found["ahead"].mean.shape == (8, 3)
    assert found["paths"].shape == (100, 8, 24, 3)


class _ParserFound(Exception):  # noqa: N818  # no error
    """Carries the parser of a command."""


class _OnlyParser(CLI):
    def parse_arguments(self, parser, args):
        raise _ParserFound(parser)


@pytest.fixture(scope="module")
def parsers():
    """The parser of each command, made when it is first needed."""
    return {}


def words_of(command: str) -> list[str]:
    return with_configs(shlex.split(command))


def data_of(words: list[str]) -> list[str]:
    """Return the datamodules that a command names."""
    named = [*mentions(words, "data"), *mentions(words, "data.class_path")]
    return [value["class_path"] if isinstance(value, dict) else value for value in named]


@pytest.mark.parametrize(("page", "command"), dict.fromkeys(LIGHTNING))
def test_commands_parse(page, command, here, parsers):
    words = words_of(command)
    if words[0] not in parsers:
        with pytest.raises(_ParserFound) as caught:
            _OnlyParser(words[:1])
        (parsers[words[0]],) = caught.value.args
    local.use_working_directory()
    if not data_of(words):  # the checkpoint has them: those of the page's last fit
        fits = [words_of(other) for at, other in LIGHTNING if at == page and other.startswith("fit ")]
        words[1:1] = fits[-1][1:] if fits else ["--data=Sines"]
    for name in data_of(words):
        discovery.load(name)
    config = parsers[words[0]].parse_args(words)
    assert config["subcommand"] == words[0]


def test_blocks_are_found():
    """A block with a typo in its fence or its mark would be left out in silence."""
    for page in PAGES:
        text = page.read_text()
        fences = len(re.findall(r"^```+[\w{]", text, re.MULTILINE))
        assert len(blocks_of(page)) == fences, page
        marks = re.findall(r"^<!-- not run:", text, re.MULTILINE)
        assert len(marks) == sum(bool(b.reason) for b in blocks_of(page)), page
    known = {"python", "yaml", "text", *SHELLS}
    assert {b.language for b in BLOCKS if not b.language.startswith("{")} <= known


def test_a_file_has_one_content():
    for block in BLOCKS:
        if block.file:
            assert block.text == FILES[block.file], f"{block.page}:{block.line}"


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\((?!http|#)([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).is_file(), f"{page}: {link}"
        for name in re.findall(r"\b(?:configs|tests|benchmarks|datamodules)/[\w/-]+\.(?:yaml|py)", page.read_text()):
            example = name in FILES or name in EXAMPLES
            assert example or (ROOT / name).is_file(), f"{page}: {name}"
        for name in re.findall(r"`(test_\w+\.py)`", page.read_text()):
            assert any((ROOT / "tests").rglob(name)), f"{page}: {name}"


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


def test_pairs_of_files_keep_their_splits(here):
    """The dataset of the guide, before and after its folder has grown."""
    rng = np.random.default_rng(0)

    def write(names):
        for name in names:
            for kind, width in (("in", 1), ("out", 2)):
                np.savetxt(here / f"{name}_{kind}.csv", rng.normal(size=(5, width)), delimiter=",")

    write("abcdefghij")
    make = partial(discovery.load("Pairs"), root=str(here), features=2, covariates=1)
    for check in CHECKS:
        check(make)
    data = make()
    data.setup("fit")
    train = {sequence.name for sequence in data.split("train")}
    write("klmnopqrst")
    grown = make()
    grown.setup("test")
    grown.load_state_dict(data.state_dict())
    with pytest.warns(UserWarning, match="left out"):
        tested = {sequence.name for sequence in grown.split("test")}
    assert tested
    assert not tested & train
