"""Pictures of measurements and of several runs; each of a run's own curves is utils/report.py's."""

import itertools
import math
import statistics

import numpy as np

from .rows import EPOCHS
from .run_tables import TRAINED
from .tables import FLOORS, PUBLISHED, PUBLISHED_PARTS, figure4_medians

HATCHES = ("", "//", "..")
OTHERS = "published, of another corpus"
STYLES = list(zip(("-", "--", ":", "-."), ("o", "s", "^", "D"), strict=True))


def _figure(width, height):
    """An empty figure of so many inches; matplotlib is imported when there is something to draw."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def figure4_picture(record, path):
    """Figure 4 in the paper's form: bars of a training step's parts, and the grid of speeds over nn.LSTM."""
    parts, grids = figure4_medians(record)
    figure = _figure(13, 4.5)
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    parts |= PUBLISHED_PARTS
    names = [name.replace(", ", ",\n").replace(" (", "\n(") for name in parts]
    bottom = [0.0] * len(parts)
    for number, label in enumerate(("RNN", "softmax", "optimization")):
        heights = [taken[number] for taken in parts.values()]
        left.bar(names, heights, 0.6, bottom, label=label, hatch=HATCHES[number], edgecolor="white")
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    left.set_ylabel("milliseconds a batch")
    left.set_title("Training step, 2 x 640, batch 20, 105 steps")
    left.set_ylim(0, 1.2 * max(bottom))
    left.legend(ncols=3, loc="upper center")
    grid = grids["QRNN"]
    batches, lengths = (sorted({key[number] for key in grid}) for number in (0, 1))
    right.imshow(
        [[grid[batch, length] for length in lengths] for batch in batches], cmap="Greens", vmin=0, vmax=6, aspect="auto"
    )
    for y, batch in enumerate(batches):
        published = dict(zip((32, 64, 128, 256, 512), PUBLISHED.get(batch, ()), strict=False))
        for x, length in enumerate(lengths):
            theirs = f"\n(paper {published[length]}x)" if length in published else ""
            right.text(x, y, f"{grid[batch, length]:.1f}x{theirs}", ha="center", va="center", fontsize=9)
    right.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    right.set_yticks(range(len(batches)), [str(batch) for batch in batches])
    right.set_xlabel("sequence length")
    right.set_ylabel("batch size")
    right.set_title("320-unit QRNN layer without gradients, times the speed of nn.LSTM")
    figure.savefig(path, dpi=120)


def curves_picture(rows, path):
    """Validation perplexity over the minutes of training: rows [(name, records of its seeds)], a line each record.

    Rows of equal epochs, whose names end in EPOCHS, have a panel of their own, over epochs.
    """
    equal = [row for row in rows if row[0].endswith(EPOCHS)]
    others = [row for row in rows if row not in equal]
    panels = [panel for panel in (("minutes", others), ("epochs", equal)) if panel[1]]
    figure = _figure(7 * len(panels) + 1, 5)
    for axes, (unit, own) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        _curves(axes, unit, own)
    figure.savefig(path, dpi=120)


def _curves(axes, unit, rows):
    """Validation perplexity over "minutes" or "epochs", lines of one colour for each of rows [(name, records)]."""
    lowest = []
    for number, (name, records) in enumerate(rows):
        line, marker = STYLES[number % len(STYLES)]
        own = [_lowest(record) for record in records]
        label = f"{name}: {', '.join(f'{perplexity:.1f}' for perplexity in own)}"
        for record in records:
            epochs = record["history"]["epochs"]
            lengths = [epoch["seconds"] / 60 if unit == "minutes" else epoch["part"] for epoch in epochs]
            done = list(itertools.accumulate(lengths))
            valid = [epoch["valid_ppl"] for epoch in epochs]
            axes.plot(done, valid, line, marker=marker, ms=4, color=f"C{number % 10}", label=label)
            label = None  # one line of the legend for all seeds
        lowest += [perplexity for perplexity in own if perplexity < math.inf]
    axes.set(xlabel=f"{unit} of training", ylabel="perplexity of the validation split", yscale="log")
    axes.set_title("between epochs; the lowest in the legend", fontsize=9)
    if lowest:
        axes.set_ylim(0.9 * min(lowest), 4 * max(lowest))
    axes.locator_params(axis="x", integer=unit == "epochs")
    _plain(axes)


def _lowest(record):
    """The least validation perplexity of a training's epochs, inf where none is finite."""
    return min(
        (epoch["valid_ppl"] for epoch in record["history"]["epochs"] if epoch["valid_ppl"] < math.inf), default=math.inf
    )


