"""What a config key is: a typed dataclass field with a default, documentation and rules.

A group of keys is a frozen dataclass whose fields are made by ``key``, ``group`` and ``named``. A
field's annotation must be a class itself, not a string (no ``from __future__ import annotations``):
bool, int, float, str, a tuple of one of these such as ``tuple[int, ...]``, ``SPAN``, or another
group.
"""

import dataclasses
import json
import math
import typing
from typing import Any

from vbon_jax.errors import InputError

SPAN = float | tuple[float, float]  # a number, or the two that it may lie between
_ENTRIES = {int: "whole numbers", float: "finite numbers", str: "strings"}


def key(default: Any, doc: str, **rules: Any) -> Any:
    """Declares a key.

    Args:
      default: Its value where none is given.
      doc: What it means, for the config reference.
      **rules: What its value must obey: ``least`` and ``most`` (inclusive bounds), ``above`` and
        ``below`` (exclusive bounds), ``choices`` (the values allowed).

    Returns:
      A dataclass field.
    """
    return dataclasses.field(default=default, metadata={"doc": doc, **rules})


def group(cls: type, **defaults: Any) -> Any:
    """Declares a group of keys under a name of its own.

    Args:
      cls: The group's dataclass.
      **defaults: Defaults that differ here from those of ``cls``.

    Returns:
      A dataclass field.
    """
    return dataclasses.field(default_factory=lambda: cls(**defaults))


def named(cls: type, doc: str) -> Any:
    """Declares any number of groups of one kind, each under a name the user chooses.

    Args:
      cls: The dataclass of each group.
      doc: What the groups mean, for the config reference.

    Returns:
      A dataclass field whose default is an empty dict.
    """
    return dataclasses.field(default_factory=dict, metadata={"doc": doc, "of": cls})


def build(cls: type, values: Any, where: str = "") -> Any:
    """Builds a group from a plain dict.

    Whole numbers are accepted for floats, and lists for tuples.

    Args:
      cls: The group's dataclass.
      values: Key to value, a nested dict for a group; a key that is missing takes its default.
      where: Dotted name of the group in messages; empty for the whole config.

    Returns:
      A ``cls``.

    Raises:
      InputError: A key is unknown, or a value has another type or breaks a rule of its key.
    """
    return _updated(cls(), values, where)


def check(instance: Any, where: str = "") -> None:
    """Validates a group that is built already, by the rules and in the words of ``build``.

    Whole numbers in place of floats and lists in place of tuples are converted, in the instance
    itself also where its class is frozen, so a ``__post_init__`` may call this.

    Args:
      instance: A dataclass of keys.
      where: Name of the group in messages, ``VBoN.n=0.5: must be at least 1``; empty for none.

    Raises:
      InputError: A value has another type or breaks a rule of its key.
    """
    for f in dataclasses.fields(instance):
        name, value = _join(where, f.name), getattr(instance, f.name)
        if dataclasses.is_dataclass(f.type):
            check(_instance(value, f.type, name), name)
        elif "of" in f.metadata:
            for part, of_part in _parts(value, name).items():
                check(_instance(of_part, f.metadata["of"], f"{name}.{part}"), f"{name}.{part}")
        else:
            object.__setattr__(instance, f.name, _value(f, value, name))


def as_dict(instance: Any) -> dict[str, Any]:
    """Converts a group, or the whole config, to plain JSON values.

    Args:
      instance: A dataclass of keys.

    Returns:
      Key to value, groups as nested dicts and tuples as lists.
    """
    return json.loads(json.dumps(dataclasses.asdict(instance)))


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Joins the names of nested groups: ``{"a": {"b": 1}}`` becomes ``{"a.b": 1}``.

    Args:
      values: Nested dicts; an empty one stays as it is.
      prefix: Put before each name.

    Returns:
      Dotted name to value, in order.
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inside = isinstance(value, dict) and value
        flat |= flatten(value, f"{prefix}{name}.") if inside else {prefix + name: value}
    return flat


def rows(cls: type) -> list[tuple[str, str, Any]]:
    """Lists every key, for the config reference.

    Args:
      cls: A dataclass of keys.

    Returns:
      (dotted key, doc, default) of each in order; those of a ``named`` group under ``NAME``.
    """
    return _rows(cls(), "")


