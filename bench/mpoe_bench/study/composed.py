"""A study of experts that are trained apart and composed: neurons and LoRA beside one base, and its
runs."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpoe.models import collect_statistics, compose_experts, load_expert, save_expert, start_expert
from mpoe.models.composition import forced
from mpoe_bench.study.arms import BETAS, train_steps
from mpoe_bench.study.plan import Records, read_composition, run_key
from mpoe_bench.study.tables import composed_table
from mpoe_bench.study.texts import LENGTH, read_texts, tenant_texts

BATCH = 4
SAMPLED = 64  # pieces for an expert's statistics
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
KINDS = ("neurons", "lora")
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


def drawn(train_pieces: Sequence[Tensor], steps: int, seed: int) -> list[Tensor]:
    """Batches of each text in turn, the same for every kind of expert."""
    generator = torch.Generator().manual_seed(seed)
    texts = [train_pieces[step % len(train_pieces)] for step in range(steps)]
    return [text[torch.randint(len(text), (BATCH,), generator=generator)] for text in texts]


def trained(
    kind: str, base: Any, size: int, batches: Sequence[Tensor], rate: float, seed: int
) -> Any:
    """An expert (``kind`` "neurons") or a LoRA adapter beside ``base``, on its feed-forward
    networks, trained by AdamW.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    torch.manual_seed(seed)
    config = LoraConfig(
        r=size, lora_alpha=2 * size, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM"
    )
    model = (
        start_expert(base, size)
        if kind == "neurons"
        else get_peft_model(copy.deepcopy(base), config)
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(parameters, lr=rate, betas=BETAS, weight_decay=0.0, fused=True)
    train_steps(model.train(), adam, len(batches), enumerate(batches))
    return model.eval()


@torch.inference_mode()
def losses(model: Any, ids: Tensor) -> Tensor:
    """Of every token that is predicted, float32 ``[N, LENGTH - 1]``."""
    found = []
    for part in ids.split(8):
        logits = model(input_ids=part).logits
        own = F.cross_entropy(logits[:, :-1].flatten(0, 1), part[:, 1:].flatten(), reduction="none")
        found.append(own.view(len(part), -1))
    return torch.cat(found)


def adapters(base: Any, places: Mapping[str, Path]) -> Any:
    """One model with several adapters, by name."""
    names = iter(places.items())
    first, place = next(names)
    model = PeftModel.from_pretrained(copy.deepcopy(base), str(place), adapter_name=first)
    for name, place in names:
        model.load_adapter(str(place), adapter_name=name)
    return model.eval()


class RoutedAdapters(nn.Module):
    """A feed-forward network whose LoRA adapters are mixed by a router, token by token; the last
    expert is none."""

    def __init__(
        self, network: nn.Module, names: Sequence[str], weight: Tensor, top_k: int
    ) -> None:
        super().__init__()
        self.network, self.names, self.top_k = network, list(names), top_k
        self.register_buffer("weight", weight.float())

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x @ self.weight.mT).topk(self.top_k)
        gates = torch.zeros(*x.shape[:-1], len(self.weight)).scatter(
            -1, chosen.indices, chosen.values.softmax(-1)
        )
        layers = [layer for layer in self.network.modules() if isinstance(layer, LoraLayer)]
        y = torch.zeros_like(x)
        for number, name in enumerate([*self.names, None]):
            for layer in layers:
                layer.enable_adapters(name is not None)
                if name is not None:
                    layer.set_adapter([name])
            y = y + gates[..., number : number + 1] * self.network(x)
        return y


def mean(found: Tensor) -> float:
    return round(float(found.mean()), 5)


def by_request(found: Tensor) -> list[float]:
    return [round(float(loss), 4) for loss in found.mean(1)]


def batched(ids: Tensor) -> list[dict[str, Tensor]]:
    return [{"input_ids": part} for part in ids.split(8)]


def started(arguments: argparse.Namespace) -> tuple[Path, Any, Any]:
    """The folder that keeps files of experts, the tokenizer, and the base in float32.

    Raises:
        ValueError: an option that is needed and missing.
    """
    for name in ("data_dir", "model", "work_dir"):
        if getattr(arguments, name) is None:
            raise ValueError(f"{name} must be given for experts that are composed; got none")
    folder: Path = arguments.work_dir
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(arguments.model)
    base: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    base.generation_config.pad_token_id = tokenizer.eos_token_id
    return folder, tokenizer, base


