"""Speech, or any other sound: recordings as frames of raw samples or of log-mel bands."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from vrnn_lightning.data import (
    MAX_GB,
    InvalidFiles,
    Modality,
    Scaler,
    SequenceDataModule,
    Sequences,
    Split,
    checked_limit,
    data_root,
    fetch,
    require_size,
    tracked,
)
from vrnn_lightning.data.audio import HIGHEST_RATE, AudioHeader, resampled_length
from vrnn_lightning.data.audio_index import IndexedFile, index_audio
from vrnn_lightning.data.cache import digest, recall, remember
from vrnn_lightning.data.corpora import FSDD_TEST, Layout, Recording, find_recordings
from vrnn_lightning.data.mel import LogMelFrames
from vrnn_lightning.data.recordings import PCM16, Crops, RawFrames, Recordings
from vrnn_lightning.errors import UserError

if TYPE_CHECKING:
    pass

__all__ = ["PATTERNS", "Speech"]

PATTERNS = {"fsdd": FSDD_TEST}
"""Official splits by name. ``fsdd``: the first five recordings of each digit and speaker of the spoken digits."""

SHARE = 0.1
"""The share of files, or of speakers, for a split that neither an option nor the corpus decides."""
MEL_BANDS = 80


class Speech(SequenceDataModule):
    r"""Recordings, read when needed, cut into frames of raw samples or of log-mel bands.

    Every wav, flac, ogg and SPHERE (.sph, .wav) file below the folder is one sequence; hidden files are passed over.
    Samples are in [-1, 1] (16 bit: the integer / 32768), channels are mixed to one, and one mean and one standard
    deviation, taken over all training samples, scale them, unless ``units`` says otherwise; log-mel frames have a mean
    and a standard deviation for each band. Only headers are read beforehand, files when their turn comes; with
    ``window`` or ``crop`` no more of a wav, flac or SPHERE file than the window, but the whole of an ogg file, whose
    decoder does not find a given sample exactly.

    What headers say, and the mean and standard deviation of the training samples, is remembered in the user's cache
    folder (``$XDG_CACHE_HOME/vrnn_lightning``, else ``~/.cache/vrnn_lightning``) for as long as size and time of the
    files stay the same. So a large corpus is read once at the first training, and opens quickly from then on.

    The layouts of corpora, with the splits that are customary there:

    * "folder": every audio file; splits are drawn.
    * "fsdd", the spoken digits: the first five takes of each digit and speaker are the test; validation is drawn.
    * "timit": the core test set of 24 speakers, validation on 50 others of the folder TEST, training on the folder
      TRAIN. The sentences SA, which all speak, and the other speakers of TEST are in no split.
    * "ljspeech": of the clips in ``wavs``, in order, the last 250 are the test, the 250 before them validation; of a
      part of the corpus, the last twentieth each. A clip that ``metadata.csv`` names must be there.
    * "librispeech" (LibriTTS too): the folders train-*, dev-* and test-*; ``test="test-clean"`` takes one of them.
    * "vctk": speakers are drawn, a tenth for validation and a tenth for the test. Of two microphones the first is
      read, and of trimmed and whole recordings the trimmed ones.
    * "blizzard", or other long recordings: as "folder", whole recordings are drawn; needs ``window`` or ``crop``.
    * "manifest": ``root`` is a csv file with the columns path (below the csv file's folder), split (train, valid or
      test) if wanted, else splits are drawn, and speaker if drawn splits are to keep speakers apart. Other columns are
      ignored.

    The checkpoint keeps which file was in which split, so a file that was trained on is never tested, whatever the
    folder holds later. Files that the checkpoint does not know are left out, unless none of its test files is there:
    then the folder is another corpus, and they are the test split, or those of them that the layout has in it.

    Args:
        root: The folder; it is searched with its sub-folders and may be another one when a checkpoint is used again.
            For the layout "manifest" a csv file.
        layout: How the files lie, see above.
        features: "raw" samples, or "log_mel": the logarithm of the power in bands of the mel scale, as in
            :class:`~vrnn_lightning.data.mel.LogMelFrames`.
        frame_size: Raw samples per time step: the number of features of a raw frame, and the hop of log-mel frames.
        mel_bands: Bands of a log-mel frame, its number of features; 80 if ``None``. For ``features="log_mel"`` alone.
        mel_window: Samples that a log-mel frame reads; four times ``frame_size`` if ``None``. For
            ``features="log_mel"`` alone.
        sample_rate: Hz of the model's samples. None takes the rate that all files share.
        resample: Convert files of another rate instead of refusing them.
        stereo: "mix" averages the channels, "refuse" stops at a file with more than one.
        test: Test files: a fraction of the training files (of the speakers, where the layout knows them), drawn with
            ``seed``, at least one unless it is 0; or a regular expression that is searched in the path below ``root``,
            of all files; or the name of an official split, ``fsdd`` for the spoken digits. ``None`` takes the layout's
            own, or a tenth where it has none. What the layout has for the test or for validation is never trained on,
            also where this takes other files instead.
        val: Validation files, chosen in the same way from the files outside the test split.
        tail: What becomes of the samples that don't fill a last frame: "drop" leaves them out, and with them files
            shorter than one frame; "pad" fills the frame with zeros that count as not observed. Log-mel frames that are
            filled count as observed.
        units: What the model reads: "scaled" samples, for a density; their "amplitude" as it is, cut off at -1 and 1,
            for levels of that range; or "pcm16", whole numbers from -32768 to 32767 (what 16-bit files hold; other
            samples are rounded), for a discretised likelihood. The scaler of the latter two is the identity. Log-mel
            frames are always "scaled".
        crop: Train on a random stretch of so many steps of each recording, another one in each epoch, a function of
            seed, epoch and path alone; shorter recordings are whole. The scaler, validation and test read all steps.
            ``None`` trains on whole recordings.
        skip_bad: Skip and count files that can't be used, instead of stopping at the first one. Without it, what the
            header and the number of bytes tell is known at the start, damage in the middle when a file is read. With
            it, each file is read to its end when it is first seen, so that all damage is known before splits are drawn.
        batch_size: Sequences per batch and process.
        download: Fetch the spoken digits (16 MB; for the layout "fsdd") into ``root``, where it is empty or not there
            yet.
        max_gb: Gigabytes that the samples of one recording may take: a damaged or hostile file declares more than it
            holds. A file that takes no more than 16 times its own size is always read.
        options: The other options of :class:`~vrnn_lightning.SequenceDataModule`.

    Raises:
        UserError: An option is out of its range, is not a regular expression or makes no sense beside another. From
            ``setup`` on: there is no such folder or no audio in it, a file can't be read, breaks off or is empty, rates
            or channels are not as asked, no file is as long as a frame, or an expression matches no file.

    >>> Speech("recordings", frame_size=160).num_features
    160
    """

    modality: ClassVar[Modality] = "audio"
    scaling: ClassVar[Literal["none", "scalar", "per_feature"]] = "scalar"
    run_options: ClassVar[frozenset[str]] = SequenceDataModule.run_options | {
        "resample",
        "layout",
        "crop",
        "skip_bad",
        "download",
        "max_gb",
    }

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
        layout: Layout = "folder",
        features: Literal["raw", "log_mel"] = "raw",
        mel_bands: int | None = None,
        mel_window: int | None = None,
        crop: int | None = None,
        skip_bad: bool = False,
        download: bool = False,
        max_gb: float = MAX_GB,
        **options: Any,
    ) -> None:
        counts = {"frame_size": frame_size, "mel_bands": mel_bands, "mel_window": mel_window, "crop": crop}
        _require_counts({**counts, "sample_rate": sample_rate})
        mel = features == "log_mel"
        super().__init__(num_features=mel_bands or MEL_BANDS if mel else frame_size, batch_size=batch_size, **options)
        self.hparams["download"] = False  # a run's wish, which no checkpoint repeats
        self.download = download
        self.root = data_root(root)
        self.max_gb = checked_limit(max_gb)
        self.frame_size = frame_size
        self.mel_window = mel_window or 4 * frame_size
        self.resample = resample
        self.stereo = stereo
        self.tail = tail
        self.missing = tail == "pad" and not mel
        self.units = units
        self.features, self.layout, self.crop, self.skip_bad = features, layout, crop, skip_bad
        self._check_options(mel_bands, mel_window)
        self.full_scale = PCM16 if units == "pcm16" else 1.0
        """What an amplitude of 1 is in data units: players take a sample divided by it."""
        self.test = _portion("test", test)
        self.val = _portion("val", val)
        _require_training_share(self.test, self.val)
        if mel:  # frames of logarithms: a picture, but no sound
            self.modality = "roll"  # type: ignore[misc]  # of the class, but for these frames
            self.scaling = "per_feature"  # type: ignore[misc]  # as above
        self._asked_rate = self._rate = sample_rate
        self._files: dict[str, IndexedFile] | None = None
        self._recordings: dict[str, Recording] = {}
        self._frame_counts: dict[str, int] | None = None
        self._members: dict[Split, list[str]] | None = None
        self._resumed = False
        self._trained: dict[str, int] = {}
        self._warned: set[str] = set()

    def _check_options(self, mel_bands: int | None, mel_window: int | None) -> None:
        """Raise if an option has an unknown value, or would be ignored beside others."""
        for option, word, known in (
            ("units", self.units, ("scaled", "amplitude", "pcm16")),
            ("features", self.features, ("raw", "log_mel")),
            ("stereo", self.stereo, ("mix", "refuse")),
            ("tail", self.tail, ("drop", "pad")),
            ("layout", self.layout, get_args(Layout)),
        ):
            if word not in known:
                raise UserError(f"--data.{option} {word}: must be {', '.join(known[:-1])} or {known[-1]}")
        if self.features == "raw":
            for option, value in (("mel_bands", mel_bands), ("mel_window", mel_window)):
                if value is not None:
                    raise UserError(f"--data.{option} {value}: needs --data.features log_mel")
        elif self.units != "scaled":
            raise UserError(f"--data.units {self.units}: is for samples; leave it out beside --data.features log_mel")
        elif self.mel_window < self.frame_size:
            raise UserError(
                f"--data.mel_window {self.mel_window}: must be at least --data.frame_size, {self.frame_size}, "
                "or samples between windows are never read"
            )
        if self.layout == "blizzard" and self.window is None and self.crop is None:
            raise UserError(
                "--data.layout blizzard: its recordings are too long to train on whole; set --data.window 40, "
                "which carries the state, or --data.crop 400"
            )

    @property
    def sample_rate(self) -> int:
        """Hz of the model's samples: the checkpoint's, the option's, or the one that all files share."""
        if self._rate is None:
            rates = {name: file.header.rate for name, file in self._scan().items()}
            first, rate = next(iter(rates.items()))
            other = next((name for name in rates if rates[name] != rate), None)
            if other is not None:
                raise UserError(
                    f"{self._folder / other}: {rates[other]} Hz, but {self._folder / first} has {rate} Hz; "
                    "choose --data.sample_rate and set --data.resample true"
                )
            self._rate = rate
        return self._rate

    def prepare_data(self) -> None:
        """Fetch the digits, if that is asked for, and fill the cache, on one process of each machine."""
        if self.download:
            fetch("fsdd", self.root)
        with suppress(UserError):  # setup says it, on every process
            self._scan()
            trainer = self.trainer
            if trainer is not None and trainer.state.fn == "fit" and trainer.ckpt_path is None:
                _ = self.scaler

    def setup(self, stage: str) -> None:
        """Look at the folder early, so that what is wrong with it is said before training starts."""
        if stage == "fit":
            super().setup(stage)
        else:
            self._scan()  # split and rate may be a checkpoint's, which is loaded after setup

    def sequences(self, split: Split) -> Sequences:
        """Return the recordings of a split, each of shape (frames, features), raw ones from -full_scale to full_scale.

        With ``crop``, those of training are stretches that change with the epoch.
        """
        whole = Recordings(self._folder, self._names(split), self.sample_rate, self._frames)
        if self.crop is None or split != "train":
            return whole
        return Crops(sequences=whole, lengths=self._whole_lengths(split), crop=self.crop, seed=self.seed)

    def lengths(self, split: Split) -> Sequence[int]:
        """Return the frames of each sequence of a split, from the headers alone."""
        lengths = self._whole_lengths(split)
        return lengths if self.crop is None or split != "train" else [min(self.crop, steps) for steps in lengths]

    def _whole_lengths(self, split: Split) -> list[int]:
        frames = self._usable()
        return [frames[name] for name in self._names(split)]

    def fit_scaler(self) -> Scaler:
        """Fit mean and std over all training samples, or those of each band, unless ``units`` are to be left as is."""
        return super().fit_scaler() if self.units == "scaled" else Scaler()

    def fitted_on(self) -> tuple[Sequences, Iterable[int]]:
        """Return the whole training recordings and their frames, with a bar that says how far the fit is."""
        self.split("train")
        whole = Recordings(self._folder, self._names("train"), self.sample_rate, self._frames)
        return whole, tracked(self._whole_lengths("train"), "mean and std of the training recordings")

    def _moments(self, scaler: Scaler | None) -> tuple[Tensor, Tensor]:
        """Return mean and std of the training split in data units, remembered as long as no file of it changes."""
        names, files = self._names("train"), self._scan()
        stamps = [[name, files[name].size, files[name].modified] for name in names]
        how = [self.sample_rate, self.features, self.frame_size, self.num_features, self.mel_window]
        key = f"moments-1-{digest([str(self._folder.resolve()), stamps, how, self.tail, self.units])}"
        found = recall(key)
        if found is None:
            found = [moment.tolist() for moment in super()._moments(scaler)]
            remember(key, found)
        mean, std = (torch.tensor(moment, dtype=torch.float64) for moment in found)
        return mean, std

    def input_statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and std of the scaled training samples, the same for all of a frame, each of shape (features,).

        Of log-mel frames too: each band is scaled to mean 0 and std 1.
        """
        standard = Scaler() if self.units == "scaled" else super().fit_scaler()
        return standard.mean.float().repeat(self.num_features), standard.std.float().repeat(self.num_features)

    def state_dict(self) -> dict[str, Any]:
        """Return the scaler, the sample rate in Hz and the files of each split, as paths below ``root``."""
        drawn, files = self._drawn(), self._scan()
        seen = [name for name in [*drawn["train"], *drawn["val"]] if name in files]
        trained = self._trained | {name: files[name].header.samples for name in seen}
        return super().state_dict() | {"sample_rate": self.sample_rate, "trained": trained} | dict(drawn)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the checkpoint's scaler, sample rate and splits."""
        super().load_state_dict(state_dict)
        self._rate = state_dict["sample_rate"]
        self._members = {"train": state_dict["train"], "val": state_dict["val"], "test": state_dict["test"]}
        self._trained = state_dict["trained"]
        self._resumed = True
        self._frame_counts = None  # at another rate
        self._splits.clear()  # those that setup found were drawn again

    @property
    def _frames(self) -> RawFrames | LogMelFrames:
        """What cuts samples into frames."""
        pad = self.tail == "pad"
        if self.features == "raw":
            return RawFrames(self.frame_size, pad, self.units)
        return LogMelFrames(self.sample_rate, self.frame_size, self.mel_window, self.num_features, pad)

    @property
    def _folder(self) -> Path:
        """The folder below which paths are."""
        return self.root.parent if self.layout == "manifest" else self.root

    def _names(self, split: Split) -> list[str]:
        """Return the files of a split that are there."""
        usable, drawn = self._usable(), self._drawn()
        known = {name for names in drawn.values() for name in names}
        if self._resumed and not known.issuperset(usable):
            unknown = [name for name in usable if name not in known and self._recordings[name].split != "unused"]
            if unknown and not set(usable).intersection(drawn["test"]):
                self._refuse_trained(unknown)
                own = [name for name in unknown if self._recordings[name].split == "test"]
                drawn, unknown = {**drawn, "test": own or unknown}, []
            if unknown:
                self._warn(f"{self.root}: {len(unknown)} files that are in no split of the checkpoint are left out")
        wanted = set(drawn[split])
        return [name for name in usable if name in wanted]

    def _refuse_trained(self, names: list[str]) -> None:
        """Raise if another corpus holds a file of the checkpoint under another path."""
        trained = {(PurePosixPath(name).stem, samples): name for name, samples in self._trained.items()}
        for name in names:
            known = trained.get((PurePosixPath(name).stem, self._scan()[name].header.samples))
            if known is not None:
                raise UserError(
                    f"{self._folder / name}: seems to be {known}, which the model was trained on; "
                    f"choose --data.root so that {known} lies below it"
                )

    def _drawn(self) -> dict[Split, list[str]]:
        """Return the files of each split as the checkpoint has them, or find them once."""
        if self._members is None:
            generator = torch.Generator().manual_seed(self.seed)
            usable = list(self._usable())
            test = self._take("test", self.test, usable, generator)
            val = self._take("val", self.val, [name for name in usable if name not in test], generator)
            held = {name for name in usable if self._recordings[name].split not in ("train", None)}
            spared = [name for name in held - test - val if self._recordings[name].split != "unused"]
            if spared:
                self._warn(
                    f"{self.root}: {len(spared)} files that --data.layout {self.layout} has for validation or test are "
                    "in no split, for --data.test and --data.val name others"
                )
            train = set(usable) - held - test - val
            chosen: dict[Split, set[str]] = {"train": train, "val": val, "test": test}
            self._members = {split: [name for name in usable if name in names] for split, names in chosen.items()}
        return self._members

    def _take(
        self, split: Split, portion: float | re.Pattern[str] | None, names: list[str], generator: torch.Generator
    ) -> set[str]:
        """Return the files of a split, out of those that no other has."""
        if isinstance(portion, re.Pattern):
            chosen = {name for name in names if portion.search(name)}
            if not chosen:
                raise UserError(
                    f"--data.{split} {portion.pattern!r}: matches none of {len(names)} paths below {self._folder}, "
                    f"{names[0]!r} for example"
                    if names
                    else f"--data.{split} {portion.pattern!r}: the test split leaves no file in {self._folder}"
                )
            return chosen
        own = {name for name in names if self._recordings[name].split == split}
        if portion is None and own:
            return own
        share = SHARE if portion is None else portion
        speakers = {name: self._recordings[name].speaker for name in names}
        drawable = [name for name in names if self._recordings[name].split in ("train", None)]
        groups = list(dict.fromkeys(speakers[name] for name in drawable))
        count = max(1, round(share * len(groups))) if share > 0 else 0
        drawn = {groups[i] for i in torch.randperm(len(groups), generator=generator)[:count].tolist()}
        return {name for name in drawable if speakers[name] in drawn}

    def _usable(self) -> dict[str, int]:
        """Return how many frames each file makes that yields one, after checking every header against the options."""
        if self._frame_counts is not None:
            return self._frame_counts
        files, rate, frames = self._scan(), self.sample_rate, self._frames
        for name, file in files.items():
            self._check(name, file.header)
        counts = {
            name: frames.count(resampled_length(file.header.samples, file.header.rate, rate))
            for name, file in files.items()
        }
        usable = {name: count for name, count in counts.items() if count}
        raw = self.features == "raw"
        shortest, option = (self.frame_size, "frame_size") if raw else (self.mel_window, "mel_window")
        if not usable:
            raise UserError(
                f"{self.root}: no file is as long as one frame of {shortest} samples; "
                f"lower --data.{option} or set --data.tail pad"
            )
        if len(usable) < len(files):
            self._warn(
                f"{self.root}: {len(files) - len(usable)} of {len(files)} files are shorter than one frame of "
                f"{shortest} samples and are left out; --data.tail pad keeps them"
            )
        self._frame_counts = usable
        return usable

    def _check(self, name: str, header: AudioHeader) -> None:
        if header.channels > 1 and self.stereo == "refuse":
            raise UserError(
                f"{self._folder / name}: {header.channels} channels, but --data.stereo is refuse; "
                "make it mono or set --data.stereo mix"
            )
        if header.rate != self.sample_rate and not self.resample:
            wanted = "--data.sample_rate is" if self._asked_rate else "the checkpoint's sample rate is"
            raise UserError(
                f"{self._folder / name}: {header.rate} Hz, but {wanted} {self.sample_rate} and --data.resample is off"
            )
        if header.rate < self.sample_rate:
            samples = resampled_length(header.samples, header.rate, self.sample_rate)
            require_size(self._folder / name, 4 * samples, self.max_gb)

    def _scan(self) -> dict[str, IndexedFile]:
        """Return what the header of every file of the corpus says, in the order of their paths."""
        if self._files is None:
            bad = InvalidFiles(self.skip_bad)
            recordings = find_recordings(self.root, self.layout, bad)
            total = len(recordings) + len(bad.problems)
            files = index_audio(self._folder, [recording.name for recording in recordings], bad, self.max_gb)
            bad.report(total, self.root)
            self._recordings = {recording.name: recording for recording in recordings}
            self._files = files
        return self._files

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            rank_zero_warn(message)


