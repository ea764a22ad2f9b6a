"""What a model is made of, as tables: its weights and their zeros, percentiles, modules."""

from . import report

KINDS = ("sparsity", "percentile", "model", "modules")
SPARSITY = ("parameter", "shape", "elements", "non-zero", "zero %", "zero rows %", "zero columns %", "mean", "std")
PERCENTILES = (50, 75, 90, 95, 99)


def summary_text(model, kind):
    """The table of a kind of KINDS. A matrix that embedding and softmax share counts once."""
    return {"sparsity": sparsity_text, "percentile": percentile_text, "model": str, "modules": modules_text}[kind](
        model
    )


def sparsity_text(model):
    """Each parameter's zeros, by element and, of a matrix, by whole rows and columns; mean and standard deviation."""
    rows, elements, kept = [], 0, 0
    for name, parameter in _weights(model):
        weight = parameter.detach().float()
        there = weight != 0
        lines = [f"{100 * (~there).all(dim).float().mean().item():.2f}" if weight.dim() == 2 else "" for dim in (1, 0)]
        count, total = int(there.sum()), weight.numel()
        elements, kept = elements + total, kept + count
        deviation = weight.std().item() if total > 1 else 0.0
        rows.append(
            [
                *(name, shape_text(weight), f"{total:,}", f"{count:,}", percent(total - count, total), *lines),
                *(f"{weight.mean().item():.5f}", f"{deviation:.5f}"),
            ]
        )
    rows.append(["total", "", f"{elements:,}", f"{kept:,}", percent(elements - kept, elements), "", "", "", ""])
    return report.markdown_table(SPARSITY, rows)


def percentile_text(model):
    """Percentiles of the magnitudes of each weight: the 90th is q of BaiduRNNPruner."""
    rows = []
    for name, parameter in _weights(model):
        magnitudes = parameter.detach().float().abs().flatten().sort().values
        places = [min(len(magnitudes) - 1, int(len(magnitudes) * part / 100)) for part in PERCENTILES]
        rows.append([name, shape_text(parameter), *(f"{magnitudes[place].item():.4f}" for place in places)])
    return report.markdown_table(("parameter", "shape", *(f"{part}%" for part in PERCENTILES)), rows)


def _weights(model):
    """(name, parameter) of all that hold a number: in compressed rows nothing may be left of a matrix."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.numel()]


def modules_text(model):
    """Every module, its class, and how many parameters are its own."""
    rows = [
        [name or "(model)", type(module).__name__, f"{sum(p.numel() for p in module.parameters(recurse=False)):,}"]
        for name, module in model.named_modules()
    ]
    return report.markdown_table(("module", "class", "own parameters"), rows)


def shape_text(tensor):
    """3 x 5."""
    return " x ".join(map(str, tensor.shape))


def percent(part, whole):
    """With two digits."""
    return f"{100 * part / whole:.2f}"
