"""What the study measures: one function per kind of run, each returns a JSON-able record."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpoe.models import compose_experts, load_expert
from mpoe.models.domains import forced
from mpoe_bench.composed.adapters import (
    adapters,
    drawn,
    keep,
    losses,
    merged_adapter,
    routed_adapters,
    trained,
)
from mpoe_bench.composed.texts import LENGTH, Texts, tenant_texts

PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Give me three names for a cat.",
    "Explain in two sentences why the sky is blue.",
    "Translate to Spanish: Good morning, my friend.",
    "How do I boil an egg?",
    "Name a prime number larger than 50 and say why it is prime.",
    "Write a polite reply that declines an invitation.",
)


@dataclass(frozen=True)
class Plan:
    """The study's file; see bench/studies/composed.toml."""

    title: str
    question: str
    seeds: list[int]
    rates: list[float]
    steps: int
    lengths: list[int]
    domains: list[str]
    forgetting: str
    probes: list[str]
    tenants: list[str]
    neurons: int
    rank: int

    def size(self, kind: str) -> int:
        return self.neurons if kind == "neurons" else self.rank

    def rate(self, kind: str, records: Mapping[str, Any]) -> float | None:
        """Best on the validation texts of all domains; ``None`` while one is missing."""
        keys = {
            rate: [own_key(kind, domain, self.steps, rate, self.seeds[0]) for domain in self.domains]
            for rate in self.rates
        }
        if any(key not in records for some in keys.values() for key in some):
            return None
        return min(keys, key=lambda rate: sum(records[key]["validation"] for key in keys[rate]))


def own_key(kind: str, domain: str, steps: int, rate: float, seed: int) -> str:
    return f"{kind} {domain} {steps} {rate:g} {seed}"


def mean(found: Tensor) -> float:
    return round(float(found.mean()), 5)


@dataclass
class Bench:
    """What every measurement needs: the plan, the base, its tokenizer, texts, a folder for experts."""

    plan: Plan
    base: Any
    tokenizer: Any
    texts: Texts
    folder: Path

    def place(self, key: str) -> Path:
        name = key.replace(" ", "-")
        return self.folder / (f"{name}.expert" if key.startswith("neurons") else name)

    def tests(self, model: Any) -> dict[str, Any]:
        """Losses on every domain's test text and the probes, and of every halfway request."""
        shown = {**self.texts.test, **self.texts.probes}
        found: dict[str, Any] = {name: mean(losses(model, ids)) for name, ids in shown.items()}
        found["requests"] = [round(float(loss), 4) for loss in losses(model, self.texts.halfway).mean(1)]
        return found

    def own(self, kind: str, domain: str, steps: int, rate: float, seed: int) -> dict[str, Any]:
        """Train an expert for a domain (or a tenant) and keep its file."""
        if domain in self.texts.train:
            text, validation, test = (
                part[domain] for part in (self.texts.train, self.texts.validation, self.texts.test)
            )
        else:
            text, validation, test = tenant_texts(self.tokenizer, domain)
        model = trained(kind, self.base, self.plan.size(kind), drawn([text], steps, seed), rate, seed)
        keep(model, self.place(own_key(kind, domain, steps, rate, seed)), text)
        record = {"validation": mean(losses(model, validation)), "test": mean(losses(model, test))}
        record |= {"base": mean(losses(self.base, test))} if domain not in self.texts.train else {}
        return record | {name: mean(losses(model, ids)) for name, ids in self.texts.probes.items()}

    def files(self, kind: str, records: Mapping[str, Any], seed: int) -> dict[str, Path]:
        """The domains' experts of a seed at the chosen rate."""
        rate = self.plan.rate(kind, records)
        assert rate is not None
        return {d: self.place(own_key(kind, d, self.plan.steps, rate, seed)) for d in self.plan.domains}

    def composed(self, files: Sequence[Path], **options: Any) -> Any:
        background = options.pop("background", None) or [{"input_ids": part} for part in self.texts.background.split(8)]
        return compose_experts(self.base, files, background=background, **options)