def _require_counts(counts: dict[str, int | None]) -> None:
    """Raise if an option that counts something is below 1, or a sample rate is above what any file has."""
    for option, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"--data.{option} {value}: must be at least 1")
    if (counts["sample_rate"] or 0) > HIGHEST_RATE:
        raise UserError(f"--data.sample_rate {counts['sample_rate']}: must be at most {HIGHEST_RATE} Hz")


def _require_training_share(test: float | re.Pattern[str] | None, val: float | re.Pattern[str] | None) -> None:
    """Raise if fractions leave no training file."""
    shares = [SHARE if portion is None else portion for portion in (test, val)]
    if sum(share for share in shares if isinstance(share, float)) >= 1:
        raise UserError(
            f"--data.test {shares[0]} and --data.val {shares[1]}: add up to 1 or more and leave no training file"
        )


def _portion(option: str, value: float | str | None) -> float | re.Pattern[str] | None:
    """Return a checked fraction or a compiled expression."""
    if value is None:
        return None
    if isinstance(value, str):
        try:
            return re.compile(PATTERNS.get(value, value))
        except re.error as error:
            raise UserError(f"--data.{option} {value!r}: not a regular expression ({error})") from None
    if not 0 <= value < 1:
        raise UserError(f"--data.{option} {value}: a fraction of the files must be at least 0 and below 1")
    return float(value)
