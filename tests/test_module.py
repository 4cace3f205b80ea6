"""The LightningModule: units, resume, processes, precision, refusals."""

from __future__ import annotations

import csv
import math
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from vrnn_lightning.datamodules.sines import Sines

from vrnn_lightning import MLPConfig, UserError, VRNNLightningModule
from vrnn_lightning.batch import SequenceBatch, SequenceSample, pad
from vrnn_lightning.callbacks import (
    ConstantKLWeight,
    ControlVAE,
    CosineKLAnnealing,
    CyclicalKLAnnealing,
    Diagnostics,
    LinearKLAnnealing,
    Predictions,
    Samples,
    SigmoidKLAnnealing,
)
from vrnn_lightning.callbacks.archives import ArchiveWriter
from vrnn_lightning.heads import Bernoulli, Gaussian, Poisson
from vrnn_lightning.metrics import ActiveUnits, Bound
from vrnn_lightning.objectives import ELBO, FIVO, IWAE

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),  # a resume into another folder, to compare the two
    pytest.mark.filterwarnings("ignore:Experiment logs directory"),  # two runs, of which only the gradients count
]


def data(**options):
    sizes = {"train_size": 21, "val_size": 9, "test_size": 9, "steps": 8, "min_steps": 1, "batch_size": 4}
    return Sines(**{**sizes, **options})


def module(**options):
    seed_everything(1, verbose=False)
    layers = dict.fromkeys(("phi_x", "phi_z", "prior", "encoder", "decoder"), MLPConfig(8))
    return VRNNLightningModule(3, **{"latent_size": 2, "hidden_size": 8, **layers, **options})


def trainer(folder, *callbacks, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    return Trainer(
        default_root_dir=folder,
        logger=CSVLogger(folder, name="", version=""),
        callbacks=list(callbacks),
        accelerator="cpu",
        **{"max_epochs": 2, "num_sanity_val_steps": 0, **quiet, **options},
    )


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def column(folder, name):
    return [float(row[name]) for row in rows(folder) if row.get(name)]


@pytest.mark.parametrize("latent", [2, 0])
def test_reported_figures_are_totals_over_totals(tmp_path, latent):
    """val/* equals sums over the split, taken by hand, for ragged lengths and an uneven last batch."""
    model, source = module(latent_size=latent), data()
    trainer(tmp_path, max_epochs=1).fit(model, source)
    reported = {k: v[-1] for k in rows(tmp_path)[0] if k.startswith("val/") and (v := column(tmp_path, k))}
    log_px = kl = steps = exact = 0.0
    model.eval()
    with torch.no_grad():
        for i, batch in enumerate(source.val_dataloader()):
            trace = model.vrnn(batch, model._noise(batch, i).over_time(latent))
            log_px += trace.log_px.double().sum().item()
            kl += trace.kl.double().sum().item()
            steps += batch.lengths.sum().item()
            exact += source.exact_log_likelihood(batch).sum().item()
    expected = {
        "val/reconstruction": log_px / steps,
        "val/kl": kl / steps,
        "val/elbo": (log_px - kl) / steps,
        "val/elbo_per_sequence": (log_px - kl) / 9,
        "val/reconstruction_per_sequence": log_px / 9,
        "val/kl_per_sequence": kl / 9,
        "val/bits_per_dim": -(log_px - kl) / (3 * steps * math.log(2)),
        "val/exact_log_likelihood": exact / steps,
        "val/gap": (exact - log_px + kl) / steps,
    }
    for name, value in expected.items():
        assert reported.pop(name) == pytest.approx(value, rel=1e-5, abs=1e-5), name
    assert reported.pop("val/objective") == pytest.approx(expected["val/elbo"], rel=1e-5)
    assert set(reported) == ({"val/active_units"} if latent else set())


def test_the_untrained_bound_lies_below_the_exact_likelihood(tmp_path):
    model = module()
    trainer(tmp_path).validate(model, data(val_size=200), verbose=False)
    assert model.trainer.callback_metrics["val/gap"] > 0


def test_neither_batch_size_nor_order_changes_what_is_reported(tmp_path):
    """Every sequence has noise of its own."""
    model, found = module(), []
    for size in (4, 9, 1):
        runner = trainer(tmp_path, precision="64-true")
        runner.validate(model, data(batch_size=size), verbose=False)
        found.append(runner.callback_metrics["val/elbo"].item())
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)


