"""What `mpoe COMMAND --help` shows: the options that matter first, without importing what a command
needs to run.

`mpoe COMMAND --help all` asks the command itself.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Short(NamedTuple):
    """The usage line, and a few words about options by name."""

    usage: str
    options: Mapping[str, str]


_OVERWRITE = "replace what an earlier call wrote"
SHORT = {
    "train": Short(
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
    "compare": Short(
        "mpoe compare RUN_DIR RUN_DIR ... [--flag value ...]",
        {
            "output_dir": "folder for report.html and compare.json (mpoe_compare)",
            "overwrite": _OVERWRITE,
        },
    ),
    "evaluate": Short(
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
    "convert": Short(
        "mpoe convert IN OUT [--flag value ...]",
        {
            "num_experts": "experts of every feed-forward layer (8)",
            "top_k": "experts per token",
            "shape": "hidden, neurons, separable, paper, light: what the experts own (hidden)",
            "overwrite": _OVERWRITE,
        },
    ),
    "export": Short(
        "mpoe export IN OUT --to mixtral [--flag value ...]",
        {
            "to": "mixtral, qwen3_moe; of neurons granitemoeshared, qwen2_moe; or hub (mixtral)",
            "private": "of --to hub: a repository that others cannot see",
            "local": "of --to hub: OUT is a folder, ready to upload",
            "overwrite": _OVERWRITE,
        },
    ),
    "compose": Short(
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
    "plan": Short(
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
    "inspect": Short(
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
    "generate": Short(
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
    "info": Short(
        "mpoe info [FILE ...] [--json]",
        {
            "json": "print JSON instead of tables",
        },
    ),
    "demo": Short(
        "mpoe demo [--flag value ...]",
        {
            "output_dir": "folder for report.html, results, experts and model (mpoe_demo)",
            "compare": "compare dense, wider, Switch and MPO experts",
            "steps": "training steps per expert or arm",
            "seed": "of data order, routers and dropout (0)",
            "overwrite": _OVERWRITE,
        },
    ),
    "bench": Short(
        "mpoe bench [--flag value ...]",
        {
            "suite": "quick, planner, targets, layers, models or gpu (quick)",
            "device": "cpu or cuda (cpu)",
            "out": "folder for report.md and results.json (bench_results)",
            "minutes": "begin nothing new after so long",
            "overwrite": _OVERWRITE,
        },
    ),
}
