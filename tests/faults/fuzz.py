"""What a random input may lead to: it works, or is refused in our own words; damage to values
and bytes.

Files are data and configurations of runs, read through the public functions.
"""

import gzip
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from mpoe.cli.command import parse
from mpoe.cli.errors import is_on_purpose
from mpoe.cli.options import ExpertOptions, RunOptions
from mpoe.cli.tasks import DataOptions
from mpoe.data.tasks import load_task_from_folder

SECONDS = 20.0  # of processor time that one input may take

# Of every type that JSON, YAML or Python may bring, at the edges of what is sensible.
UNUSUAL = (
    *(None, True, False, -1, 0, 1, 2, 3, 5, 8, 24, 48, 64, 2**31, 2**63, 10**30),
    *(-0.5, 0.0, 0.25, 1.0, 1.5, 1e300, float("nan"), float("inf"), float("-inf")),
    *("", " ", "a" * 2000, "\x00"),
    *"x 0 é☃ ( ffn attention switch moe mpo paper".split(),
    *(
        [],
        [0],
        [-1],
        [None],
        ["ffn", "embedding"],
        [[1]],
        [1.5],
        ["", "x"],
        {},
        {"a": 1},
        {"up": {}, "down": {}},
    ),
    *({"up": 3}, {".*": 4}, {"(": 2}, {"x": None}, {"x": [1.0, "2"]}, {"top_k": 2}),
    {"in_factors": [2], "out_factors": [3]},
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


def unusual(draw):
    return draw.choice(UNUSUAL)


def sample_of(draw, items, most):
    """Up to ``most`` different ones, at least one."""
    pool = list(items)
    return draw.sample(pool, min(len(pool), draw.randint(1, most)))


def spoil_values(values, draw):
    """A mapping with one to three entries replaced, dropped or misnamed, perhaps deep inside."""
    spoilt = dict(values)
    for key in sample_of(draw, spoilt, 3):
        inner = spoilt[key]
        if isinstance(inner, dict) and inner and draw.random() < 0.7:
            spoilt[key] = spoil_values(inner, draw)
        elif isinstance(inner, list) and inner and draw.random() < 0.5:
            spoilt[key] = [unusual(draw) if draw.random() < 0.5 else each for each in inner]
        elif draw.random() < 0.15:
            del spoilt[key]
        elif draw.random() < 0.15:
            spoilt[key[:-1] + "x"] = spoilt.pop(key)
        else:
            spoilt[key] = unusual(draw)
    return spoilt


def spoil_bytes(data, draw):
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
    *(b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\r\n", b"\t", b"[" * 3000),
    *(bytes([mark]) for mark in b"\"',{}]:"),
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
    ),
    *(b"? [x]", b"\\u0000", b"\xc3\x28", b"=", b"#", b"%", b"y" * 200_000),
)


def what_became_of(case):
    """``worked`` or ``refused``.

    Raises:
        AssertionError: it was refused in words that name nothing.
        Exception: whatever an input led to inside.
        OutOfTime: see the class.
    """

    def stop(*_):
        raise OutOfTime(f"not done after {SECONDS} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        case.call()
    except Exception as error:
        # PyTorch's own words, for a size that some machines have.
        if "can't allocate memory" in str(error):
            return "refused"
        if not isinstance(error, Refused) and not is_on_purpose(error):
            raise
        if case.names and not any(name in str(error) for name in case.names):
            raise AssertionError(f"names nothing: {error}") from error
        return "refused"
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.signal(signal.SIGVTALRM, before)
    return "worked"


# ------------------------------------------------------------------ files

ROWS = [(f"the film number {i} is {'good' if i % 2 else 'bad'}", i % 2) for i in range(6)]
TABLES = {
    ".jsonl": "".join(f'{{"sentence": "{text}", "label": {label}}}\n' for text, label in ROWS),
    ".csv": "sentence,label\n" + "".join(f'"{text}, really",{label}\n' for text, label in ROWS),
    ".tsv": "sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in ROWS),
    ".txt": "\n\n".join(text for text, _ in ROWS),
}
CONFIGS = {
    ".json": '{"model": "t5", "num_experts": 4, "tasks": ["a", "b"], "capacity_factor": 1.25, '
    '"text_columns": null}',
    ".yaml": "model: t5\nnum_experts: 4\ntasks: [a, b]\ncapacity_factor: 1.25\n"
    "label_words: {0: bad, 1: good}\n",
}


def data_files(draw, folder):
    """An endless stream; every case has a folder of its own below ``folder``."""
    for number in range(1_000_000):
        own = folder / str(number)
        own.mkdir(parents=True)
        if draw.random() < 0.35:
            suffix = draw.choice(sorted(CONFIGS))
            file = own / f"run{suffix}"
            file.write_bytes(spoil_bytes(CONFIGS[suffix].encode(), draw))
            groups = [RunOptions, DataOptions, ExpertOptions]
            options = [name for group in groups for name in group.__dataclass_fields__]
            yield Case(
                f"{file}", partial(parse, groups, [], file), [str(file), "configuration", *options]
            )
            continue
        suffix = draw.choice(sorted(TABLES))
        good = TABLES[suffix].encode()
        for split in ("train", "validation"):
            data = spoil_bytes(good, draw) if split == "train" or draw.random() < 0.3 else good
            if draw.random() < 0.15:
                (own / f"{split}{suffix}.gz").write_bytes(
                    spoil_bytes(gzip.compress(data, mtime=0), draw)
                )
            else:
                (own / f"{split}{suffix}").write_bytes(data)
        yield Case(f"{own}/train{suffix}", partial(load, own), [str(own), "data_dir"])


def load(folder):
    """Read a task and touch every item."""
    task = load_task_from_folder(folder, "task")
    for split in ("train", "validation"):
        for example in task.examples(split):
            if not isinstance(example.source, str):
                raise AssertionError(f"a source is {example.source!r}")