def test_bits_per_dim_count_the_scaler():
    """A bound in scaled units minus the log of the scaler's std, per value and in bits."""
    bound = Bound()
    bound.update(
        torch.full((1, 4), -3.0),
        torch.ones(1, 4, 2),
        torch.tensor([4]),
        torch.tensor(12),
        torch.tensor(12 * math.log(0.5)),
    )
    figures = bound.compute()
    assert figures["bits_per_dim"].item() == pytest.approx((20 + 12 * math.log(0.5)) / (12 * math.log(2)))
    assert figures["elbo"].item() == -5.0


def test_active_units_count_dimensions_whose_mean_varies():
    units = ActiveUnits(3)
    mean = torch.stack([torch.randn(4, 50), 0.05 * torch.randn(4, 50), torch.full((4, 50), 7.0)], -1)
    mean[:, 40:] = 1e3
    mask = torch.arange(50).expand(4, 50) < 40
    for half in (slice(0, 2), slice(2, 4)):
        units.update(mean[half], mask[half])
    assert units.compute() == 1


def test_training_loss_is_per_sequence_and_gradient_is_its_own(tmp_path):
    model = module()
    batch = next(iter(data().train_dataloader()))
    runner = trainer(tmp_path)
    runner.strategy.connect(model)
    model.trainer = runner
    model.log = lambda *args, **kwargs: None
    loss = model.training_step(batch, 3)
    trace = model.vrnn(batch, model._noise(batch, 3, 0).over_time(2))
    assert loss.item() == pytest.approx(-(trace.log_px.sum() - trace.kl.sum()).item() / len(batch), rel=1e-5)


