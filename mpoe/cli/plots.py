"""Every plot of the reports, in one style; PNG files, or SVG inside a page. Needs matplotlib (the extra ``report``)."""

from __future__ import annotations

import importlib.util
import io
import itertools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpoe.inspection.growth import Growth
    from mpoe.inspection.spectra import BondSpectrum

# Told apart by colour-blind readers too (Okabe and Ito).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999999")
PANEL = (4.6, 3.1)  # size in inches of a plot shown next to others, or alone on a phone
_READABLE = 20  # columns up to which cells of a heat map carry their number
_STEEP = 0.05  # spectra that fall below this fraction of the largest value are drawn on a logarithmic axis

Paint = Callable[[Any], None]
Curve = Sequence[tuple[float, float]]  # (step, value)
# A spectrum per name of a weight, grouped by the projections' kind.
Spectra = Mapping[str, Mapping[str, Sequence["BondSpectrum"]]]


def have_matplotlib() -> bool:
    """Whether plots can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure of so many inches, and its axes ``[rows, columns]``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def png(figure: Any) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def svg(paint: Paint, width: float = 7.0, height: float = 3.4) -> str:
    """An ``<svg>`` element; ``paint`` draws on its axes. Its text stays text, in the font of the page."""
    from matplotlib import rc_context

    figure, axes = new_figure(width, height)
    paint(axes[0, 0])
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg")
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def heat_map(
    axes: Any, values: Sequence[Sequence[float]], names: Sequence[str], high: float, form: str, label: str
) -> None:
    """Values [rows][columns] from 0 to ``high`` as shades; a row for each name, numbers where they can be read."""
    image = axes.imshow(values, aspect="auto", cmap="Blues", vmin=0.0, vmax=high)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    if len(values[0]) <= _READABLE:
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                colour = "white" if value > 0.6 * high else "black"
                axes.text(column, row, form.format(value), ha="center", va="center", fontsize=7, color=colour)
    axes.figure.colorbar(image, ax=axes, label=label)


# ------------------------------------------------------------------- training


def validation_losses(records: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Curves of a run's ``metrics.jsonl`` by task; ``validation`` for a loss over all of them."""
    found: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        for key, value in record.items():
            if key.startswith("eval_") and key.endswith("loss") and value is not None:
                name = key.removeprefix("eval_").removesuffix("loss").strip("_") or "validation"
                found.setdefault(name, []).append((record["step"], value))
    return found


def curve(records: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of the records that have ``key``."""
    return [(r["step"], r[key]) for r in records if r.get(key) is not None and "step" in r]


def training_panels(records: Sequence[Mapping[str, Any]]) -> list[Paint]:
    """The panels of a run's ``metrics.jsonl``: task loss and, for a mixture, balancing loss and expert load."""
    validation = validation_losses(records)
    several = list(validation) != ["validation"]
    load = {
        "expert_entropy": ("entropy / ln E, mean over layers", COLOURS[0]),
        "expert_max_share": ("largest share, worst layer", COLOURS[1]),
        "expert_min_share": ("smallest share, worst layer", COLOURS[4]),
    }
    shown = {
        "Task loss": [("training", curve(records, "task_loss") or curve(records, "loss"), COLOURS[0])],
        "Balancing loss": [("weighted, all layers", curve(records, "aux_loss"), COLOURS[2])],
        "Expert load": [(label, curve(records, key), colour) for key, (label, colour) in load.items()],
    }

    def panel(title: str, lines: Sequence[tuple[str, Curve, str]]) -> Paint:
        def paint(axes: Any) -> None:
            for label, points, colour in lines:
                _line(axes, points, label, colour)
            if title == "Task loss":
                for (name, points), colour in zip(validation.items(), itertools.cycle(COLOURS[1:])):
                    _line(axes, points, f"{name}, validation" if several else name, colour, "o")
            if title == "Expert load":
                axes.set_ylim(0, 1.02)
            _finish(axes, title)

        return paint

    return [panel(title, drawn) for title, lines in shown.items() if (drawn := [line for line in lines if line[1]])]


def _line(axes: Any, points: Curve, label: str, colour: str, marker: str = "") -> None:
    """A curve with dots, or its running mean over the pale raw values."""
    steps, values = [step for step, _ in points], [value for _, value in points]
    if not marker:
        axes.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8)
        width = max(1, len(values) // 12)
        parts = [values[max(0, end - width) : end] for end in range(1, len(values) + 1)]
        values = [sum(part) / len(part) for part in parts]
    axes.plot(steps, values, color=colour, label=label, marker=marker or None, markersize=3)


def _finish(axes: Any, title: str, ylabel: str = "") -> None:
    axes.set(xlabel="optimizer step", ylabel=ylabel, title=title)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def loss_curves(lines: Mapping[str, Curve], title: str, marker: str = "") -> str:
    """Losses against the optimizer step, one line per name; without a marker a running mean over the raw values."""

    def paint(axes: Any) -> None:
        for (name, points), colour in zip(lines.items(), itertools.cycle(COLOURS)):
            if points:
                _line(axes, points, name, colour, marker)
        _finish(axes, title, "loss")

    return svg(paint, *PANEL)


def training_curves(records: Sequence[Mapping[str, Any]]) -> bytes:
    """Losses and balance over a run, from the records of its ``metrics.jsonl``, side by side."""
    panels = training_panels(records)
    figure, grid = new_figure(3.0 * len(panels), 3.2, 1, len(panels))
    for axes, paint in zip(grid[0], panels, strict=True):
        paint(axes)
    return png(figure)


# -------------------------------------------------------------------- models


def size_bars(reports: Mapping[str, Mapping[str, int]]) -> str:
    """Parameters of whole models by kind, a bar for each; ``reports``: name -> parameter report."""
    kinds = {"rest": COLOURS[7], **dict(zip(("central", "auxiliary", "expert", "router"), COLOURS, strict=False))}
    names = ["\n".join(textwrap.wrap(name, 14)) for name in reports]

    def paint(axes: Any) -> None:
        left = [0.0] * len(reports)
        for kind, colour in kinds.items():
            width = [report.get(kind, 0) / 1e6 for report in reports.values()]
            if any(width):
                axes.barh(names, width, left=left, color=colour, label=kind)
                left = [a + b for a, b in zip(left, width, strict=True)]
        dense = [0 if total else report["total"] / 1e6 for report, total in zip(reports.values(), left, strict=True)]
        if any(dense):
            axes.barh(names, dense, color=COLOURS[6], label="dense model")
        axes.invert_yaxis()
        axes.set(xlabel="millions of parameters", title="Parameters")
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=3, frameon=False)

    return svg(paint, *PANEL)


