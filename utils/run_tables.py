"""Tables of run records: trained models, checkpoints evaluated, seeds side by side, published figures beside ours."""

import re
import statistics

from . import UserError, report

COLUMNS = (
    "model", "parameters", "corpus", "recipe", "epochs", "minutes", "valid ppl", "test ppl", "forward ms", "ms/batch",
    "peak MiB", "device", "command", "commit",
)  # fmt: skip
SCORE_COLUMNS = ("model", "corpus", "adaptation", "valid ppl", "test ppl", "minutes", "device", "command", "commit")
DIFFERENCE_COLUMNS = (
    "what differs", "seeds", "valid ppl", "test ppl", "best epoch", "mean test ppl", "times the first row's"
)  # fmt: skip
PLAN_COLUMNS = (
    "row", *COLUMNS[:6], "seeds", "valid ppl", "test ppl", "published valid", "published test", *COLUMNS[8:]
)  # fmt: skip
MEANS = (("minutes", "minutes", 1), ("forward ms", "forward_ms_per_batch", 0), ("ms/batch", "ms_per_batch", 0))
"""Columns that are means over seeds in a planned table: (column, what of a record it is of, digits)."""
TRAINED = "training"
"""The kind of a record that a train script wrote; the other is evaluate.py's."""
KINDS = (TRAINED, "evaluation of a checkpoint")


def model_name(model):
    """Kind and sizes of a record's model, as a table shows them."""
    core = model["core"]
    if model["family"] == "rmc":
        name = f"RMC {core['variant']} {core['memslots']}x({core['numheads']}x{core['headsize']})"
    elif model["family"] == "qrnn":
        name = f"QRNN {core['mode']} {core['nlayers']}x{core['nhid']} window {core['window']}"
    elif model["family"] == "transformer":
        name = f"Transformer {core['nlayers']}x{core['emsize']} context {core['context']}"
    else:
        name = "AWD-" * (model["family"] == "awd")
        name += f"{core['model']} {core['nlayers']}x{core['nhid']}{' loop' if core['loop'] else ''}"
    clusters = " split" if model.get("splitcross") else " adaptive"
    name += (" tied" if model["tied"] else "") + (clusters if model.get("cutoffs") else "")
    name += f", {model['pruned'] / model['parameters']:.1%} pruned" if model.get("pruned") else ""
    return name + "".join(f", {kind}" for kind in ("native", "sparse") if model.get(kind)) + quantization_name(model)


def quantization_name(model):
    """The settings of a simulated model in integers, "" of any other."""
    settings = model.get("quantization")
    if not settings:
        return ""
    words = [settings["mode"], "per channel" if settings["per_channel"] else "per tensor", f"clip {settings['clip']}"]
    words += [f"float16 {','.join(settings['fp16'])}"] if settings["fp16"] else []
    return f", {settings['weight_bits']}/{settings['activation_bits']} bits {' '.join(words)}"


def cells(record):
    """{column: cell} of a run record; what a training has and an evaluation has not is "" there.

    Raises UserError when its perplexities are not of batch 1.
    """
    results, environment, model = record["results"], record["environment"], record["model"]
    batch = {score["batch_size"] for score in results.values()}
    if batch != {1}:
        raise UserError(f"run {record['name']}: expected valid and test scored at batch 1, got batch sizes {batch}")
    trained = record["kind"] == TRAINED
    cut = "" if record.get("status", "finished") == "finished" else f", {record['status']}"
    adaptation = f"`{record['adaptation']}`" if record.get("adaptation") else ""
    return {
        "model": model_name(model),
        "parameters": f"{model['parameters']:,}",
        "corpus": record["corpus"]["name"],
        "recipe": record["config"]["recipe"] if trained else adaptation,
        "epochs": f"{record['epochs']}{cut}" if trained else "",
        "adaptation": adaptation or "none",
        "minutes": f"{record['minutes']:.1f}",
        "valid ppl": f"{results['valid']['perplexity']:.2f}",
        "test ppl": f"{results['test']['perplexity']:.2f}",
        "forward ms": f"{record['forward_ms_per_batch']:.0f}" if trained else "",
        "ms/batch": f"{record['ms_per_batch']:.0f}" if trained else "",
        "peak MiB": f"{record['peak_memory_mib']:.0f}" if trained else "",
        "device": f"{environment['device']}, {environment['threads']} threads",
        "command": f"`{record['command']}`",
        "commit": _short(environment["commit"] or ""),
    }