def _seen(texts: Texts) -> Callable[[str], list[dict[str, Tensor]]]:
    return lambda domain: [{"input_ids": part} for part in texts.train[domain][:256].split(8)]


def composed_of_seed(bench: Bench, records: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The mixture of a seed's files."""
    return bench.tests(bench.composed(list(bench.files("neurons", records, seed).values())))


def variants(bench: Bench, records: Mapping[str, Any]) -> dict[str, Any]:
    """The first seed's mixture with other statistics or another number of experts per token."""
    files = bench.files("neurons", records, bench.plan.seeds[0])
    experts, seen = [load_expert(file) for file in files.values()], _seen(bench.texts)

    def means_alone(statistics: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The class's mean with the background's covariance."""
        return {name: value if name.endswith(".mean") else base[name] for name, value in statistics.items()}

    whole = bench.composed(experts)
    background = whole.background_statistics
    bare = [dataclasses.replace(e, statistics=means_alone(e.statistics, background)) for e in experts]
    named = {e.name: seen(d) for e, d in zip(experts, files, strict=True)}
    return {
        "means alone": bench.tests(bench.composed(bare, background=background)),
        "with texts": bench.tests(bench.composed(experts, background=background, texts=named)),
        "top-1": bench.tests(bench.composed(experts, background=background, top_k=1)),
    }


def _chosen(mixture: Any, ids: Tensor) -> Tensor:
    """The request router: the expert, without none, that the routers prefer over all layers and the first half."""
    with torch.inference_mode():
        logits = mixture(input_ids=ids[:, : LENGTH // 2], output_router_logits=True).router_logits
    stacked = torch.stack([layer.view(len(ids), -1, layer.shape[-1]) for layer in logits])
    return stacked.softmax(-1)[..., :-1].mean((0, 2)).argmax(-1)


def request_router(bench: Bench, records: Mapping[str, Any]) -> dict[str, Any]:
    """One expert or adapter for a whole request, by its first half; and the best one for every token (an oracle)."""
    seed = bench.plan.seeds[0]
    mixture = bench.composed(list(bench.files("neurons", records, seed).values()))
    model = adapters(bench.base, bench.files("lora", records, seed))
    shown = {**bench.texts.test, **bench.texts.probes, "requests": bench.texts.halfway}
    found: dict[str, Any] = {"request router, LoRA": {}, "request router, neurons": {}, "oracle, neurons": {}}
    for text, ids in shown.items():
        chosen = torch.cat([_chosen(mixture, part) for part in ids.split(8)])
        of: dict[str, list[Tensor]] = {"LoRA": [], "neurons": []}
        for number, domain in enumerate(bench.plan.domains):
            model.set_adapter(domain)
            of["LoRA"].append(losses(model, ids))
            with forced(mixture, number):
                of["neurons"].append(losses(mixture, ids))
        for kind, each in of.items():
            picked = torch.stack(each)[chosen, torch.arange(len(ids))]
            by_request = [round(float(loss), 4) for loss in picked.mean(1)]
            found[f"request router, {kind}"][text] = by_request if text == "requests" else mean(picked)
        best = torch.stack(of["neurons"]).min(0).values
        found["oracle, neurons"][text] = (
            [round(float(x), 4) for x in best.mean(1)] if text == "requests" else mean(best)
        )
        right = bench.texts.first if text == "requests" else None
        if text in bench.plan.domains:
            right = torch.full((len(ids),), bench.plan.domains.index(text))
        if right is not None:
            found.setdefault("request router is right", {})[text] = round(float((chosen == right).float().mean()), 3)
    return found


def merges(bench: Bench, records: Mapping[str, Any]) -> dict[str, Any]:
    """Mean, TIES and DARE of the LoRAs, their weight chosen on validation texts; LoRA under the mixture's routers."""
    seed = bench.plan.seeds[0]
    files = bench.files("lora", records, seed)
    found = {
        "mean of LoRAs": bench.tests(merged_adapter(adapters(bench.base, files), list(files), "cat", 1 / len(files)))
    }
    for name, how in (("TIES", "ties_svd"), ("DARE", "dare_ties_svd")):
        tried = {}
        for weight in (0.3, 0.6, 1.0):
            model = merged_adapter(adapters(bench.base, files), list(files), how, weight, 0.5)
            tried[sum(mean(losses(model, ids)) for ids in bench.texts.validation.values())] = weight, model
        weight, model = tried[min(tried)]
        found[f"{name} of LoRAs"] = bench.tests(model) | {"weight": weight}
    mixture = bench.composed(list(bench.files("neurons", records, seed).values()))
    found["the same routers, LoRA"] = bench.tests(routed_adapters(adapters(bench.base, files), list(files), mixture))
    return found


def one_adapter(bench: Bench, records: Mapping[str, Any]) -> dict[str, Any]:
    """One LoRA on the domains in turn, and one on all of them at once, each with as many steps as all experts."""
    plan, train = bench.plan, bench.texts.train
    rate, seed = plan.rate("lora", records), plan.seeds[0]
    assert rate is not None
    model: Any = None
    found = {}
    for name, batches in (
        (
            "LoRA, domains in turn",
            [batch for domain in plan.domains for batch in drawn([train[domain]], plan.steps, seed)],
        ),
        ("LoRA, all at once", drawn([train[domain] for domain in plan.domains], plan.steps * len(plan.domains), seed)),
    ):
        model = trained("lora", bench.base, plan.rank, batches, rate, seed)
        found[name] = bench.tests(model)
    return found


def tenants(bench: Bench, records: Mapping[str, Any]) -> dict[str, Any]:
    """Mixtures of 2, 4, ... experts: the mean share of their own experts' gain; one removed and added again."""
    plan, seed = bench.plan, bench.plan.seeds[0]
    rate = plan.rate("neurons", records)
    assert rate is not None
    every = [*plan.domains, *plan.tenants]
    files = {domain: bench.place(own_key("neurons", domain, plan.steps, rate, seed)) for domain in every}
    tests = {d: bench.texts.test[d] if d in bench.texts.test else tenant_texts(bench.tokenizer, d)[2] for d in every}
    found: dict[str, Any] = {}
    background = bench.composed(list(files.values())[:1]).background_statistics
    for number in range(2, len(every) + 1, 2):
        some = every[:number]
        mixture = bench.composed([files[domain] for domain in some], background=background)
        found[str(number)] = {domain: mean(losses(mixture, tests[domain])) for domain in some}
        found[str(number)] |= {name: mean(losses(mixture, ids)) for name, ids in bench.texts.probes.items()}
    wrong = {}
    for domain in every:  # the best of the other experts, always on
        with_others = [number for number, other in enumerate(every) if other != domain]
        alone = []
        for number in with_others:
            with forced(mixture, number):
                alone.append(mean(losses(mixture, tests[domain])))
        wrong[domain] = min(alone)
    return found | {"best wrong expert": wrong}


def answers(bench: Bench, records: Mapping[str, Any]) -> dict[str, Any]:
    """How much the mixture changes the base's own answers: nats per token of them, and greedy tokens that are equal."""
    mixture = bench.composed(list(bench.files("neurons", records, bench.plan.seeds[0]).values()))
    told, equal, count = {"base": 0.0, "mixture": 0.0}, 0, 0
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        ids = bench.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            own = bench.base.generate(ids, max_new_tokens=48, do_sample=False)
            other = mixture.generate(ids, max_new_tokens=48, do_sample=False)
        start, new = ids.shape[1] - 1, own.shape[1] - ids.shape[1]
        for name, model in (("base", bench.base), ("mixture", mixture)):
            told[name] += float(losses(model, own)[:, start:].sum())
        same = own[0, : other.shape[1]] == other[0, : own.shape[1]]
        equal, count = equal + int(same[ids.shape[1] :].long().cumprod(0).sum()), count + new
    return {name: round(total / count, 4) for name, total in told.items()} | {
        "equal before the first other": equal / count
    }
