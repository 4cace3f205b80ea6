"""A pushed pendulum in pictures, and the convolutions that read them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from vrnn_lightning.datamodules.pendulum import Pendulum

from vrnn_lightning import UserError, build_vrnn
from vrnn_lightning.callbacks.media import Media
from vrnn_lightning.nn import Conv
from vrnn_lightning.testing import CHECKS

SMALL = {"train_size": 17, "val_size": 6, "test_size": 7, "steps": 9, "min_steps": 2, "batch_size": 4, "episode": 4}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check):
    check(lambda **options: Pendulum(**SMALL | options))


def test_frames_show_the_bob_and_rewards_its_height():
    data = Pendulum(train_size=8, val_size=1, test_size=1, noise=0)
    axis = torch.linspace(-1.3, 1.3, 16)
    for s in data.split("train"):
        frames = s.x.unflatten(-1, (16, 16))
        weights = frames / frames.sum((1, 2), keepdim=True)
        height = -(weights.sum(2) * axis).sum(1)
        torch.testing.assert_close(height, s.targets[:, 0], rtol=0, atol=0.05)


def test_episodes_begin_anew_in_training_alone():
    data = Pendulum(**{**SMALL, "min_steps": 9})
    assert data.split("train")[0].is_first.nonzero().flatten().tolist() == [0, 4, 8]
    assert (data.split("train")[0].inputs[[0, 4, 8]] == 0).all()
    assert [len(s.x) for s in data.split("test")] == [4] * 7


def test_a_push_moves_it():
    """The same seed with the equation solved by much smaller steps."""
    s = Pendulum(train_size=1, val_size=1, test_size=1, noise=0, steps=20).split("train")[0]
    cosine, push = s.targets[:, 0].double().numpy(), s.inputs[:, 0].double().numpy()
    best = np.inf
    for side in (1, -1):
        angle, speed, path = side * np.arccos(cosine[0]), 0.0, [cosine[0]]
        for u in push[1:]:
            for _ in range(200):
                speed += 0.0005 * (15 * np.sin(angle) + 6 * u - 0.1 * speed)
                angle += 0.0005 * speed
            path.append(np.cos(angle))
        best = min(best, np.abs(np.array(path)[:12] - cosine[:12]).max())
    assert best < 0.15


@pytest.mark.parametrize("shape", [[1, 16, 16], [4, 64]])
def test_convolutions_are_those_of_torch(shape):
    torch.manual_seed(0)
    network, x = Conv(256, shape, channels=[3, 5], stride=2), torch.randn(2, 4, 256)
    for i, j in ((0, 0), (1, 3)):
        torch.testing.assert_close(network(x)[i, j], network.layers(x[i, j].view(1, *shape)).flatten())
    model = build_vrnn(256, 2, 8, phi_x=lambda width: Conv(width, shape))
    assert model.generate(steps=3, batch_size=2).x.shape == (2, 3, 256)


def test_bad_options_are_one_line():
    for make, message in (
        (lambda: Conv(255, [1, 16, 16]), r"shape \[1, 16, 16\]: must be .* of 255 numbers"),
        (lambda: Conv(3, [-1, -3]), r"shape \[-1, -3\]: must be"),
        (lambda: Conv(256, [1, 16, 16], kernel=2), "kernel 2, .* the kernel odd"),
        (lambda: Conv(256, [1, 16, 16], channels=[]), r"channels \[\]"),
        (lambda: Conv(256, [256]), r"shape \[256\]: must be"),
        (lambda: Conv(256, [1, 16, 16], stride=0), "stride 0: must be positive"),
        (lambda: Conv(256, [1, 16, 16], activation="relu"), "activation 'relu': must be one of"),
        (lambda: Pendulum(episode=0), "--data.episode 0: must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            make()


def test_the_recipe_trains_forecasts_and_shows_rewards(lightning, folder):
    recipe = Path(__file__).parents[2] / "configs" / "rssm.yaml"
    sizes = ("--data.train_size", "8", "--data.val_size", "2", "--data.test_size", "2", "--model.hidden_size", "8")
    assert (
        lightning(
            "fit", "-c", recipe, *sizes, "--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1"
        ).code
        == 0
    )
    done = lightning("predict", "--ckpt_path", "best", "--prediction.task", "forecast", "--prediction.prefix", "20",
                     "--prediction.steps", "30", "--prediction.samples", "3")  # fmt: skip
    assert done.code == 0, done.err
    assert "seasonal naive" in done.out
    done = lightning("test", "--ckpt_path", "best", "--evaluation.samples", "2")
    assert done.code == 0, done.err
    assert "test/reward" in done.out


def test_frames_that_are_images_are_shown_side_by_side():
    media, x = Media(Pendulum(train_size=2)), torch.rand(12, 256)
    (shown,) = media.to_display({"sampled": [x]})["sampled"]
    assert shown.shape == (2 * 17, 10 * 17)
    assert torch.equal(shown[17 : 17 + 16, 17 : 17 + 16], x[11].view(16, 16))
    assert shown[16].isnan().all()