@pytest.mark.parametrize("interval", [1.0, 0.5], ids=["end of epoch", "middle of epoch"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, interval):
    """Weights, optimiser moments, logged losses and annealing weights agree exactly."""

    def run(folder, epochs, ckpt=None):
        model = module(lr_scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1))
        saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=3, save_last=True)
        t = trainer(folder, LinearKLAnnealing(10), Samples(), saver, max_epochs=epochs, val_check_interval=interval)
        t.fit(model, data(), ckpt_path=ckpt)
        return model, t

    straight, t = run(tmp_path / "straight", 3)
    middle = tmp_path / "straight" / ("step=6.ckpt" if interval == 1.0 else "step=9.ckpt")
    torch.manual_seed(99)
    resumed, r = run(tmp_path / "resumed", 3, middle)
    assert t.global_step == r.global_step == 18
    for a, b in zip(straight.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    moments = [tr.optimizers[0].state_dict()["state"] for tr in (t, r)]
    assert all(torch.equal(moments[0][k]["exp_avg"], moments[1][k]["exp_avg"]) for k in moments[0])
    for name in ("train/loss", "train/beta", "val/elbo"):
        late, all_of_it = column(tmp_path / "resumed", name), column(tmp_path / "straight", name)
        assert late == all_of_it[-len(late) :]


def test_accumulated_micro_batches_equal_one_batch(tmp_path):
    """Two batches of 4 accumulated train as one of the same 8 sequences, latent noise and ragged lengths included."""
    found = []
    for size, accumulate in ((8, 1), (4, 2)):
        t = trainer(tmp_path, max_epochs=3, accumulate_grad_batches=accumulate, precision="64-true")
        model = module()
        t.fit(model, data(train_size=8, batch_size=size))
        assert t.global_step == 3
        found.append(model.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-10, atol=1e-10, msg=name)


class Kinds(Callback):
    """Keeps the data types of all that a training step reads and makes."""

    def __init__(self):
        self.kinds = {}

    def on_fit_start(self, trainer, pl_module):
        inner = pl_module.vrnn._infer

        def infer(window, *rest):
            trace, noise = inner(window, *rest), window.noise
            noise = noise if isinstance(noise, torch.Tensor) else noise.over_time(pl_module.vrnn.latent_size)
            self._keep_pass(window.batch, noise, window.masks, trace)
            return trace

        pl_module.vrnn._infer = infer

    def _keep_pass(self, batch, noise, masks, trace):
        dropped = {} if masks is None else masks._asdict()
        made = {"x": batch.x, "noise": noise, **dropped, **vars(trace), **trace.state._asdict()}
        made |= {"mean": trace.posterior.mean, "prior": trace.prior.mean, "emission": trace.emission.mean}
        self._keep(made)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self._keep({f"gradient of {name}": p.grad for name, p in pl_module.named_parameters()})

    def on_train_end(self, trainer, pl_module):
        self._keep(pl_module.state_dict())
        for i, state in enumerate(trainer.optimizers[0].state.values()):
            self._keep({f"{key} {i}": value for key, value in state.items() if key != "step"})

    def _keep(self, made):
        tensors = {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}
        self.kinds |= {name: value.dtype for name, value in tensors.items() if value.is_floating_point()}


def test_double_precision_is_double_everywhere(tmp_path):
    keep = Kinds()
    trainer(tmp_path, keep, precision="64-true", max_epochs=1).fit(module(dropout=0.2), data())
    assert {"x", "noise", "phi_z", "log_px", "kl", "h", "scale_std", "vrnn.input_mean", "exp_avg 0"} <= set(keep.kinds)
    assert {name for name, kind in keep.kinds.items() if kind != torch.float64} == set()


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "32-true"])
def test_precisions_run_and_bounds_stay_wide(tmp_path, precision):
    model = module()
    trainer(tmp_path, precision=precision, max_epochs=1).fit(model, data())
    trace = model(
        next(iter(data().val_dataloader()))
        if precision != "64-true"
        else SequenceBatch(torch.zeros(1, 2, 3).double(), torch.tensor([2]))
    )
    assert trace.log_px.dtype == (torch.float64 if precision == "64-true" else torch.float32)
    assert all(math.isfinite(v) for v in column(tmp_path, "val/elbo"))


def test_hyperparameters_load_without_running_code(tmp_path):
    """Factories and sizes given in Python come back from a weights-only checkpoint."""
    model = module(
        emission=partial(Gaussian, min_std=0.01),
        prior=MLPConfig(5, 2),
        optimizer=partial(torch.optim.SGD, lr=1e-5),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1),
    )
    t = trainer(tmp_path, max_epochs=1)
    t.fit(model, data())
    t.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["noise_seed"] == model.noise_seed
    loaded = VRNNLightningModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert loaded.vrnn.decoder.head.min_std == 0.01
    assert loaded.vrnn.prior.body[2].out_features == 5
    assert loaded.optimizer([torch.nn.Parameter(torch.ones(1))]).param_groups[0]["lr"] == 1e-5
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


def test_a_factory_that_no_checkpoint_can_hold_is_refused():
    with pytest.raises(UserError, match="emission"):
        module(emission=lambda i, o: Gaussian(i, o))


class Binary(Sines):
    """Signs of sines."""

    def sequences(self, split):
        found = super().sequences(split)
        for sequence in found:
            sequence.x = (sequence.x > 0.5).float()
        return found

    def exact_log_likelihood(self, batch):
        return None


