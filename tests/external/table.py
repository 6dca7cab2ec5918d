"""Counts the results of `tools/external_suites.sh`: ``python tests/external/table.py RESULTS``.

Exit status 1 if a failure is open: our class fails the test, the dense class passes it, and no line
below explains why. ``--failed FILE`` lists one file's failed tests instead.
"""

import argparse
import fnmatch
import json
import sys
from pathlib import Path

# test -> why ours fails or is skipped although the dense class passes. Only for tests whose code
# names classes or dense weights.
EXPLAINED = {
    "test_can_load_from_already_mapped_keys": "renames keys of older checkpoints, which mixtures "
    "never had",
    "test_eager_matches_batched_and_grouped_inference*": "asks that Transformers' own functions "
    "compute the experts; ours have their own, and the dense class has no experts",
    "test_reverse_loading_mapping": "renames keys of older checkpoints, which mixtures never had",
}
# The same for skipped tests; a failure of one would be open.
SKIPPED = {
    "test_can_init_all_missing_weights": "runs for a list of Transformers' own model types",
    "test_fsdp2_*": "starts processes for a list of Transformers' own model types",
    "test_pipeline_*": "pipelines are tested with a list of dense classes",
    "test_tp_*": "starts processes for a list of Transformers' own model types",
}


def _explanation(test, outcome):
    """The pattern of all tests that share this one's explanation, and the explanation."""
    known = EXPLAINED | (SKIPPED if outcome == "skipped" else {})
    return next(
        ((pattern, why) for pattern, why in known.items() if fnmatch.fnmatch(test, pattern)), None
    )


def compare(ours, dense):
    """Counts of one suite, and a line per failure or skip that the dense class lacks; equal lines
    are merged."""
    counts = {"passed": 0, "skipped": 0, "failed": 0, "open": 0}
    lines = []
    for test, result in sorted(ours.items()):
        outcome, reason = result["outcome"], result.get("reason", "")
        counts[outcome] += 1
        if outcome == "passed":
            continue
        other = dense.get(test, {}).get("outcome", "skipped" if outcome == "skipped" else "passed")
        if other == outcome:
            continue  # the dense class does the same
        explained = _explanation(test, outcome)
        if explained is None and outcome == "failed":
            counts["open"] += 1
            reason = f"open: {reason}"
        name, why = explained or (test, reason)
        lines.append(f"`{name}` {outcome}: {why}")
    return counts, list(dict.fromkeys(lines))


def suites(folder):
    """Name, our results and the dense class's results for every suite in a folder."""
    found = []
    for file in sorted(folder.glob("transformers-*.json")):
        tests = json.loads(file.read_text())
        split = {"MPOE": {}, "Dense": {}}
        for name, result in tests.items():
            case, _, test = name.partition("::")
            split[case.partition("_")[0]][test] = result
        found.append(
            (f"Transformers: {file.stem.partition('-')[2]}", split["MPOE"], split["Dense"])
        )
    if (folder / "peft-mpoe.json").is_file():
        ours, dense = (
            json.loads((folder / f"peft-{kind}.json").read_text()) for kind in ("mpoe", "dense")
        )
        found.append(("PEFT", ours, dense))
    return found


def main():
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="?")
    parser.add_argument("--failed", type=Path)
    options = parser.parse_args()
    if options.failed is not None:
        tests = json.loads(options.failed.read_text())
        print(
            *(test["id"] for test in tests.values() if test["outcome"] == "failed"),
            sep="\n",
            end="",
        )
        return
    if options.results is None:
        parser.error("RESULTS is missing")
    table = ["| suite | passed | skipped | failed | of these open |", "|---|---|---|---|---|"]
    notes = {}
    remain = 0
    for name, ours, dense in suites(options.results):
        counts, lines = compare(ours, dense)
        table.append(
            f"| {name} | "
            f"{' | '.join(str(counts[key]) for key in ('passed', 'skipped', 'failed', 'open'))} |"
        )
        for line in lines:
            notes.setdefault(line, []).append(name.removeprefix("Transformers: "))
        remain += counts["open"]
    listed = "\n".join(f"- {', '.join(names)}: {line}" for line, names in notes.items()) or "None."
    print(*table, "", "Failed or skipped where the dense class is not:", "", listed, sep="\n")
    sys.exit(1 if remain else 0)


if __name__ == "__main__":
    main()
