"""What the parameters of a class take, as far as the gate is concerned."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterable
from datetime import date, timedelta
from enum import Enum
from functools import cache
from pathlib import PurePath
from types import FunctionType, NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union

__all__ = ["Expected", "expected_of", "parameters_of"]

PLAIN = (str, int, float, complex, bytes, NoneType, PurePath, Enum, timedelta, date)


class Expected(NamedTuple):
    """What a parameter takes."""

    bases: tuple[type, ...] = ()  # of what may be named there
    names: bool = False  # a text is imported
    functions: bool = False  # a function may be named, and a class stands for calls of it
    nested: bool = False  # a text is read as YAML, which may name something
    plain: bool = False  # only a class is wanted, not an instance


UNKNOWN = Expected(names=True, functions=True, nested=True)


@cache
def parameters_of(made: type) -> dict[str, Any]:
    """Return the types of a class' options, with those of its bases if it takes any option."""
    types: dict[str, Any] = {}
    for cls in made.__mro__:
        init = vars(cls).get("__init__")
        if not isinstance(init, FunctionType):
            continue
        forwarded = vars(cls).get("forwards_options_to")
        if forwarded is not None:
            types = typing.get_type_hints(forwarded.__func__, include_extras=True) | types
            del types["return"]
        try:
            hints = typing.get_type_hints(init, include_extras=True)
        except Exception:  # a type that is imported for type checkers alone; it counts as unknown
            hints = {}
        _, *options = inspect.signature(init).parameters.values()
        named = [option for option in options if option.kind not in (option.VAR_KEYWORD, option.VAR_POSITIONAL)]
        types = {option.name: hints.get(option.name, option.annotation) for option in named} | types
        if all(option.kind != option.VAR_KEYWORD for option in options):
            break
    return types


def expected_of(annotation: Any) -> Expected:
    """Return what a parameter of a type takes."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any or annotation is object:
        return Expected(nested=True)
    if annotation is None or origin is Literal:
        return Expected()
    if annotation is Callable or annotation is typing.Callable or origin is Callable:
        return UNKNOWN._replace(bases=expected_of(args[-1]).bases if args else ())
    if annotation is type or origin is type:
        return _any_of(args)._replace(names=True, nested=True, plain=True)
    if origin is typing.Annotated:
        return expected_of(args[0])
    if origin in (Union, UnionType) or (isinstance(origin, type) and _is_container(origin)):
        return _any_of(args)
    kind = origin or annotation
    if not isinstance(kind, type) or isinstance(kind, TypeVar) or annotation is inspect.Parameter.empty:
        return UNKNOWN
    if issubclass(kind, PLAIN):
        return Expected()
    if _is_container(kind):
        return Expected(nested=True)
    arguments = _any_of(args)
    return arguments._replace(bases=(*arguments.bases, kind), names=True, nested=True)


def _any_of(annotations: Iterable[Any]) -> Expected:
    parts = [expected_of(annotation) for annotation in annotations if annotation is not Ellipsis]
    bases = tuple(base for part in parts for base in part.bases)
    return Expected(bases, *(any(flags) for flags in zip(*(part[1:] for part in parts), strict=True)))


def _is_container(kind: type) -> bool:
    return kind.__module__ in ("builtins", "collections", "collections.abc", "typing") and hasattr(kind, "__iter__")
