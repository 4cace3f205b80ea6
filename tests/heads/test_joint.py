"""Groups of columns with heads of their own: the product of their densities, in any order of columns."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from vrnn_lightning import UserError, VRNNLightningModule
from vrnn_lightning.heads import (
    AutoregressiveBernoulli,
    Bernoulli,
    Categorical,
    Gaussian,
    Group,
    Joint,
    Poisson,
    log_prob,
    tempered,
)
from vrnn_lightning.inference.imputing import _complete

GROUPS = [Group([4, 0], Bernoulli), Group("1:4", Categorical), Group([5, 6], partial(Gaussian, min_std=0.1))]


def mixed() -> tuple[Joint, torch.Tensor, torch.Tensor]:
    """A head of seven columns, features, and frames that it supports."""
    torch.manual_seed(0)
    head, f = Joint(4, 7, GROUPS).double(), torch.randn(5, 4).double()
    return head, f, head(f).sample()


def test_log_prob_is_the_sum_of_the_groups():
    head, f, x = mixed()
    binary, classes, real = (part(f) for part in head.heads)
    expected = binary.log_prob(x[:, [4, 0]]) + classes.log_prob(x[:, 1:4]) + real.log_prob(x[:, 5:])
    torch.testing.assert_close(log_prob(head(f), x), expected)
    assert set(x[:, [0, 4]].unique().tolist()) == {0.0, 1.0}
    assert (x[:, 1:4].sum(-1) == 1).all()
    torch.testing.assert_close(head(f).mean[:, [4, 0]], binary.mean)
    torch.testing.assert_close(head(f).variance[:, 5:], real.variance)
    sharp = binary.tempered(0.5).mean
    torch.testing.assert_close(tempered(head(f), 0.5).mean[:, [4, 0]], sharp)


def test_missing_columns_are_left_out():
    head, f, x = mixed()
    observed = torch.tensor([True, False, False, False, False, True, False]).expand_as(x)
    binary, _, real = (part(f) for part in head.heads)
    expected = binary.base_dist.log_prob(x[:, [4, 0]])[:, 1] + real.base_dist.log_prob(x[:, 5:])[:, 0]
    torch.testing.assert_close(log_prob(head(f), x.masked_fill(~observed, math.nan), observed), expected)


def test_missing_columns_are_drawn_by_their_groups():
    head, f, x = mixed()
    known = torch.tensor([True, True, True, True, False, False, True]).expand_as(x)
    filled = _complete(head(f), x, known)
    assert torch.equal(filled[known], x[known])
    assert head.supports(filled).all()


def test_each_group_has_its_scale_statistics_and_rounding():
    head, _, _ = mixed()
    assert head.scales_inputs.tolist() == [False] * 5 + [True] * 2
    mean = torch.tensor([0.2, 0.1, 0.3, 0.6, 0.9, 5.0, 5.0]).double()
    head.init_from_statistics(mean)
    found = head(torch.zeros(4).double()).mean
    torch.testing.assert_close(found[:5], mean[:5])
    assert head.round_mean(mean).tolist() == [0, 0, 0, 1, 1, 5, 5]
    module = VRNNLightningModule(7, latent_size=2, emission=partial(Joint, groups=GROUPS))
    module.vrnn.init_from_statistics(mean.float(), torch.full((7,), 3.0))
    assert module.vrnn.input_std.tolist() == [1.0] * 5 + [3.0] * 2
    assert module.vrnn.generate(steps=3, batch_size=2).x.shape == (2, 3, 7)


def test_kind_of_number():
    assert Joint(4, 2, [Group([0]), Group([1])]).likelihood == "density"
    assert Joint(4, 2, [Group([0], Bernoulli), Group([1], Poisson)]).likelihood == "mass"
    assert Joint(4, 2, [Group([0], Bernoulli), Group([1])]).likelihood == "mixed"


def test_message_names_the_column_of_the_frame():
    head, _, x = mixed()
    x[2, 4] = 0.5
    with pytest.raises(UserError, match=r"emission Joint: feature 4 .* not 0 or 1. Fix: binarise"):
        head.check(x, torch.ones_like(x, dtype=torch.bool))


def test_a_joint_head_may_be_a_group():
    inner = partial(Joint, groups=[Group([1], Bernoulli), Group([0])])
    head = Joint(4, 3, [Group([2, 0], inner), Group([1], Categorical)])
    assert [type(head.head_of(i)).__name__ for i in range(3)] == ["Bernoulli", "Categorical", "Gaussian"]
    assert head(torch.zeros(2, 4)).sample().shape == (2, 3)


def test_a_group_without_partly_missing_frames():
    head = Joint(4, 3, [Group("0:2", AutoregressiveBernoulli), Group([2])])
    seen = torch.tensor([False, True, True])
    with pytest.raises(UserError, match="a missing feature precedes"):
        log_prob(head(torch.zeros(4)), torch.zeros(3), seen)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([Group("0:2")], "columns 2 are in no group"),
        ([Group("0:3"), Group([2, 0])], "columns 0, 2 are in two groups"),
        ([Group("0:3"), Group([3])], "columns 3 are not among the data's 3"),
        ([Group([-1, 0, 1])], "columns -1 are not among"),
        ([], "columns 0, 1, 2 are in no group"),
        ([Group("0:3"), Group([])], "and not empty"),
        ([Group("first")], "columns 'first': must be a list or a range such as '0:3'"),
    ],
)
def test_every_column_is_in_one_group(groups, message):
    with pytest.raises(UserError, match=message):
        Joint(4, 3, groups)


def test_options_travel_in_the_checkpoint(tmp_path):
    inner = partial(Joint, groups=[Group("0:1"), Group([1], Bernoulli)])
    groups = [Group("1:3", inner), Group([0], partial(Gaussian, min_std=0.5))]
    module = VRNNLightningModule(3, latent_size=2, emission=partial(Joint, groups=groups))
    module.save_pretrained(tmp_path)
    again = VRNNLightningModule.from_pretrained(tmp_path)
    head = again.vrnn.decoder.head
    assert again.hparams["emission"] == module.hparams["emission"]
    assert head.heads[1].min_std == 0.5
    assert type(head.head_of(2)) is Bernoulli
    f = torch.randn(2, head.in_features)
    assert torch.equal(head(f).mean, module.vrnn.decoder.head(f).mean)
    with pytest.raises(UserError, match="can't be stored"):
        VRNNLightningModule(3, emission=partial(Joint, groups=[Group("0:3", lambda i, o: Gaussian(i, o))]))


def test_on_the_command_line(lightning, tiny):
    groups = [{"columns": [1, 2]}, {"columns": "0:1", "head": {"class_path": "StudentT", "init_args": {"min_df": 3.0}}}]
    Path("joint.yaml").write_text(
        yaml.safe_dump({"model": {"emission": {"class_path": "Joint", "init_args": {"groups": groups}}}})
    )
    words = ["fit", "-c", tiny, "-c", "joint.yaml"]
    said = lightning(*words)
    assert said.code == 0, said.err
    (written,) = Path("runs").glob("*/version_0/config.yaml")
    given = yaml.safe_load(written.read_text())["model"]["emission"]["init_args"]["groups"]
    assert [group["columns"] for group in given] == [[1, 2], "0:1"]
    assert given[1]["head"]["init_args"] == {"min_df": 3.0, "min_scale": 1e-4}
    assert lightning("test", "--ckpt_path", written.parent / "checkpoints" / "last.ckpt").code == 0
    assert "--model.emission.groups" in lightning("fit", "--model.emission.help", "Joint").out
    wrong = lightning(*words, "--model.emission.groups", "[{columns: '0:3', head: Gausian}]")
    assert "Did you mean 'Gaussian'?" in wrong.err
    assert len(wrong.err.strip().splitlines()) == 1


def test_columns_of_every_kind_from_files(lightning):
    """Real ones are scaled, binary and categorical ones are as they are."""
    generator, arrays = np.random.default_rng(0), {}
    for split in ("train", "valid", "test"):
        kind = np.eye(3)[generator.integers(0, 3, 40)]
        x = np.column_stack([5 + 3 * generator.standard_normal(40), generator.random(40) < 0.3, kind])
        arrays |= {f"{split}_values": x, f"{split}_lengths": np.full(4, 10)}
    np.savez("mixed.npz", **arrays)
    values = np.concatenate([x for x in arrays.values() if x.ndim == 2])
    rows = [",".join(f"{value:.4f}" for value in row) for row in values]
    Path("mixed.csv").write_text("\n".join(["a,b,c0,c1,c2", *rows]))
    groups = "[{columns: [0]}, {columns: [1], head: Bernoulli}, {columns: '2:5', head: Categorical}]"
    emission = ["--model.emission", "Joint", "--model.emission.groups", groups, "--trainer.max_epochs", "1"]
    for data in (
        ["Archive", "--data.root", "mixed.npz", "--data.features", "5", "--data.unscaled", "[1,2,3,4]"],
        ["Tables", "--data.root", "mixed.csv", "--data.columns", "[a,b,c0,c1,c2]", "--data.unscaled", "[b,c0,c1,c2]"],
    ):
        said = lightning("fit", "--data", *data, *emission)
        assert said.code == 0, said.err
        (path,) = Path("runs", data[0].lower()).rglob("last.ckpt")
        weights = torch.load(path, weights_only=True)["state_dict"]
        assert weights["scale_mean"][0] > 3
        assert (weights["scale_mean"][1:] == 0).all()
        assert (weights["scale_std"][1:] == 1).all()
        assert lightning("test", "--ckpt_path", path).code == 0
    archive = ["Archive", "--data.root", "mixed.npz", "--data.features", "5", "--data.unscaled", "[5]"]
    tables = ["Tables", "--data.root", "mixed.csv", "--data.columns", "[a,b]", "--data.unscaled", "[c0]"]
    for data, words in ((archive, "unscaled 5: must lie"), (tables, "unscaled 'c0': is not in --data.columns. Fix: ")):
        said = lightning("fit", "--data", *data)
        assert said.code == 1
        assert words in said.err
