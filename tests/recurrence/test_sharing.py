"""No two attributes of the fast loop's objects share one mutable list or dictionary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_recurrence import CELLS, OPTIONS, add_extras, make_batch, make_model

from vrnn_lightning.recurrence import tape as tapes
from vrnn_lightning.recurrence.operations import Calls, Pass

OURS = ("vrnn_lightning.recurrence",)


def mutables(root: Any) -> dict[int, set[str]]:
    """Return of every list, dictionary and set that attributes reach: the attributes that hold it, by its identity."""
    owners: dict[int, set[str]] = {}
    seen: set[int] = set()
    objects = [root]
    while objects:
        owner = objects.pop()
        if id(owner) in seen:
            continue
        seen.add(id(owner))
        if type(owner).__module__.startswith(OURS) and hasattr(owner, "__dict__"):
            for name, value in vars(owner).items():
                if isinstance(value, list | dict | set):
                    owners.setdefault(id(value), set()).add(f"{type(owner).__name__}.{name} of {id(owner)}")
                objects.append(value)
        elif isinstance(owner, dict):
            objects += [*owner.keys(), *owner.values()]
        elif isinstance(owner, list | tuple | set):
            objects += owner
    return owners


def keep(passes: list[Any], method: Any) -> Any:
    def call(tape: tapes.Tape, *args: Any) -> Pass:
        passes.append((tape, method(tape, *args)))
        return passes[-1][1]

    return call


@pytest.mark.parametrize("options", [{}, *OPTIONS.values()], ids=["plain", *OPTIONS])
@pytest.mark.parametrize("cell", CELLS)
def test_no_two_attributes_share_one_mutable(cell, options, monkeypatch):
    passes, make = [], tapes._methods
    monkeypatch.setattr(tapes, "_methods", lambda operations, name: passes.append(operations) or make(operations, name))
    monkeypatch.setattr(tapes.Tape, "new_pass", keep(passes, tapes.Tape.new_pass))
    model = make_model(cell, 4, **options)
    model.encoder.body[0].register_forward_hook(lambda *_: None)  # one part is called
    add_extras(model, batch := make_batch([5, 3]))
    model(batch).log_px.sum().backward()
    shared = [names for names in mutables(passes).values() if len(names) > 1]
    assert any(isinstance(part, Pass) for found in passes for part in found)
    assert not shared


def test_the_search_finds_one():
    values = Pass({}, Calls())
    values.parameter_grads = values._steps  # type: ignore[assignment]  # the fault itself
    assert [names for names in mutables(values).values() if len(names) > 1]
    assert torch.is_grad_enabled()
