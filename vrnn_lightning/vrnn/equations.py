"""The model: its networks, and its four equations as methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils._pytree import tree_flatten, tree_unflatten

from vrnn_lightning.batch import SequenceBatch
from vrnn_lightning.errors import UserError
from vrnn_lightning.filtering import map_tensors
from vrnn_lightning.heads import Factorised, GaussianLatent, Head, Latent, Network, gaussian
from vrnn_lightning.nn import cell_outputs, cell_state, feature_width
from vrnn_lightning.noise import Noise
from vrnn_lightning.recurrence import (
    Masks,
    NetworkInputs,
    Parts,
    Prior,
    Purpose,
    State,
    is_plain,
    partition,
    repeat_rows,
    run_backward,
)
from vrnn_lightning.vrnn.initial import InferredState, Initial, InitialState

__all__ = ["Equations"]


def join(*values: Tensor | None) -> Tensor:
    """Return values side by side, without those that are absent."""
    there = [value for value in values if value is not None]
    return there[0] if len(there) == 1 else torch.cat(there, -1)


class Equations(nn.Module):
    r"""The networks of a VRNN, and its equations.

    .. math::
        \text{prior} \quad & z_t \sim \mathcal N(\mu_{0,t}, \sigma_{0,t}^2), \quad
            [\mu_{0,t}, \sigma_{0,t}] = \varphi_\mathrm{prior}(h_{t-1}) \\
        \text{generation} \quad & x_t \sim p(\varphi_\mathrm{dec}(\varphi_z(z_t), h_{t-1})) \\
        \text{recurrence} \quad & h_t = f(\varphi_x(x_t), \varphi_z(z_t), h_{t-1}) \\
        \text{inference} \quad & z_t \sim \mathcal N(\mu_{z,t}, \sigma_{z,t}^2), \quad
            [\mu_{z,t}, \sigma_{z,t}] = \varphi_\mathrm{enc}(\varphi_x(x_t), h_{t-1})

    Each equation is a method: :meth:`prior_dist`, :meth:`emission_dist`, :meth:`next_state` and :meth:`posterior_dist`.
    A step is::

        x_features = model.extract_x(x)
        prior = model.prior_dist(h)
        z = model.posterior_dist(x_features, h, prior).rsample()
        z_features = model.extract_z(z)
        emission = model.emission_dist(z_features, h)
        h, state = model.next_state(x_features, z_features, state)

    The methods read ``h``, h_{t-1} of the top layer, shape (..., hidden); ``x_features`` and ``z_features``, shape
    (..., width), the latter of width 0 without a latent; each with its dropout applied; and ``inputs``, the covariates
    of step t, shape (..., covariates), if the model reads any.

    Args:
        phi_x: The feature extractor of x_t.
        phi_z: The feature extractor of z_t; ``None`` without a latent, as ``prior`` and ``encoder``.
        prior: The prior network, or another map from h_{t-1} to a distribution.
        encoder: The inference network.
        decoder: The network of the emission, and its head.
        cells: The layers of the recurrence, each with ``hidden_size``; the networks read the top one. A cell is called
            like ``nn.GRUCell``, or with an attribute ``has_cell_state = True`` like ``nn.LSTMCell``. One with
            ``initial_state(batch_size)``, a tree of tensors, is called with the input and such a tree, and returns its
            output (batch, hidden_size) and the next tree.
        backward_rnn: The recurrence that reads backwards, for a smoothing posterior.
        residual_posterior: The encoder's mean is added to the prior's (Res_q in Fraccaro et al. 2016).
        dropout: Probability of dropping a unit of phi_x, phi_z or h, see :func:`build_vrnn`.
        num_inputs: Covariates per step.
        missing: phi_x also reads which values were measured.
        latent: The kind of latent; Gaussian by default.
        initial: Called with a number of rows and the covariates of their first steps, returns the state before the
            first step; zero, or what cells make in ``initial_state``, by default. An
            :class:`~vrnn_lightning.vrnn.initial.InferredState` also reads the sequence.
    """

    input_mean: Tensor
    input_std: Tensor

    def __init__(
        self,
        phi_x: nn.Module,
        phi_z: nn.Module | None,
        prior: Prior | None,
        encoder: Network[Any] | None,
        decoder: Network[Head],
        cells: nn.ModuleList,
        backward_rnn: nn.GRU | nn.LSTM | None = None,
        *,
        residual_posterior: bool = False,
        dropout: float = 0.0,
        num_inputs: int = 0,
        missing: bool = False,
        latent: Latent | None = None,
        initial: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.num_features = decoder.head.num_features
        self.latent = GaussianLatent(0 if encoder is None else encoder.head.num_features) if latent is None else latent
        self.latent_size = self.latent.size
        self.hidden_size = cast(nn.GRUCell, cells[0]).hidden_size
        self._has_cell_state = getattr(cells[0], "has_cell_state", isinstance(cells[0], nn.LSTMCell))
        self.residual_posterior, self.dropout = residual_posterior, dropout
        self.num_inputs, self.missing = num_inputs, missing
        self.phi_x, self.phi_z, self.prior, self.backward_rnn = phi_x, phi_z, prior, backward_rnn
        self.encoder, self.decoder, self.cells, self.initial = encoder, decoder, cells, initial
        self.checkpoint_every: int | None = None
        """In training keep only the states between windows of so many steps, and infer each window again on the way
        back (Chen et al. 2016, arXiv 1604.06174); ``None`` keeps all. It changes no value: an option of the run."""
        self.checked: tuple[list[Any], Parts] | None = None
        """The modules and hooks whose fast step was compared with the methods, and what the loop compiles of them."""
        self._reported: set[str] = set()
        self.called_parts: dict[str, float] = {}
        """Parts that the time loop called at each step of the last passes, with their share of its time."""
        self.compiled = False
        """Score with :func:`torch.compile`: all that is outside the time loop. An option of the run, too."""
        self.register_buffer("input_mean", torch.zeros(self.num_features))
        self.register_buffer("input_std", torch.ones(self.num_features))

    @torch.no_grad()
    def init_from_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Centre what phi_x reads, and start the emission's bias, from the data's moments, each (features,)."""
        self.input_mean.copy_(mean)
        scales = torch.as_tensor(self.head.scales_inputs, device=std.device)
        self.input_std.copy_(torch.where((std > 0) & scales, std, 1.0))
        self.head.init_from_statistics(mean)

    def standardize_input(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return what phi_x reads of frames: standardised values and, if it reads that, which were measured.

        Args:
            x: Frames, shape (..., features).
            valid: True at real, measured values, shape (..., features); others read as the mean. ``None`` for all.
        """
        centred = (x - self.input_mean) / self.input_std
        if valid is not None:
            centred = centred.masked_fill(~valid, 0.0)
        if not self.missing:
            return centred
        return torch.cat([centred, torch.ones_like(centred) if valid is None else valid.to(centred)], -1)

    def extract_x(self, x: Tensor, valid: Tensor | None = None, masks: Masks | None = None) -> Tensor:
        """Return the features of frames, with their dropout applied; see :meth:`standardize_input`."""
        features: Tensor = self.phi_x(self.standardize_input(x, valid))
        return features if masks is None else features * masks.phi_x

    def extract_z(self, z: Tensor, masks: Masks | None = None) -> Tensor:
        """Return the features of latents, shape (..., latent), with their dropout applied."""
        features = z if self.phi_z is None else self.phi_z(z)
        return features if masks is None else features * masks.phi_z

    def prior_dist(self, h: Tensor, inputs: Tensor | None = None) -> Factorised:
        r"""Return the prior :math:`p(z_t \mid x_{<t}, z_{<t})` (Chung et al. 2015, eq. 5)."""
        if self.prior is None:
            return gaussian(h[..., :0], h[..., :0])
        return self.prior(join(h, inputs))

    def emission_dist(self, z_features: Tensor, h: Tensor, inputs: Tensor | None = None) -> Distribution:
        r"""Return the emission :math:`p(x_t \mid z_{\le t}, x_{<t})` (Chung et al. 2015, eq. 6)."""
        return cast(Distribution, self.decoder(join(z_features, h, inputs)))

    @property
    def emission_parts(self) -> tuple[nn.Module | None, Callable[[Tensor], Distribution]]:
        """The decoder's network, and the head that makes the emission of its features.

        Any decoder but a plain :class:`~vrnn_lightning.heads.Network` is called as a whole: ``None``, and a head that
        reads z_features, h and inputs side by side.
        """
        if not self.runs_own_method("emission_dist"):
            return None, self._emission_of_joined
        if is_plain(self.decoder, Network):
            return self.decoder.body, self.decoder.head
        return None, self.decoder

    @property
    def emission_head(self) -> Callable[[Tensor], Distribution]:
        """What makes the emission of :meth:`emission_features`."""
        return self.emission_parts[1]

    def emission_features(self, z_features: Tensor | None, h: Tensor, inputs: Tensor | None = None) -> Tensor:
        """Return what :attr:`emission_head` reads, shape (..., width)."""
        joined, body = join(z_features, h, inputs), self.emission_parts[0]
        return joined if body is None else cast(Tensor, body(joined))

    def _emission_of_joined(self, joined: Tensor) -> Distribution:
        widths = [joined.shape[-1] - self.hidden_size - self.num_inputs, self.hidden_size, self.num_inputs]
        z_features, h, inputs = joined.split(widths, -1)
        return self.emission_dist(z_features, h, inputs if self.num_inputs else None)

    def newly_called(self) -> list[str]:
        """Return a line for each part that the loop called for the first time, and for a KL without a closed form."""
        new = {part: share for part, share in self.called_parts.items() if part not in self._reported}
        self._reported |= set(new)
        kinds = {part: type(self.get_submodule(part)).__name__ for part in new}
        lines = [f"{part}: {kinds[part]} is called at every step, {new[part]:.0%} of the loop's time" for part in new]
        if not self.latent.has_closed_kl and "kl" not in self._reported:
            self._reported.add("kl")
            lines.append(
                f"kl: log q(z) - log p(z) of the latents drawn; {type(self.latent).__name__} has no closed form"
            )
        return lines

    def runs_own_method(self, name: str) -> bool:
        """Return whether a method is the one of this class, which the time loop knows."""
        return getattr(type(self), name) is getattr(Equations, name) and name not in vars(self)

    @property
    def head(self) -> Head:
        """The emission's head: the support of the data, the kind of its likelihood, and its first bias.

        Raises:
            UserError: A decoder of another class has none.
        """
        head = getattr(self.decoder, "head", None)
        if not isinstance(head, Head):
            kind = type(self.decoder).__name__
            raise UserError(f"decoder: {kind} has no head. Fix: set its attribute `head` to the emission's Head")
        return head

    @property
    def parts(self) -> Parts:
        """What the time loop compiles; other parts are called at each step."""
        return Parts.of(self) if self.checked is None else self.checked[1]

    @property
    def infers_state(self) -> bool:
        """Whether the initial state is a latent; the KL of a pass then has a column for it."""
        return isinstance(self.initial, InferredState)

    @property
    def has_latent(self) -> bool:
        """Whether anything is inferred: z_t, or the initial state."""
        return bool(self.latent_size) or self.infers_state

    @property
    def feature_widths(self) -> tuple[int, int]:
        """Widths of the features of x_t and of z_t."""
        like = self.input_mean
        x_width = feature_width(self.phi_x, self.num_features * (2 if self.missing else 1), "phi_x", like)
        return x_width, 0 if self.phi_z is None else feature_width(self.phi_z, self.latent_size, "phi_z", like)

    def next_state(
        self,
        x_features: Tensor,
        z_features: Tensor | None,
        state: State,
        inputs: Tensor | None = None,
        masks: Masks | None = None,
    ) -> tuple[Tensor, State]:
        r"""Return the recurrence :math:`h_t = f(\varphi_x(x_t), \varphi_z(z_t), h_{t-1})` (Chung et al. 2015, eq. 7).

        Args:
            x_features: Features of x_t, shape (batch, width).
            z_features: Features of z_t, shape (batch, width); ``None`` without a latent.
            state: State before the step.
            inputs: Covariates, shape (batch, covariates).
            masks: Dropout of what networks and upper layers read of h.

        Returns:
            h_t of the top layer as the networks read it, shape (batch, hidden), and the state after the step.
        """
        below, hs, cs = join(x_features, inputs, z_features), [], []
        own = iter(state.c if isinstance(state.c, tuple) else ())
        for layer, cell in enumerate(cast("list[Any]", self.cells)):
            h = state.h[:, layer]
            if hasattr(cell, "initial_state"):
                leaves, spec = tree_flatten(cell.initial_state(1))
                before: Any = tree_unflatten([next(own) for _ in leaves], spec)
                h, *after = cell_outputs(f"cells.{layer}", cell, cell(below, before), (h, before))
                cs += after
            elif isinstance(state.c, Tensor):
                both = h, state.c[:, layer]
                h, *after = cell_outputs(f"cells.{layer}", cell, cell(below, both), both)
                cs += after
            else:
                (h,) = cell_outputs(f"cells.{layer}", cell, cell(below, h), h)
            hs.append(h)
            below = h if masks is None else h * masks.h[:, layer]
        c = tuple(cs) if isinstance(state.c, tuple) else torch.stack(cs, 1) if cs else None
        return below, State(torch.stack(hs, 1), c)

    def posterior_dist(
        self,
        x_features: Tensor,
        h: Tensor,
        prior: Factorised | None = None,
        inputs: Tensor | None = None,
        future: Tensor | None = None,
    ) -> Factorised:
        r"""Return the posterior :math:`q(z_t \mid x_{\le t}, z_{<t})` (Chung et al. 2015, eq. 9).

        Args:
            x_features: Features of x_t.
            h: h_{t-1}.
            prior: The prior, if it is known, for a residual posterior.
            inputs: Covariates.
            future: State of the recurrence that reads backwards, shape (..., hidden), for smoothing.
        """
        if self.encoder is None:
            return self.prior_dist(h, inputs)
        posterior = cast(Factorised, self.encoder(join(x_features, inputs, future, h)))
        if not self.residual_posterior:
            return posterior
        prior = self.prior_dist(h, inputs) if prior is None else prior
        return gaussian(posterior.base_dist.loc + prior.base_dist.loc, posterior.base_dist.scale)

    def describe_step(self, purpose: Purpose) -> str:
        """Return which lines of a step are computed before, inside and after the time loop.

        Args:
            purpose: "infer" for training and evaluation, "filter", "stream" or "generate".
        """
        return str(partition(self, purpose))

    def initial_state(self, batch_size: int, inputs: Tensor | None = None, *, mean: bool = False) -> State:
        """Return the state before the first step.

        Args:
            batch_size: Number of sequences.
            inputs: Covariates of the first step, shape (batch_size, covariates), if the state is a function of them.
            mean: If the state is a latent, return its prior's mean and not a draw.
        """
        if self.initial is None:
            return self.zero_state(batch_size)
        if mean and isinstance(self.initial, InferredState):
            return self.initial.moved(batch_size, None)
        return cast(State, self.initial(batch_size, inputs))

    def initial_state_of(
        self, batch: SequenceBatch, samples: int = 1, noise: Noise | None = None, masks: Masks | None = None
    ) -> Initial:
        """Return the state before the first step of each sequence of a clean batch, for ``samples`` trajectories of it.

        An inferred state is drawn with the noise of the pass, by default from torch's global generator.
        """
        if isinstance(self.initial, InferredState):
            x_features, covariates, _ = self.network_inputs(batch, masks, None)
            noise = Noise(batch) if noise is None else noise
            return self.initial.infer(join(x_features, covariates), batch, noise, samples)
        inputs = batch.inputs[:, 0].to(self.input_mean) if self.num_inputs and batch.inputs is not None else None
        if inputs is not None:
            inputs = torch.where(batch.lengths[:, None] > 0, inputs, 0.0)
        return Initial(map_tensors(lambda x: repeat_rows(x, samples), self.initial_state(len(batch), inputs)))

    def zero_state(self, batch_size: int) -> State:
        """Return the state of zeros, or of what cells make in ``initial_state``, for ``batch_size`` sequences."""
        zeros = self.input_mean.new_zeros(batch_size, len(self.cells), self.hidden_size)
        own = [(f"cells.{i}", cell) for i, cell in enumerate(self.cells) if hasattr(cell, "initial_state")]
        if own:
            return State(zeros, tuple(x.to(zeros) for name, cell in own for x in cell_state(name, cell, batch_size)))
        return State(zeros, zeros if self._has_cell_state else None)

    def require_state(self, state: State) -> None:
        """Raise if a state has another shape or type than this model's."""
        like = self.zero_state(len(state.h))
        for name, given, own in zip("hc", state, like, strict=True):
            if (given is None) != (own is None):
                raise UserError(
                    f"state: {name} is {'missing' if given is None else 'of an LSTM, but the cell is a GRU'}"
                )
            parts = ([x for x in tree_flatten(part)[0] if x is not None] for part in (given, own))
            got, needed = (" and ".join(f"{tuple(x.shape)} in {x.dtype}" for x in part) for part in parts)
            if got != needed:
                raise UserError(f"state: {name} has shape {got}, expected {needed}")

    def draw_masks(self, noise: Noise) -> Masks | None:
        """Draw the dropout of a pass; ``None`` in evaluation, or where the probability is 0."""
        if not self.training or not self.dropout:
            return None
        widths = [*self.feature_widths, len(self.cells) * self.hidden_size]
        kept = noise.uniform(sum(widths)) >= self.dropout
        phi_x, phi_z, h = (kept.to(self.input_mean) / (1 - self.dropout)).split(widths, -1)
        return Masks(phi_x, phi_z, h.unflatten(-1, (-1, self.hidden_size)))

    def mask_invalid(self, batch: SequenceBatch) -> SequenceBatch:
        """Return a batch with zeros at padding and at missing values.

        Raises:
            UserError: The batch has no steps, or not the covariates that the model reads.
        """
        if 0 in batch.x.shape[:2]:
            raise UserError("the batch has no sequences or no time steps. Fix: pad it to one")
        inputs = batch.inputs if self.num_inputs else None
        width = 0 if inputs is None else inputs.shape[-1]
        if width != self.num_inputs:
            raise UserError(f"the batch has {width} covariates (inputs) per step, the model reads {self.num_inputs}")
        if inputs is not None:
            inputs = inputs.to(batch.x).masked_fill(~batch.mask[..., None], 0.0)
        first, shape = batch.is_first, batch.mask.shape
        if first is not None and (first.dtype != torch.bool or first.shape != shape):
            raise UserError(f"is_first: must be torch.bool of shape {tuple(shape)}, (batch, time)")
        if isinstance(self.initial, InitialState):
            self.initial.require_whole(batch)
        is_first = None if batch.is_first is None else batch.is_first & batch.mask
        return replace(batch, x=batch.x.masked_fill(~batch.valid_mask, 0.0), inputs=inputs, is_first=is_first)

    def network_inputs(self, batch: SequenceBatch, masks: Masks | None, future: Tensor | None) -> NetworkInputs:
        """Return what the networks read of a clean batch, time first."""
        x_features = self.phi_x(self.standardize_input(batch.x, batch.valid_mask).transpose(0, 1))
        x_features = x_features if masks is None else x_features * masks.phi_x
        return NetworkInputs(x_features, None if batch.inputs is None else batch.inputs.transpose(0, 1), future)

    def backward_states(self, batch: SequenceBatch, masks: Masks | None) -> Tensor | None:
        """Return the states of the recurrence that reads each episode of a clean batch from its end, for smoothing.

        Returns:
            Shape (time, batch, hidden), or ``None`` for a model that does not smooth.
        """
        if self.backward_rnn is None:
            return None
        x_features, inputs, _ = self.network_inputs(batch, masks, None)
        return run_backward(self.backward_rnn, join(x_features, inputs), batch)
