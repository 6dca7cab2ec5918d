"""Runs `mpoe demo` with seeds 0 to 4, prints every score, and stores what the demo reports about them.

    python tools/demo_seeds.py [t5] [gpt2] [--seeds 0 1 2 3 4] [--threads 1]

Takes about two minutes per seed and model on two cores. The results go into mpoe/cli/demo_seeds.json; a test compares
their settings with the demo's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from mpoe.cli.demo import run
from mpoe.cli.demo_arms import SETTINGS
from mpoe.cli.demo_tables import SEEDS_FILE, fingerprint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(SETTINGS), help="t5, gpt2")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    for kind in options.models:
        for seed in options.seeds:
            with tempfile.TemporaryDirectory() as folder:
                keep(kind, seed, run(Path(folder), kind, SETTINGS[kind], seed))
    print(SEEDS_FILE.read_text(encoding="utf-8"))


def keep(kind: str, seed: int, results: dict[str, Any]) -> None:
    """Add one run to the results; results with other settings are dropped."""
    facts = json.loads(SEEDS_FILE.read_text(encoding="utf-8"))
    settings = json.loads(json.dumps(fingerprint(SETTINGS[kind])))
    found = facts.get(kind, {})
    runs = found["runs"] if found.get("settings") == settings else {}
    means = {arm["key"]: round(arm["mean"], 5) for arm in results["arms"]}
    runs[str(seed)] = {"means": means, "held": results["check"]["held"]}
    runs = {key: runs[key] for key in sorted(runs, key=int)}
    facts[kind] = {"settings": settings, "versions": results["versions"], "runs": runs}
    SEEDS_FILE.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
