"""Records as the cells of markdown tables."""

import itertools
import math
import statistics

from . import report

SCORED = ("valid", "test")

# Whom a candidate is compared with: peers, each with the candidate whose flags and weights it takes.
RIVALS = {
    "LSTM, port": (("port-rnn", "LSTM, port"),),
    "LSTM loop, port": (("port-rnn", "LSTM loop, port"),),
    "LSTM 650 tied, example": (("example", "LSTM 650 tied, example"),),
    "RMC, paper's form": (("port-rmc", "RMC, port's form"),),
    "RMC, port's form": (("port-rmc", "RMC, port's form"),),
    "AWD-LSTM": (("authors", "AWD-LSTM"), ("a-martyn", "AWD-LSTM"), ("fastai", "AWD-LSTM")),
    "AWD-QRNN": (("authors", "AWD-QRNN"),),
}


def places(milliseconds):
    """Digits behind the point of figures of about this many milliseconds."""
    return 1 if milliseconds < 100 else 0


def spread(values, digits=0):
    """Median (lowest to highest)."""
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def about(record):
    """How and where a record was made, two paragraphs of markdown."""
    where = " | ".join(f"{key} {value}" for key, value in record["environment"].items())
    return f"`{record['command']}`; {record['machine']}\n\n{where}\n\n"


def rival_name(rival):
    """How a table calls a peer."""
    return f"{rival[0]} ({rival[1]})"


SPEED_COLUMNS = (
    "model", "ms/batch, median (range)", "tokens/s", "forward only ms", "launches", "peak MiB", "products alone ms",
    "step / products", "times the peer's speed", "launches / peer's", "peak / peer's",
)  # fmt: skip


def speed_text(record):
    """The markdown of a speed record: how it was made, its table."""
    rows = {row["name"]: row for row in record["rows"]}
    table_rows = []
    for name, row in rows.items():
        median = statistics.median(row["ms"])
        digits = places(median)
        cells = [name, spread(row["ms"], digits), "", f"{statistics.median(row['forward_ms']):,.{digits}f}"]
        cells += [f"{row['launches']:,}"]
        cells += [f"{row['memory_mib']:,.0f}", "", "", "", "", ""]
        if "products_ms" in row:
            cells[2] = f"{row['tokens'] / median * 1000:,.0f}"
            cells[6] = spread(row["products_ms"], digits)
            cells[7] = spread([taken / alone for taken, alone in zip(row["ms"], row["products_ms"], strict=True)], 2)
        peers = [rows[rival] for rival in map(rival_name, RIVALS.get(name, ())) if rival in rows]
        ratios = [[theirs / ours for ours, theirs in zip(row["ms"], peer["ms"], strict=True)] for peer in peers]
        cells[8] = "; ".join(spread(ratio, 2) for ratio in ratios)
        cells[9] = "; ".join(f"{row['launches'] / peer['launches']:.2f}" for peer in peers)
        cells[10] = "; ".join(f"{row['memory_mib'] / peer['memory_mib']:.2f}" for peer in peers)
        table_rows.append(cells)
    return f"Vocabulary {record['vocab_size']:,}. " + about(record) + report.markdown_table(SPEED_COLUMNS, table_rows)


def settings_text(record):
    """The markdown of a settings record: milliseconds of each setting, and times what it takes as it comes.

    Cells of what was not timed are empty.
    """
    taken = {}
    for row in record["rows"]:
        taken.setdefault(row["name"], {})[row["setting"]] = row["ms"]
    plain = record["rows"][0]["setting"]
    columns = [column for name in taken for column in (f"{name}: ms/batch", "times the first row's")]
    rows = []
    for setting in dict.fromkeys(row["setting"] for row in record["rows"]):
        row = [f"`{setting}`" if setting != plain else plain]
        for ways in taken.values():
            if setting not in ways:
                row += ["", ""]
                continue
            ratios = [own / unchanged for own, unchanged in zip(ways[setting], ways[plain], strict=True)]
            row += [spread(ways[setting]), spread(ratios, 2)]
        rows.append(row)
    title = f"Vocabulary {record['vocab_size']:,}. " + about(record)
    return title + report.markdown_table(("setting", *columns), rows)


