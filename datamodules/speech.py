"""Speech, or any other sound: a folder of wav, flac and ogg files as frames of raw samples."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from vrnn_lightning.batch import Sequence
from vrnn_lightning.data import Modality, Scaler, SequenceDataModule, Sequences, Split
from vrnn_lightning.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from soundfile import SoundFile

__all__ = ["PATTERNS", "Speech"]

PATTERNS = {"fsdd": r"_[0-4]\.[^.]+$"}
"""Official splits by name. ``fsdd``: the first five recordings of each digit and speaker of the spoken digits."""

SUFFIXES = (".wav", ".flac", ".ogg")
PCM16 = 32768.0  # what 16-bit files call an amplitude of 1
SEEKABLE = {"PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"}
"""Encodings, flac's among them, of which libsndfile reads a part exactly as in the whole file."""
UNKNOWN_LENGTH = 2**62  # what libsndfile reports for a stream whose header leaves the length open


class Speech(SequenceDataModule):
    r"""A folder of recordings, read when needed, cut into frames of raw samples.

    Every wav, flac and ogg file below the folder is one sequence; hidden files are passed over. Samples are in
    [-1, 1] (16 bit: the integer / 32768), channels are mixed to one, and one mean and one standard deviation, taken
    over all training samples, scale them, unless ``units`` says otherwise. Only headers are read beforehand, files
    when their turn comes; with ``window`` no more of a wav or flac file than the window, but the whole of an ogg file,
    whose decoder does not find a given sample exactly.

    The checkpoint keeps which file was in which split, so a file that was trained on is never tested, whatever the
    folder holds later. Files that the checkpoint does not know are left out, unless none of its test files is there:
    then the folder is another corpus, and they are the test split.

    Args:
        root: The folder; it is searched with its sub-folders and may be another one when a checkpoint is used again.
        frame_size: Raw samples per frame, the number of features of a time step.
        sample_rate: Hz of the model's samples. None takes the rate that all files share.
        resample: Convert files of another rate instead of refusing them.
        stereo: "mix" averages the channels, "refuse" stops at a file with more than one.
        test: Test files: a fraction of all, drawn with ``seed``, at least one unless it is 0; or a regular expression
            that is searched in the path below ``root``; or the name of an official split, ``fsdd`` for the spoken
            digits.
        val: Validation files, chosen likewise from the files outside the test split.
        tail: What becomes of the samples that don't fill a last frame: "drop" leaves them out, and with them files
            shorter than one frame; "pad" fills the frame with zeros that count as not observed.
        units: What the model reads: "scaled" samples, for a density; their "amplitude" as it is, cut off at -1 and 1,
            for levels of that range; or "pcm16", whole numbers from -32768 to 32767 (what 16-bit files hold; other
            samples are rounded), for a discretised likelihood. The scaler of the latter two is the identity.
        batch_size: Sequences per batch and process.
        num_workers: Processes that read ahead; 0 reads in the main process.
        seed: Seed of the splits and of the order of the training batches.
        window: Steps per window in training, between which the state is carried; ``None`` trains on whole sequences.

    Raises:
        UserError: An option is out of its range, or is no regular expression. From ``setup`` on: there is no such
            folder or no audio in it, a file can't be read or is empty, rates or channels are not as asked, no file is
            as long as a frame, or an expression matches no file.

    >>> Speech("recordings", frame_size=160).num_features
    160
    """

    modality: ClassVar[Modality] = "audio"
    scaling: ClassVar[Literal["none", "scalar", "per_feature"]] = "scalar"
    run_options: ClassVar[frozenset[str]] = SequenceDataModule.run_options | {"resample"}  # the rate itself stays

    def __init__(
        self,
        root: str,
        frame_size: int = 200,
        sample_rate: int | None = None,
        resample: bool = False,
        stereo: Literal["mix", "refuse"] = "mix",
        test: float | str = 0.1,
        val: float | str = 0.1,
        tail: Literal["drop", "pad"] = "drop",
        units: Literal["scaled", "amplitude", "pcm16"] = "scaled",
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        window: int | None = None,
    ) -> None:
        super().__init__(
            num_features=frame_size, batch_size=batch_size, num_workers=num_workers, seed=seed, window=window
        )
        for option, value in (("frame_size", frame_size), ("sample_rate", sample_rate)):
            if value is not None and value < 1:
                raise UserError(f"--data.{option} {value}: must be at least 1")
        self.root = Path(root).expanduser()
        self.frame_size = frame_size
        self.resample = resample
        self.stereo = stereo
        self.tail = tail
        self.missing = tail == "pad"
        if units not in ("scaled", "amplitude", "pcm16"):
            raise UserError(f"--data.units {units}: must be scaled, amplitude or pcm16")
        self.units = units
        self.full_scale = PCM16 if units == "pcm16" else 1.0
        """What an amplitude of 1 is in data units: players take a sample divided by it."""
        self.test = _portion("test", test)
        self.val = _portion("val", val)
        if isinstance(self.test, float) and isinstance(self.val, float) and self.test + self.val >= 1:
            raise UserError(f"--data.test {test} and --data.val {val}: add up to 1 or more and leave no training file")
        self._asked_rate = self._rate = sample_rate
        self._headers: dict[str, _Header] | None = None
        self._members: dict[Split, list[str]] | None = None
        self._trained: dict[str, int] = {}
        self._warned: set[str] = set()

    @property
    def sample_rate(self) -> int:
        """Hz of the model's samples: the checkpoint's, the option's, or the one that all files share."""
        if self._rate is None:
            rates = {name: header.rate for name, header in self._scan().items()}
            first, rate = next(iter(rates.items()))
            other = next((name for name in rates if rates[name] != rate), None)
            if other is not None:
                raise UserError(
                    f"{self.root / other}: {rates[other]} Hz, but {self.root / first} has {rate} Hz; "
                    "choose --data.sample_rate and set --data.resample true"
                )
            self._rate = rate
        return self._rate

    def setup(self, stage: str) -> None:
        """Look at the folder early, so that what is wrong with it is said before training starts."""
        if stage == "fit":
            super().setup(stage)
        else:
            self._scan()  # split and rate may be a checkpoint's, which is loaded after setup

    def sequences(self, split: Split) -> Sequences:
        """Return the recordings of a split, each of shape (frames, frame_size), from -full_scale to full_scale."""
        names, pad = self._names(split), self.tail == "pad"
        return _Recordings(self.root, names, self.sample_rate, self.frame_size, pad, self.units)

    def lengths(self, split: Split) -> SequenceOf[int]:
        """Return the frames of each recording of a split, from the headers alone."""
        return [self._frames(name) for name in self._names(split)]

    def fit_scaler(self) -> Scaler:
        """Fit one mean and std over all training samples, unless ``units`` are to be left as they are."""
        return super().fit_scaler() if self.units == "scaled" else Scaler()

    def input_statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and std of the training samples, the same for all of a frame, each of shape (frame_size,)."""
        standard = Scaler() if self.units == "scaled" else super().fit_scaler()
        return standard.mean.float().repeat(self.frame_size), standard.std.float().repeat(self.frame_size)

    def state_dict(self) -> dict[str, Any]:
        """Return the scaler, the sample rate in Hz and the files of each split, as paths below ``root``."""
        drawn, headers = self._drawn(), self._scan()
        seen = [name for name in [*drawn["train"], *drawn["val"]] if name in headers]
        trained = self._trained | {name: headers[name].samples for name in seen}
        return super().state_dict() | {"sample_rate": self.sample_rate, "trained": trained} | dict(drawn)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the checkpoint's scaler, sample rate and splits."""
        super().load_state_dict(state_dict)
        self._rate = state_dict["sample_rate"]
        self._members = {"train": state_dict["train"], "val": state_dict["val"], "test": state_dict["test"]}
        self._trained = state_dict["trained"]
        self._splits.clear()  # those that setup found were drawn anew

    def _names(self, split: Split) -> list[str]:
        """Return the files of a split that are in the folder."""
        usable, drawn = self._usable(), self._drawn()
        known = {name for names in drawn.values() for name in names}
        unknown = [name for name in usable if name not in known]
        if unknown and not set(usable).intersection(drawn["test"]):
            self._refuse_trained(unknown)
            drawn, unknown = {**drawn, "test": unknown}, []
        if unknown:
            self._warn(f"{self.root}: {len(unknown)} files that are in no split of the checkpoint are left out")
        wanted = set(drawn[split])
        return [name for name in usable if name in wanted]

    def _refuse_trained(self, names: list[str]) -> None:
        """Refuse another corpus that holds a file of the checkpoint's under another path."""
        trained = {(PurePosixPath(name).stem, samples): name for name, samples in self._trained.items()}
        for name in names:
            known = trained.get((PurePosixPath(name).stem, self._scan()[name].samples))
            if known is not None:
                raise UserError(
                    f"{self.root / name}: seems to be {known}, which the model was trained on; "
                    f"choose --data.root so that {known} lies below it"
                )

    def _drawn(self) -> dict[Split, list[str]]:
        """Return the files of each split as the checkpoint has them, or draw them once."""
        if self._members is None:
            generator = torch.Generator().manual_seed(self.seed)
            test, rest = self._take("test", self.test, self._usable(), generator)
            val, train = self._take("val", self.val, rest, generator)
            self._members = {"train": train, "val": val, "test": test}
        return self._members

    def _take(
        self, option: str, portion: float | re.Pattern[str], names: list[str], generator: torch.Generator
    ) -> tuple[list[str], list[str]]:
        if isinstance(portion, re.Pattern):
            chosen = {name for name in names if portion.search(name)}
            if not chosen:
                raise UserError(
                    f"--data.{option} {portion.pattern!r}: matches none of {len(names)} paths below {self.root}, "
                    f"{names[0]!r} for example"
                    if names
                    else f"--data.{option} {portion.pattern!r}: the test split leaves no file in {self.root}"
                )
        else:
            count = max(1, round(portion * len(names))) if portion > 0 else 0
            chosen = {names[i] for i in torch.randperm(len(names), generator=generator)[:count].tolist()}
        return [name for name in names if name in chosen], [name for name in names if name not in chosen]

    def _usable(self) -> list[str]:
        """Return the files that yield at least one frame, after checking every header against the options."""
        headers = self._scan()
        for name, header in headers.items():
            self._check(name, header)
        usable = [name for name in headers if self._frames(name) > 0]
        if not usable:
            raise UserError(
                f"{self.root}: no file is as long as one frame of {self.frame_size} samples; "
                "lower --data.frame_size or set --data.tail pad"
            )
        if len(usable) < len(headers):
            self._warn(
                f"{self.root}: {len(headers) - len(usable)} of {len(headers)} files are shorter than one frame of "
                f"{self.frame_size} samples and are left out; --data.tail pad keeps them"
            )
        return usable

    def _check(self, name: str, header: _Header) -> None:
        if header.channels > 1 and self.stereo == "refuse":
            raise UserError(
                f"{self.root / name}: {header.channels} channels, but --data.stereo is refuse; "
                "make it mono or set --data.stereo mix"
            )
        if header.rate != self.sample_rate and not self.resample:
            wanted = "--data.sample_rate is" if self._asked_rate else "the checkpoint's sample rate is"
            raise UserError(
                f"{self.root / name}: {header.rate} Hz, but {wanted} {self.sample_rate} and --data.resample is off"
            )

    def _frames(self, name: str) -> int:
        header = self._scan()[name]
        up, down = _ratio(header.rate, self.sample_rate)
        samples = -(-header.samples * up // down)
        return -(-samples // self.frame_size) if self.tail == "pad" else samples // self.frame_size

    def _scan(self) -> dict[str, _Header]:
        """Return the header of every audio file, in the order of their paths."""
        if self._headers is None:
            if not self.root.exists():
                raise UserError(f"--data.root {self.root}: no such folder")
            if not self.root.is_dir():
                raise UserError(f"--data.root {self.root}: is a file; give the folder that holds the recordings")
            names = _audio_below(self.root)
            if not names:
                raise UserError(f"--data.root {self.root}: no audio in it; expected {', '.join(SUFFIXES)} files")
            self._headers = {name: _header(self.root / name) for name in names}
        return self._headers

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            rank_zero_warn(message)


@dataclass(frozen=True)
class _Header:
    """What a file says of itself: samples per channel, Hz, channels."""

    samples: int
    rate: int
    channels: int


@dataclass(frozen=True)
class _Recordings:
    """Recordings as sequences of frames; each, or a part of it, is read when it is asked for."""

    root: Path
    names: list[str]
    sample_rate: int
    frame_size: int
    pad: bool
    units: str

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int, /) -> Sequence:
        with _opened(self.root / self.names[index]) as file:
            return self._frames(index, file, 0, None)

    def window(self, index: int, first: int, last: int, /) -> Sequence | None:
        with _opened(self.root / self.names[index]) as file:
            if file.subtype not in SEEKABLE:
                return None
            return self._frames(index, file, first * self.frame_size, last * self.frame_size)

    def _frames(self, index: int, file: SoundFile, start: int, stop: int | None) -> Sequence:
        """Return frames of a recording, from sample ``start`` to before ``stop`` or its end."""
        name = self.names[index]
        samples = torch.from_numpy(_read(self.root / name, file, self.sample_rate, start, stop))
        samples = _convert(samples, self.units)
        rest = len(samples) % self.frame_size
        if rest == 0 or not self.pad:
            return Sequence(samples[: len(samples) - rest].view(-1, self.frame_size), name=name)
        missing = self.frame_size - rest
        frames = torch.nn.functional.pad(samples, (0, missing)).view(-1, self.frame_size)
        observed = torch.ones_like(frames, dtype=torch.bool)
        observed[-1, rest:] = False
        return Sequence(frames, observed, name=name)


def _convert(samples: Tensor, units: str) -> Tensor:
    """Return amplitudes in the units asked for."""
    if units == "pcm16":
        return (samples * PCM16).round().clamp(-PCM16, PCM16 - 1)
    return samples.clamp(-1, 1) if units == "amplitude" else samples


def _portion(option: str, value: float | str) -> float | re.Pattern[str]:
    """Return a checked fraction or a compiled expression."""
    if isinstance(value, str):
        try:
            return re.compile(PATTERNS.get(value, value))
        except re.error as error:
            raise UserError(f"--data.{option} {value!r}: not a regular expression ({error})") from None
    if not 0 <= value < 1:
        raise UserError(f"--data.{option} {value}: a fraction of the files must be at least 0 and below 1")
    return float(value)


def _audio_below(root: Path) -> list[str]:
    """Return the paths of all audio files below a folder, relative and with forward slashes, sorted."""
    found = (Path(folder, file) for folder, _, files in os.walk(root) for file in files)
    audio = (path for path in found if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))
    return sorted(path.relative_to(root).as_posix() for path in audio)


