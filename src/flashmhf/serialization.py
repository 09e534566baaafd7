"""Dataclasses from what JSON holds. `dataclasses.asdict`, and then `as_plain`, is the other direction."""

import json
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def as_plain(values: dict[str, Any], *, default: Any = None) -> dict[str, Any]:
    """The values as `json.loads` would return them once they were written; `default` as of `json.dumps`."""
    content: dict[str, Any] = json.loads(json.dumps(values, default=default))
    return content


def from_plain(kind: type[T], value: Any) -> T:
    """An instance of `kind`, a dataclass, from the values that `json.loads` returns.

    Its fields are dataclasses, tuples, lists, dicts with str keys, plain values, or one of these or None. Keys that are
    not fields are ignored.

    Raises:
        ValueError: a field is missing or has a value of another type; names it.
    """
    result: T = _convert(kind, value, kind.__name__)
    return result


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _dataclass(kind, _checked(dict, value, where), where)
    if NoneType in arguments:
        others = [argument for argument in arguments if argument is not NoneType]
        assert len(others) == 1, kind
        return None if value is None else _convert(others[0], value, where)
    if origin is dict:
        items = _checked(dict, value, where)
        return {key: _convert(arguments[1], item, f"{where}.{key}") for key, item in items.items()}
    if origin in (tuple, list):
        _checked(list | tuple, value, where)
        kinds = arguments if origin is tuple and arguments[-1] is not ... else (arguments[0],) * len(value)
        if len(kinds) != len(value):
            raise ValueError(f"{where}: expected {len(kinds)} values, got {len(value)}")
        return origin(_convert(kinds[i], item, f"{where}[{i}]") for i, item in enumerate(value))
    return _checked(int | float if kind is float else kind, value, where)


def _dataclass(kind: Any, values: dict[str, Any], where: str) -> Any:
    hints = get_type_hints(kind)
    found = {}
    for field in fields(kind):
        if field.name in values:
            found[field.name] = _convert(hints[field.name], values[field.name], f"{where}.{field.name}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{where}: expected {field.name}, got none")
    return kind(**found)


def _checked(kind: Any, value: Any, where: str) -> Any:
    if kind is not Any and not isinstance(value, kind):
        raise ValueError(f"{where}: expected {getattr(kind, '__name__', kind)}, got {value!r:.80}")
    return value