QUALITY_COLUMNS = ("model", "seed", "valid ppl", "test ppl", "ms/batch, median", "test ppl / first row's")
MEAN_COLUMNS = ("model", "seeds", *QUALITY_COLUMNS[2:])
MANY = 5
"""Seeds from which on a table shows their mean instead of each."""


def quality_text(record):
    """The markdown of a quality record: who trained, from which seed, what our evaluation says of the weights."""
    models = {}
    for row in record["rows"]:
        models.setdefault(row["name"], []).append(row)
    title = f"{record['corpus']}, {record['epochs']} epochs, {record['rows'][0]['updates']} updates. " + about(record)
    first = next(iter(models.values()))
    if len(first) < MANY:
        pairs = [pair for runs in models.values() for pair in zip(runs, first, strict=True)]
        rows = [_quality_row(row, reference) for row, reference in pairs]
        return title + report.markdown_table(QUALITY_COLUMNS, rows)
    rows = [_mean_row(name, runs, first) for name, runs in models.items()]
    return title + "Means with their standard errors.\n\n" + report.markdown_table(MEAN_COLUMNS, rows)


def _quality_row(row, reference):
    cells = [row["name"], row["seed"], f"{row['valid']:.2f}", f"{row['test']:.2f}", f"{row['ms']:,.0f}"]
    return [*cells, f"{row['test'] / reference['test']:.3f}"]


def _mean_row(name, runs, first):
    """One model's runs, one a seed; the error of the ratio as if the two models' runs were independent."""
    cells, test = [name, len(runs)], [mean_error([run["test"] for run in each]) for each in (runs, first)]
    cells += [f"{mean:.2f} ± {error:.2f}" for mean, error in (mean_error([run["valid"] for run in runs]), test[0])]
    ratio = test[0][0] / test[1][0]
    error = ratio * math.hypot(*(error / mean for mean, error in test))
    cells += [f"{statistics.median(run['ms'] for run in runs):,.0f}"]
    return [*cells, "1" if runs is first else f"{ratio:.3f} ± {error:.3f}"]


def mean_error(values):
    """The mean and its standard error."""
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def memory_text(record):
    """The markdown of a memory record."""
    header = ("model", "parameters", "parameters MiB", "peak MiB of two training steps, above the parameters")
    rows = [
        [row["name"], f"{row['parameters']:,}", f"{row['parameters'] / 2**18:,.0f}", f"{row['memory_mib']:,.0f}"]
        for row in record["rows"]
    ]
    return f"Vocabulary {record['vocab_size']:,}. " + about(record) + report.markdown_table(header, rows)


def shortened(name, length=60):
    """The name, or its first letters and three dots: that of a kernel of a GPU has hundreds."""
    return name if len(name) <= length else f"{name[: length - 3]}..."


def profile_text(record):
    """The markdown of a profile record: two columns a candidate, its operations by their own time."""
    header, cells = [], []
    for row in record["rows"]:
        digits = places(row["total_ms"])
        header += [f"{row['name']}: {row['total_ms']:,.{digits}f} ms", "calls", "ms"]
        cells.append([[shortened(name), f"{calls:,}", f"{taken:,.{digits}f}"] for name, taken, calls in row["longest"]])
    rows = [
        [cell for part in parts for cell in part] for parts in itertools.zip_longest(*cells, fillvalue=("", "", ""))
    ]
    return f"Vocabulary {record['vocab_size']:,}. " + about(record) + report.markdown_table(header, rows)


