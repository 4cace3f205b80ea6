"""The one gate that a name in a file passes before anything is imported or called for it."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from functools import cache, partial
from importlib.metadata import entry_points
from pathlib import Path
from types import FunctionType
from typing import Any

import yaml

from vrnn_lightning import datamodules
from vrnn_lightning.compatibility import current_class
from vrnn_lightning.errors import UserError
from vrnn_lightning.files import MAX_DEPTH, require_bounded
from vrnn_lightning.trust.parameters import Expected, expected_of, parameters_of

__all__ = ["Gate", "is_name", "path_of", "strings_of", "subclasses_of"]

OWN = "vrnn_lightning"
ALLOWED = (
    OWN,
    "torch.optim",
    "torch.nn",
    *(
        f"lightning.pytorch.{part}"
        for part in ("accelerators", "callbacks", "loggers", "plugins", "profilers", "strategies")
    ),
    *(f"lightning.fabric.{part}" for part in ("loggers", "plugins", "strategies")),  # where some of those are defined
    "lightning.pytorch.cli.ReduceLROnPlateau",  # torch's, with the name of a metric
)
FUNCTIONS = tuple(f"{OWN}.{module}" for module in ("heads", "metrics", "nn", "objectives", "schedules"))
"""Modules whose functions a file may name: they compute, and do nothing else."""
NOT_ALLOWED = (f"{OWN}.cli", f"{OWN}.discovery", f"{OWN}.testing", f"{OWN}.__main__")
"""Parts of this package that run what they are given."""
ENTRY_POINTS = "vrnn_lightning.datamodules"
SCALARS = (bool, int, float, str)
MAX_TEXT = 10_000
"""Characters of a text that is read as YAML."""


@dataclass(frozen=True)
class Gate:
    """Decides what a file may import, in this order: its name, the import, the expected base class, and then the call.

    Allowed are this package, its datamodules, ``torch.optim``, ``torch.nn``, Lightning's callbacks, loggers and
    strategies, registered entry points, and what the call that reads the file names or trusts. A function is allowed
    only where this package defines it.

    Args:
        source: The file, as messages name it.
        trusted: Class paths and modules that the user trusts.
        named: Class paths that the call itself names.
        fix: How to trust a name, with ``{}`` in its place.
        folder: Where a text may be the name of a file, besides the working directory.

    >>> from torch.optim import Optimizer
    >>> Gate("a.ckpt").check({"class_path": "torch.optim.Adam"}, type[Optimizer], "optimizer")
    >>> Gate("a.ckpt").check("os.system", type[Optimizer], "optimizer")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    vrnn_lightning.errors.UserError: a.ckpt: optimizer names os.system, ... Fix: if you trust it, give trust=['os']
    """

    source: str
    trusted: tuple[str, ...] = ()
    named: frozenset[str] = field(default=frozenset(), repr=False)
    fix: str = "give trust=['{}']"
    folder: Path | None = None

    def __post_init__(self) -> None:
        for name in self.trusted:
            if not is_name(name):
                raise UserError(f"trust {name!r}: is neither a class path nor a module. Fix: give the name of one")

    @classmethod
    def of_call(cls, source: object, trust: str | Iterable[str], options: Mapping[str, Any] | None = None) -> Gate:
        """Return the gate of a call from Python that reads a file; the call's own arguments may name anything."""
        trusted = (trust,) if isinstance(trust, str) else tuple(trust)
        return cls(str(source), trusted, frozenset(strings_of(options)))

    def check(self, value: Any, annotation: object, place: str) -> None:
        """Raise a UserError if the value of a parameter names what a file may not import; nothing is called."""
        require_bounded(value, f"{self.source}: {place}")
        self._walk(value, expected_of(annotation), place, make=False)

    def check_options(self, made: type, options: Mapping[Any, Any], place: str = "") -> None:
        """Raise a UserError if the options of a class name what a file may not import; nothing is called."""
        require_bounded(options, self.source)
        self._options(made, options, place, make=False)

    def build(self, made: type, options: Mapping[Any, Any], place: str = "") -> dict[str, Any]:
        """Return the options of a class with the objects that they name, or raise as :meth:`check_options` does."""
        require_bounded(options, self.source)
        return self._options(made, options, place, make=True)

    def resolve(self, name: object, bases: tuple[type, ...], place: str) -> Any:
        """Return the class that a path names; raise if a file may not import it or it has none of the base classes."""
        return self._import(name, Expected(bases, names=True), place)

    def _options(self, made: type, options: Mapping[Any, Any], place: str, *, make: bool) -> dict[str, Any]:
        if not isinstance(options, Mapping):
            raise UserError(f"{self.source}: {place or made.__name__} must hold options by name")
        known, values = parameters_of(made), {}
        for name, value in options.items():
            inner = f"{place}.{name}" if place else str(name)
            if not isinstance(name, str) or not name.removesuffix("+").isidentifier():
                raise UserError(f"{self.source}: {inner[:80]!r} is not the name of an option. Fix: correct it")
            if name not in known and is_dataclass(made):
                raise UserError(
                    f"{self.source}: {inner} is not an option of {made.__name__}. Fix: remove it or update the package"
                )
            annotation = known.get(name.removesuffix("+"), inspect.Parameter.empty)
            if annotation in SCALARS and not _is_scalar(value, annotation, is_text=not make):
                raise UserError(f"{self.source}: {inner} {str(value)[:80]!r} must be of type {annotation.__name__}")
            values[name] = self._walk(value, expected_of(annotation), inner, make=make)
        return values

    def _walk(self, value: Any, expected: Expected, place: str, *, make: bool) -> Any:
        below = partial(self._walk, expected=expected, make=make)
        if isinstance(value, str):
            return self._text(value, expected, place, make=make)
        if isinstance(value, Mapping):
            if "class_path" in value:
                return self._spec(value, expected, place, make=make)
            record = next((base for base in expected.bases if is_dataclass(base)), None)
            if record is not None:
                options = self._options(record, value, place, make=make)
                return self._call(record, options, place) if make else value
            return {key: below(part, place=f"{place}.{key}") for key, part in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            parts = [below(part, place=place) for part in value]
            return type(value)(parts) if type(value) in (list, tuple, set, frozenset) else value
        return value

    def _text(self, text: str, expected: Expected, place: str, *, make: bool) -> Any:
        if not (expected.names or expected.nested):
            return text
        is_path = bool(expected.bases) and any(mark in text for mark in "/\\~")
        if expected.names and (is_path or self._is_file(text)):
            raise UserError(f"{self.source}: {place} is the file {text}. Fix: write its content there")
        inner = self._yaml(text, place)
        if not isinstance(inner, str):
            self._walk(inner, expected, place, make=False)
            return text
        for name in {text, inner} if expected.names else ():
            if "." in name and is_name(name):
                target = self._import(name, expected, place)
                return target if make else text
            for cls in _classes_named(name, expected.bases):
                self._import(path_of(cls), expected, place)
        return text

    def _spec(self, value: Mapping[Any, Any], expected: Expected, place: str, *, make: bool) -> Any:
        name = value["class_path"]
        if not isinstance(name, str) or not set(value) <= {"class_path", "init_args", "dict_kwargs"}:
            raise UserError(f"{self.source}: {place} must hold a class_path and init_args")
        target = self._import(name, expected._replace(functions=False), place, is_factory=expected.functions)
        options: dict[str, Any] = {}
        for part in ("init_args", "dict_kwargs"):
            if value.get(part) is not None:
                options |= self._options(target, value[part], place, make=make)
        if not make:
            return value
        if expected.functions and not is_dataclass(target):  # a dataclass makes factories
            return partial(target, **options) if options else target
        return target if expected.plain else self._call(target, options, place)

    def _call(self, made: type, options: dict[str, Any], place: str) -> Any:
        try:
            return made(**options)
        except UserError:
            raise
        except Exception as error:  # a constructor may raise anything for options that do not fit it
            line = " ".join(str(error).split())[:300]
            raise UserError(f"{self.source}: {place}: {made.__name__} can't be made of its options: {line}") from error

    def _import(self, name: object, expected: Expected, place: str, *, is_factory: bool = False) -> Any:
        """Check a name, import it, and check the class or function."""
        path = current_class(self._full_path(name, expected.bases, place))
        if not self._allows(path):
            raise self._refusal(place, path)
        module, _, attribute = path.rpartition(".")
        try:
            target = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UserError(
                f"{self.source}: {place} {path} can't be imported ({error}). Fix: install it or correct it"
            ) from error
        defined = f"{getattr(target, '__module__', None)}.{getattr(target, '__qualname__', attribute)}"
        is_explicit = path in self.trusted or path in self.named
        if isinstance(target, (type, FunctionType)) and not is_explicit and not self._allows(defined):
            raise self._refusal(place, path, defined)
        is_explicit = is_explicit or self._trusts(defined)
        if isinstance(target, FunctionType):
            is_own = any(_within(defined, module) for module in FUNCTIONS) and not attribute.startswith("_")
            if expected.functions and (is_explicit or (is_own and not expected.bases)):
                return target
        elif isinstance(target, type) and not inspect.isabstract(target):
            is_own = _within(defined, OWN) or is_explicit
            makes_callables = (expected.functions or is_factory) and "__call__" in dir(target) and is_own
            fits = issubclass(target, expected.bases) if expected.bases else is_explicit and expected.names
            if fits or makes_callables:
                return target
        kinds = " or ".join(dict.fromkeys(base.__name__ for base in expected.bases)) or "class of this kind"
        raise UserError(f"{self.source}: {place} {path} is not a {kinds} that can be called")

    def _full_path(self, name: object, bases: tuple[type, ...], place: str) -> str:
        if not isinstance(name, str) or not is_name(name):
            raise UserError(f"{self.source}: {place} must name a class, not {str(name)[:80]!r}")
        if "." in name:
            return name
        classes = _classes_named(name, bases)
        if len(classes) != 1:
            problem = "is the name of several classes" if classes else "no such class"
            raise UserError(f"{self.source}: {place} {name}: {problem}. Fix: give its class path")
        return path_of(classes[0])

    def _refusal(self, place: str, name: str, defined: str = "") -> UserError:
        kind = f"is {defined}" if defined else "is not of vrnn-lightning, torch.optim, torch.nn or Lightning"
        fix = self.fix.format(name if defined else name.rpartition(".")[0])
        if _within(name, f"{datamodules.__name__}.local"):
            fix = f"name it in the call (--data {name.rpartition('.')[2]}), or {fix}"
        problem = f"{place} names {name}, which {kind}; it is not called"
        return UserError(f"{self.source}: {problem}. Fix: if you trust it, {fix}")

    def _allows(self, name: str) -> bool:
        if name in self.named or self._trusts(name):
            return True
        if any(part.startswith("__") for part in name.split(".")) or any(_within(name, part) for part in NOT_ALLOWED):
            return False
        if _within(name, datamodules.__name__):  # a file of the working directory's folder does not count
            return datamodules.is_installed(name) or name in _entry_points()
        return any(_within(name, package) for package in ALLOWED) or name in _entry_points()

    def _trusts(self, name: str) -> bool:
        return any(_within(name, trusted) for trusted in self.trusted)

    def _is_file(self, text: str) -> bool:
        """Return whether a parser could read a text as the name of a file, which may be a pipe."""
        try:
            path = Path(text).expanduser()
            places = [path if folder is None else folder / path for folder in (None, self.folder)]
            return any(place.exists() and not place.is_dir() for place in places)
        except (OSError, ValueError, RuntimeError):  # no file can have such a name, or no user
            return False

    def _yaml(self, text: str, place: str) -> Any:
        """Return a text's YAML with every scalar as text: parsers differ in what they read as numbers or dates."""
        try:
            if len(text) > MAX_TEXT:
                raise UserError(f"{self.source}: {place} holds more than {MAX_TEXT} characters. Fix: shorten it")
            inner = yaml.load(text, Loader=yaml.BaseLoader) if text.strip() else text
            require_bounded(inner, f"{self.source}: {place}")
            return inner
        except RecursionError as error:
            raise UserError(f"{self.source}: {place} is nested more than {MAX_DEPTH} deep. Fix: flatten it") from error
        except (yaml.YAMLError, ValueError, TypeError):  # a list as the name of an option is a TypeError
            if any(mark in text for mark in ("class_path", "{", "[")):
                raise UserError(f"{self.source}: {place} is neither a name nor YAML. Fix: correct it") from None
            return text


def strings_of(value: Any) -> Iterator[str]:
    """Yield every string in nested containers.

    >>> sorted(strings_of({"a": ["b", {"c": 1}]}))
    ['b']
    """
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from strings_of(part)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for part in value:
            yield from strings_of(part)


def _is_scalar(value: Any, kind: type, *, is_text: bool) -> bool:
    """Return whether a value is of a type, or, where a parser reads it, a text that may be."""
    fits = isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)
    return fits or (is_text and isinstance(value, str))


def path_of(cls: type) -> str:
    """Return the class path of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def is_name(text: str) -> bool:
    """Return whether Python could import a text: more characters are letters to it than to a regular expression."""
    return all(part.isidentifier() for part in text.split("."))


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@cache
def _entry_points() -> frozenset[str]:
    return frozenset(point.value.replace(":", ".") for point in entry_points(group=ENTRY_POINTS))


def _classes_named(name: str, bases: tuple[type, ...]) -> list[type]:
    """Return the classes of a name among those that are imported already."""
    classes = {cls for base in bases for cls in subclasses_of(base) if cls.__name__ == name}
    return sorted(classes, key=lambda cls: cls.__module__)


def subclasses_of(base: type) -> set[type]:
    """Return a class and all classes below it that are imported already."""
    below: list[type] = type.__subclasses__(base)
    return {base}.union(*map(subclasses_of, below))
