"""Speech, or any other sound: recordings as frames of raw samples or of log-mel bands."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from vrnn_lightning.data import (
    FileDataModule,
    InvalidFiles,
    Modality,
    RandomSplitDataModule,
    Scaler,
    Sequences,
    Split,
    require,
    require_size,
    tracked,
)
from vrnn_lightning.data.audio import HIGHEST_RATE, AudioFile, index_audio, resampled_length
from vrnn_lightning.data.cache import digest, recall, remember
from vrnn_lightning.data.corpora import PATTERNS, CorpusSplits, Layout, Recording, find_recordings
from vrnn_lightning.data.recordings import PCM16, Crops, LogMelFrames, RawFrames, Recordings
from vrnn_lightning.errors import UserError

__all__ = ["PATTERNS", "Speech"]

MEL_BANDS = 80


class Speech(RandomSplitDataModule, FileDataModule):
    """Recordings, read when needed, cut into frames of raw samples or of log-mel bands.

    Every wav, flac, ogg and SPHERE (.sph, .wav) file below the folder is one sequence; hidden files are ignored.
    Samples are in [-1, 1] (16 bit: the integer / 32768), channels are mixed to one, and one mean and one standard
    deviation, taken over all training samples, scale them, unless ``units`` is set; log-mel frames have a mean and a
    standard deviation for each band. At the start only headers are read. With ``window`` or ``crop`` no more of a file
    is read than the window, except for ogg files, which are decoded whole: their decoder can't find a sample exactly.

    The content of headers and the mean and standard deviation of the training samples are cached in
    ``$XDG_CACHE_HOME/vrnn_lightning``, else ``~/.cache/vrnn_lightning``, until size or time of the files change: a
    large corpus is read through once, at its first training.

    The checkpoint keeps the files of each split: a file that was trained on is never tested, whatever the folder holds
    later. Files that the checkpoint does not know are left out, unless none of its test files is there: then the folder
    is another corpus, and they are the test split, or those of them that the layout has in it.

    Args:
        root: The folder, searched with its sub-folders; for the layout "manifest" a csv file.
        layout: "folder", or the published layout of a corpus with its customary splits: "fsdd", "timit", "ljspeech",
            "librispeech", "vctk" or "blizzard", as ``docs/datasets.md`` lists them. "manifest": ``root`` is a csv file
            with the columns path (below its folder) and optionally split (train, valid or test) and speaker.
        features: "raw" samples, or "log_mel": the logarithm of the power in bands of the mel scale, as in
            :class:`~vrnn_lightning.data.recordings.LogMelFrames`.
        frame_size: Raw samples per time step: the features of a raw frame, and the hop of log-mel frames.
        mel_bands: Bands of a log-mel frame, its number of features; 80 if ``None``. Only for ``features="log_mel"``.
        mel_window: Samples that a log-mel frame reads; four times ``frame_size`` if ``None``. Only for
            ``features="log_mel"``.
        sample_rate: Hz of the model's samples. ``None`` takes the rate that all files share.
        resample: Convert files of another rate instead of raising an error.
        stereo: "mix" averages the channels, "refuse" raises an error for a file with more than one.
        test: Test files: a random fraction of the training files (of the speakers, where the layout knows them), at
            least one unless it is 0; a regular expression that is searched in the path below ``root`` of all files; or
            the name of an official split, ``fsdd`` for the spoken digits. ``None`` takes the layout's own, or a tenth
            where it has none. What the layout holds out is never trained on, even if this selects other files.
        val: Validation files, selected in the same way from the files outside the test split.
        tail: Samples that don't fill a last frame: "drop" leaves them out, and with them files shorter than one frame;
            "pad" fills the frame with zeros that count as not observed, or as observed in log-mel frames.
        units: The model's input: "scaled" samples, for a density; their "amplitude" as it is, clipped to [-1, 1]; or
            "pcm16", whole numbers from -32768 to 32767 (what 16-bit files hold; other samples are rounded), for a
            discretised likelihood. The latter two are not scaled. Log-mel frames are always "scaled".
        crop: Train on a random stretch of so many steps of each recording, resampled every epoch from seed, epoch and
            path alone; shorter recordings are whole. The scaler, validation and test read all steps. ``None`` trains on
            whole recordings.
        skip_bad: Skip and count files that can't be used, instead of raising an error at the first one. Each file is
            then read to its end when it is first seen: all damage is known before splits are drawn. Without it, damage
            in the middle is found when a file is read.
        batch_size: Sequences per batch and process.
        download: Fetch the spoken digits (16 MB; for the layout "fsdd") into ``root``, where it is empty or missing.
        options: The other options of ``FileDataModule``.

    Raises:
        UserError: An option is out of its range, is not a regular expression or contradicts another. From ``setup`` on:
            there is no such folder or no audio in it, a file can't be read, breaks off or is empty, rates or channels
            are not as asked, no file is as long as a frame, or an expression matches no file.

    >>> Speech("recordings", frame_size=160).num_features
    160
    """

    modality: ClassVar[Modality] = "audio"
    scaling: ClassVar[Literal["none", "scalar", "per_feature"]] = "scalar"
    run_options: ClassVar[frozenset[str]] = FileDataModule.run_options | {
        *("resample", "layout", "crop", "skip_bad", "download")
    }
    dataset: ClassVar[str] = "fsdd"

    def __init__(
        self,
        root: str,
        frame_size: int = 200,
        sample_rate: int | None = None,
        resample: bool = False,
        stereo: Literal["mix", "refuse"] = "mix",
        test: float | str | None = None,
        val: float | str | None = None,
        tail: Literal["drop", "pad"] = "drop",
        units: Literal["scaled", "amplitude", "pcm16"] = "scaled",
        batch_size: int = 64,
        *,
        layout: Layout = "folder",
        features: Literal["raw", "log_mel"] = "raw",
        mel_bands: int | None = None,
        mel_window: int | None = None,
        crop: int | None = None,
        skip_bad: bool = False,
        download: bool = False,
        **options: Any,
    ) -> None:
        counts = {"frame_size": frame_size, "mel_bands": mel_bands, "mel_window": mel_window, "crop": crop}
        for option, count in counts.items():
            require(option, count, 1)
        require("sample_rate", sample_rate, 1, HIGHEST_RATE)
        is_mel = features == "log_mel"
        width = mel_bands or MEL_BANDS if is_mel else frame_size
        super().__init__(root, num_features=width, batch_size=batch_size, **options)
        self.frame_size = frame_size
        self.mel_window = mel_window or 4 * frame_size
        self.resample = resample
        self.stereo, self.tail, self.units = stereo, tail, units
        self.features, self.layout, self.crop, self.skip_bad = features, layout, crop, skip_bad
        self.missing = tail == "pad" and not is_mel
        self._check_options(mel_bands, mel_window)
        self.full_scale = PCM16 if units == "pcm16" else 1.0
        """An amplitude of 1 in data units: players take a sample divided by it."""
        self._random_splits = CorpusSplits(test, val, self.seed, self._folder, self._find_usable)
        if is_mel:  # frames of logarithms: a picture, but no sound
            self.modality = "roll"  # type: ignore[misc]  # of the class, but for these frames
            self.scaling = "per_feature"  # type: ignore[misc]  # as above
        self._asked_rate = self._rate = sample_rate
        self._recordings: dict[str, Recording] = {}

    def _check_options(self, mel_bands: int | None, mel_window: int | None) -> None:
        if self.features == "raw":
            for option, samples in (("mel_bands", mel_bands), ("mel_window", mel_window)):
                if samples is not None:
                    raise UserError(
                        f"--data.{option} {samples}: needs --data.features log_mel. Fix: set it or leave {option} out"
                    )
        elif self.units != "scaled":
            raise UserError(
                f"--data.units {self.units}: is for samples. Fix: leave it out beside --data.features log_mel"
            )
        elif self.mel_window < self.frame_size:
            raise UserError(
                f"--data.mel_window {self.mel_window}: must be at least --data.frame_size, {self.frame_size}, "
                "or samples between windows are never read"
            )
        if self.layout == "blizzard" and self.window is None and self.crop is None:
            raise UserError(
                "--data.layout blizzard: its recordings are too long to train on whole. Fix: set --data.window 40, "
                "which carries the state, or --data.crop 400"
            )

    @property
    def sample_rate(self) -> int:
        """Hz of the model's samples: the checkpoint's, the option's, or the one that all files share."""
        if self._rate is None:
            files = self._files
            first, rate = next((name, file.rate) for name, file in files.items())
            other = next((name for name, file in files.items() if file.rate != rate), None)
            if other is not None:
                raise UserError(
                    f"{self._folder / other}: {files[other].rate} Hz, but {self._folder / first} has {rate} Hz. Fix: "
                    "choose --data.sample_rate and set --data.resample true"
                )
            self._rate = rate
        return self._rate

    def prepare_data(self) -> None:
        """Fetch the spoken digits, if requested, and fill the cache, on one process of each machine."""
        super().prepare_data()
        with suppress(UserError):  # setup raises it, on every process
            len(self._files)
            trainer = self.trainer
            if trainer is not None and trainer.state.fn == "fit" and trainer.ckpt_path is None:
                _ = self.scaler

    def setup(self, stage: str) -> None:
        """Read headers early: what is wrong with the folder is reported before training starts."""
        if stage == "fit":
            super().setup(stage)
        else:
            len(self._files)  # only that: split and rate may be a checkpoint's, which is loaded after setup

    def sequences(self, split: Split) -> Sequences:
        """Return the recordings of a split, each of shape (frames, features), raw ones from -full_scale to full_scale.

        With ``crop``, those of training are stretches that change with the epoch.
        """
        whole = self._make_recordings(split)
        if self.crop is None or split != "train":
            return whole
        return Crops(sequences=whole, crop=self.crop, seed=self.seed)

    def _make_recordings(self, split: Split) -> Recordings:
        names = self.random_splits.names(split, self.sizes, self._folder)
        return Recordings(self._folder, names, [self._counts[name] for name in names], self.sample_rate, self._frames)

    def fit_scaler(self) -> Scaler:
        """Fit mean and std over all training samples, or those of each band; none unless ``units`` is "scaled"."""
        return super().fit_scaler() if self.units == "scaled" else Scaler()

    def fitted_on(self) -> tuple[Sequences, Iterable[int]]:
        """Return the whole training recordings and their frames, with a progress bar."""
        self.split("train")  # raises if it is empty
        whole = self._make_recordings("train")
        return whole, tracked(whole.lengths, "mean and std of the training recordings")

    def _moments(self, scaler: Scaler | None) -> tuple[Tensor, Tensor]:
        """Return mean and std of the training split in data units, cached until a file of it changes."""
        names, files = self._make_recordings("train").names, self._files
        stamps = [[name, files[name].size, files[name].modified] for name in names]
        how = [self.sample_rate, self.features, self.frame_size, self.num_features, self.mel_window]
        key = f"moments-1-{digest([str(self._folder.resolve()), stamps, how, self.tail, self.units])}"
        moments = recall(key)
        if moments is None:
            moments = [moment.tolist() for moment in super()._moments(scaler)]
            remember(key, moments)
        mean, std = (torch.tensor(moment, dtype=torch.float64) for moment in moments)
        return mean, std

    def input_statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and std of the scaled training samples, the same for all of a frame, each of shape (features,).

        Each band of log-mel frames is scaled to mean 0 and std 1, too.
        """
        standard = Scaler() if self.units == "scaled" else super().fit_scaler()
        return standard.mean.float().repeat(self.num_features), standard.std.float().repeat(self.num_features)

    def state_dict(self) -> dict[str, Any]:
        """Return the scaler, the sample rate in Hz and the files of each split, as paths below ``root``."""
        return super().state_dict() | {"sample_rate": self.sample_rate}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.random_splits.load_state_dict(state_dict)  # raises if it has no splits
        if self._rate != state_dict["sample_rate"]:
            self._rate = state_dict["sample_rate"]
            vars(self).pop("_counts", None)

    @property
    def _frames(self) -> RawFrames | LogMelFrames:
        pad = self.tail == "pad"
        if self.features == "raw":
            return RawFrames(self.frame_size, pad, self.units)
        return LogMelFrames(self.sample_rate, self.frame_size, self.mel_window, self.num_features, pad)

    @property
    def _folder(self) -> Path:
        return self.root.parent if self.layout == "manifest" else self.root

    @property
    def random_splits(self) -> CorpusSplits:
        """The splits that options and layout select."""
        return self._random_splits

    @property
    def sizes(self) -> dict[str, int]:
        """The samples of all files that have a frame, by path."""
        return {name: self._files[name].samples for name in self._counts}

    def _find_usable(self) -> dict[str, Recording]:
        return {name: self._recordings[name] for name in self._counts}

    @cached_property
    def _counts(self) -> dict[str, int]:
        """The frames of each file that has any, after checking every header against the options."""
        files, rate, frames = self._files, self.sample_rate, self._frames
        lengths = {name: resampled_length(file.samples, file.rate, rate) for name, file in files.items()}
        for name, file in files.items():
            self._require_format(name, file, lengths[name])
        counts = {name: count for name, samples in lengths.items() if (count := frames.count(samples))}
        is_raw = self.features == "raw"
        shortest, option = (self.frame_size, "frame_size") if is_raw else (self.mel_window, "mel_window")
        if not counts:
            raise UserError(
                f"{self.root}: no file is as long as one frame of {shortest} samples. Fix: "
                f"lower --data.{option} or set --data.tail pad"
            )
        if len(counts) < len(files):
            rank_zero_warn(
                f"{self.root}: {len(files) - len(counts)} of {len(files)} files are shorter than one frame of "
                f"{shortest} samples and are left out; --data.tail pad keeps them"
            )
        return counts

    def _require_format(self, name: str, file: AudioFile, samples: int) -> None:
        """Raise if a file's channels, rate or length after resampling are not as the options allow."""
        path = self._folder / name
        if file.channels > 1 and self.stereo == "refuse":
            raise UserError(
                f"{path}: {file.channels} channels, but --data.stereo is refuse. Fix: set --data.stereo mix"
            )
        if file.rate != self.sample_rate and not self.resample:
            wanted = "--data.sample_rate is" if self._asked_rate else "the checkpoint's sample rate is"
            raise UserError(f"{path}: {file.rate} Hz, but {wanted} {self.sample_rate}. Fix: set --data.resample true")
        if file.rate < self.sample_rate:
            require_size(path, 4 * samples, self.max_gb)

    @cached_property
    def _files(self) -> dict[str, AudioFile]:
        invalid = InvalidFiles(self.skip_bad)
        recordings = find_recordings(self.root, self.layout, invalid)
        total = len(recordings) + len(invalid.problems)
        files = index_audio(self._folder, [recording.name for recording in recordings], invalid, self.max_gb)
        invalid.report(total, self.root)
        self._recordings = {recording.name: recording for recording in recordings}
        return files