def evaluation_text(record):
    """The markdown of an evaluation record."""
    ours = record["rows"][0]
    table_rows = []
    for row in record["rows"]:
        ratios = [theirs / own for own, theirs in zip(ours["seconds"], row["seconds"], strict=True)]
        table_rows.append([row["name"], spread(row["seconds"], 2), f"{row['perplexity']:.2f}", spread(ratios, 2)])
    header = ("model", f"seconds for {record['targets']:,} targets of {record['corpus']}", "perplexity", "times ours")
    return about(record) + report.markdown_table(header, table_rows)


def load_text(record):
    """The markdown of a load record."""
    rows = {row["name"]: row for row in record["rows"]}
    build_seconds = rows["build"]["seconds"]
    table_rows = []
    for name, row in rows.items():
        ratios = [other / own for own, other in zip(build_seconds, row["seconds"], strict=True)]
        table_rows.append([name, spread(row["seconds"], 2), f"{max(row['memory_mib']):,.0f}", spread(ratios, 2)])
    return about(record) + report.markdown_table(
        (record["corpus"], "seconds", "peak MiB", "times our build"), table_rows
    )


def layers_text(record):
    """The markdown of a layers record: each size a part, ratios to the first way and to the products alone."""
    text = [about(record)]
    for what, sizes in dict.fromkeys((row["what"], tuple(row["sizes"])) for row in record["rows"]):
        rows = [row for row in record["rows"] if (row["what"], tuple(row["sizes"])) == (what, sizes)]
        names = "T, B, H" if what == "recurrence" else "T, B, input, H, window"
        first = next((row for row in rows if row["name"] in ("cpu", "cuda", "QRNN")), rows[0])
        cells = []
        for row in rows:
            ratios = [theirs / ours for ours, theirs in zip(first["ms"], row["ms"], strict=True)]
            alone = row.get("products_ms")
            over = spread([a / b for a, b in zip(row["ms"], alone, strict=True)], 2) if alone else ""
            cells.append([row["name"], f"{row['difference']:.0e}", spread(row["ms"], 1), spread(ratios, 2), over])
            cells[-1] += [spread(row["inference_ms"], 1)] if "inference_ms" in row else []
        header = (f"{what}, {names} = {', '.join(map(str, sizes))}", "difference", "forward and backward ms")
        header += (f"times {first['name']}", "times its products alone")
        header += ("without gradients ms",) * ("inference_ms" in first)
        text.append(report.markdown_table(header, cells))
    return "\n".join(text)


def quantization_text(record):
    """The markdown of a quantization record: a row a setting, perplexities of ours and of distiller, its own beside."""
    rows = []
    for row in record["rows"]:
        scores = [f"{row[who][split]:.2f}" if who in row else "-" for who in ("ours", "distiller") for split in SCORED]
        rows.append([row["name"], *scores, f"{row['published']:.2f}"])
    header = [f"{who}, {split}" for who in ("ours", "distiller, same weights") for split in SCORED]
    title = (
        f"{record['corpus']}, in {record['eval_batch']} columns; statistics from {record['statistics']}; published: "
        f"WikiText-2, valid, an LSTM of 2 x 1500. "
    )
    return title + about(record) + report.markdown_table(("simulated", *header, "published, valid"), rows)


def products_text(record):
    """The markdown of a products record: a row a way, a column a size; microseconds and times the first way's speed."""
    sizes, found = dict.fromkeys(tuple(row["sizes"]) for row in record["rows"]), {}
    for row in record["rows"]:
        found.setdefault(row["name"], {})[tuple(row["sizes"])] = row
    first, table_rows = next(iter(found.values())), []
    for name, own in found.items():
        cells = [name, f"{max(row['difference'] for row in own.values()):.0e}"]
        for size in sizes:
            if size not in own:  # its result was too far off
                cells.append("-")
                continue
            taken = [1000 * value for value in own[size]["ms"]]
            ratios = [theirs / value for theirs, value in zip(first[size]["ms"], own[size]["ms"], strict=True)]
            cells.append(f"{spread(taken)}; {spread(ratios, 2)}")
        table_rows.append(cells)
    header = ("product", "difference", *(f"{m} x {k} by {k} x {n}" for m, k, n in sizes))
    return "Microseconds; times the first row's speed. " + about(record) + report.markdown_table(header, table_rows)


