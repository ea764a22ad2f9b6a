"""Records as the cells of markdown tables."""

import statistics

from . import UserError, report

COLUMNS = (
    "model", "parameters", "corpus", "recipe", "epochs", "minutes", "valid ppl", "test ppl", "forward ms", "ms/batch",
    "peak MiB", "device", "command", "commit",
)  # fmt: skip


def model_name(model):
    """Kind and sizes of a record's model, as a table shows them."""
    core = model["core"]
    if model["family"] == "rmc":
        name = f"RMC {core['variant']} {core['memslots']}x({core['numheads']}x{core['headsize']})"
    elif model["family"] == "qrnn":
        name = f"QRNN {core['mode']} {core['nlayers']}x{core['nhid']} window {core['window']}"
    else:
        name = f"{core['model']} {core['nlayers']}x{core['nhid']}{' loop' if core['loop'] else ''}"
    return name + (" tied" if model["tied"] else "") + (" adaptive" if model.get("cutoffs") else "")


def table_row(record):
    """The cells of one run record, in the order of COLUMNS; evaluation is at the batch size the record names."""
    config, results = record["config"], record["results"]
    batch = {score["batch_size"] for score in results.values()}
    if batch != {1}:
        raise UserError(f"run {record['name']}: expected valid and test scored at batch 1, got batch sizes {batch}")
    return [
        model_name(record["model"]),
        f"{record['model']['parameters']:,}",
        record["corpus"]["name"],
        config["recipe"],
        record["epochs"],
        f"{record['minutes']:.1f}",
        f"{results['valid']['perplexity']:.2f}",
        f"{results['test']['perplexity']:.2f}",
        f"{record['forward_ms_per_batch']:.0f}",
        f"{record['ms_per_batch']:.0f}",
        f"{record['peak_memory_mib']:.0f}",
        f"{record['environment']['device']}, {record['environment']['threads']} threads",
        f"`{record['command']}`",
        (record["environment"]["commit"] or "")[:12],
    ]


def table_text(records):
    """The markdown table of run records, best test perplexity first."""
    ordered = sorted(records, key=lambda record: record["results"]["test"]["perplexity"])
    return report.markdown_table(COLUMNS, [table_row(record) for record in ordered])


def spread(values, digits=0):
    """Median (lowest to highest)."""
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def about(record):
    """How and where a record was made, two paragraphs of markdown."""
    where = " | ".join(f"{key} {value}" for key, value in record["environment"].items())
    return f"`{record['command']}`; {record['machine']}\n\n{where}\n\n"