class ComposedStudy:
    """Makes the runs; its methods are those of `ArmsStudy`."""

    def __init__(self, file: Path) -> None:
        self.plan = read_composition(file)

    def prepare(self, arguments: argparse.Namespace) -> None:
        self.folder, self.tokenizer, self.base = started(arguments)
        self.texts = read_texts(
            self.tokenizer, arguments.data_dir, self.plan.domains, self.plan.probes
        )

    def waiting(self, records: Records) -> list[str]:
        return [key for key in self.runs(records) if key not in records]

    def table(self, records: Records) -> str:
        return composed_table(self.plan, records)

    def make(self, key: str, records: Records) -> dict[str, Any]:
        begin, (what, _, rest) = time.process_time(), key.partition(" ")
        if what in KINDS:
            domain, steps, rate, seed = rest.rsplit(" ", 3)
            found: Any = self.own(what, domain, int(steps), float(rate), int(seed))
        elif what == "base":
            found = self.tests(self.base)
        elif what == "composed":
            found = self.tests(self.mixture(records, int(rest)))
        else:
            found = getattr(self, what)(records)
        if isinstance(found, Iterator):
            found = {name: self.tests(model) for name, model in found}
        return found | {"cpu_seconds": round(time.process_time() - begin)}

    def runs(self, records: Records) -> Iterator[str]:
        """Every run whose rate is known, in its order."""
        plan, first = self.plan, self.plan.seeds[0]
        yield "base"
        for kind, rate in itertools.product(KINDS, plan.rates):
            yield from (run_key(kind, domain, plan.steps, rate, first) for domain in plan.domains)
        if not all(plan.rate(kind, records) for kind in KINDS):
            return
        yield from (f"composed {first}", "merges", "variants", "request_router")
        for seed in plan.seeds[1:]:
            for kind in KINDS:
                yield from (plan.key(kind, domain, seed, records) for domain in plan.domains)
            yield f"composed {seed}"
        for kind in KINDS:
            yield from (
                plan.key(kind, plan.forgetting, first, records, steps) for steps in plan.lengths
            )
        yield "one_adapter"
        yield from (plan.key("neurons", tenant, first, records) for tenant in plan.tenants)
        yield from ("tenants", "answers")

    # ------------------------------------------------------------ parts

    def place(self, key: str) -> Path:
        name = key.replace(" ", "-")
        return self.folder / (f"{name}.expert" if key.startswith("neurons") else name)

    def files(
        self, kind: str, records: Records, seed: int, names: Sequence[str] = ()
    ) -> dict[str, Path]:
        """Experts of a seed at the chosen rate, by default the domains'; those without a file are
        trained again."""
        found, rate = {}, self.plan.rate(kind, records)
        assert rate is not None
        for domain in names or self.plan.domains:
            found[domain] = self.place(run_key(kind, domain, self.plan.steps, rate, seed))
            if not found[domain].exists():
                self.own(kind, domain, self.plan.steps, rate, seed)
        return found

    @cached_property
    def background(self) -> Mapping[str, Tensor]:
        """The base's statistics on texts of no domain."""
        some = next(self.folder.glob("*.expert"))
        return compose_experts(
            self.base, [some], background=batched(self.texts.background)
        ).background_statistics

    def composed(self, parts: Sequence[Any], **options: Any) -> Any:
        """The mixture of experts or their files, with the routers that were the default then."""
        settings: dict[str, Any] = {"top_k": 2, "sharpness": 3.0, "preference": 0.0}
        return compose_experts(
            self.base, parts, **{"background": self.background, **settings, **options}
        )

    def mixture(self, records: Records, seed: int) -> Any:
        """Of a seed's files."""
        return self.composed(list(self.files("neurons", records, seed).values()))

    def tests(self, model: Any) -> dict[str, Any]:
        """Losses on every domain's test text and the probes, and of every halfway request."""
        shown = {**self.texts.test, **self.texts.probes}
        found: dict[str, Any] = {name: mean(losses(model, ids)) for name, ids in shown.items()}
        return found | {"requests": by_request(losses(model, self.texts.halfway))}

    # ------------------------------------------------------------ runs

    def own(self, kind: str, domain: str, steps: int, rate: float, seed: int) -> dict[str, Any]:
        """Train an expert for a domain (or a tenant) and keep its file."""
        known = self.texts.splits.get(domain)
        text, validation, test = known or tenant_texts(self.tokenizer, domain)
        try:
            model = trained(
                kind, self.base, self.plan.size(kind), drawn([text], steps, seed), rate, seed
            )
        except FloatingPointError as error:
            return {"diverged": f"the loss {error}", "validation": math.inf, "test": math.inf}
        place = self.place(run_key(kind, domain, steps, rate, seed))
        if kind == "neurons":
            save_expert(model, place, statistics=collect_statistics(model, batched(text[:SAMPLED])))
        else:
            model.save_pretrained(str(place))
        record = {"validation": mean(losses(model, validation)), "test": mean(losses(model, test))}
        record |= {} if known else {"base": mean(losses(self.base, test))}
        return record | {name: mean(losses(model, ids)) for name, ids in self.texts.probes.items()}

    def merges(self, records: Records) -> Iterator[tuple[str, Any]]:
        """Mean, TIES and DARE of the LoRAs, by PEFT, their weight chosen on validation texts; LoRA
        under the mixture's routers."""
        files = self.files("lora", records, self.plan.seeds[0])

        def merged(how: str, weight: float, density: float | None = None) -> Any:
            """A weighted sum ("cat") or another of PEFT's merges, of as large a rank as all
            together."""
            torch.manual_seed(0)  # DARE drops at random
            model = adapters(self.base, files)
            rank = None if how == "cat" else self.plan.rank * len(files)
            options: dict[str, Any] = {
                "combination_type": how,
                "density": density,
                "svd_rank": rank,
            }
            model.add_weighted_adapter(list(files), [weight] * len(files), "merged", **options)
            model.set_adapter("merged")
            return model

        def validation(model: Any) -> float:
            return sum(mean(losses(model, ids)) for _, ids, _ in self.texts.splits.values())

        yield "mean of LoRAs", merged("cat", 1 / len(files))
        for name, how in (("TIES", "ties_svd"), ("DARE", "dare_ties_svd")):
            yield (
                f"{name} of LoRAs",
                min((merged(how, weight, 0.5) for weight in (0.3, 0.6, 1.0)), key=validation),
            )
        routed, mixture = adapters(self.base, files), self.mixture(records, self.plan.seeds[0])
        for own, other in zip(
            routed.get_base_model().model.layers, mixture.model.layers, strict=True
        ):
            own.mlp = RoutedAdapters(
                own.mlp, list(files), other.mlp.router.weight, mixture.mpoe_config.top_k
            )
        yield "the same routers, LoRA", routed

    def variants(self, records: Records) -> Iterator[tuple[str, Any]]:
        """The first seed's mixture with other statistics or another number of experts per token."""
        files, background = self.files("neurons", records, self.plan.seeds[0]), self.background
        loaded = [load_expert(file) for file in files.values()]

        def means_alone(statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
            """The class's mean with the background's covariance."""
            return {
                name: value if name.endswith(".mean") else background[name]
                for name, value in statistics.items()
            }

        bare = [dataclasses.replace(e, statistics=means_alone(e.statistics)) for e in loaded]
        seen = {
            e.name: batched(self.texts.splits[d][0][:SAMPLED])
            for e, d in zip(loaded, files, strict=True)
        }
        yield "means alone", self.composed(bare)
        yield "with texts", self.composed(loaded, texts=seen)
        yield "top-1", self.composed(loaded, top_k=1)

    def request_router(self, records: Records) -> dict[str, Any]:
        """One expert or adapter for a whole request, by the routers' preference over all layers and
        its first half; and the best one for every token (an oracle)."""
        domains, mixture = self.plan.domains, self.mixture(records, self.plan.seeds[0])
        model = adapters(self.base, self.files("lora", records, self.plan.seeds[0]))

        @torch.inference_mode()
        def chosen(ids: Tensor) -> Tensor:
            logits = mixture(
                input_ids=ids[:, : LENGTH // 2], output_router_logits=True
            ).router_logits
            stacked = torch.stack([layer.view(len(ids), -1, layer.shape[-1]) for layer in logits])
            return stacked.softmax(-1)[..., :-1].mean((0, 2)).argmax(-1)  # the last is none

        found: dict[str, Any] = {
            "request router, LoRA": {},
            "request router, neurons": {},
            "oracle, neurons": {},
        }
        right: dict[str, float] = {}
        for text, ids in {
            **self.texts.test,
            **self.texts.probes,
            "requests": self.texts.halfway,
        }.items():
            told = by_request if text == "requests" else mean
            picked = torch.cat([chosen(part) for part in ids.split(8)])
            of: dict[str, list[Tensor]] = {"LoRA": [], "neurons": []}
            for number, domain in enumerate(domains):
                model.set_adapter(domain)
                of["LoRA"].append(losses(model, ids))
                with forced(mixture, number):
                    of["neurons"].append(losses(mixture, ids))
            for kind, each in of.items():
                found[f"request router, {kind}"][text] = told(
                    torch.stack(each)[picked, torch.arange(len(ids))]
                )
            found["oracle, neurons"][text] = told(torch.stack(of["neurons"]).min(0).values)
            if text not in self.texts.probes:
                wanted = (
                    self.texts.first if text == "requests" else torch.tensor(domains.index(text))
                )
                right[text] = round(float((picked == wanted).float().mean()), 3)
        return found | {"request router is right": right}

    def one_adapter(self, records: Records) -> Iterator[tuple[str, Any]]:
        """One LoRA on the domains in turn, and one on all of them at once, each with as many steps
        as all"""
        plan, texts = self.plan, [text for text, _, _ in self.texts.splits.values()]
        rate, seed = plan.rate("lora", records), plan.seeds[0]
        assert rate is not None
        in_turn = [batch for text in texts for batch in drawn([text], plan.steps, seed)]
        at_once = drawn(texts, plan.steps * len(texts), seed)
        for name, batches in (("LoRA, domains in turn", in_turn), ("LoRA, all at once", at_once)):
            yield name, trained("lora", self.base, plan.rank, batches, rate, seed)

    def tenants(self, records: Records) -> dict[str, Any]:
        """Mixtures of 2, 4, ... experts: the mean share of their own experts' gain; the best of the
        others, always on."""
        every, test = [*self.plan.domains, *self.plan.tenants], dict(self.texts.test)
        test |= {tenant: tenant_texts(self.tokenizer, tenant)[2] for tenant in self.plan.tenants}
        files, found = self.files("neurons", records, self.plan.seeds[0], every), {}
        for number in range(2, len(every) + 1, 2):
            mixture = self.composed([files[domain] for domain in every[:number]])
            shown = {domain: test[domain] for domain in every[:number]} | dict(self.texts.probes)
            found[str(number)] = {name: mean(losses(mixture, ids)) for name, ids in shown.items()}
        alone: dict[str, dict[str, float]] = {domain: {} for domain in every}
        for number, expert in enumerate(every):
            with forced(mixture, number):
                for domain in every:
                    alone[domain][expert] = (
                        mean(losses(mixture, test[domain])) if domain != expert else math.inf
                    )
        return found | {
            "best wrong expert": {domain: min(losses.values()) for domain, losses in alone.items()}
        }

    def answers(self, records: Records) -> dict[str, Any]:
        """How much the mixture changes the base's own answers: nats per token, and greedy tokens
        that are equal."""
        mixture = self.mixture(records, self.plan.seeds[0])
        told, equal, count = {"base": 0.0, "mixture": 0.0}, 0, 0
        for prompt in PROMPTS:
            chat = [{"role": "user", "content": prompt}]
            ids = self.tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt"
            )["input_ids"]
            with torch.inference_mode():
                own, other = (
                    m.generate(ids, max_new_tokens=48, do_sample=False)
                    for m in (self.base, mixture)
                )
            for name, model in (("base", self.base), ("mixture", mixture)):
                told[name] += float(losses(model, own)[:, ids.shape[1] - 1 :].sum())
            same = own[0, : other.shape[1]] == other[0, : own.shape[1]]
            equal += int(same[ids.shape[1] :].long().cumprod(0).sum())
            count += own.shape[1] - ids.shape[1]
        return {name: round(total / count, 4) for name, total in told.items()} | {
            "equal at the start": equal / count
        }