def _header(path: Path) -> _Header:
    import soundfile

    try:
        info = soundfile.info(path)
    except soundfile.LibsndfileError as error:
        raise _unreadable(path, error.error_string) from None
    if info.frames == 0:
        raise UserError(f"{path}: holds no samples; remove it")
    if info.frames >= UNKNOWN_LENGTH:
        raise _unreadable(path, "its header does not tell its length")
    return _Header(info.frames, info.samplerate, info.channels)


@contextmanager
def _opened(path: Path) -> Iterator[SoundFile]:
    import soundfile

    try:
        with soundfile.SoundFile(path) as file:
            yield file
    except soundfile.LibsndfileError as error:
        raise _unreadable(path, error.error_string) from None


def _read(path: Path, file: SoundFile, sample_rate: int, start: int, stop: int | None) -> NDArray[np.float32]:
    """Return one channel of samples in [-1, 1] at a rate in Hz, shape (samples,), and read no more of the file.

    Args:
        path: The file's name, for messages.
        file: The file.
        sample_rate: Hz of the result.
        start: The first sample, counted at ``sample_rate``.
        stop: One past the last sample; ``None``, or a number past the end, for the file's end.
    """
    up, down = _ratio(file.samplerate, sample_rate)
    end = -(-file.frames * up // down)
    start, stop = min(start, end), end if stop is None else min(stop, end)
    begin, end = (start, stop) if up == down else _reach(start, stop, up, down, file.frames)
    if begin:
        file.seek(begin)
    samples = file.read(end - begin, dtype="float32", always_2d=True)
    if len(samples) < end - begin:
        raise _unreadable(path, "it breaks off")
    mono: NDArray[np.float32] = samples.mean(axis=1)
    if not math.isfinite(mono.sum(dtype="float64")):
        raise UserError(f"{path}: holds NaN or infinite samples; remove it or mend it")
    if up == down:
        return mono
    from scipy.signal import resample_poly

    before = begin * up // down
    resampled: NDArray[np.float32] = resample_poly(mono, up, down)[start - before : stop - before]
    return resampled.astype("float32", copy=False)


def _reach(start: int, stop: int, up: int, down: int, length: int) -> tuple[int, int]:
    """Return the samples of a file of ``length`` that resampled ones from ``start`` to before ``stop`` depend on.

    The first of them falls on a resampled one, so that a part is resampled in step with the whole.
    """
    half = 10 * max(up, down) // up + 1  # what resample_poly's filter spans to each side
    begin = max(0, start * down // up - half) // down * down
    return begin, min(length, -(-stop * down // up) + half)


def _ratio(rate: int, wanted: int) -> tuple[int, int]:
    """Return the factors by which to multiply and divide a rate to get the wanted one."""
    common = math.gcd(rate, wanted)
    return wanted // common, rate // common


def _unreadable(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: cannot be read as audio ({reason.strip()}); remove it or convert it to wav")
