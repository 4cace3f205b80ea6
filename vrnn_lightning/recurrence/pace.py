"""A few steps on a tape, taken again and again: for loops whose next step is not known before the last one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vrnn_lightning.recurrence.loop import Cell
from vrnn_lightning.recurrence.parts import Networks, State, as_state
from vrnn_lightning.recurrence.tape import Known, Product, Tape, Track

__all__ = ["Pace"]

READS = {"prior": "hu", "encoder": "xuh", "decoder": "zhu", "cell": "xuz"}


class Pace:
    """Steps of a model, its states and the first sums of the networks that read h_{t-1}.

    What a network reads is told by letters: h for h_{t-1}, x and z for phi_x and phi_z, u for covariates. One product
    with h_{t-1} serves all networks. Whoever makes a pace lays the rest of the step on its tape, and
    then steps without graph; weights are those of when it was made.

    Args:
        model: The networks.
        state: State before the first step.
        networks: Those that read h_{t-1}: "prior", "encoder", "decoder".
        known: Letters of what stands in ``self.known`` when a step begins.
        inputs: Width of the covariates.
        batch: Rows of what is known; a divisor of the state's.
        steps: To be taken at once.

    Attributes:
        tape: Of so many steps.
        known: To be filled before they are taken, shape (steps, batch, width).
        sums: Of each network's first layer, and of the bottom "cell".
        hidden: h_{t-1} of the top layer, in the type of states.
    """

    def __init__(
        self,
        model: Networks,
        state: State,
        networks: Sequence[str],
        known: str,
        inputs: int,
        batch: int,
        steps: int = 1,
    ) -> None:
        self.tape = tape = Tape(steps, len(state.h), state.h)
        cells = [cast("nn.GRUCell | nn.LSTMCell", cell) for cell in model.cells]
        self.layers = len(cells)
        states = [tape.state(part) for part in state.layers()]
        self.hs, cs = states[: self.layers], states[self.layers :]
        self.hidden = self.hs[-1]
        phi_z = 0 if model.phi_z is None else model.phi_z.out_features
        widths = {"x": model.phi_x.out_features, "z": phi_z, "h": self.hidden.width, "u": inputs}
        firsts = [next(cast("Any", getattr(model, name)).body.linears()) for name in networks]
        weights: dict[str, Tensor] = {name: first.weight for name, first in zip(networks, firsts, strict=True)}
        weights["cell"] = cells[0].weight_ih
        self.weights = {
            name: dict(zip(READS[name], weight.split([widths[letter] for letter in READS[name]], 1), strict=True))
            for name, weight in weights.items()
        }
        self.laid = [
            Cell(tape, cell, h, cs[i] if cs else None) for i, (cell, h) in enumerate(zip(cells, self.hs, strict=True))
        ]
        front = tape.track(sum(first.out_features for first in firsts))
        self.sums, start = {"cell": self.laid[0].from_below}, 0
        for name, first in zip(networks, firsts, strict=True):
            self.sums[name] = front.columns(start, start + first.out_features)
            start += first.out_features

        width = sum(widths[letter] for letter in known)
        self.known = tape.weight(state.h.new_zeros(steps, batch, width)) if width else None
        for layer, h in zip(self.laid, self.hs, strict=True):
            bias = tape.weight(torch.cat([layer.bias_h, layer.bias]))
            if width and layer is self.laid[0]:
                of_known = F.pad(self._of("cell", known, widths), (0, 0, len(layer.bias_h), 0))
                tape.add(Known(layer.gates, bias, self.known, tape.weight(of_known.t())))
            else:
                tape.add(Known(layer.gates, bias))
            tape.add(Product(tape.cast(h, tape.narrow), tape.weight(layer.weight_h.t()), layer.from_h))
        source = tape.cast(self.hidden, tape.narrow)
        of_h = tape.weight(torch.cat([self.weights[name]["h"] for name in networks]).t())
        bias = tape.weight(torch.cat([first.bias for first in firsts]))
        if width:
            of_known = torch.cat([self._of(name, known, widths) for name in networks])
            tape.add(Known(front, bias, self.known, tape.weight(of_known.t())))
            tape.add(Product(source, of_h, front))
        else:
            tape.add(Product(source, of_h, front, bias))

    def _of(self, name: str, letters: str, widths: dict[str, int]) -> Tensor:
        """Return a first layer's weight of some letters, with zeros for what it does not read."""
        weights = self.weights[name]
        rows = len(next(iter(weights.values())))
        parts = [
            weights[letter] if letter in weights else weights["u"].new_zeros(rows, widths[letter]) for letter in letters
        ]
        return torch.cat(parts, 1)

    def read(self, source: Track, letters: str, *names: str) -> None:
        """Let networks, or the "cell", read what was found in the step, told by its letters in their order."""
        for name in names:
            weight = torch.cat([self.weights[name][letter] for letter in letters], 1)
            self.tape.add(Product(source, self.tape.weight(weight.t()), self.sums[name]))

    def advance(self) -> None:
        """Lay the cells, once everything was added to the sums."""
        tape = self.tape
        self.laid[0].advance()
        for layer, h in zip(self.laid[1:], self.hs, strict=False):
            below = tape.cast(h.later(), tape.narrow)
            tape.add(Product(below, tape.weight(layer.cell.weight_ih.t()), layer.from_below))
            layer.advance()

    def step(self, steps: int = 1) -> None:
        """Take steps, once everything is laid; what they left behind stays until the next ones."""
        self.tape.step(steps)

    def state(self) -> State:
        """Return the state after the last step taken."""
        return as_state([state.at[0].clone() for state in self.tape.states], self.layers)
