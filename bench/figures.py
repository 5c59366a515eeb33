"""Figures of a report: each as PNG to look at, PDF and SVG to print, for a text that is 7 inches wide."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from .tables import plain

STYLE = {
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.linewidth": 0.5,
    "lines.linewidth": 1,
    "lines.markersize": 3.5,
    "xtick.major.width": 0.5,
    "ytick.major.width": 0.5,
    "pdf.fonttype": 42,  # text stays text
    "svg.fonttype": "none",
    "svg.hashsalt": "depthvlm-bench",  # the same results give the same file
}
WIDTH = 7.0  # inches
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d00", "#56b4e9", "#7a3b9e", "#444444")  # Okabe and Ito's
MARKERS = "osD^vPX*<>h"  # with eight colours: 88 different pairs
DASHES = ("-", "--", "-.", ":")


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, folder: Path, stem: str) -> str:
    """Write STEM.png, .pdf and .svg; returns the PNG's name."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # placed once for all three
    figure.savefig(folder / f"{stem}.png", dpi=200)
    figure.savefig(folder / f"{stem}.pdf", metadata={"CreationDate": None})
    figure.savefig(folder / f"{stem}.svg", metadata={"Date": None})
    return f"{stem}.png"


def label(text: str, length: int = 36) -> str:
    """Text of a results file, for a figure: of at most `length` characters, both its ends kept, and no formula."""
    text = plain(text)
    if len(text) > length:
        text = f"{text[: length // 2 - 1]}…{text[-(length // 2) :]}"
    return text.replace("$", r"\$")


