"""The study of quiet experts: a domain is added to a chat model, and what else has changed; see
quiet.toml."""

import argparse
import copy
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import ArrowConfig, create_arrow_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpoe.config import RouterConfig
from mpoe.models import collect_statistics, compose_experts, save_expert, start_expert
from mpoe.models.background import (
    background_batches,
    background_parts,
    pooled_background,
    token_batches,
)
from mpoe.models.composition import compose
from mpoe.models.lora_fit import check_adapter, fit_adapter
from mpoe.models.walk import routed_layers
from mpoe_bench.study.arms import BETAS, train_steps
from mpoe_bench.study.costs import ANSWER_TOKENS, costs
from mpoe_bench.study.experts import (
    BATCH,
    PROMPTS,
    SAMPLED,
    adapters,
    drawn,
    mean_loss,
)
from mpoe_bench.study.plan import TENANTS, Expert, QuietPlan, Record, Records, made, values_of
from mpoe_bench.study.quiet_picture import draw
from mpoe_bench.study.quiet_tables import QuietResults
from mpoe_bench.study.texts import (
    SPLITS,
    Split,
    domain_texts,
    pieces_of,
    probe_texts,
    split_of,
    tenant_texts,
)

SHOWN = 8  # pieces of a text that is not the domain's own
FITTED = 256  # pieces that neurons are fitted to an adapter on, one batch in five held out
REPLAY_SEED = 5
PROJECTIONS = ["gate_proj", "up_proj", "down_proj"]
Maker = Callable[[], Record]


def answer_scores(model: Any, ids: Tensor, start: int) -> Tensor:
    """Log-probabilities ``[T - start, V]`` of an answer that begins at ``start``."""
    logits = model(input_ids=ids).logits
    return logits[0, start - 1 : -1].log_softmax(-1)


