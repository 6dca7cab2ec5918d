"""The other fields of the comparison of quality: T5's spans, and adapters of a pretrained model, each on tiny data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from mpoe_bench.quality.mixture_of_lora import balance_losses
from mpoe_bench.quality.novels import NovelsField
from mpoe_bench.quality.plans import Plan
from mpoe_bench.quality.report import write_report
from mpoe_bench.quality.runs import arm_of, run_plan
from mpoe_bench.quality.spans import END, FIRST_SENTINEL, LENGTH, SPANS, SpansField, corrupt
from mpoe_bench.quality.training import Budget, convert, prepare, run_arm
from transformers import LlamaConfig, LlamaForCausalLM


class Letters:
    """A tokenizer of bytes."""

    eos_token_id = 0

    def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [list(text.encode()) for text in texts]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "austen").mkdir()
    for split in ("train", "validation", "test"):
        text = "\n\n".join(f"Paragraph {i} of {split} goes on for a while." for i in range(60))
        (folder / "austen" / f"{split}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def novels(data: Path) -> NovelsField:
    """A Llama of 32 with one layer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, num_key_value_heads=1, **sizes))
    return NovelsField(data, block=32, batch=2, held_out=4, given=(model, Letters()))


def test_corruption_loses_nothing() -> None:
    """Every sentinel replaced by its span gives the bytes back."""
    ids = torch.randint(0, FIRST_SENTINEL, (5, 61))
    inputs, labels = corrupt(ids, torch.Generator().manual_seed(1))
    assert inputs.shape == (5, 61 - SPANS * (LENGTH - 1))
    for row, left, right in zip(ids.tolist(), inputs.tolist(), labels.tolist(), strict=True):
        assert right[-1] == END
        spans = {right[i]: right[i + 1 : i + 1 + LENGTH] for i in range(0, SPANS * (LENGTH + 1), LENGTH + 1)}
        assert list(spans) == list(range(FIRST_SENTINEL, END))
        assert [x for value in left for x in spans.get(value, [value])] == row


@pytest.mark.parametrize("key", ["switch8", "upcycled_paper_two"])
def test_t5_learns_spans(data: Path, key: str) -> None:
    field = SpansField(data, model=16, layers=1, block=64, batch=4, held_out=4, domains=("novels",))
    first, more = (run_arm(field, arm_of(key), Budget(steps, 4e-3, 0)) for steps in (1, 6))
    assert more["test"] < first["test"]
    assert more["router"]["entropy"] <= 1.0
    assert field.feed_forward_weights() == 2 * 2 * 16 * 64


TRAINED = {
    "lora16": {"default"},
    "adapter8": {"auxiliary", "router"},
    "adapter_hidden": {"auxiliary", "router"},
    "mixlora8": {"first", "second", "router"},
}


@pytest.mark.parametrize("key", TRAINED)
def test_adapters_train_and_leave_the_rest(novels: NovelsField, key: str) -> None:
    if key == "lora16":
        pytest.importorskip("peft")
    arm = arm_of(key)
    model = convert(novels, arm, prepare(novels, arm, 0), 0)
    trained = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == TRAINED[key]
    record = run_arm(novels, arm, Budget(8, 2e-2, 0))
    assert record["test"] < record["before"]
    assert record["trained"] == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_adapters_are_compared_with_lora(novels: NovelsField, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    run_plan(Plan("novels", ("lora16", "adapter8"), 2, seeds=(0, 1)), novels, tmp_path, lambda _: None)
    text = write_report(tmp_path, novels)
    assert "Gain over LoRA, rank 16" in text
    assert f"Before training: {novels.before:.3f}" in text


def test_a_mixture_of_lora_starts_as_the_model_and_is_the_sum_of_its_experts(novels: NovelsField) -> None:
    dense = novels.dense_model(0)
    batch = next(novels.batches(0, 1))
    model = convert(novels, arm_of("mixlora8"), novels.dense_model(0), 0)
    torch.testing.assert_close(model(**batch).logits, dense(**batch).logits)
    mixture = model.model.layers[0].mlp
    for second in mixture.second.values():
        torch.nn.init.normal_(second)
    x = torch.randn(7, 32)
    decision = mixture.router(x)
    network = {name: getattr(mixture.network, name).weight for name in mixture.first}

    def expert(e: int, row: torch.Tensor) -> torch.Tensor:
        gate, up, down = (w + 2.0 * (mixture.first[n][e] @ mixture.second[n][e]).T for n, w in network.items())
        return down @ (torch.nn.functional.silu(gate @ row) * (up @ row))

    for row, y, gates, chosen in zip(x, mixture(x), decision.top_k_weights, decision.top_k_index, strict=True):
        expected = sum(gate * expert(int(e), row) for gate, e in zip(gates, chosen, strict=True))
        torch.testing.assert_close(y, expected)
    assert float(balance_losses(model).detach()) == pytest.approx(float(mixture.balance_loss.detach()))
    assert float(balance_losses(model).detach()) > 0.0


def test_domains_share_every_batch(novels: NovelsField, data: Path) -> None:
    (data / "sms_spam").mkdir(exist_ok=True)
    for split in ("train", "validation", "test"):
        rows = "".join(f"CALL NOW {i} AND WIN\tspam\n" for i in range(40))
        (data / "sms_spam" / f"{split}.tsv").write_text("sentence\tlabel\n" + rows)
    field = dataclasses.replace(novels, domains=("novels", "messages"), batch=4)
    capitals = [(batch["input_ids"] < ord("a")).float().mean(1) > 0.9 for batch in field.batches(0, 3)]
    assert [int(batch.sum()) for batch in capitals] == [2, 2, 2]
    found = field.evaluate(field.dense_model(0), "test")
    assert found.parts.keys() == {"novels", "messages"}
    assert found.score == pytest.approx(sum(found.parts.values()) / 2)


def test_a_pretrained_model_is_not_widened(novels: NovelsField) -> None:
    with pytest.raises(ValueError, match="got hidden size 8"):
        novels.dense_model(0, hidden=8)