def _rows(instance: Any, where: str) -> list[tuple[str, str, Any]]:
    found: list[tuple[str, str, Any]] = []
    for f in dataclasses.fields(instance):
        name, default = _join(where, f.name), getattr(instance, f.name)
        if dataclasses.is_dataclass(f.type):
            found += _rows(default, name)
            continue
        found.append((name, f.metadata["doc"], default))
        if "of" in f.metadata:
            found += _rows(f.metadata["of"](), f"{name}.NAME")
    return found


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _updated(default: Any, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise InputError(f"{where or 'config'}={values!r}: must be a group of keys")
    fields = {f.name: f for f in dataclasses.fields(default)}
    unknown = set(values) - set(fields)
    if unknown:
        raise InputError(
            f"unknown config key {_join(where, sorted(unknown)[0])}: allowed here are "
            + ", ".join(_join(where, name) for name in fields)
        )
    given = {
        name: _field(fields[name], getattr(default, name), value, _join(where, name))
        for name, value in values.items()
    }
    return dataclasses.replace(default, **given)


def _field(f: dataclasses.Field, default: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(f.type):
        return _updated(default, value, where)
    if "of" in f.metadata:
        parts = _parts(value, where)
        return {name: build(f.metadata["of"], v, f"{where}.{name}") for name, v in parts.items()}
    return _value(f, value, where)


def _parts(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}={value!r}: must be groups of keys, each under a name")
    return value


def _instance(value: Any, cls: Any, where: str) -> Any:
    if not isinstance(value, cls):
        raise InputError(f"{where}={value!r}: must be {cls.__name__}")
    return value


class Size(int):
    """A `most` that no machine has the memory for: its message names what plans memory."""


def _value(f: dataclasses.Field, value: Any, where: str) -> Any:
    of: Any = f.type
    if of == SPAN:
        if isinstance(value, list | tuple):
            return _span(f, _coerced(tuple[float, ...], value), where)
        value, of = _coerced(float, value), float
        if not isinstance(value, float):
            raise InputError(f"{where}={value!r}: must be a number, or two, such as (2, 64)")
    rules, value = f.metadata, _coerced(of, value)
    expected: Any = typing.get_origin(of) or of
    if expected is tuple and isinstance(value, tuple):
        _check_entries(typing.get_args(f.type)[0], value, where)
    if not isinstance(value, expected) or (expected is int and not _is_int(value)):
        raise InputError(f"{where}={value!r}: must be {expected.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where}={value!r}: must be a finite number")
    for rule, holds, text in (
        ("least", lambda a: value >= a, "at least"),
        ("most", lambda a: value <= a, "at most"),
        ("above", lambda a: value > a, "above"),
        ("below", lambda a: value < a, "below"),
    ):
        if rule in rules and not holds(bound := rules[rule]):
            more = "; `vbon plan` tells what a run needs" if isinstance(bound, Size) else ""
            raise InputError(f"{where}={value!r}: must be {text} {bound}{more}")
    if "choices" in rules and value not in rules["choices"]:
        raise InputError(f"{where}={value!r}: choose one of {', '.join(rules['choices'])}")
    return value


def _span(f: dataclasses.Field, value: tuple[Any, ...], where: str) -> tuple[float, float]:
    """Checks two ends, each by the rules of the key."""
    _check_entries(float, value, where)
    if len(value) != 2 or not value[0] < value[1]:
        raise InputError(f"{where}={value!r}: must be a number, or two of which the first is less")
    for end in value:
        _value(f, end, where)
    return value[0], value[1]


def _check_entries(of: type, values: tuple[Any, ...], where: str) -> None:
    for entry in values:
        right = _is_int(entry) if of is int else isinstance(entry, of)
        if not right or (of is not str and not math.isfinite(entry)):
            raise InputError(f"{where} has {entry!r}: it must hold {_ENTRIES[of]}")


def _coerced(expected: Any, value: Any) -> Any:
    """Returns whole numbers as floats where floats are meant, and lists as tuples."""
    if expected is float and _is_int(value):
        return float(value)
    if isinstance(value, list | tuple):
        floats = expected == tuple[float, ...]
        return tuple(float(v) if floats and _is_int(v) else v for v in value)
    return value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
