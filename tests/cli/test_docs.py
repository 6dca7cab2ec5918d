"""Commands and examples of the README and of docs/ run, on small data; what pages list is what
there is."""

import os
import re
import shlex
import subprocess

import pytest

import mpoe.config
import mpoe.data
import mpoe.layers
import mpoe.models
import mpoe.training
import mpoe_kernels
from mpoe import load_mpoe
from mpoe.data.stand_in_models import stand_in_path
from mpoe.data.tasks import standard_specs
from tests.assertions import run_python
from tests.cases import ROOT

INSTALL = "python -m pip install"  # CI runs these as they stand
LAUNCH = "torchrun"  # several processes: slow, below


def blocks(text, language):
    """Fenced blocks of a page; those under a `<!-- run: ... -->` mark belong to CI."""
    found = re.findall(rf"(<!-- run: \w+ -->\n)?```{language}\n(.*?)```", text, flags=re.S)
    return [block for mark, block in found if not mark]


def run_commands(cli, text):
    """Every `mpoe` command of a page, with small models and few steps; returns the names of those
    that ran."""
    ran = set()
    for line in "".join(blocks(text, "bash")).splitlines():
        if not line.strip() or INSTALL in line or line.startswith(LAUNCH):
            continue
        program, command, *arguments = map(shlex.quote, shlex.split(line, comments=True))
        assert program == "mpoe", line
        names = {"path/to/t5"} | ({"t5-base"} if command == "convert" else set())
        arguments = [str(stand_in_path("t5")) if a in names else a for a in arguments]
        arguments = [str(stand_in_path("gpt2")) if a == "path/to/model" else a for a in arguments]
        if command == "train":
            arguments.append("--max_steps=1 --per_device_train_batch_size=4 --max_target_length=4")
            arguments.append("--save_strategy=no --use_cpu")
        if command == "bench":  # tests/bench measures
            arguments.append("--scale tiny --overwrite --minutes .001")
        cli(command, *arguments)
        ran.add(command)
    return ran


def write_files(text, folder):
    """Every YAML block of a page, into the file that its first line names: ``# my_tasks.yaml``."""
    for block in blocks(text, "yaml"):
        (folder / block.split("\n", 1)[0].removeprefix("# ")).write_text(block, encoding="utf-8")


def run_blocks(text):
    """The Python blocks of a page, one after the other in one namespace, on our tiny T5."""
    names = {}
    for block in blocks(text, "python"):
        exec(block.replace('"t5-base"', repr(str(stand_in_path("t5")))), names)
    return names


DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def folders_of_the_pages(sentiment, folder):
    """What readers have: ``my_folder`` and ``law``."""
    sentiment.rename(folder / "my_folder")
    (folder / "law").mkdir()
    sentence = "In case {} the court found for the plaintiff.\n"
    (folder / "law/train.txt").write_text("".join(map(sentence.format, range(900))))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(cli, page, sentiment, tmp_path, monkeypatch):
    text = page.read_text(encoding="utf-8")
    fences = len(re.findall(r"^```\w", text, flags=re.M)) - len(
        re.findall(r"^<!-- run: ", text, flags=re.M)
    )
    assert fences == sum(
        len(blocks(text, language)) for language in ("python", "bash", "text", "yaml")
    ), "a block nobody runs"
    monkeypatch.chdir(tmp_path)
    folders_of_the_pages(sentiment, tmp_path)
    write_files(text, tmp_path)
    run_blocks(text)
    ran = run_commands(cli, text)
    assert ran == {"train", "compose", "plan"} or page.stem != "README"


def test_every_described_task_is_listed():
    rows = [
        line
        for line in (DOCS / "tasks.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| `")
    ]
    for name, spec in standard_specs().items():
        (row,) = (row.split(" | ") for row in rows if f"`{name}`" in row.split(" | ")[0])
        assert set(row[1].split(", ")) == set(spec.labels) or not spec.labels, name
        assert row[2] == ", ".join(spec.metrics), name
        assert row[3].removesuffix(" |") == (
            spec.hub.path if spec.hub else "(a folder of yours)"
        ), name


