"""Which lines of a step are computed before, inside and after the time loop.

Training, particle filters, streams and generation run the same step. They differ only in which values are given for all
steps beforehand, and in which are read at each step.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from vrnn_lightning.recurrence.state import Networks

__all__ = ["Line", "Partition", "Purpose", "partition"]

Purpose = Literal["infer", "filter", "stream", "generate"]

READS = {
    "prior": ("h", "inputs"),
    "posterior": ("x_features", "inputs", "future", "h"),
    "emission": ("z_features", "h", "inputs"),
    "state": ("x_features", "inputs", "z_features"),
}
"""The values that the network computing a value reads, in the order of the columns of its first weight."""

DATA = ("x_features", "inputs", "future")
GIVEN: dict[Purpose, tuple[str, ...]] = {"infer": DATA, "filter": DATA, "stream": DATA, "generate": ("inputs",)}
"""Values that are given, or computed from given ones, for all steps beforehand, with a row per sequence.

They lie side by side in this order; a network reads a contiguous part of them."""

READ_AT_ONCE: dict[Purpose, tuple[str, ...]] = {
    "infer": (),
    "filter": ("prior", "emission"),
    "stream": ("prior", "emission"),
    "generate": ("x",),
}
"""Values that are read at each step: by the weights of particles, by the caller of a stream, by the next step."""


class Line(NamedTuple):
    """One line of a step: the value that a part of the model computes, and the values that it reads."""

    value: str
    part: str
    reads: tuple[str, ...]


class Partition(NamedTuple):
    """Where the lines of a step are computed: before, inside or after the loop over its steps."""

    before: tuple[Line, ...]  # what depends on given values alone
    inside: tuple[Line, ...]  # what is read at each step, and what the state depends on
    after: tuple[Line, ...]  # the rest

    def __str__(self) -> str:
        lines = []
        for place, part in zip(self._fields, self, strict=True):
            lines.append(f"{place} the loop:")
            lines += [f"    {i.value:<10} = {i.part}({', '.join(i.reads)})" for i in part] or ["    nothing"]
        return "\n".join(lines)


def partition(model: Networks, purpose: Purpose) -> Partition:
    """Return which lines of a model's step are before, inside and after the loop."""
    generates = purpose == "generate"
    absent = set() if model.phi_z is not None else {"prior", "posterior", "z", "z_features", "noise"}
    absent |= set() if model.backward_rnn is not None else {"future"}
    lines = [
        Line("prior", "prior", READS["prior"]),
        Line("posterior", "encoder", (*READS["posterior"], *["prior"] * model.residual_posterior)),
        Line("z", "draw", ("prior" if generates else "posterior", "noise")),
        Line("z_features", "phi_z", ("z",)),
        Line("emission", "decoder", READS["emission"]),
        Line("x", "draw", ("emission",)),
        Line("x_features", "phi_x", ("x",)),
        Line("state", "cells", (*READS["state"], "h")),
    ]
    lines = [line for line in lines if line.value not in absent | {"posterior" if generates else "x"}]
    lines = [line._replace(reads=tuple(read for read in line.reads if read not in absent)) for line in lines]
    known = {"inputs", "noise"} | (set() if generates else {"x", "future"})
    before: list[Line] = []
    for line in lines:
        if set(line.reads) <= known:
            before.append(line)
            known.add(line.value)
    needed, inside = {"state", *READ_AT_ONCE[purpose]}, []
    for line in reversed(lines):
        if line.value in needed and line not in before:
            inside.append(line)
            needed |= set(line.reads)
    after = (line for line in lines if line not in before and line not in inside)
    return Partition(tuple(before), tuple(inside[::-1]), tuple(after))
