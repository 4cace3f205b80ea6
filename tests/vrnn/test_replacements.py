"""A part that a user replaces, subclasses or hooks is used by every pass, or refused by name; never passed over.

``python -m pytest tests/vrnn/test_replacements.py -s -k summary`` prints the outcome of each (part, way, purpose).
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import pytest
import readable
import torch
from passes import CONFIGS, PURPOSES, Data, Run, called_future, make_data, make_model, readable_infer
from replacing import WAYS, Site, called
from torch import Tensor, nn
from torch.func import functional_call

from vrnn_lightning import VRNN, UserError

DISTS = ("prior", "prior.head", "encoder", "encoder.head", "decoder", "decoder.head")
LEAVES = ("phi_x.0", "phi_z.0", "prior.head.linear", "encoder.body.0", "decoder.head.linear", "cells.0", "cells.1")
PARTS = (
    "phi_x", "phi_z", "prior", "encoder", "encoder.body.0", "decoder", "decoder.head", "decoder.head.linear", "cells.0",
    "cells.1",
)  # fmt: skip
INNER = (
    "phi_x.0", "phi_x.1", "phi_z.0", "prior.head", "prior.head.linear", "encoder.body", "encoder.head", "decoder.body",
)  # fmt: skip
FOR_SMOOTHING = ("backward_rnn", "encoder", "phi_x.0", "cells.0")
OF_WEIGHTS = tuple(WAYS)[list(WAYS).index("weight norm") :]
NEVER_REFUSED = (
    "weight norm", "spectral norm", "spectral norm in training", "pruning", "functional call", "tensor hook", "frozen",
    "shared weight",
)  # fmt: skip
"""Ways that need nothing of the loop but that it reads each weight by its name."""
NOT_EXPORTED = ("backward hook", "backward pre-hook", "functional call")  # no gradients; torch exports parameters
OF_TORCH_RNN = ("tensor hook", "frozen")  # torch's own GRU does not read what the other ways make of its weights


def can(config: str, name: str, way: str) -> bool:
    """Tell whether torch has the way for a part."""
    if name == "backward_rnn":
        return way not in OF_WEIGHTS or way in OF_TORCH_RNN
    if way.startswith("backward"):  # torch warns of hooks of distributions, and of parts whose input has no gradient
        return name not in (*DISTS, "phi_x", "phi_x.0")
    if way == "LoRA":
        return name in LEAVES and not name.startswith("cells")
    if way == "shared weight" and config == "options" and name.startswith("phi"):
        return False  # missing values: the two differ in width
    return way not in OF_WEIGHTS or name in LEAVES


def cases(config: str, names: tuple[str, ...]) -> list[tuple[str, str, str]]:
    return [(config, name, way) for name in names for way in WAYS if can(config, name, way)]


class Calls(nn.Module):
    """A module whose call is a pass, for torch's ``functional_call``."""

    def __init__(self, model: VRNN, run: Run, data: Data) -> None:
        super().__init__()
        self.model, self.run, self.data = model, run, data

    def forward(self) -> list[Tensor]:
        return self.run(self.model, self.data)


@contextmanager
def replaced(config: str, name: str, way: str) -> Iterator[Callable[[Run], list[Tensor]]]:
    """Yield what runs a pass over a model of which a part is replaced."""
    data, model = make_data(config), make_model(**CONFIGS[config]).eval()
    with ExitStack() as stack:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # old ways that people still go
            others = WAYS[way](Site(model, name, stack, lambda model: readable_infer(model, data)))
        yield lambda run: functional_call(Calls(model, run, data), others or {}, ())


@cache
def outcomes(config: str, name: str, way: str, *purposes: str) -> dict[str, str]:
    """Return of each purpose: equal, refused, ignored, or the error."""
    expected: dict[Run, tuple[list[Tensor], bool]] = {}
    with replaced(config, name, way) as passing:
        for run in dict.fromkeys(PURPOSES[purpose][1] for purpose in ("infer", *purposes)):
            called.clear()
            expected[run] = passing(run), bool(called)
    assert not close(expected[readable_infer][0], unreplaced(config)), "the replacement changes nothing"
    return {
        purpose: outcome(config, name, way, PURPOSES[purpose][0], *expected[PURPOSES[purpose][1]])
        for purpose in purposes
    }


def outcome(config: str, name: str, way: str, run: Run, expected: list[Tensor], is_needed: bool) -> str:
    called.clear()
    try:
        with replaced(config, name, way) as passing:
            found = passing(run)
    except UserError as error:
        return "refused" if owner(name) in str(error) else f"error: {error}"
    except Exception as error:  # whatever it is, it is in the table
        return f"error: {type(error).__name__}: {error}"
    return "equal" if bool(called) >= is_needed and close(found, expected) else "ignored"


def owner(name: str) -> str:
    """Return the part of the model that an error names: all of a network, or one cell."""
    return name if name.startswith("cells") else name.partition(".")[0]


def close(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(one, other, strict=True)
    )


@cache
def unreplaced(config: str) -> list[Tensor]:
    return readable_infer(make_model(**CONFIGS[config]).eval(), make_data(config))


def purposes_of(config: str) -> tuple[str, ...]:
    """Return the purposes, without those that a smoothing model can't have or that have no readable loop for it."""
    return ("infer", "recomputed", "generate") if config == "smoothing" else tuple(PURPOSES)[:-1]


@pytest.fixture(autouse=True)
def _backward_recurrence_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readable, "readable_future", called_future)


def check(config: str, name: str, way: str, *purposes: str) -> None:
    allowed = {"equal"} if way in NEVER_REFUSED else {"equal", "refused"}
    found = outcomes(config, name, way, *purposes or purposes_of(config))
    assert not {purpose: said for purpose, said in found.items() if said not in allowed}


def each(some: list[tuple[str, str, str]]) -> Any:
    return pytest.mark.parametrize(("config", "name", "way"), some, ids=["-".join(case) for case in some])


@each(cases("gru", PARTS))
def test_a_replaced_part_is_used_or_refused(config, name, way):
    check(config, name, way)


@each(cases("gru", INNER))
def test_inner_parts(config, name, way):
    check(config, name, way)


@each([*cases("lstm", PARTS), *cases("smoothing", FOR_SMOOTHING), *cases("options", PARTS)])
def test_with_every_option(config, name, way):
    check(config, name, way)


@each([case for case in cases("gru", ("encoder", "encoder.body.0")) if case[2] not in NOT_EXPORTED])
def test_an_exported_program_has_it(config, name, way):
    check(config, name, way, "program")


def test_summary():
    """Print all outcomes of a GRU, with ``pytest -s``."""
    total: Counter[tuple[str, str]] = Counter()
    print("\n" + " " * 56, *(f"{purpose:10}" for purpose in purposes_of("gru")))
    for case in [*cases("gru", (*PARTS, *INNER)), *cases("smoothing", ("backward_rnn",))]:
        found = outcomes(*case, *purposes_of(case[0]))
        said = [found.get(purpose, "").partition(":")[0] for purpose in purposes_of("gru")]
        total.update(zip(purposes_of("gru"), said, strict=True))
        print(f"{' '.join(case):56}", *(f"{word:10}" for word in said))
    for word in ("equal", "refused", "ignored", "error"):
        print(f"{word:56}", *(f"{total[purpose, word]:<10}" for purpose in purposes_of("gru")))
    assert not [key for key in total if key[1] in ("ignored", "error")]