def sparsity_picture(rows, path):
    """Test perplexity over the part of all weights that is zero: rows [(name, published, record)].

    Pruned while training, at once (the records of evaluations), and the published figures, which are of another
    corpus. The first and last fill the picture, what is beyond is said at its edge; the parts are as far apart as what
    they leave is in proportion.
    """
    figure = _figure(8, 5)
    axes = figure.subplots()
    kinds = {"while training": ([], "o", "C0"), "at once": ([], "s--", "C1"), OTHERS: ([], "^", "0.4")}
    labels = {}
    for name, published, record in rows:
        model = record["model"]
        part = 100 * model["pruned"] / model["parameters"]
        kind = "while training" if record["kind"] == TRAINED else "at once"
        perplexity = record["results"]["test"]["perplexity"]
        kinds[kind][0].append((part, perplexity))
        if kind == "while training":
            near = [point for point in labels if abs(point[0] - part) < 1 and abs(point[1] - perplexity) < 2]
            labels.setdefault((near or [(part, perplexity)])[0], []).append(name)
        if published is not None:
            kinds[OTHERS][0].append((part, published))
    for label, (points, style, color) in kinds.items():
        if points:
            axes.plot(*zip(*sorted(points), strict=True), style, color=color, ms=5, label=label)
    for point, names in labels.items():
        axes.annotate(", ".join(names), point, textcoords="offset points", xytext=(6, 3), fontsize=8)
    shown = [perplexity for kind in ("while training", OTHERS) for _, perplexity in kinds[kind][0]]
    axes.set(xlabel="weights that are zero, % (as far apart as log(100 - %))", ylabel="perplexity of the test split")
    axes.set_xscale("function", functions=(lambda part: -np.log(100 - part), lambda left: 100 - np.exp(-left)))
    axes.set_xticks([0, 50, 70, 80, 90, 95])
    axes.set_xlim(-8, 96.5)
    if shown:
        axes.set_ylim(0.95 * min(shown), 1.3 * max(shown))
        for part, perplexity in kinds["at once"][0]:
            if perplexity > 1.3 * max(shown):
                above = f"at once: {perplexity:,.0f}"
                axes.annotate(
                    above,
                    (part, 1),
                    xycoords=("data", "axes fraction"),
                    xytext=(0, 3),
                    fontsize=8,
                    ha="center",
                    textcoords="offset points",
                    color="C1",
                )
    _plain(axes)
    figure.savefig(path, dpi=120)


def scaling_picture(record, path):
    """A panel an axis of a scaling record: milliseconds of each family as that size grows, and their floor, dotted."""
    names = list(dict.fromkeys(row["axis"] for row in record["rows"]))
    lines = -(-len(names) // 3)
    figure = _figure(13, 3.8 * lines)
    panels = figure.subplots(lines, 3, squeeze=False).flat
    for axis, panel in itertools.zip_longest(names, panels):
        if axis is None:
            panel.set_visible(False)
            continue
        own = [row for row in record["rows"] if row["axis"] == axis]
        for number, name in enumerate(dict.fromkeys(row["name"] for row in own)):
            found = [row for row in own if row["name"] == name]
            values, color = [row["value"] for row in found], f"C{number}"
            middle = [statistics.median(row["ms"]) for row in found]
            beyond = [
                [mid - min(row["ms"]) for mid, row in zip(middle, found, strict=True)],
                [max(row["ms"]) - mid for mid, row in zip(middle, found, strict=True)],
            ]
            panel.errorbar(
                values, middle, beyond, fmt=f"{STYLES[number][1]}-", color=color, ms=4, capsize=2, label=name
            )
            panel.plot(values, [row["floor_ms"] for row in found], ":", color=color)
        panel.set(xlabel=f"{axis} (dotted: {FLOORS.get(axis, 'products alone')})", ylabel="milliseconds", yscale="log")
        if axis != "zeros":
            panel.set_xscale("log")
        panel.set_xticks(
            sorted({row["value"] for row in own}), [f"{value:,}" for value in sorted({r["value"] for r in own})]
        )
        panel.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        _plain(panel)
    figure.savefig(path, dpi=110)


def ahead_picture(comparisons, path):
    """Bars: how many times as good as a peer ours is, with the range of rounds; a tick at what was to be reached.

    comparisons: [(what, ours, peer, ratios, reach or None)].
    """
    figure = _figure(10, 0.9 + 0.24 * len(comparisons))
    axes = figure.subplots()
    kinds = list(dict.fromkeys(what for what, *_ in comparisons))
    for y, (what, _, _, ratios, reach) in enumerate(comparisons):
        middle, number = statistics.median(ratios), kinds.index(what)
        beyond = [[middle - min(ratios)], [max(ratios) - middle]]
        axes.barh(y, middle, 0.7, xerr=beyond, color=f"C{number % 10}", alpha=0.75, hatch=HATCHES[number % 3])
        axes.text(1.01, y, f"{middle:.2f}", va="center", fontsize=7, transform=axes.get_yaxis_transform())
        if reach:
            axes.plot([reach, reach], [y - 0.45, y + 0.45], color="black", lw=2)
    axes.set_yticks(range(len(comparisons)), [f"{what}: {ours} / {peer}" for what, ours, peer, *_ in comparisons])
    axes.tick_params(axis="y", labelsize=7)
    axes.axvline(1, color="0.3", lw=1)
    axes.set_ylim(len(comparisons) - 0.4, -0.6)
    axes.set(xscale="log", xlabel="times as fast as the peer, or as little memory (black: to be reached)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(axis="x", which="both", color="0.92")
    axes.set_axisbelow(True)
    figure.savefig(path, dpi=110)


def _plain(axes):
    """Numbers instead of powers, a grid, a legend."""
    low, high = axes.get_ylim()
    if high / low < 30:
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.tick_params(axis="y", which="minor", labelsize=7)
    axes.grid(which="both", color="0.92")
    if len(axes.get_legend_handles_labels()[1]) > 8:  # beside the axes, where it hides no curve
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    else:
        axes.legend()