def test_statistics_come_from_the_training_split_once(tmp_path):
    source = Binary(train_size=50, val_size=9, steps=8, batch_size=10)
    model = module(emission=Bernoulli)
    t = trainer(tmp_path, max_epochs=1, limit_train_batches=0)
    t.fit(model, source)
    x = torch.cat([s.x for s in source.split("train")])
    torch.testing.assert_close(model.vrnn.input_mean, x.mean(0))
    assert (model.vrnn.input_std == 1).all()  # binary data are centred alone
    counting = module(emission=Poisson)
    trainer(tmp_path, max_epochs=1, limit_train_batches=0).fit(counting, source)
    torch.testing.assert_close(counting.vrnn.input_std, x.std(0, unbiased=False))
    torch.testing.assert_close(model.vrnn.decoder.head.linear.bias.sigmoid(), x.mean(0), rtol=1e-4, atol=1e-4)
    assert "val/gap" not in t.callback_metrics
    t.save_checkpoint(tmp_path / "a.ckpt")
    later = module(emission=Bernoulli)
    trainer(tmp_path / "b", max_epochs=1, limit_train_batches=0).fit(
        later, Binary(train_size=50, val_size=9, steps=8, seed=5), ckpt_path=tmp_path / "a.ckpt"
    )
    assert torch.equal(later.vrnn.input_mean, model.vrnn.input_mean)


def test_grey_values_are_no_bernoulli(tmp_path):
    with pytest.raises(UserError, match=r"feature 0 has values from .* not 0 or 1"):
        trainer(tmp_path).fit(module(emission=Bernoulli), data())


def test_a_second_fit_keeps_what_the_first_learned(tmp_path):
    """Biases that started from the data are not reset; only the scaler follows the data."""
    model, source = module(emission=Bernoulli), Binary(train_size=50, val_size=9, steps=8, batch_size=10)
    trainer(tmp_path, max_epochs=1).fit(model, source)
    bias = model.vrnn.decoder.head.linear.bias.clone()
    trainer(tmp_path, max_epochs=0).fit(model, source)
    assert torch.equal(model.vrnn.decoder.head.linear.bias, bias)


def test_fit_after_validate_and_test(tmp_path):
    model, source = module(), data()
    runner = trainer(tmp_path, max_epochs=1)
    runner.validate(model, source, verbose=False)
    runner.fit(model, source)
    runner.test(model, source, verbose=False)
    trainer(tmp_path, max_epochs=1).fit(model, source)
    assert math.isfinite(runner.callback_metrics["test/elbo"])


class Loud(Sines):
    """Sines in other units, standardised."""

    scaling = "scalar"

    def __init__(self, gain: float = 1.0, **options):
        super().__init__(**options)
        self.gain = gain

    def sequences(self, split):
        found = super().sequences(split)
        for sequence in found:
            sequence.x = sequence.x * self.gain
        return found

    def exact_log_likelihood(self, batch):
        return None


def test_data_scaled_otherwise_are_refused_without_the_checkpoint(tmp_path):
    """With it, the checkpoint's scaler is used, and bits per dimension count it."""
    model, options = module(), {"train_size": 20, "val_size": 9, "test_size": 9, "steps": 8, "batch_size": 10}
    first = trainer(tmp_path, max_epochs=1)
    first.fit(model, Loud(**options))
    first.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="scaled otherwise"):
        trainer(tmp_path).test(model, Loud(10.0, **options), verbose=False)
    runner, source = trainer(tmp_path), Loud(10.0, **options)
    runner.test(model, source, ckpt_path=tmp_path / "a.ckpt", verbose=False, weights_only=True)
    assert source.scaler.std.item() == pytest.approx(model.scale_std[0].item())
    figures = runner.callback_metrics
    bits = -(figures["test/elbo"] / 3 - model.scale_std[0].log()) / math.log(2)
    assert figures["test/bits_per_dim"].item() == pytest.approx(bits.item(), rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_narrow_parameters_are_refused(tmp_path, precision):
    with pytest.raises(UserError, match="bf16-mixed"):
        trainer(tmp_path, precision=precision).fit(module(), data())


def test_an_optimiser_option_out_of_range_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"optimizer.*learning rate"):
        trainer(tmp_path).fit(module(optimizer=partial(torch.optim.Adam, lr=-1.0)), data())


class WithEmpty(Sines):
    """Two sequences of no steps among the others."""

    def sequences(self, split):
        found = super().sequences(split)
        for sequence in found[:3:2]:
            sequence.x = sequence.x[:0]
        return found


