"""Checks whose errors name the field, what was expected and what was given."""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar

_T = TypeVar("_T")


def shortened(text: str, most: int = 100) -> str:
    """The start and the end of a text that is longer: what a file holds may be of any size."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


def quoted(value: object) -> str:
    """A value as messages show it."""
    return shortened(repr(value))


@contextlib.contextmanager
def refusing(
    what: str, kinds: type[Exception] | tuple[type[Exception], ...] = Exception
) -> Iterator[None]:
    """Inside, errors of these kinds become a ValueError that begins with ``what``."""
    try:
        yield
    except kinds as error:
        raise ValueError(f"{what}{shortened(str(error), 1000)}") from error


def hint(value: object, known: Sequence[str]) -> str:
    close = get_close_matches(str(value), list(known), n=3, cutoff=0.4)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def check_choice(name: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, known))}; got "
            f"{quoted(value)}{hint(value, known)}"
        )


def check_type(name: str, value: object, kinds: Any, wanted: str) -> None:
    """Require an instance of a class, or of one of several; True and False are no numbers."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        raise TypeError(f"{name} must be {wanted}; got {type(value).__name__} {quoted(value)}")


def check_list(name: str, value: Any, wanted: str) -> None:
    """Require a list or another sequence that is no text."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a list of {wanted}; got {quoted(value)}")


def check_integer(name: str, value: Any, least: int, optional: bool = False) -> None:
    if value is None and optional:
        return
    check_type(name, value, int, "an integer or None" if optional else "an integer")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {quoted(value)}")


def is_file_name(value: object) -> bool:
    """Whether this is the name of a file that any system takes: no folder, drive, hidden file or
    odd character."""
    is_text = isinstance(value, str) and value.isprintable() and len(value.encode()) <= 200
    return is_text and re.fullmatch(r"[^./\\:][^/\\:]*", str(value)) is not None


def check_seed(name: str, value: Any) -> None:
    """A seed that every random generator in use accepts: NumPy's takes 32 bits."""
    check_integer(name, value, 0)
    if value >= 1 << 32:
        raise ValueError(f"{name} must be below 2**32; got {quoted(value)}")


def check_number(
    name: str, value: Any, low: float, high: float = math.inf, *, open_low: bool = False
) -> None:
    check_type(name, value, (int, float), "a number")
    inside = (value > low if open_low else value >= low) and value <= high and math.isfinite(value)
    if not inside:
        bounds = f"greater than {low}" if open_low else f"at least {low}"
        if high != math.inf:
            bounds += f" and at most {high}"
        raise ValueError(f"{name} must be {bounds}; got {quoted(value)}")


def check_flag(name: str, value: object) -> None:
    check_type(name, value, bool, "True or False")


def check_counts_and_flags(config: Any) -> None:
    """Require True or False in the fields that a dataclass declares as bool, and an integer of at
    least 1 in those that it declares as int."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type == "bool":
            check_flag(field.name, value)
        elif field.type in ("int", "int | None"):
            check_integer(field.name, value, 1, optional=field.type != "int")


def refuse_unknown_fields(cls: type[_T]) -> type[_T]:
    """Decorator for a dataclass: an unknown field raises a TypeError that suggests the closest
    known ones.

    Instances keep the names of the fields that were given and are not None in ``_given``.
    """
    construct = cls.__init__

    @functools.wraps(construct)
    def __init__(self: Any, *values: Any, **named: Any) -> None:
        check_fields(cls, named, cls.__name__, TypeError)
        known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        given = {**dict(zip(known, values, strict=False)), **named}
        self._given = frozenset(name for name, value in given.items() if value is not None)
        construct(self, *values, **named)

    setattr(cls, "__init__", __init__)  # noqa: B010
    return cls


def check_fields(
    cls: type, values: Mapping[str, Any], what: str, error: type[Exception] = ValueError
) -> None:
    check_type(what, values, Mapping, "a mapping")
    known = [f.name for f in dataclasses.fields(cls)]
    for name in values:
        if name not in known:
            raise error(
                f"{what} has no field {quoted(name)}{hint(name, known)}; it has {', '.join(known)}"
            )


def checked_ratios(ratios: Any) -> dict[str, list[float]]:
    """``rate_ratios`` of an `MPOEConfig`: names with lists of numbers."""
    check_type("rate_ratios", ratios, Mapping, "a mapping")
    for name, values in ratios.items():
        check_list(f"rate_ratios[{quoted(name)}]", values, "numbers")
        for value in values:
            check_number(f"rate_ratios[{quoted(name)}]", value, 0.0)
    return {name: [float(value) for value in values] for name, values in ratios.items()}
