"""Experts on the Hugging Face Hub: a repository holds files of experts and a card that says what they fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mpoe.models.expert_files import Expert, load_expert

CARD = """---
library_name: mpoe
tags: [mpoe, mixture-of-experts]
---
# Experts

Each file is an expert: hidden neurons that were trained beside a frozen base model. `mpoe compose BASE FILE ...` makes
a mixture of several, without their texts; `mpoe info FILE` says what a file needs.

| file | base | neurons per layer | SHA-256 of the base |
|---|---|---|---|
{rows}
"""


def _row(file: Path, expert: Expert) -> str:
    facts = expert.facts
    return f"| {file.name} | {facts['base_name'] or facts['model']} | {expert.neurons} | `{facts['base'][:16]}` |"


def push_expert(path: str | Path, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Upload an expert's file, or all files ``*.expert`` of a folder, in one commit with a card.

    Args:
        path: of the file or the folder; nothing else of the folder is uploaded.
        repo_id: such as ``"me/experts"``; made if it is not there.
        private, token: as in `huggingface_hub.HfApi.create_repo`.

    Returns:
        The address of the commit.

    Raises:
        TypeError, ValueError: as `load_expert`, before anything is uploaded; a folder without experts.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    place = Path(path)
    files = sorted(place.glob("*.expert")) if place.is_dir() else [place]
    if not files:
        raise ValueError(f"path must be an expert's file or a folder with some; {place} holds no *.expert")
    rows = "\n".join(_row(file, load_expert(file)) for file in files)
    api: Any = HfApi(token=token)
    repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    contents: dict[str, Any] = {file.name: file for file in files}
    contents["README.md"] = CARD.format(rows=rows).encode()
    operations = [CommitOperationAdd(name, value) for name, value in contents.items()]
    message = f"Experts {', '.join(file.stem for file in files)}"
    return str(api.create_commit(repository, operations, commit_message=message).commit_url)
