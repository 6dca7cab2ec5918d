"""The data that `mpoe inspect` collects about a model, and the sections of its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpoe.cli import inspect_plots as plots
from mpoe.cli.files import REPORT_FILE, write_json
from mpoe.cli.html import table
from mpoe.cli.inspect_report import routes_html, write_inspection
from mpoe.cli.scoring import expert_load
from mpoe.inspection.growth import parameter_growth
from mpoe.inspection.routes import route_text
from mpoe.inspection.spectra import bond_spectra
from mpoe.layers.cores import MPOCores
from mpoe.models.report import routed_layers, short_name
from mpoe.models.summary import HEADER, summarize

if TYPE_CHECKING:
    from mpoe.inspection.composed import Worth
    from mpoe.inspection.spectra import BondSpectrum

NUMBERS_FILE = "inspect.json"
WORTH_HEADER = ("expert", "tokens", "alone", "without", "removed")
PLOTS = ("expert_load", "bond_rank", "bond_spectra", "parameters", "training")

_ROUTES = (
    "A column for each token, a row for each layer; the number is the expert that the router gave the token to, and "
    "the colour says the same. Hold the pointer over a cell to see the router's probability. A row of one colour is a "
    "layer that sends everything to one expert; equal tokens show whether a layer sorts by word or by context."
)
_LOAD = (
    "The share of its tokens that each layer gave to each expert, counted on {}. Padding is not counted. An expert "
    "near 0 learns nothing from such data; raise balance_loss_weight if training does not cure it."
)
_BONDS = (
    "Cutting an expert's matrix in two at a bond of dimension d leaves d singular values there; their entanglement "
    "entropy S gives the effective rank exp(S): over how many of the d directions the weight is spread. Near 100% of "
    "d, a smaller max_bond would cost accuracy; a low share means that truncation is cheap. Below, the singular values "
    "themselves, averaged over the experts."
)
_WORTH = (
    "Losses in nats per token, on {} predicted tokens. \"Alone\": all tokens go to this expert ('none' is the base). "
    '"Without": the mixture composed without it; what that adds is the price of removing the expert. The oracle gives '
    "every token the single expert that predicts it best, so it is a bound that no router reaches."
)
_GROWTH = "A dense expert brings full weights of its own, an MPO expert its auxiliary cores and a row of the router."
_TRAINING = "From the run's metrics.jsonl; pale lines are the raw values, the others running means."


class Inspection:
    """The data about one model.

    Args:
        name: the name that the user typed.
        model: in eval mode.
        tokenizer: its tokenizer.
        items: encoded items for the expert load.
        counted: what they are, in words.
        records: records of ``metrics.jsonl``, or none.
        texts: texts whose tokens are traced.
        num_tokens: tokens of the pass that plans are made for.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        items: list[dict[str, Any]],
        counted: str,
        records: list[dict[str, Any]],
        texts: Sequence[str],
        num_tokens: int,
    ) -> None:
        self.name, self.model, self.counted, self.records = name, model, counted, records
        self.config = model.mpoe_config
        self.layers = [short_name(layer) for layer, _ in routed_layers(model)]
        self.load = expert_load(model, items, tokenizer.pad_token_id) if self.layers else []
        self.routes = [(text, route_text(model, tokenizer, text)) for text in texts] if self.layers else []
        self.weights = summarize(model, num_tokens, self.config.top_k)
        self.spectra = self._spectra()
        self.worth: Worth | None = None
        self.growth = parameter_growth(model) if "ffn" in self.config.targets else None

    def _spectra(self) -> dict[str, dict[str, list[BondSpectrum]]]:
        """By kind of weight (up, down, an attention projection's name, ...) and layer."""
        found: dict[str, dict[str, list[BondSpectrum]]] = {}
        for row in self.weights:
            if not isinstance(row.cores, MPOCores):
                continue
            layer, _, kind = short_name(row.name).rpartition(".")
            bonds = bond_spectra(row.cores)
            if bonds:
                found.setdefault(kind, {})[layer or kind] = bonds
        return found

    def _worth_rows(self) -> list[list[str]]:
        worth = self.worth
        if worth is None:
            return []
        parts = zip(worth.names, worth.share, worth.alone, worth.removed, strict=True)
        rows = [
            [name, f"{share:.0%}", f"{alone:.3f}", f"{removed:.3f}", f"{removed - worth.loss:+.3f}"]
            for name, share, alone, removed in parts
        ]
        whole = [["the mixture", "", f"{worth.loss:.3f}", "", ""], ["oracle", "", f"{worth.oracle:.3f}", "", ""]]
        return [*rows, *whole]

    def worth_lines(self) -> list[str]:
        """What the experts are worth, in words; empty for a model that was not composed."""
        if self.worth is None:
            return []
        told = [f"{row[0]}: {row[1]} of tokens, {row[4]} nats if removed" for row in self._worth_rows()[:-2]]
        distance = self.worth.loss - self.worth.oracle
        return [*told, f"the mixture has {self.worth.loss:.3f} nats per token, {distance:.3f} more than the oracle"]

    # -------------------------------------------------------------- writing

    def write(self, folder: Path) -> None:
        """Write the plots, the numbers and, last, the report."""
        sections = self.sections()
        folder.mkdir(parents=True, exist_ok=True)
        for old in (REPORT_FILE, NUMBERS_FILE, *(f"{plot}.png" for plot in PLOTS)):
            (folder / old).unlink(missing_ok=True)
        for _, _, images, _ in sections:
            for plot, png in images.items():
                (folder / f"{plot}.png").write_bytes(png)
        write_json(folder / NUMBERS_FILE, self.numbers())
        rows = [HEADER, *(row.cells() for row in self.weights)]
        write_inspection(folder / REPORT_FILE, f"mpoe inspect: {self.name}", self.facts(), sections, rows)

    def facts(self) -> list[tuple[str, str]]:
        """A short description of the model."""
        report = self.model.parameter_report()
        config = self.config
        shape = config.shape if isinstance(config.shape, str) else "given"
        experts = f"{config.num_experts} {config.expert_type} experts, top-{config.top_k}"
        parts = [
            f"{key} {report[key]:,}" for key in ("central", "auxiliary", "expert", "router", "rest") if report[key]
        ]
        total, dense, switch = report["total"], report["dense_total"], report["switch_total"]
        return [
            ("model", f"{type(self.model).__name__}, {total:,} parameters"),
            ("mixture", f"moe_type {config.moe_type}: {experts}, shape {shape}" if self.layers else "no routers"),
            ("parameters", ", ".join(parts)),
            ("as a dense model", f"{dense:,}; this one is {total / dense:.2f} times as large"),
            ("with dense experts", f"{switch:,}, {switch / total:.2f} times as many as here"),
        ]

    def sections(self) -> list[tuple[str, str, Mapping[str, bytes], str]]:
        """Heading, how to read it, plots by file name, further HTML."""
        found: list[tuple[str, str, Mapping[str, bytes], str]] = []
        if self.routes:
            named = getattr(self.model.config, "mpoe_experts", None)
            html = routes_html(self.routes, self.config.num_experts, named)
            found.append(("Which expert took which token", _ROUTES, {}, html))
        if self.worth is not None:
            html = table(WORTH_HEADER, self._worth_rows())
            found.append(("What each expert is worth", _WORTH.format(self.worth.tokens), {}, html))
        if self.load:
            drawn = {"expert_load": plots.load_by_layer(self.load, self.layers)}
            found.append(("Expert load", _LOAD.format(self.counted), drawn, ""))
        if self.spectra:
            drawn = {
                "bond_rank": plots.bond_ranks(self.spectra),
                "bond_spectra": plots.spectrum_lines(self.spectra),
            }
            found.append(("What the bonds carry", _BONDS, drawn, ""))
        if self.growth is not None:
            png = plots.growth(self.growth, self.config.num_experts)
            found.append(("Parameters against experts", _GROWTH, {"parameters": png}, ""))
        if any("loss" in record for record in self.records):
            png = plots.training_curves(self.records)
            found.append(("Training", _TRAINING, {"training": png}, ""))
        return found

    def numbers(self) -> dict[str, Any]:
        """Everything that is drawn, JSON-able."""
        return {
            "model": self.name,
            "parameters": self.model.parameter_report(),
            "layers": self.layers,
            "expert_load": self.load,
            "counted_on": self.counted,
            "worth": None if self.worth is None else vars(self.worth),
            "routes": [{"text": text, "streams": [vars(route) for route in routes]} for text, routes in self.routes],
            "bonds": {
                kind: {
                    layer: [{"dimension": b.dimension, "entropy": b.entropy.tolist()} for b in bonds]
                    for layer, bonds in weights.items()
                }
                for kind, weights in self.spectra.items()
            },
            "parameters_by_experts": None if self.growth is None else vars(self.growth),
        }