def test_sequences_of_no_steps_train_and_are_not_drawn(tmp_path):
    trainer(tmp_path, Samples(), max_epochs=1).fit(module(), WithEmpty(train_size=9, val_size=5, steps=4, batch_size=5))
    assert list((tmp_path / "samples").glob("*.png"))
    assert math.isfinite(column(tmp_path, "val/elbo")[0])


def test_sequences_without_a_name_have_noise_of_their_own():
    model, batch = module(), SequenceBatch(torch.zeros(3, 4, 3), torch.tensor([4, 4, 2]), names=["", "", ""])
    noise = model._noise(batch, 0).over_time(2)
    assert not torch.equal(noise[0], noise[1])


class Poison(Callback):
    """Makes one training batch infinite."""

    def on_train_batch_start(self, trainer, pl_module: LightningModule, batch, batch_idx):
        if trainer.global_step == 7:
            batch.x[0, 0, 0] = 1e30


def test_a_loss_that_is_not_finite_stops_with_step_names_and_checkpoint(tmp_path):
    saver = ModelCheckpoint(tmp_path, "kept")
    with pytest.raises(UserError) as error:
        trainer(tmp_path, Poison(), saver).fit(module(), data())
    message = str(error.value)
    assert "loss is -inf" not in message
    assert "at step 7" in message
    assert "sine" in message
    assert str(tmp_path / "kept.ckpt") in message
    kept = torch.load(tmp_path / "kept.ckpt", weights_only=True)
    assert all(torch.isfinite(v).all() for v in kept["state_dict"].values())


def test_another_feature_width_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"4 features .* made for 3"):
        trainer(tmp_path).fit(module(), data(channels=4))


@pytest.mark.parametrize(
    "annealer",
    [
        LinearKLAnnealing(10),
        CosineKLAnnealing(10),
        SigmoidKLAnnealing(10),
        CyclicalKLAnnealing(10, cycles=2),
        ConstantKLWeight(0.3),
    ],
    ids=lambda a: type(a).__name__,
)
def test_annealers_log_the_weight_of_each_step(tmp_path, annealer):
    trainer(tmp_path, annealer).fit(module(), data())
    betas = column(tmp_path, "train/beta")
    assert betas == pytest.approx([annealer.beta(step) for step in range(12)])


def test_the_weight_enters_the_loss_and_no_reported_bound(tmp_path):
    """A run with weight 0 trains on the reconstruction alone, and its first loss says so."""
    trainer(tmp_path, ConstantKLWeight(0.0)).fit(module(), data(min_steps=None))
    first = next(r for r in rows(tmp_path) if r["train/loss"])
    assert float(first["train/loss"]) == pytest.approx(-float(first["train/reconstruction_per_sequence"]), rel=1e-5)
    assert float(first["train/elbo"]) == pytest.approx(
        float(first["train/reconstruction"]) - float(first["train/kl"]), rel=1e-5
    )
    assert float(first["train/kl"]) > 0


def test_two_annealers_are_refused(tmp_path):
    with pytest.raises(UserError, match="LinearKLAnnealing and ConstantKLWeight"):
        trainer(tmp_path, LinearKLAnnealing(10), ConstantKLWeight()).fit(module(), data())


@pytest.mark.parametrize(
    "make",
    [
        lambda: LinearKLAnnealing(-1),
        lambda: CosineKLAnnealing(5, start=-1),
        lambda: SigmoidKLAnnealing(5, steepness=0),
        lambda: CyclicalKLAnnealing(5, cycles=0),
        lambda: CyclicalKLAnnealing(5, ramp=0),
        lambda: ConstantKLWeight(-1),
        lambda: Samples(count=0),
        lambda: module(objective=partial(ELBO, free_bits=-1.0)),
    ],
)
def test_absurd_options_are_refused(make):
    with pytest.raises(UserError):
        make()


def test_gradient_norm_is_logged_before_clipping(tmp_path):
    trainer(tmp_path, gradient_clip_val=1e-3).fit(module(), data())
    assert min(column(tmp_path, "train/grad_norm")) > 1e-3