def generate_text(record):
    """The markdown of a generate record: milliseconds a word, times the peer's speed, times reading the weights."""
    rows, table_rows = {row["name"]: row for row in record["rows"]}, []
    for name, row in rows.items():
        row_cells = [name, spread(row["ms"], 2), "", "", "", ""]
        if "reading_ms" in row:
            over = [taken / alone for taken, alone in zip(row["ms"], row["reading_ms"], strict=True)]
            row_cells[2:5] = [f"{row['weights_mib']:.0f}", spread(row["reading_ms"], 2), spread(over, 2)]
        peers = [rows[rival] for rival in map(rival_name, RIVALS.get(name, ())) if rival in rows]
        ratios = [[theirs / ours for ours, theirs in zip(row["ms"], peer["ms"], strict=True)] for peer in peers]
        row_cells[5] = "; ".join(spread(ratio, 2) for ratio in ratios)
        table_rows.append(row_cells)
    header = ("model", "ms/word", "weights MiB", "reading them ms", "times reading them", "times the peer's speed")
    title = f"Vocabulary {record['vocab_size']:,}, {record['words']:,} words in one column. "
    return title + about(record) + report.markdown_table(header, table_rows)


def scaling_text(record):
    """The markdown of a scaling record: a table an axis; milliseconds, and how often they hold the floor's."""
    text = [about(record)]
    for axis in dict.fromkeys(row["axis"] for row in record["rows"]):
        own = [row for row in record["rows"] if row["axis"] == axis]
        values = list(dict.fromkeys(row["value"] for row in own))
        table_rows = []
        for name in dict.fromkeys(row["name"] for row in own):
            found = {row["value"]: row for row in own if row["name"] == name}
            digits = 0 if max(row["floor_ms"] for row in found.values()) > 10 else 3
            shown = [found[value] for value in values]
            cells = [spread(row["ms"], digits) for row in shown]
            over = [f"{statistics.median(row['ms']) / row['floor_ms']:.2f}" for row in shown]
            table_rows += [[name, *cells], [f"{name}, times {FLOORS.get(axis, 'its products alone')}", *over]]
        text.append(report.markdown_table((axis, *(f"{value:,}" for value in values)), table_rows))
    return "\n".join(text)


FLOORS = {"zeros": "the dense product", "processes": "an equal share of one process's"}
"""What a scaling record's floor is where it is not the matrix products alone."""

PUBLISHED = {
    8: (5.5, 8.8, 11.0, 12.4, 16.9), 16: (5.5, 6.7, 7.8, 8.3, 10.8), 32: (4.2, 4.5, 4.9, 4.9, 6.4),
    64: (3.0, 3.0, 3.0, 3.0, 3.7), 128: (2.1, 1.9, 2.0, 2.0, 2.4), 256: (1.4, 1.4, 1.3, 1.3, 1.3),
}  # fmt: skip
"""Figure 4 of Bradbury et al. 2017, right: by batch size, for 32, 64, 128, 256 and 512 steps, over cuDNN's LSTM."""
PUBLISHED_PARTS = {"LSTM (cuDNN, paper)": (170, 75, 45), "QRNN (paper)": (42, 75, 35)}
"""Left: milliseconds of RNN, softmax and optimization, read off the bars."""


def figure4_medians(record):
    """Medians: {name: (RNN, softmax, optimization)}, and {way: {(batch, length): times nn.LSTM's speed}}."""
    parts = {
        name: [statistics.median(column) for column in zip(*taken, strict=True)]
        for name, taken in record["parts"].items()
    }
    grids = {}
    for way in ("QRNN", "QRNN bf16"):
        grids[way] = {
            (cell["batch"], cell["length"]): statistics.median(cell["nn.LSTM"]) / statistics.median(cell[way])
            for cell in record["cells"]
        }
    return parts, grids


