"""What a random input may lead to: it works, or it is refused in our own words; anything else is a problem."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mpoe.cli.command import is_on_purpose

SECONDS = 20.0  # of processor time that one input may take

# Of every type that JSON, YAML or Python may bring, at the edges of what is sensible.
ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 5, 8, 24, 48, 64, 2**31, 2**63, 10**30),
    *(-0.5, 0.0, 0.25, 1.0, 1.5, 1e300, float("nan"), float("inf"), float("-inf")),
    *("", " ", "x", "0", "é☃", "a" * 2000, "\x00", "(", "ffn", "attention", "switch", "moe", "mpo", "paper"),
    *([], [0], [-1], [None], ["ffn", "embedding"], [[1]], [1.5], ["", "x"], {}, {"a": 1}, {"up": {}, "down": {}}),
    *(
        {"up": 3},
        {".*": 4},
        {"(": 2},
        {"x": None},
        {"x": [1.0, "2"]},
        {"top_k": 2},
        {"in_factors": [2], "out_factors": [3]},
    ),
)


@dataclass(frozen=True)
class Case:
    """One input: what it is, and the call that must work or refuse by naming one of ``names``."""

    what: str
    call: Callable[[], object]
    names: Sequence[str] = ()


class Refused(Exception):
    """A refusal that the case has recognised as one itself."""


class OutOfTime(BaseException):
    """A case that took far too long."""


def odd(draw: random.Random) -> Any:
    return draw.choice(ODD)


def some(draw: random.Random, items: Iterable[Any], most: int) -> list[Any]:
    """Up to ``most`` different ones, at least one."""
    pool = list(items)
    return draw.sample(pool, min(len(pool), draw.randint(1, most)))


def spoil_values(values: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """A mapping with one to three entries replaced, dropped or misnamed, perhaps deep inside."""
    spoilt = dict(values)
    for key in some(draw, spoilt, 3):
        inner = spoilt[key]
        if isinstance(inner, dict) and inner and draw.random() < 0.7:
            spoilt[key] = spoil_values(inner, draw)
        elif draw.random() < 0.15:
            del spoilt[key]
        elif draw.random() < 0.15:
            spoilt[key[:-1] + "x"] = spoilt.pop(key)
        else:
            spoilt[key] = odd(draw)
    return spoilt


def spoil_bytes(data: bytes, draw: random.Random) -> bytes:
    """Bytes flipped, cut, repeated or put in."""
    spoilt = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        at, length = draw.randrange(len(spoilt) + 1), draw.randint(1, 12)
        kind = draw.randrange(5)
        if kind == 0 and at < len(spoilt):
            spoilt[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del spoilt[at:]
        elif kind == 2:
            del spoilt[at : at + length]
        elif kind == 3:
            spoilt[at:at] = spoilt[at : at + length] * draw.randint(1, 3)
        else:
            spoilt[at:at] = draw.choice(_PIECES)
    return bytes(spoilt)


_PIECES = (
    *(
        b"\x00",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b'"',
        b"'",
        b"\n",
        b"\r\n",
        b"\t",
        b",",
        b"{",
        b"}",
        b"[" * 3000,
        b"]",
        b":",
    ),
    *(
        b"9" * 5000,
        b"1e999",
        b"NaN",
        b"null",
        b"-",
        b"&a *a",
        b"!!python/object:os.system",
        b"2001-99-99",
        b"<<: 1",
        b"? [x]",
    ),
    *(b"\\u0000", b"\xc3\x28", b"=", b"#", b"%", b"y" * 200_000),
)


def what_became_of(case: Case) -> str:
    """``worked`` or ``refused``.

    Raises:
        AssertionError: it was refused in words that name nothing.
        Exception: whatever an input led to inside.
        OutOfTime: see the class.
    """

    def stop(*_: object) -> None:
        raise OutOfTime(f"not done after {SECONDS} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        case.call()
    except Exception as error:
        if not isinstance(error, Refused) and not is_on_purpose(error):
            raise
        if case.names and not any(name in str(error) for name in case.names):
            raise AssertionError(f"names nothing: {error}") from error
        return "refused"
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.signal(signal.SIGVTALRM, before)
    return "worked"