def test_samples_are_drawn_and_training_is_untouched(tmp_path):
    plain, shown = module(), None
    trainer(tmp_path / "a").fit(plain, data())
    shown = module()
    trainer(tmp_path / "b", Samples(every_n_validations=2)).fit(shown, data())
    kinds = (".png", "_latent.png", "_traversal.png", "_interpolation.png", "_table.csv")
    written = [f"step_0000012{kind}" for kind in kinds]
    assert {p.name for p in (tmp_path / "b" / "samples").iterdir()} == set(written)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), shown.state_dict().values(), strict=True))


@pytest.mark.parametrize("latent", [2, 0])
def test_prediction_writes_scores_and_posterior_means(tmp_path, latent):
    """Scores add up to the test ELBO, and the means lie one after the other, without padding."""
    model, source = module(latent_size=latent), data()
    runner = trainer(tmp_path, Predictions())
    runner.predict(model, source, return_predictions=False)
    with np.load(tmp_path / "encodings.npz") as archive:
        written = dict(archive)
    lengths = [len(s.x) for s in source.split("test")]
    assert written["test_lengths"].tolist() == lengths
    assert written["test_values"].shape == (sum(lengths), latent)
    assert written["test_names"].tolist() == [s.name for s in source.split("test")]
    runner.test(model, source, verbose=False)
    elbo = runner.callback_metrics["test/elbo"].item()
    assert written["test_elbo"].sum() / sum(lengths) == pytest.approx(elbo, rel=1e-5)


def test_updates_are_clipped_before_they_are_made(tmp_path):
    """With plain gradient descent at rate 1, a step is as long as the clipped gradient."""
    model = module(optimizer=partial(torch.optim.SGD, lr=1.0))
    before = torch.nn.utils.parameters_to_vector(model.vrnn.parameters()).detach().clone()
    trainer(tmp_path, max_steps=1, gradient_clip_val=0.01).fit(model, data())
    step = torch.nn.utils.parameters_to_vector(model.vrnn.parameters()).detach() - before
    assert column(tmp_path, "train/grad_norm")[0] > 0.01
    assert step.norm().item() == pytest.approx(0.01, rel=1e-3)