def growth(totals: Growth, own: int) -> bytes:
    """Parameters of the whole model against the number of experts; ``own`` is the model's."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure, grid = new_figure(7.0, 3.6)
    axes = grid[0, 0]
    for name, values, colour in (
        ("dense experts (Switch)", totals.switch, COLOURS[1]),
        ("MPO experts", totals.mpoe, COLOURS[0]),
    ):
        if values:
            axes.plot(totals.experts, [v / 1e6 for v in values], marker="o", color=colour, label=name)
    axes.axhline(totals.dense / 1e6, color=COLOURS[6], linestyle="--", label="dense model")
    axes.axvline(own, color="grey", linestyle=":", label="this model")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(totals.experts, [str(count) for count in totals.experts])
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="experts", ylabel="millions of parameters", title="Parameters against experts")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    return png(figure)


def load_map(load: Sequence[Sequence[float]], names: Sequence[str]) -> Paint:
    """Share of its tokens that each layer of ``names`` gave to each expert, ``load [layers][E]``, in per cent."""
    shares = [[100 * count / (sum(layer) or 1.0) for count in layer] for layer in load]
    experts = len(shares[0])

    def paint(axes: Any) -> None:
        heat_map(axes, shares, names, max(map(max, shares)), "{:.0f}", "% of the layer's tokens")
        axes.set_xticks(range(0, experts, max(1, experts // 16)))
        axes.set(xlabel="expert", title=f"Expert load (even would be {100 / experts:.3g}% each)")

    return paint


def load_by_layer(load: Sequence[Sequence[int]], names: Sequence[str]) -> bytes:
    """`load_map` as a PNG file."""
    figure, grid = new_figure(8.0, 1.4 + 0.28 * len(load))
    load_map(load, names)(grid[0, 0])
    return png(figure)


def bond_ranks(spectra: Spectra) -> bytes:
    """Effective rank of every bond in per cent of d: a column for each bond, a panel for each kind of weight."""
    columns = max(len(bonds) for weights in spectra.values() for bonds in weights.values())
    longest = max(map(len, spectra.values()))
    figure, grid = new_figure(1.2 + (1.6 + 0.75 * columns) * len(spectra), 1.6 + 0.28 * longest, 1, len(spectra))
    for axes, (kind, weights) in zip(grid[0], spectra.items(), strict=True):
        used = [[100 * bond.used for bond in bonds] for bonds in weights.values()]
        first = next(iter(weights.values()))
        heat_map(axes, used, list(weights), 100.0, "{:.0f}", "% of d")
        axes.set_xticks(range(len(first)), [f"bond {k + 1}\nd = {bond.dimension}" for k, bond in enumerate(first)])
        axes.tick_params(axis="x", labelsize=8)
        axes.set_title(kind)
    figure.suptitle("Effective rank of the bonds, exp(entropy)")
    return png(figure)


def spectrum_lines(spectra: Spectra) -> bytes:
    """Singular values across each bond, relative to the largest, mean over experts: a line for each layer."""
    from matplotlib import colormaps

    columns = max(len(bonds) for weights in spectra.values() for bonds in weights.values())
    figure, grid = new_figure(2.0 + 2.6 * columns, 0.8 + 2.3 * len(spectra), len(spectra), columns)
    for row, (kind, weights) in zip(grid, spectra.items(), strict=True):
        shades = colormaps["viridis"].resampled(max(2, len(weights)))
        for depth, (name, bonds) in enumerate(weights.items()):
            for axes, bond in zip(row, bonds, strict=False):
                values = bond.singular_values / bond.singular_values[:, :1].clamp_min(1e-300)
                line = values.mean(0).clamp_min(1e-6).tolist()
                axes.plot(range(1, len(line) + 1), line, color=shades(depth), linewidth=1.1, label=name)
        for index, axes in enumerate(row):
            if not axes.has_data():
                axes.set_axis_off()  # a chain with fewer bonds than others
                continue
            axes.set(title=f"{kind}, bond {index + 1}", xlabel="singular value number")
            if axes.dataLim.y0 < _STEEP:
                axes.set_yscale("log")
            else:
                axes.set_ylim(0.0, 1.05)
            axes.grid(alpha=0.25)
        row[0].set_ylabel("relative to the largest")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    if len(labels) > 8:  # the first and last ones show the direction of the colours
        handles, labels = [handles[0], handles[-1]], [labels[0], labels[-1]]
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, title="layer")
    return png(figure)