def style(index: int) -> dict:
    """Colour, mark and dash of the contestant `index`."""
    colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
    return {"color": colour, "marker": marker, "linestyle": DASHES[index // len(COLOURS) % len(DASHES)]}


def panels(count: int, height: float, columns: int, xlabel: str) -> tuple[Figure, list]:
    """A figure of `count` panels of `height` inches that share their axes; the lowest of each column has labels."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = new_figure(WIDTH, rows * max(height, 0.8) + 0.3)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for unused in axes[count:]:
        unused.remove()
    for panel in axes[:count]:
        panel.grid(alpha=0.3, linewidth=0.4)
    for panel in axes[max(0, count - columns) : count]:
        panel.tick_params(labelbottom=True)
        panel.set_xlabel(xlabel)
    return figure, list(axes[:count])


def heat_map(names: Sequence[str], columns: Sequence[str], values: np.ndarray, best: np.ndarray) -> Figure:
    """values, best: (names, columns); NaN: no score. Bold: the best of a column and what may equal it."""
    figure = new_figure(WIDTH, 1 + 0.2 * len(names))
    axes = figure.add_subplot()
    axes.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for row, column in np.argwhere(np.isfinite(values)):
        value = values[row, column]
        weight = "bold" if best[row, column] else "normal"
        axes.text(
            column, row, f"{value:.3f}", ha="center", va="center", color="w" if value < 0.55 else "k", weight=weight
        )
    axes.set_xticks(range(len(columns)), map(label, columns), rotation=30, ha="left", rotation_mode="anchor")
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(names)), map(label, names))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def forest(names: Sequence[str], columns: Sequence[str], values: np.ndarray, bounds: np.ndarray) -> Figure:
    """δ1 with its interval: a panel per source, a line per contestant. values: (names, columns); bounds: (2, ...)."""
    figure, axes = panels(len(columns), 0.5 + 0.15 * len(names), 5, "δ1")
    places = np.arange(len(names))
    for column, panel in enumerate(axes):
        value, (low, high) = values[:, column], bounds[:, :, column]
        errors = np.nan_to_num(np.stack([value - low, high - value]).clip(min=0))
        for place in places:
            options = {"color": style(place)["color"], "elinewidth": 0.8, "capsize": 2, "capthick": 0.8}
            panel.errorbar(value[place], place, xerr=errors[:, place : place + 1], fmt="o", markersize=1.5, **options)
        panel.set_title(label(columns[column]))
    low, high = np.nanmin(np.fmin(values, bounds[0])), np.nanmax(np.fmax(values, bounds[1]))
    margin = 0.05 * (high - low) + 0.005
    axes[0].set(xlim=(low - margin, high + margin), ylim=(len(names) - 0.5, -0.5))
    axes[0].xaxis.set_major_locator(MaxNLocator(3))
    axes[0].set_yticks(places, map(label, names))
    return figure


def pair_matrix(names: Sequence[str], difference: np.ndarray, beyond: np.ndarray) -> Figure:
    """difference: (names, names) δ1 of the row minus that of the column; numbers, in hundredths, where `beyond`."""
    side = min(WIDTH - 2.1, 0.3 * len(names))  # beside the names, of at most 2 inches
    figure = new_figure(side + 2.1, side + 0.35)
    axes = figure.add_subplot()
    norm = CenteredNorm(halfrange=max(np.nanmax(np.abs(difference)), 1e-6))
    axes.imshow(np.where(beyond, difference, np.nan), cmap="RdBu", norm=norm, aspect="auto")
    for row, column in np.argwhere(beyond):
        value = difference[row, column]
        dark = abs(value) > 0.6 * norm.halfrange
        text = f"{100 * value:.{1 if abs(value) < 0.0095 else 0}f}".replace("-", "−").replace("0.", ".")
        axes.text(column, row, text, ha="center", va="center", fontsize=6, color="w" if dark else "k")
    axes.set_yticks(range(len(names)), [f"{label(name, 26)}  {place}" for place, name in enumerate(names, 1)])
    axes.set_xticks(range(len(names)), range(1, len(names) + 1))
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    return figure


def depth_lines(
    names: Sequence[str], ranges: Sequence[str], sources: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]
) -> Figure:
    """δ1 over ranges of the true depth, a panel per source: (names, ranges) scores, their (2, ...) bounds, points.

    Intervals are drawn as bands for up to four contestants; tables hold them all.
    """
    figure, axes = panels(len(sources), 2.0, 3, "true depth, m")
    places = np.arange(len(ranges))
    for panel, (source, (values, bounds, points)) in zip(axes, sources.items(), strict=True):
        for index, name in enumerate(names):
            panel.plot(places, values[index], label=label(name), **style(index))
            if len(names) <= 4:
                panel.fill_between(places, *bounds[:, index], color=style(index)["color"], alpha=0.15, linewidth=0)
        panel.set_title(f"{label(source)}, {points.sum()} points")
    used = np.flatnonzero(sum(points for _, _, points in sources.values()))
    axes[0].set(ylim=(-0.03, 1.03), xlim=(used[0] - 0.5, used[-1] + 0.5))
    axes[0].set_xticks(places[used], [ranges[place] for place in used])
    for panel in axes:
        panel.tick_params(axis="x", labelrotation=45)
    for panel in axes[::3]:
        panel.set_ylabel("δ1")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=6, frameon=False)
    return figure


def scene_strips(names: Sequence[str], sources: dict[str, np.ndarray]) -> Figure:
    """δ1 of each scene as a dot, their median as a bar, a panel per source: (names, scenes)."""
    figure, axes = panels(len(sources), 0.5 + 0.13 * len(names), 4, "δ1 of a scene")
    for panel, (source, values) in zip(axes, sources.items(), strict=True):
        for place, scores in enumerate(values):
            scores = scores[np.isfinite(scores)]
            panel.scatter(
                scores, np.full(len(scores), place), s=5, alpha=0.35, linewidths=0, color=style(place)["color"]
            )
            if len(scores):
                panel.scatter(np.median(scores), place, marker="|", s=50, color="k", linewidths=1.2)
        panel.set_title(f"{label(source)}, {values.shape[1]} scenes")
    axes[0].set(xlim=(-0.02, 1.02), ylim=(len(names) - 0.5, -0.5))
    axes[0].set_yticks(range(len(names)), map(label, names))
    return figure


def contact_sheet(title: str, images: list[dict]) -> Figure:
    """Images with the error of each point or pixel: ln(predicted / true), blue too near, red too far.

    images: dicts of `image` (PIL), `caption`, and either `points` (u, v, error) or `errors` (h, w) with `labelled`,
    where there is ground truth. Errors are NaN without an answer.
    """
    columns = min(4, len(images))
    figure = new_figure(WIDTH, 0.5 + 1.75 * -(-len(images) // columns))
    norm = matplotlib.colors.Normalize(-np.log(2), np.log(2))
    colours = matplotlib.colormaps["coolwarm"].with_extremes(bad="k")
    for place, item in enumerate(images, 1):
        axes = figure.add_subplot(-(-len(images) // columns), columns, place)
        width, height = item["image"].size
        picture = item["image"].convert("RGB")
        picture.thumbnail((640, 640), Image.Resampling.BOX)
        axes.imshow(picture, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
        if "points" in item:
            u, v, error = item["points"]
            missing = np.isnan(error)
            size = np.clip(1500 / len(u), 2.5, 9)
            options = {"cmap": colours, "norm": norm, "edgecolors": "k", "linewidths": 0.2}
            drawn = axes.scatter(u[~missing], v[~missing], s=size, c=error[~missing], **options)
            axes.scatter(u[missing], v[missing], s=size, marker="x", c="k", linewidths=0.8)
        else:
            drawn = axes.imshow(
                item["errors"],
                cmap=colours,
                norm=norm,
                alpha=0.8 * item["labelled"],
                extent=(-0.5, width - 0.5, height - 0.5, -0.5),
                interpolation="nearest",
            )
        axes.set_title(item["caption"], fontsize=5.5)
        axes.set_axis_off()
    bar = figure.colorbar(drawn, ax=figure.axes, location="bottom", fraction=0.03, pad=0.02, aspect=50)
    bar.set_ticks(np.log([0.5, 0.8, 1, 1.25, 2]), labels=["half", "0.8", "right", "1.25", "twice"])
    figure.suptitle(label(title), fontsize=8)
    return figure