class Spoil(Callback):
    """Ruins the weights after two epochs, and keeps what they were at the best validation."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            for p in pl_module.vrnn.parameters():
                p.data += 1.0

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            self.best = {name: value.clone() for name, value in pl_module.state_dict().items()}


def test_the_best_checkpoint_is_the_best(tmp_path):
    """Its weights are those of the best validation, not those that training continued to."""
    spoil, best = Spoil(), ModelCheckpoint(tmp_path, "best", monitor="val/elbo", mode="max")
    trainer(tmp_path, spoil, best, max_epochs=4).fit(module(), data())
    saved = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert all(torch.equal(saved[name], value) for name, value in spoil.best.items())


def test_validation_drops_nothing(tmp_path):
    """Figures of a model with dropout are those of the model in evaluation mode."""
    model, source = module(dropout=0.5), data()
    runner = trainer(tmp_path, max_epochs=1)
    runner.fit(model, source)
    reported = runner.callback_metrics["val/elbo"].item()
    model.eval()
    with torch.no_grad():
        traces = [model.trace(batch, i) for i, batch in enumerate(source.val_dataloader())]
    total = sum((t.log_px.sum() - t.kl.sum()).item() for t in traces)
    assert reported == pytest.approx(total / sum(t.mask.sum().item() for t in traces), rel=1e-5)


def test_sequences_of_no_steps_do_not_count(tmp_path):
    """Neither in a mean over sequences nor, alone in a batch, as a figure that is not a number."""
    full = data(train_size=5, steps=6, min_steps=6).sequences("train")
    nothing = SequenceSample(full[0].x[:0])
    together, alone = pad([full[0], nothing, full[1], nothing]), pad([nothing, nothing])

    def loader(*batches):
        return DataLoader(batches, batch_size=None)

    trainer(tmp_path / "together", max_epochs=1).fit(module(), loader(together), loader(together))
    (per_step,), (per_sequence,) = (column(tmp_path / "together", f"train/elbo{end}") for end in ("", "_per_sequence"))
    assert per_sequence / per_step == pytest.approx(6)
    annealer, diagnostics = ControlVAE(target=0.5), Diagnostics(window=6)
    batches = [alone, together, alone, alone] * 4
    trainer(tmp_path / "alone", annealer, diagnostics, max_epochs=1).fit(
        module(), loader(*batches), loader(alone, together)
    )
    for name in ("train/loss", "train/kl", "val/elbo"):
        assert all(math.isfinite(value) for value in column(tmp_path / "alone", name))
    assert math.isfinite(annealer.weight)
    assert len(diagnostics.norms) == 4


def test_a_loader_leaves_out_what_has_no_steps():
    class Partly(Sines):
        def sequences(self, split):
            found = super().sequences(split)
            for sequence in found[1:3]:
                sequence.x = sequence.x[:0]
            return found

    source = Partly(train_size=7, val_size=4, steps=6, batch_size=2)
    for loader, count in ((source.train_dataloader(), 5), (source.val_dataloader(), 2)):
        lengths = [length for batch in loader for length in batch.lengths.tolist()]
        assert len(lengths) == count
        assert all(lengths)
        assert len(loader) == -(-count // 2)
    source._splits["val"] = source.split("val")[1:3]
    with pytest.raises(UserError, match="all sequences of the val split are empty"):
        source.val_dataloader()


@pytest.mark.parametrize("objective", [partial(IWAE, samples=3), partial(FIVO, particles=3)])
def test_validation_reports_the_bound_that_is_trained_on(tmp_path, objective):
    """A total over a total of each sequence's bound, without dropout or annealing, whatever was before it."""
    model, source = module(objective=objective, dropout=0.4), data()
    runner = trainer(tmp_path, ConstantKLWeight(0.1), max_epochs=2, num_sanity_val_steps=1)
    runner.fit(model, source)
    model.eval()
    rule = model.objective.resampling if isinstance(model.objective, FIVO) else None
    total = steps = 0
    with torch.no_grad():
        for i, batch in enumerate(source.val_dataloader()):
            total += model.vrnn.filter(batch, 3, rule, model._noise(batch, i)).log_likelihood.sum().item()
            steps += batch.lengths.sum().item()
    assert runner.callback_metrics["val/objective"].item() == pytest.approx(total / steps, rel=1e-5)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_wrong_value_is_refused_in_whatever_batch_it_is(tmp_path, split):
    source = Binary(train_size=8, val_size=8, steps=5, batch_size=2)
    source.split(split)[-1].x[0, 1] = 0.25
    with pytest.raises(UserError, match="feature 1 has values from 0 to 1"):
        trainer(tmp_path, max_epochs=1).fit(module(emission=Bernoulli), source)


def test_a_prediction_of_no_sequence_leaves_an_empty_archive(tmp_path):
    """As a process has it for which nothing is left."""
    writer = ArchiveWriter(tmp_path / "a.npz", "test")
    writer.declare(values=np.zeros((3, 2)), lengths=np.zeros(3, int), names=np.zeros(3, str))
    writer.finish()
    with np.load(tmp_path / "a.npz") as archive:
        assert {name: archive[name].shape for name in archive} == {
            "test_values": (0, 2), "test_lengths": (0,), "test_names": (0,)
        }  # fmt: skip


@pytest.mark.parametrize("window", [None, 2])
def test_a_limited_epoch_resumes_at_the_beginning_of_the_next(tmp_path, window):
    """A checkpoint of the validation that ends an epoch after two of the loader's batches."""

    def run(folder, epochs, ckpt=None):
        model = module()
        saver = ModelCheckpoint(folder, "{epoch}", monitor="val/elbo", save_top_k=-1)
        t = trainer(folder, saver, max_epochs=epochs, limit_train_batches=2)
        t.fit(model, data(window=window), ckpt_path=ckpt)
        return model

    straight = run(tmp_path / "straight", 2)
    resumed = run(tmp_path / "resumed", 2, tmp_path / "straight" / "epoch=0.ckpt")
    for a, b in zip(straight.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