def test_every_public_name_is_described():
    pages = {
        name: (DOCS / f"api_{name}.md").read_text() for name in ("mpoe", "parts", "data", "kernels")
    }
    words = {name: set(re.findall(r"\w+", text)) for name, text in pages.items()}
    for package, described in (
        (mpoe, words["mpoe"]),
        (mpoe.data, words["data"]),
        (mpoe_kernels, words["kernels"]),
    ):
        assert {*package.__all__} - {"__version__"} <= described
    for package in (
        mpoe.config,
        mpoe.layers,
        mpoe.models,
        mpoe.training,
    ):  # of the families' classes one
        names = {
            name
            for name in package.__all__
            if name not in dir(mpoe.models) or name not in mpoe.models._CLASSES
        }
        assert names <= words["mpoe"] | words["parts"]


README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_links_lead_somewhere():
    links = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    assert len(links) >= 10
    absent = [link for link in links if not (ROOT / link.partition("#")[0]).exists()]
    assert not absent


def test_lines_of_the_readme_fit_a_window():
    long = [line for line in README.splitlines() if len(line) > 120 and not line.startswith("|")]
    assert not long


def test_it_says_so_until_a_gpu_was_measured():
    """`bench/gpu.sh` leaves a list of its parts beside its report, also when it only walks them on
    a CPU."""
    lists = (ROOT / "bench/results").glob("*/visit.md")
    visits = [file for file in lists if "no CUDA device was found" not in file.read_text()]
    assert ("nothing was measured on a GPU yet" in " ".join(README.split())) == (not visits)


def listed_folders():
    """Folders of the tree, as paths."""
    tree = CONTRIBUTING.partition("<!-- tree:")[2].partition("```text\n")[2].partition("```")[0]
    paths, package = [], ""
    for line in tree.splitlines():
        name = line.split()[0].rstrip("/")
        package = package if line.startswith("  ") else name
        paths.append(name if name == package else f"{package}/{name}")
    return paths


def test_the_tree_is_the_real_one(lacks):
    listed = listed_folders()
    for package in ("mpoe", "mpoe_kernels"):
        inside = {
            f"{package}/{path.parent.name}" for path in (ROOT / package).glob("*/__init__.py")
        }
        assert inside == {path for path in listed if path.startswith(f"{package}/")}
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    if not tracked:
        lacks("not a checkout of git")
    folders = {
        file.partition("/")[0] for file in tracked if "/" in file and not file.startswith(".")
    }
    assert folders == {path for path in listed if "/" not in path}


PAGE = (ROOT / "docs/scale.md").read_text(encoding="utf-8")
LINES = [line for block in blocks(PAGE, "bash") for line in block.splitlines()]


def launch(folder, example):
    """Run a launch line as it stands on the page, with few steps and small batches; returns what it
    printed."""
    launches = [line for line in LINES if line.startswith(LAUNCH)]
    assert sorted("examples/" in line for line in launches) == [False, True]
    arguments = next(shlex.split(line)[1:] for line in launches if ("examples/" in line) == example)
    if example:
        arguments = [str(ROOT / a) if a.startswith("examples/") else a for a in arguments] + ["3"]
    else:
        arguments[arguments.index("--max_steps") + 1] = "2"
        arguments += ["--per_device_train_batch_size", "4", "--use_cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = run_python("-m", "torch.distributed.run", *arguments, cwd=folder, env=environment)
    saved = folder / next(a for a in arguments if a.startswith("runs/"))
    assert type(load_mpoe(saved)).__name__ == "MPOET5ForConditionalGeneration"
    return out


@pytest.mark.slow
def test_the_launch_line_runs(sentiment, tmp_path):
    folders_of_the_pages(sentiment, tmp_path)
    launch(tmp_path, example=False)
    assert (tmp_path / "runs/two" / "results.json").is_file()


@pytest.mark.slow
def test_the_launch_line_of_the_sharded_loop_runs(tmp_path):
    assert len(re.findall(r"step \d: loss \d", launch(tmp_path, example=True))) == 2