class QuietStudy:
    """Makes the runs; its methods are those of `ArmsStudy`."""

    def __init__(self, file: Path) -> None:
        self.plan = made(QuietPlan, "the study", values_of(file))

    def prepare(self, arguments: argparse.Namespace) -> None:
        """See `ArmsStudy.prepare`."""
        for name in ("data_dir", "model", "work_dir"):
            if getattr(arguments, name) is None:
                raise ValueError(f"{name} must be given for quiet experts; got none")
        self.folder = arguments.work_dir
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
        base.generation_config.pad_token_id = self.tokenizer.eos_token_id
        self.base = base.eval()
        data = arguments.data_dir
        self.splits = {}
        for domain in self.plan.domains:
            texts = [domain_texts(data, domain, split) for split in SPLITS]
            self.splits[domain] = split_of(self.tokenizer, *texts)
        self.probes = {
            probe: pieces_of(self.tokenizer, probe_texts(data, probe), SHOWN)
            for probe in self.plan.probes
        }

    def waiting(self, records: Records) -> list[str]:
        return [key for key, _ in self.runs(records) if key not in records]

    def table(self, records: Records) -> str:
        return QuietResults(self.plan, records).page()

    def draw(self, records: Records, file: Path) -> None:
        draw(QuietResults(self.plan, records), file)

    def make(self, key: str, records: Records) -> Record:
        begin = time.process_time()
        record = dict(self.runs(records))[key]()
        return record | {"cpu_seconds": round(time.process_time() - begin)}

    def runs(self, records: Records) -> Iterator[tuple[str, Maker]]:
        """Key and maker of every run whose rate is known, in its order."""
        plan = self.plan
        first = plan.seeds[0]
        rates = plan.known_rates(records)
        untrained = {"quiet": self.quiet, "scaled": self.scaled}

        def added(kind: str, domain: str, seed: int, steps: int = plan.steps) -> tuple[str, Maker]:
            expert = Expert(kind, domain, steps, rates.get(kind), seed)
            return plan.key(expert), partial(untrained.get(kind, self.own), expert)

        yield "base", lambda: self.tests(self.base, plan.domains)
        for seed in plan.seeds:  # what success asks for, first
            for domain in plan.domains:
                yield added("neurons", domain, seed)
                yield added("quiet", domain, seed)
            yield f"mixture {seed}", partial(self.all_quiet, seed)
        yield "rivals", self.rivals
        for number in TENANTS:
            yield f"tenants {number}", partial(self.tenants, number)
        for seed in plan.seeds:
            for domain in plan.domains:
                yield added("lora", domain, seed)
                yield added("scaled", domain, seed)
        for rate in plan.replay_rates:
            for expert in plan.candidates(rate):
                yield plan.key(expert), partial(self.own, expert)
        if "replay" not in rates:
            return
        for steps in plan.lengths:
            for kind in ("neurons", "lora", "replay", "quiet"):
                yield added(kind, plan.forgetting, first, steps)
        for seed in plan.seeds:
            for domain in plan.domains:
                for steps in (plan.equal_time, plan.steps):
                    yield added("replay", domain, seed, steps)
        for adapted in plan.adapters:
            for domain in plan.domains:
                yield f"adapter {adapted}: {domain}", partial(self.adapter, adapted, domain)
        yield "costs", self.costs

    # ------------------------------------------------------------ what is measured

    @cached_property
    def answers(self) -> list[tuple[Tensor, int, Tensor]]:
        """The base's greedy answers, ids ``[1, T]``, where each begins, and the base's
        log-probabilities of its tokens ``[tokens, V]``."""
        answers = []
        for prompt in PROMPTS:
            chat = [{"role": "user", "content": prompt}]
            rendered = self.tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt"
            )
            ids = rendered["input_ids"]
            start = ids.shape[1]
            with torch.inference_mode():
                answer = self.base.generate(ids, max_new_tokens=ANSWER_TOKENS, do_sample=False)
                before = answer_scores(self.base, answer, start)
            answers.append((answer, start, before))
        return answers

    @torch.inference_mode()
    def change_of_answers(self, model: Any) -> dict[str, float]:
        """On the base's own answers: the KL divergence from the base, and the share of equal greedy
        tokens."""
        divergence = 0.0
        same = 0
        count = 0
        for ids, start, before in self.answers:
            after = answer_scores(model, ids, start)
            divergence += float((before.exp() * (before - after)).sum())
            same += int((before.argmax(-1) == after.argmax(-1)).sum())
            count += len(before)
        return {"answers": round(divergence / count, 5), "same": round(same / count, 4)}

    def tests(self, model: Any, whole: Sequence[str] = ()) -> dict[str, float]:
        """Losses on every domain's test text (all of it for the domains ``whole``) and the probes,
        and the change of the base's own answers."""
        results = {}
        for domain, (_, _, test) in self.splits.items():
            results[domain] = mean_loss(model, test[:SHOWN])
            if domain in whole:
                results[f"{domain}, all"] = mean_loss(model, test)
        for probe, ids in self.probes.items():
            results[probe] = mean_loss(model, ids)
        return results | self.change_of_answers(model)

    # ------------------------------------------------------------ parts

    @cached_property
    def parts(self) -> dict[str, Tensor]:
        """The samples of the base, and the general text."""
        return background_parts(self.base, self.tokenizer)

    @cached_property
    def background(self) -> dict[str, Tensor]:
        return pooled_background(self.base, [token_batches(ids) for ids in self.parts.values()])

    @cached_property
    def replayed(self) -> Tensor:
        """Pieces of the base's own texts and chats, as long as those of domains."""
        texts = self.parts["texts"]
        chats = self.parts["chats"]
        return torch.cat([texts, chats[:, : texts.shape[1]]])

    def split(self, domain: str) -> Split:
        return self.splits.get(domain) or tenant_texts(self.tokenizer, domain)

    def place(self, expert: Expert) -> Path:
        name = self.plan.key(expert).replace(" ", "-")
        if expert.kind == "neurons":
            name = f"{name}.expert"
        return self.folder / name

    def started(self, kind: str, targets: str | list[str] = PROJECTIONS, seed: int = 0) -> Any:
        """An expert (``kind`` "neurons") or a LoRA of the plan's size beside the base, on its
        feed-forward networks or on PEFT's ``targets``."""
        torch.manual_seed(seed)
        if kind == "neurons":
            return start_expert(self.base, self.plan.neurons).train()
        rank = self.plan.rank
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM"
        )
        return get_peft_model(copy.deepcopy(self.base), config).train()

    def trained(self, expert: Expert, targets: str | list[str] = PROJECTIONS) -> Any:
        """What `started` makes, trained by AdamW; see `train_steps` for errors."""
        model = self.started(expert.kind, targets, expert.seed)
        parameters = [p for p in model.parameters() if p.requires_grad]
        adam = torch.optim.AdamW(
            parameters, lr=expert.rate, betas=BETAS, weight_decay=0.0, fused=True
        )
        text = self.split(expert.domain)[0]
        batches = drawn(text, expert.steps, expert.seed)
        loss_of = self.loss_with_replay() if expert.kind == "replay" else None
        train_steps(model, adam, expert.steps, batches, loss_of=loss_of)
        return model.eval()

    def train(self, expert: Expert) -> Any:
        """Train an expert or an adapter, keep its file, and return the model."""
        model = self.trained(expert)
        place = self.place(expert)
        if expert.kind == "neurons":
            text = self.split(expert.domain)[0]
            statistics = collect_statistics(model, token_batches(text[:SAMPLED]))
            save_expert(model, place, statistics=statistics)
        else:
            model.save_pretrained(str(place))
        return model

    def file(self, kind: str, domain: str, seed: int, steps: int | None = None) -> Path:
        """Of an expert or adapter at its rate; one without a file is trained again."""
        rate = self.plan.rates[kind]
        expert = Expert(kind, domain, steps or self.plan.steps, rate, seed)
        place = self.place(expert)
        if not place.exists():
            self.train(expert)
        return place

    def divergence(self, model: Any, ids: Tensor) -> Tensor:
        """Of the base from a model on its own texts, nats per token."""
        with torch.no_grad():
            wanted = self.base(input_ids=ids).logits.log_softmax(-1)
        learnt = model(input_ids=ids).logits.log_softmax(-1)
        learnt = learnt.flatten(0, 1)
        wanted = wanted.flatten(0, 1)
        return F.kl_div(learnt, wanted, log_target=True, reduction="batchmean")

    def loss_with_replay(self) -> Callable[[Any, Tensor], Tensor]:
        """A model's loss on some pieces and the divergence on as many of the base's own texts."""
        generator = torch.Generator().manual_seed(REPLAY_SEED)

        def loss(model: Any, ids: Tensor) -> Tensor:
            chosen = torch.randint(len(self.replayed), (len(ids),), generator=generator)
            of_pieces = model(input_ids=ids, labels=ids).loss
            return of_pieces + self.divergence(model, self.replayed[chosen])

        return loss

    def mixture(self, domains: Sequence[str], seed: int, steps: int | None = None) -> Any:
        """The experts' files with the defaults of the package."""
        files = [self.file("neurons", domain, seed, steps) for domain in domains]
        return compose_experts(self.base, files, background=self.background)

    # ------------------------------------------------------------ runs

    def own(self, expert: Expert) -> Record:
        """An expert or an adapter by itself, always on."""
        place = self.place(expert)
        model = self.opened(place) if place.exists() else self.train(expert)
        record = self.tests(model, [expert.domain])
        if expert.kind == "replay":
            validation = mean_loss(model, self.split(expert.domain)[1])
            with torch.inference_mode():
                kept = float(self.divergence(model, self.replayed[:SHOWN]))
            record["objective"] = validation + kept
        return record

    def opened(self, place: Path) -> Any:
        """The base with an expert's file or an adapter's folder."""
        if place.is_file():
            return start_expert(self.base, expert=place).eval()
        return adapters(self.base, {"own": place})

    def quiet(self, expert: Expert) -> Record:
        """An expert composed with *none*."""
        domains = [expert.domain]
        return self.tests(self.mixture(domains, expert.seed, expert.steps), domains)

    def all_quiet(self, seed: int) -> Record:
        """Those of all domains, composed with *none*."""
        return self.tests(self.mixture(self.plan.domains, seed), self.plan.domains)

    def scaled(self, expert: Expert) -> Record:
        """LoRA at the scale, in parts of 32, at which it gains on validation texts what the quiet
        expert does; as it is, if it gains less."""
        domain = expert.domain
        ids = self.split(domain)[1]
        wanted = mean_loss(self.mixture([domain], expert.seed), ids)
        model = self.opened(self.file("lora", domain, expert.seed))

        def gains_as_much(scale: float) -> bool:
            with rescale_adapter_scale(model, scale):
                return mean_loss(model, ids[:SHOWN]) <= wanted

        scales = [part / 32 for part in range(1, 33)]
        scale = scales[bisect_left(scales[:-1], True, key=gains_as_much)]
        with rescale_adapter_scale(model, scale):
            return self.tests(model, [domain]) | {"scale": scale}

    def rivals(self) -> Record:
        """Of the first seed's adapters: PEFT's Arrow and merges, each at the best of its settings
        on validation texts."""
        seed = self.plan.seeds[0]
        files = {domain: self.file("lora", domain, seed) for domain in self.plan.domains}
        paths = [str(path) for path in files.values()]

        def merged(how: str, weight: float, **options: Any) -> Any:
            torch.manual_seed(0)  # DARE drops at random
            model = adapters(self.base, files)
            weights = [weight] * len(files)
            model.add_weighted_adapter(list(files), weights, "merged", how, **options)
            model.set_adapter("merged")
            return model

        def arrow(top_k: int, temperature: float) -> Any:
            config = ArrowConfig(top_k=top_k, router_temperature=temperature)
            return create_arrow_model(copy.deepcopy(self.base), paths, config).eval()

        def validation(model: Any) -> float:
            return sum(mean_loss(model, ids[:SHOWN]) for _, ids, _ in self.splits.values())

        def best(models: Iterable[Any]) -> dict[str, float]:
            return self.tests(min(models, key=validation), self.plan.domains)

        half = {"density": 0.5, "svd_rank": self.plan.rank * len(files)}
        rivals = {"mean of LoRAs": best([merged("cat", 1 / len(files))])}
        for name, how in (("TIES of LoRAs", "ties_svd"), ("DARE of LoRAs", "dare_ties_svd")):
            rivals[name] = best(merged(how, weight, **half) for weight in (0.3, 0.6, 1.0))
        for top_k in sorted({1, 2, len(files)}):
            routed = (arrow(top_k, temperature) for temperature in (0.3, 1.0, 3.0))
            rivals[f"Arrow, top {top_k}"] = best(routed)
        rivals["mean hidden states"] = best([self.mean_hidden_states(files)])
        return rivals

    def mean_hidden_states(self, files: Mapping[str, Path]) -> Any:
        """The adapters' merged networks as dense experts, two per token, whose routers' rows are
        the mean inputs of validation texts, each of length 1 (mergekit's hidden mode)."""
        merged = []
        for path in files.values():
            merged.append(self.opened(path).merge_and_unload().eval())
        mixture = compose(self.base, merged, None, RouterConfig(top_k=2))
        seeing = start_expert(self.base, 1)
        for number, (_, validation, _) in enumerate(self.splits.values()):
            statistics = collect_statistics(seeing, token_batches(validation), 0)
            for name, layer in routed_layers(mixture):
                mean = statistics[f"{name}.mean"]
                layer.router.weight.data[number] = F.normalize(mean, dim=0)
        return mixture

    def tenants(self, number: int) -> Record:
        """A mixture of so many experts of the first seed: the losses with each expert alone and in
        the mixture."""
        names = [*self.plan.domains, *self.plan.tenants][:number]
        seed = self.plan.seeds[0]
        mixture = self.mixture(names, seed)
        record = {"mixture": self.tests(mixture)}
        for name in names:
            test = self.split(name)[2]
            alone = self.opened(self.file("neurons", name, seed))
            models = (self.base, alone, mixture)
            record[name] = [mean_loss(model, test) for model in models]
        return record

    def adapter(self, adapted: str, domain: str) -> Record:
        """Neurons fitted to a LoRA of the first seed in another place, with the package's defaults:
        the test losses of base, adapter and neurons, or why the package refused it."""
        train, _, test = self.split(domain)
        seed = self.plan.seeds[0]
        place = self.folder / f"adapter {adapted} {domain}".replace(" ", "-")
        lora = Expert("lora", domain, self.plan.steps, self.plan.rates["lora"], seed)
        model = self.trained(lora, self.plan.adapters[adapted])
        model.save_pretrained(str(place))
        merged = model.merge_and_unload().eval()
        neurons = check_adapter(self.base, place)
        texts = [{"input_ids": rows, "labels": rows} for rows in train[:FITTED].split(BATCH)]
        losses_of = [mean_loss(model, test) for model in (self.base, merged)]
        record = {"neurons": neurons, "losses": losses_of}
        try:
            fitted = fit_adapter(self.base, merged, texts, domain, neurons=neurons)
        except ValueError as error:
            record["refused"] = str(error)
            return record
        with_neurons = start_expert(self.base, expert=fitted).eval()
        losses_of.append(mean_loss(with_neurons, test))
        return record

    def costs(self) -> Record:
        """Of one thread: seconds of a background; tokens per second and memory of training, of
        reading and of answering, with an expert, with LoRA and without."""
        begin = time.process_time()
        texts = background_batches(self.base, self.tokenizer)
        sampled = time.process_time()
        self.background = pooled_background(self.base, texts)
        background = {
            "sampling": round(sampled - begin),
            "statistics": round(time.process_time() - sampled),
        }
        domain = self.plan.domains[0]
        seed = self.plan.seeds[0]
        ids = self.split(domain)[0][:BATCH]
        learning = {
            "all weights": copy.deepcopy(self.base).train().requires_grad_(True),
            "LoRA": self.started("lora"),
            "an expert": self.started("neurons"),
        }
        serving = {
            "base, or a merged LoRA": self.base,
            "LoRA beside the base": self.opened(self.file("lora", domain, seed)),
            "one quiet expert": self.mixture([domain], seed),
            "four": self.mixture(self.plan.domains, seed),
        }
        return {"background": background} | costs(learning, serving, ids)