def figure4_text(record):
    """The markdown of a figure4 record: parts of a step, then the grid of speeds, published figures beside ours."""
    parts, grids = figure4_medians(record)
    rows = [
        [name, *(f"{value:,.0f}" for value in taken), f"{sum(taken):,.0f}"]
        for name, taken in [*parts.items(), *PUBLISHED_PARTS.items()]
    ]
    text = about(record) + report.markdown_table(("ms a training step", "RNN", "softmax", "optimization", "all"), rows)
    batches, lengths = (sorted({key[number] for key in grids["QRNN"]}) for number in (0, 1))
    rows = []
    for batch in batches:
        row = [str(batch)]
        for length in lengths:
            published = dict(zip((32, 64, 128, 256, 512), PUBLISHED.get(batch, ()), strict=False)).get(length)
            row.append(" / ".join([*(f"{grids[way][batch, length]:.1f}" for way in grids), f"{published or '-'}"]))
        rows.append(row)
    header = ("batch: ours / ours bf16 / published", *(f"{length} steps" for length in lengths))
    return text + "\n" + report.markdown_table(header, rows)


COMPRESSION_COLUMNS = (
    "checkpoint", "file MiB", "weights MiB", "parameters", "zeros %", "peak MiB", "ms/batch", "ms/word",
    "times the first's batches", "times the first's words", "valid ppl", "test ppl",
)  # fmt: skip


def compression_text(record):
    """The markdown of a compression record: a row a checkpoint, then what each computes in what."""
    first, rows = record["rows"][0], []
    for row in record["rows"]:
        ratios = [
            spread([theirs / own for theirs, own in zip(first[key], row[key], strict=True)], 2)
            for key in ("batch_ms", "word_ms")
        ]
        rows.append(
            [
                *(row["name"], f"{row['file_mib']:.1f}", f"{row['weights_mib']:.1f}", f"{row['parameters']:,}"),
                *(f"{100 * row['zeros'] / row['parameters']:.1f}", f"{row['memory_mib']:,.0f}"),
                *(spread(row["batch_ms"], 1), spread(row["word_ms"], 2), *ratios),
                *(f"{row[split]:.2f}" for split in SCORED),
            ]
        )
    types = "\n".join(f"- {row['name']}: {row['types']}" for row in record["rows"])
    return (
        f"{record['corpus']}, scored in {record['eval_batch']} columns. A batch is {record['steps']} words of "
        f"{record['columns']} columns; words are generated in one; the peak is that of loading and generating. "
        f"{about(record)}{report.markdown_table(COMPRESSION_COLUMNS, rows)}\n{types}\n"
    )


def cuda_text(record):
    """The markdown of what tools/cuda_report.py counted."""
    cards = f"{record['bandwidth'] / 1e12:.2f} TB/s"
    tables = (
        (("kernel: registers", *(f"sm_{number}" for number in record["architectures"])), record["registers"]),
        (("bytes for each number of h", "loaded", "stored", "least loaded", "least stored"), record["traffic"]),
        (("a training step", "launches by torch alone", "with the kernels", "of them ours"), record["launches"]),
        ((f"a layer's pooling, mode fo, at {cards}", "forward", "backward"), record["floors"]),
    )
    text = (
        f"{about(record)}NVRTC {record['nvrtc']}; largest spill or stack of any kernel: {record['spilled']} bytes.\n\n"
    )
    return text + "\n".join(report.markdown_table(header, rows) for header, rows in tables)


RENDERERS = {
    "quality": quality_text,
    "speed": speed_text,
    "memory": memory_text,
    "profile": profile_text,
    "evaluation": evaluation_text,
    "load": load_text,
    "layers": layers_text,
    "generate": generate_text,
    "scaling": scaling_text,
    "settings": settings_text,
    "figure4": figure4_text,
    "compression": compression_text,
    "products": products_text,
    "quantization": quantization_text,
    "cuda": cuda_text,
}
