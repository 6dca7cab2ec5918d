"""Choosing factors: how many features each core of the chain gets."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import product

from mpoe_kernels.checks import check_integer

Pair = tuple[tuple[int, ...], tuple[int, ...]]  # in_factors, out_factors
# (in_features, out_features) -> factors: the original's defaults, both orientations of each.
_768 = (3, 4, 4, 4, 4)
_768_FALLING = (4, 4, 4, 4, 3)
_1024 = (4, 4, 4, 4, 4)
_3072 = (4, 4, 8, 6, 4)
_4096 = (4, 4, 8, 8, 4)
_32128 = (8, 8, 8, 8, 8)  # padded to 32768
_30522 = (6, 8, 10, 8, 8)  # padded to 30720
_PAPER: dict[tuple[int, int], Pair] = {
    (768, 3072): (_768, _3072),
    (3072, 768): (_3072, _768),
    (1024, 4096): (_1024, _4096),
    (4096, 1024): (_4096, _1024),
    (768, 768): (_768_FALLING, _768),
    (1024, 1024): (_1024, _1024),
    (32128, 768): (_32128, _768),
    (32128, 1024): (_32128, _1024),
    (30522, 768): (_30522, _768_FALLING),
}


MOST = 2**40  # far beyond any layer; the divisors of much larger numbers take minutes to find


def check_size(name: str, size: int) -> None:
    """Refuse a size that is not a positive integer, or absurdly large, by name."""
    check_integer(name, size, 1, MOST)


def divisors(size: int) -> list[int]:
    """All divisors in increasing order."""
    small = [k for k in range(1, math.isqrt(size) + 1) if size % k == 0]
    return small + [size // k for k in reversed(small) if k * k != size]


def _prime_factors(size: int) -> list[int]:
    primes = []
    p = 2
    while p * p <= size:
        while size % p == 0:
            primes.append(p)
            size //= p
        p += 1
    if size > 1:
        primes.append(size)
    return primes


def _smooth(size: int) -> int:
    """Smallest number >= size whose prime factors are all at most 7."""
    while max(_prime_factors(size), default=1) > 7:
        size += 1
    return size


@lru_cache(maxsize=1024)
def balanced_factors(size: int, num_cores: int, name: str = "size") -> tuple[int, ...]:
    """``num_cores`` factors as equal as possible, the largest in the middle.

    A large size with a prime factor above 7 (a vocabulary, a prime) is padded to the next number
    without one, if that costs at most an eighth; otherwise its own factors are used.

    Args:
        size: number of features.
        num_cores: number of factors.
        name: the name of the size in error messages.
    """
    check_size(name, size)
    check_size("num_cores", num_cores)
    if num_cores == 1:
        return (size,)
    padded = _smooth(size)
    if padded > size * 1.125:
        padded = size
    factors = [1] * num_cores
    for prime in sorted(_prime_factors(padded), reverse=True):
        factors[factors.index(min(factors))] *= prime
    factors.sort()
    # Largest in the middle: the shared central core should hold most of the weight.
    ordered: list[int] = []
    for k, factor in enumerate(factors):
        ordered.insert((len(ordered) + 1 - k % 2) // 2, factor)
    return tuple(ordered)


def paper_factors(in_features: int, out_features: int) -> Pair:
    """The original's factors for its sizes; otherwise five balanced factors, larger towards the
    middle."""
    check_size("in_features", in_features)
    check_size("out_features", out_features)
    known = _PAPER.get((in_features, out_features))
    if known:
        return known
    in_factors = balanced_factors(in_features, 5, "in_features")
    return in_factors, balanced_factors(out_features, 5, "out_features")


def _closest_pair(in_features: int, out_features: int, p: int) -> tuple[int, int]:
    """Divisors ``i`` of I and ``j`` of F whose product is closest to ``p``; among ties, the most
    similar ones."""

    def distance(pair: tuple[int, int]) -> tuple[float, float]:
        i, j = pair
        return abs(math.log(i * j / p)), abs(math.log(i / j))

    pairs = product(divisors(in_features), divisors(out_features))
    able = [(i, j) for i, j in pairs if i * j <= 4 * p]
    return min(able, key=distance)


def light_factors(in_features: int, out_features: int, p: int) -> Pair:
    """Three cores with products ``i * j`` of about ``p`` at both ends and everything else in the
    centre."""
    check_size("in_features", in_features)
    check_size("out_features", out_features)
    check_size("p", p)
    i_left, j_left = _closest_pair(in_features, out_features, p)
    in_features //= i_left
    out_features //= j_left
    i_right, j_right = _closest_pair(in_features, out_features, p)
    i_central = in_features // i_right
    j_central = out_features // j_right
    return (i_left, i_central, i_right), (j_left, j_central, j_right)


def separable_factors(
    in_features: int, out_features: int, left: int | None, right: int | None
) -> Pair:
    """``in (left, I/left, 1)``, ``out (1, F/right, right)``."""
    check_size("in_features", in_features)
    check_size("out_features", out_features)
    if left is None:
        left = _default_side(in_features, in_features <= out_features)
    if right is None:
        right = _default_side(out_features, in_features > out_features)
    _check_divisor("left", left, "in_features", in_features)
    _check_divisor("right", right, "out_features", out_features)
    return (left, in_features // left, 1), (1, out_features // right, right)


def _default_side(size: int, is_smaller: bool) -> int:
    """256 of 768 and 64 of 3072 for T5-base: a third of the smaller side, a forty-eighth of the
    larger."""
    target = size / 48
    largest = 64
    if is_smaller:
        target = size / 3
        largest = 256
    target = min(max(target, 8), largest)

    def distance(divisor: int) -> tuple[float, int]:
        return abs(math.log(divisor / target)), -divisor

    return min(divisors(size), key=distance)


def _check_divisor(name: str, value: int, of: str, size: int) -> None:
    check_size(name, value)
    if size % value:
        raise ValueError(
            f"{name} must divide {of} = {size}; got {value} (divisors: {divisors(size)})"
        )
