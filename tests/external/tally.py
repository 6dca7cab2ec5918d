"""A pytest plugin (``-p tally``) that writes what became of every test to the JSON file
``$EXTERNAL_RESULTS``.

It runs inside other people's suites, hence imports nothing of this repository. A test with subtests
counts once, with its worst outcome. Classes ``MPOE_x`` and ``Dense_x`` hold the same tests; the
dense one's result is asked for only where ours did not pass.
"""

import json
import os
from pathlib import Path

import pytest

WORST = ("passed", "skipped", "failed")
NOT_ASKED = "ours passed"
_found = {}


def _reason(report):
    """One line of why a test was skipped or failed."""
    if isinstance(report.longrepr, tuple):  # a skip: file, line, reason
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr or "")
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:300]


def pytest_runtest_logreport(report):
    """Keep the worst outcome of set-up, call, subtests and tear-down."""
    test = _found.setdefault(
        report.nodeid.partition("::")[2], {"id": report.nodeid, "outcome": "passed", "seconds": 0.0}
    )
    test["seconds"] = round(test["seconds"] + report.duration, 2)
    if WORST.index(report.outcome) > WORST.index(test["outcome"]):
        test.update(outcome=report.outcome, reason=_reason(report))


def pytest_runtest_setup(item):
    """Leave out a dense class's test whose namesake passed."""
    case, _, test = item.nodeid.partition("::")[2].partition("::")
    ours = _found.get(f"{case.replace('Dense_', 'MPOE_', 1)}::{test}")
    if case.startswith("Dense_") and ours is not None and ours["outcome"] == "passed":
        pytest.skip(NOT_ASKED)


def pytest_sessionfinish(session):
    """Write the file; workers of a parallel run write none."""
    if not hasattr(session.config, "workerinput"):
        Path(os.environ["EXTERNAL_RESULTS"]).write_text(
            json.dumps(_found, indent=0, sort_keys=True) + "\n"
        )


def word_tokenizer(words, **options):
    """For models of the suites: one token for each word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    whole = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>")
    )
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=whole, **options)
