"""Plots of `mpoe inspect`, as PNG. Needs matplotlib (the extra ``report``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mpoe.cli.plots import paint_load, training_panels
from mpoe.plotting import COLOURS, heat_map, ladder, new_figure, plain_ticks, png

if TYPE_CHECKING:
    from mpoe.inspection.growth import Growth
    from mpoe.inspection.spectra import BondSpectrum

# A spectrum per name of a weight, grouped by the projections' kind.
Spectra = Mapping[str, Mapping[str, Sequence["BondSpectrum"]]]
_STEEP = 0.05  # spectra that fall below this fraction of the largest value are drawn on a logarithmic axis


def load_by_layer(load: Sequence[Sequence[int]], names: Sequence[str]) -> bytes:
    """Share of a layer's tokens that each expert took, ``load [layers][E]``, in per cent."""
    figure, grid = new_figure(8.0, 1.4 + 0.28 * len(load))
    paint_load(grid[0, 0], load, "Expert load", names)
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


def growth(totals: Growth, own: int) -> bytes:
    """Parameters of the whole model against the number of experts; ``own`` is the model's."""
    figure, grid = new_figure(7.0, 3.6)
    axes = grid[0, 0]
    lines = {"dense experts (Switch)": (totals.switch, COLOURS[1]), "MPO experts": (totals.mpoe, COLOURS[0])}
    for name, (values, colour) in lines.items():
        if values:
            axes.plot(totals.experts, [v / 1e6 for v in values], marker="o", color=colour, label=name)
    axes.axhline(totals.dense / 1e6, color=COLOURS[6], linestyle="--", label="dense model")
    axes.axvline(own, color="grey", linestyle=":", label="this model")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(totals.experts, [str(count) for count in totals.experts])
    lowest = min([totals.dense, *totals.switch]) / 1e6
    plain_ticks(axes.yaxis, ladder(0.8 * lowest, 1.25 * max(totals.switch) / 1e6) or [lowest])
    axes.set(xlabel="experts", ylabel="millions of parameters", title="Parameters against experts")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    return png(figure)


def training_curves(records: Sequence[Mapping[str, Any]]) -> bytes:
    """Losses and balance over a run, from the records of its ``metrics.jsonl``."""
    panels = training_panels(records)
    figure, grid = new_figure(3.0 * len(panels), 3.2, 1, len(panels))
    for axes, paint in zip(grid[0], panels, strict=True):
        paint(axes)
    return png(figure)
