"""The tables of the seeds: what each of their rows trains, and what was published for it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A row of a table.

    name: of its run and record. commands: scripts with their flags; the last, train_*.py or evaluate.py, leaves the
    record. valid, test: published perplexities, if any. In commands {runs} is the table's folder of runs, {seed} what
    a name has behind it for a further seed.
    """

    name: str
    commands: tuple
    valid: float = None
    test: float = None


def trained(name, flags, valid=None, test=None):
    """A Row of one training."""
    return Row(name, (flags,), valid, test)


MEDIUM = "train_rnn.py --data penn --recipe example --tied --emsize 650 --nhid 650 --dropout 0.5 --amp bf16"
"""The seed's LSTM of 650 units, on the smaller corpus."""
LONGER = f"{MEDIUM} --epochs 6 --lr 5 --decay 0.4 --decay-from 3 --start-from dense{{seed}}"
"""What every pruned row and the control train after the dense row."""


def pruned(name, flags, valid=None, test=None):
    """A Row that goes on from the dense one while it is pruned."""
    return trained(name, f"{LONGER} {flags}".strip(), valid, test)


def at_once(percent):
    """A Row of the dense model pruned without training."""
    name = f"at-once-{percent}"
    checkpoint = f"{{runs}}/{name}{{seed}}.pt"
    dense = "{runs}/dense{seed}/best.pt"
    prune = f"compress.py prune --checkpoint {dense} --sparsity {percent / 100} --output {checkpoint}"
    return Row(name, (prune, f"evaluate.py --checkpoint {checkpoint}"))


def search(emsize, heads, layers, key, output, slots, test):
    """A Row of the port's search: embedding and head of one size."""
    name = f"rmc-{emsize}-{heads}-{layers}-{key}-{slots}" + ("-output" if output else "")
    sizes = f"--emsize {emsize} --headsize {emsize} --numheads {heads} --attmlplayers {layers} --keysize {key}"
    drop = "" if output else " --dropout 0"
    return trained(name, f"train_rmc.py --data wikitext-2 --variant port {sizes} --memslots {slots}{drop}", test=test)


EXAMPLE = "train_rnn.py --data wikitext-2 --recipe example"
AWD_LSTM = "train_awd.py --data penn --batch-size 20 --dropouti 0.4 --dropouth 0.25 --seed 141"
AWD_QRNN = (
    "train_awd.py --data penn --model QRNN --batch-size 20 --clip 0.2 --wdrop 0.1 --nhid 1550 --nlayers 4 "
    "--dropouth 0.3 --dropouti 0.4 --seed 9001"
)
CACHE = "--pointer --lambdasm 0.1 --theta 1.0 --window 500"

PLANS = {
    "word-language-model": (  # pytorch/examples' README; the figures of 650 and 1500 units are distiller's
        trained("lstm-200", f"{EXAMPLE} --epochs 6", test=117.61),
        trained("lstm-200-tied", f"{EXAMPLE} --epochs 6 --tied", test=110.44),
        trained("lstm-200-tied-40", f"{EXAMPLE} --tied", test=87.17),
        trained("lstm-650", f"{EXAMPLE} --emsize 650 --nhid 650 --dropout 0.5"),
        trained("lstm-650-tied", f"{EXAMPLE} --emsize 650 --nhid 650 --dropout 0.5 --tied", 88.17, 84.21),
        trained("lstm-1500", f"{EXAMPLE} --emsize 1500 --nhid 1500 --dropout 0.65"),
        trained("lstm-1500-tied", f"{EXAMPLE} --emsize 1500 --nhid 1500 --dropout 0.65 --tied", 87.49, 83.85),
    ),
    "wikitext2": (  # L0SG/relational-rnn-pytorch; its RMC's test figure counts a short last chunk as a whole one
        trained("lstm", "train_rnn.py --data wikitext-2", 111.31, 105.56),
        trained("lstm-loop", "train_rnn.py --data wikitext-2 --loop", 111.31, 105.56),
        trained("rmc-paper", "train_rmc.py --data wikitext-2"),
        trained("rmc-port", "train_rmc.py --data wikitext-2 --variant port", 112.77, 107.21),
    ),
    "rmc-search": (
        search(128, 4, 3, 128, False, 1, 128.81),
        search(128, 8, 3, 128, False, 1, 141.84),
        search(128, 4, 3, 32, False, 1, 123.26),
        search(128, 4, 3, 32, True, 1, 112.4),
        search(128, 4, 3, 64, False, 1, 124.44),
        search(128, 4, 3, 64, True, 1, 110.16),
        search(128, 4, 2, 64, True, 1, 111.67),
        search(64, 4, 3, 64, True, 1, 133.68),
        search(64, 4, 3, 32, True, 1, 135.93),
        search(64, 4, 3, 64, True, 4, 137.93),
        search(192, 4, 3, 64, True, 1, 107.21),
        search(192, 4, 3, 64, True, 4, 114.85),
        search(256, 4, 3, 256, False, 1, 194.73),
        search(256, 4, 3, 64, True, 1, 126.39),
    ),
    "awd": (
        trained("awd-lstm", f"{AWD_LSTM} --epochs 500", 61.2, 58.8),
        trained("awd-lstm-finetuned", f"{AWD_LSTM} --epochs 500 --finetune awd-lstm{{seed}}", 58.8, 56.5),
        Row(
            "awd-lstm-cache",
            (f"evaluate.py --checkpoint {{runs}}/awd-lstm-finetuned{{seed}}/best.pt {CACHE}",),
            *(53.2, 52.5),
        ),
        trained("awd-qrnn", f"{AWD_QRNN} --epochs 550", 60.6, 58.3),
        trained("awd-qrnn-finetuned", f"{AWD_QRNN} --epochs 300 --finetune awd-qrnn{{seed}}", 59.1, 56.7),
        Row(
            "awd-qrnn-cache",
            (f"evaluate.py --checkpoint {{runs}}/awd-qrnn-finetuned{{seed}}/best.pt {CACHE}",),
            *(53.4, 52.6),
        ),
    ),
    "pruning": (  # IntelLabs/distiller: WikiText-2, the dense row of 650 units, the others of 1,500
        trained("dense", f"{MEDIUM} --epochs 40", 88.17, 84.21),
        pruned("dense-longer", ""),
        pruned("agp-70", "--sparsity 0.7 --prune-epochs 0:4:1", 90.67, 85.96),
        pruned("agp-70-decay", "--sparsity 0.7 --prune-epochs 0:4:1 --wdecay 1e-6", 90.59, 85.84),
        pruned("agp-70b", "--compress schedules/medium-70b.yaml", 87.40, 82.93),
        pruned("agp-80", "--compress schedules/medium-80.yaml", 89.31, 83.64),
        pruned("agp-90", "--sparsity 0.9 --prune-epochs 0:4:1", 90.70, 85.67),
        pruned("agp-95", "--sparsity 0.95 --prune-epochs 0:4:1", 98.42, 92.79),
        at_once(50),
        at_once(70),
        at_once(80),
        at_once(90),
    ),
}


def listing():
    """A line a table and row: what it runs, what was published."""
    lines = []
    for name, rows in PLANS.items():
        lines.append(name)
        for row in rows:
            published = f" (published: {row.test:g} test)" if row.test else ""
            lines.append(f"  {row.name}{published}: {'; '.join(row.commands)}")
    return "\n".join(lines)