def _short(commit):
    """The first letters of a commit, and what follows its number."""
    number, dash, dirty = commit.partition("-")
    return number[:12] + dash + dirty


def _table(columns, records):
    rows = [cells(record) for record in records]
    return report.markdown_table(columns, [[row[column] for column in columns] for row in rows])


def _test(record):
    return record["results"]["test"]["perplexity"]


def records_text(records, differences=False):
    """The markdown of run records {name: record}: trained ones best first, evaluated ones last first.

    differences: trained ones are named by the flags that they differ in, a row for those that differ in seeds alone.
    """
    ordered = [records[name] for name in sorted(records)]
    trained = [record for record in ordered if record["kind"] == TRAINED]
    scored = sorted((record for record in ordered if record["kind"] != TRAINED), key=_test, reverse=True)
    parts = []
    if trained:
        parts = [differences_text(trained) if differences else _table(COLUMNS, sorted(trained, key=_test))]
    return "\n\n".join(parts + ([_table(SCORE_COLUMNS, scored)] if scored else []))


def differences_text(records):
    """The markdown table of runs that differ in their seeds and in some flags: a row a setting, best mean first."""
    settings = {}
    for record in records:
        settings.setdefault(tuple(_setting(record["command"])), []).append(record)
    shared = set.intersection(*map(set, settings))
    rows = []
    for setting, runs in settings.items():
        runs.sort(key=lambda record: record["config"]["seed"])
        scores = [[record["results"][split]["perplexity"] for record in runs] for split in ("valid", "test")]
        last = {flag.split()[0]: flag for flag in setting}.values()  # what a script takes, of a flag given twice
        row = [" ".join(f"`{flag}`" for flag in last if flag not in shared) or "nothing"]
        row += [" ".join(str(record["config"]["seed"]) for record in runs)]
        row += [" ".join(f"{score:.2f}" for score in split) for split in scores]
        row += [" ".join(str(record["results"]["test"]["epoch"]) for record in runs)]
        rows.append((statistics.mean(scores[1]), row))
    rows.sort(key=lambda row: row[0])
    first = rows[0][0]
    rows = [[*row, f"{mean:.2f}", f"{mean / first:.3f}"] for mean, row in rows]
    command = " ".join(sorted(shared, key=_setting(records[0]["command"]).index))
    return f"What all have in common: `{command} --seed SEED`\n\n{report.markdown_table(DIFFERENCE_COLUMNS, rows)}"


def _setting(command):
    """A command's script and flags, each with its values, without those that name a run or keep it."""
    own = ("--seed", "--name", "--save", "--runs-dir", "--checkpoint-every")
    return [flag for flag in re.split(r" (?=--)", command) if not flag.replace("_", "-").startswith(own)]


def plan_text(rows):
    """The markdown of a planned table. rows: [(name, published (valid, test), records of its seeds)], in their order.

    A published figure that there is none of is None. Of several seeds: perplexities are mean (least to greatest), times
    the mean, devices and commits all that there are, the rest is of the first.
    """
    table = []
    for name, published, records in rows:
        row = {"row": name, **cells(records[0])}
        if len(records) > 1:
            for column, key, digits in MEANS:
                if row[column]:
                    row[column] = f"{statistics.mean(record[key] for record in records):.{digits}f}"
            for column in ("device", "commit"):
                row[column] = "; ".join(dict.fromkeys(cells(record)[column] for record in records))
        row["seeds"] = " ".join(str(record["config"]["seed"]) for record in records if record["kind"] == TRAINED)
        for split, figure in zip(("valid", "test"), published, strict=True):
            row[f"published {split}"] = "" if figure is None else f"{figure:g}"
            values = [record["results"][split]["perplexity"] for record in records]
            if len(values) > 1:
                row[f"{split} ppl"] = f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"
        table.append([row[column] for column in PLAN_COLUMNS])
    return report.markdown_table(PLAN_COLUMNS, table)
