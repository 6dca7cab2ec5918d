"""Experts go to the hub in one commit; its client is replaced by one that notes what it is asked."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from mpoe.models import push_expert


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []

    class Api:
        def __init__(self, token: str | None = None) -> None:
            found.append(token)

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            found.append((repo_id, options))
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def create_commit(self, repo_id: str, operations: list[Any], commit_message: str) -> Any:
            found.append((repo_id, {each.path_in_repo: each.path_or_fileobj for each in operations}, commit_message))
            return SimpleNamespace(commit_url="https://hub/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return found


def test_a_folder_of_experts_is_one_commit(domains: SimpleNamespace, asked: list[Any]) -> None:
    folder = domains.files[0].parent
    (folder / "notes.txt").write_text("not an expert")
    assert push_expert(folder, "experts", private=True, token="t") == "https://hub/commit/1"
    token, (repository, options), (target, files, message) = asked
    assert (token, repository, target) == ("t", "experts", "me/experts")
    assert options == {"private": True, "exist_ok": True}
    assert list(files) == ["domain0.expert", "domain1.expert", "README.md"]
    card = files["README.md"].decode()
    assert "library_name: mpoe" in card
    assert "| domain1.expert | LlamaForCausalLM | 32 |" in card
    assert message == "Experts domain0, domain1"


def test_one_file(domains: SimpleNamespace, asked: list[Any]) -> None:
    push_expert(domains.files[1], "experts")
    assert list(asked[2][1]) == ["domain1.expert", "README.md"]


def test_nothing_is_sent_of_a_damaged_file(domains: SimpleNamespace, asked: list[Any], tmp_path: Path) -> None:
    (tmp_path / "a.expert").write_bytes(domains.files[0].read_bytes()[:-9])
    with pytest.raises(ValueError, match="whole safetensors file"):
        push_expert(tmp_path, "experts")
    (tmp_path / "a.expert").unlink()
    with pytest.raises(ValueError, match=r"holds no \*.expert"):
        push_expert(tmp_path, "experts")
    assert not asked
