"""What `mpoe COMMAND --help` shows: the options that matter first, without importing what a command
needs to run.

`mpoe COMMAND --help all` asks the command itself.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Command(NamedTuple):
    """What it does, its usage line, and a few words about options by name."""

    about: str
    usage: str
    options: Mapping[str, str]


_OVERWRITE = "replace what an earlier call wrote"
COMMANDS = {
    "train": Command(
        "Train: mpoe train [CONFIG.json|yaml] --flag value ... (flags win over the file).",
        "mpoe train [CONFIG.json|yaml] --output_dir DIR [--flag value ...]",
        {
            "model": "t5 or gpt2 (tiny stand-ins), a folder, or a hub name (t5-base)",
            "data_dir": "folder with train, validation and test files, or owner/name on the hub",
            "tasks": "tasks by name, instead: folders in data_dir, rte, imdb, doc_module, ...",
            "output_dir": "folder of the run: checkpoints, metrics, report, the final model",
            "num_experts": "experts of every feed-forward layer (8)",
            "top_k": "experts per token (2; of neurons up to 8; of other shapes than hidden 1)",
            "shape": "hidden, neurons, separable, paper, light: what the experts own (hidden)",
            "baseline": "dense, wider or switch: what the mixture is compared with",
            "expert": "train one expert as a file, NAME.expert, for mpoe compose",
            "neurons": "its size: hidden neurons beside every network (64)",
            "save_base": "keep a copy of the base beside the expert",
            "adapter": "train experts and routers alone",
            "max_steps": "optimizer steps",
            "num_train_epochs": "or passes over the data (3)",
            "per_device_train_batch_size": "items per step and device (8)",
            "learning_rate": "default: chosen by family, shape and width",
            "find_rate": "search for it first: 30 steps with each of three to five",
            "max_source_length": "tokens of the input, or of a block of running text (128)",
            "max_target_length": "tokens of the answer (16)",
            "seed": "of routers, dropout and the order of the data (42)",
            "use_cpu": "stay on the CPU",
            "overwrite": "replace the run in output_dir",
            "resume": "continue the run in output_dir at its last checkpoint",
        },
    ),
    "compare": Command(
        "Put runs side by side: mpoe compare RUN_DIR RUN_DIR ... (parameters, settings, "
        "scores, curves, time).",
        "mpoe compare RUN_DIR RUN_DIR ... [--flag value ...]",
        {
            "output_dir": "folder for report.html and compare.json (mpoe_compare)",
            "overwrite": _OVERWRITE,
        },
    ),
    "evaluate": Command(
        "Evaluate a saved model: mpoe evaluate MODEL_DIR --data_dir DIR --split test.",
        "mpoe evaluate MODEL_DIR [--flag value ...]",
        {
            "data_dir": "folder with the items; default: the run's",
            "tasks": "or tasks by name",
            "split": "train, validation or test (test)",
            "n_test": "so many items, the same for every model",
            "batch_size": "items per batch (128)",
            "output_file": "also write the scores here, as JSON",
        },
    ),
    "convert": Command(
        "Convert a dense checkpoint: mpoe convert IN OUT [--num_experts 8 --shape separable ...].",
        "mpoe convert IN OUT [--flag value ...]",
        {
            "num_experts": "experts of every feed-forward layer (8)",
            "top_k": "experts per token",
            "shape": "hidden, neurons, separable, paper, light: what the experts own (hidden)",
            "overwrite": _OVERWRITE,
        },
    ),
    "export": Command(
        "Export a mixture for other tools: mpoe export IN OUT --to mixtral|granitemoeshared|...",
        "mpoe export IN OUT --to mixtral [--flag value ...]",
        {
            "to": "mixtral, qwen3_moe; of neurons granitemoeshared, qwen2_moe; or hub (mixtral)",
            "private": "of --to hub: a repository that others cannot see",
            "local": "of --to hub: OUT is a folder, ready to upload",
            "overwrite": _OVERWRITE,
        },
    ),
    "compose": Command(
        "Make one mixture of experts trained apart: mpoe compose BASE law.expert med.expert "
        "--output_dir OUT.",
        "mpoe compose BASE EXPERT ... --output_dir OUT [--flag value ...]",
        {
            "output_dir": "folder of the mixture",
            "background": "files of what must stay as it is, beside what the base itself says",
            "preference": "of 'none', in units of a logit: more is quieter, less keeps more of "
            "each expert",
            "top_k": "experts per token (all, at most 8)",
            "add": "a mixture that gets these experts more",
            "remove": "names of experts of --add to leave out",
            "texts": "a file of each one's domain: for fine-tunes and LoRA adapters",
            "neurons": "of experts fitted to LoRA adapters (as large as the adapter)",
            "merge": "one dense network with all experts' neurons, without a router",
            "overwrite": _OVERWRITE,
        },
    ),
    "plan": Command(
        "Plan before converting: mpoe plan MODEL_OR_CONFIG --experts 8 --shape separable.",
        "mpoe plan MODEL_OR_CONFIG [--flag value ...]",
        {
            "experts": "experts of every feed-forward layer (8)",
            "top_k": "experts per token",
            "shape": "what the experts own (hidden)",
            "tokens": "of one device in one step (2048)",
            "inference": "forward only",
            "json": "also write everything, matrix by matrix, to this file",
        },
    ),
    "inspect": Command(
        'Look inside: mpoe inspect MODEL_DIR [--text "..." --output_dir DIR]: routes, load, bonds.',
        "mpoe inspect MODEL [--flag value ...]",
        {
            "output_dir": "folder for report.html and inspect.json (mpoe_inspect)",
            "text": "sentences whose tokens are followed",
            "texts": "of a mixture of experts: a file of each domain, for what each expert is "
            "worth",
            "data_dir": "folder with the items that the load is counted on",
            "num_items": "at most so many of them",
            "overwrite": _OVERWRITE,
        },
    ),
    "generate": Command(
        "Generate text with a saved model.",
        "mpoe generate MODEL_DIR --prompt TEXT [--flag value ...]",
        {
            "prompt": "text to continue; may be repeated",
            "file": "text file with one prompt per line",
            "max_new_tokens": "tokens to write at most (32)",
            "do_sample": "draw tokens at random",
            "temperature": "of sampling (1)",
            "seed": "of sampling (0)",
        },
    ),
    "info": Command(
        "Show versions, kernel backends (and why the others cannot run here) and devices; or "
        "experts' files.",
        "mpoe info [FILE ...] [--json]",
        {
            "json": "print JSON instead of tables",
        },
    ),
    "demo": Command(
        "Train three experts apart and compose them, on texts that are here (--compare: dense, "
        "Switch, MPOE).",
        "mpoe demo [--flag value ...]",
        {
            "output_dir": "folder for report.html, results, experts and model (mpoe_demo)",
            "compare": "compare dense, wider, Switch and MPO experts",
            "steps": "training steps per expert or arm",
            "seed": "of data order, routers and dropout (0)",
            "overwrite": _OVERWRITE,
        },
    ),
    "bench": Command(
        "Measure MPO experts against the dense layer and their peers on this machine.",
        "mpoe bench [--flag value ...]",
        {
            "suite": "quick, planner, targets, layers or models (quick)",
            "device": "cpu or cuda (cpu)",
            "out": "folder for report.md and results.json (bench_results)",
            "minutes": "begin nothing new after so long",
            "overwrite": _OVERWRITE,
        },
    ),
}


def show_short_help(command: str) -> None:
    """Print what a command does, and a line for each option that matters first."""
    about, usage, options = COMMANDS[command]
    width = max(map(len, options)) + 2
    print(f"Usage: {usage}\n\n{about}\n")
    for name, words in options.items():
        print(f"  --{name:{width}}{words}")
    print(f"\nAll others, with their defaults: mpoe {command} --help all")
