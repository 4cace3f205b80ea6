"""Binary features that depend on each other: sums over all frames are the reference."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vrnn_lightning import SequenceBatch, UserError, VRNNLightningModule
from vrnn_lightning.heads import AutoregressiveBernoulli, Bernoulli, log_prob, tempered

D = 6
FRAMES = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * D)
SIZES = [{"hidden_size": 3}, {"hidden_size": 40}, {"hidden_size": 7, "layers": 2}, {"hidden_size": 20, "layers": 3}]
every_size = pytest.mark.parametrize("options", SIZES, ids=str)


def make(**options) -> tuple[AutoregressiveBernoulli, Tensor]:
    """A head in evaluation whose features depend on each other, and two rows of features."""
    torch.manual_seed(0)
    head = AutoregressiveBernoulli(4, D, **options).double().eval()
    for p in head.parameters():
        torch.nn.init.normal_(p)
    return head, torch.randn(2, 4).double()


@every_size
def test_masses_sum_to_one(options):
    head, f = make(**options)
    total = log_prob(head(f), FRAMES[:, None]).exp().sum(0)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-12, atol=1e-12)


@every_size
def test_each_feature_reads_those_before_it(options):
    """By the gradient of each conditional with respect to a frame: strictly lower triangular, and not zero."""
    head, f = make(**options)
    jacobian = torch.autograd.functional.jacobian(lambda x: head(f[0])._conditionals(x), torch.full((D,), 0.5).double())
    jacobian = jacobian - torch.diag(jacobian.diagonal())  # x_d itself is in the likelihood
    assert (jacobian.triu(1) == 0).all()
    if options["hidden_size"] >= D:
        assert (jacobian.tril(-1)[1:].abs().sum(-1) > 0).all()


@every_size
@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_draws_have_the_frequencies_of_all_frames(options, temperature):
    head, f = make(**options)
    d = tempered(head(f), temperature)
    torch.manual_seed(1)
    draws = head.draw(f.repeat(20_000, 1), temperature).view(20_000, 2, D)
    masses = log_prob(d, FRAMES[:, None]).exp()
    assert masses.sum(0).detach().numpy() == pytest.approx(1, abs=1e-12)
    places = (draws * 2 ** torch.arange(D - 1, -1, -1)).sum(-1).long()
    for row in range(2):
        found = torch.bincount(places[:, row], minlength=2**D) / 20_000
        error = (masses[:, row] * (1 - masses[:, row]) / 20_000).sqrt()
        assert ((found - masses[:, row]).abs() < 5 * error + 1e-3).all()


def test_a_draw_is_scored_with_the_probabilities_it_was_drawn_with():
    for options in SIZES:
        head, f = make(**options)
        d = head(f)
        x, p = d._draw(torch.rand(3, 2, D).double())
        each = torch.where(x == 1, p, 1 - p).log().sum(-1)
        torch.testing.assert_close(log_prob(d, x), each)


def test_without_its_network_it_is_a_bernoulli():
    head, f = make(hidden_size=5)
    torch.nn.init.zeros_(head.output.weight)
    plain = Bernoulli(4, D).double()
    plain.load_state_dict({name: value for name, value in head.state_dict().items() if name in plain.state_dict()})
    torch.testing.assert_close(log_prob(head(f), FRAMES[:, None]), log_prob(plain(f), FRAMES[:, None]))
    torch.testing.assert_close(head(f).mean, plain(f).mean)


def test_marginals_of_the_first_features_are_sums_over_the_others():
    head, f = make(hidden_size=20)
    d = head(f[0])
    for count in range(D + 1):
        observed = (torch.arange(D) < count).expand(2**D, D)
        same = (FRAMES[:, None, :count] == FRAMES[None, :, :count]).all(-1).double()
        expected = (same @ log_prob(d, FRAMES).exp()).log()
        torch.testing.assert_close(log_prob(d, FRAMES.masked_fill(~observed, math.nan), observed), expected)
    with pytest.raises(UserError, match=r"a missing feature precedes an observed one. Fix: .* Bernoulli"):
        log_prob(d, FRAMES, torch.arange(D).expand(2**D, D) != 2)


def test_temperature_divides_the_logit_of_each_feature():
    head, f = make(hidden_size=20)
    _, p = head(f[0])._draw(torch.full((D,), 0.5).double())
    _, first = tempered(head(f[0]), 3.0)._draw(torch.full((D,), 0.5).double())
    torch.testing.assert_close(first[0], torch.sigmoid(p[0].logit() / 3))
    power = (log_prob(head(f[0]), FRAMES) / 3).softmax(0)
    found = log_prob(tempered(head(f[0]), 3.0), FRAMES).exp()
    assert (found - power).abs().max() > 1e-3  # what the documentation says: it is not the joint's power


def test_mean_is_estimated_and_always_the_same():
    head, f = make(hidden_size=20)
    exact = (log_prob(head(f), FRAMES[:, None]).exp()[..., None] * FRAMES[:, None]).sum(0)
    assert (head(f).mean - exact).abs().max() < 0.25
    torch.testing.assert_close(head(f).mean[:, 0], exact[:, 0])
    state = torch.get_rng_state()
    assert torch.equal(head(f).mean, head(f).mean)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_is_a_function_of_the_features_and_only_in_training():
    head, f = make(hidden_size=200, dropout=0.4)
    f, x = torch.randn(50, 4).double(), torch.ones(50, D).double()
    whole = log_prob(head(f), x)
    head.train()
    torch.manual_seed(1)
    thinned = log_prob(head(f), x)
    order = torch.randperm(50)
    torch.testing.assert_close(log_prob(head(f[order]), x[order]), thinned[order])
    assert (thinned != whole).all()
    kept = head._keep(f)
    assert kept.shape == (1, 50, 200)
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert kept.mean().item() == pytest.approx(1, abs=0.05)
    assert (kept[0].std(0) > 0.5).all()  # the rows drop different units
    assert torch.equal(head(f)._draw(x / 2)[1], head.eval()(f)._draw(x / 2)[1])


def test_gradients_of_windows_are_those_of_one_pass():
    """A window that is computed again on the way back drops the same units."""
    torch.manual_seed(0)
    module = VRNNLightningModule(D, latent_size=2, hidden_size=5, emission=AutoregressiveBernoulli).double()
    batch = SequenceBatch((torch.rand(3, 8, D) < 0.4).double(), torch.tensor([8, 8, 5]))
    gradients = []
    for window in (None, 3):
        vrnn = copy.deepcopy(module.vrnn)
        vrnn.checkpoint_every = window
        torch.manual_seed(1)
        trace = vrnn(batch)
        (trace.kl.sum() - trace.log_px.sum()).backward()
        gradients.append([p.grad for p in vrnn.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"hidden_size": 0}, "hidden_size 0"), ({"layers": 0}, "layers 0"), ({"dropout": 1.0}, "dropout 1")],
)
def test_absurd_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        AutoregressiveBernoulli(4, 3, **options)


def test_on_the_command_line(lightning, tiny):
    generator = np.random.default_rng(0)
    arrays = {
        f"{split}_values": (generator.random((16, 88)) < 0.1).astype(np.uint8) for split in ("train", "valid", "test")
    }
    np.savez("rolls.npz", **arrays, **{f"{split}_lengths": np.array([7, 4, 5]) for split in ("train", "valid", "test")})
    words = ["--data", "PianoRolls", "--data.root", "rolls.npz", "--model.emission", "AutoregressiveBernoulli"]
    Path("small.yaml").write_text(tiny.read_text().partition("data:")[0] + "report: false\n")
    said = lightning("fit", "-c", "small.yaml", *words, "--model.emission.hidden_size", "32")
    assert said.code == 0, said.err
    (checkpoint,) = Path("runs").glob("*/version_0/checkpoints/last.ckpt")
    assert lightning("test", "--ckpt_path", checkpoint, "--evaluation.samples", "2").code == 0
    shown = lightning("fit", "--model.emission.help", "AutoregressiveBernoulli").out
    assert all(f"--model.emission.{option}" in shown for option in ("hidden_size", "layers", "dropout"))
