"""The tables of the seeds: what each of their rows trains, and what was published for it."""

import shlex

from . import UserError
from .cli import PORT_TRAINING
from .rows import (
    EXAMPLE,
    HALF,
    adapted,
    at_once,
    awd,
    dropped,
    equal,
    examples,
    medium,
    part,
    pruned,
    search,
    sentences,
    trained,
    tried,
)

LOG_SPACE_TRAINING = "--dropout 0.4 --optimizer adamw --lr 1e-3 --wdecay 0.01 --clip 0 --epochs 40 --schedule constant"
"""AdamW as torch has it."""
SENTENCES_FAST = (
    "--dropout 0.3 --optimizer adam --lr 2e-3 --wdecay 1.2e-6 --clip 0.25 --epochs 5 --schedule onecycle --amp bf16"
)
"""The same models in less than an hour of two cores each."""
LOG_SPACE = "--recipe fast --window 5 --mode fo --candidate sigmoid --zoneout 0.1"
WIKI_FAST = (
    "--data wikitext-2 --splitcross --cutoffs 2800 10000 --schedule onecycle --clip 0.25 --wdecay 1.2e-6 "
    "--batch-size 40 --bptt 70 --partial-shuffle --dropout 0.45"
)
"""The port's models in two hours of two cores: Adam in one cycle, rare words in clusters that keep the tied matrix."""
AWD_EQUAL = "--no-variable-bptt --dropouti 0.3 --dropouth 0.2 --dropoute 0.05 --wdrop 0.2 --alpha 0 --beta 0"
AS_THE_PORT = "--dropout 0.5 --wdecay 0 " + " ".join(
    f"--{name.replace('_', '-')} {value}" for name, value in PORT_TRAINING.items()
)
"""Its training, for a model that it does not have."""
QRNN_PAPER = (
    "--data penn --emsize 640 --nhid 640 --nlayers 2 --dropout 0.5 --no-tied --init lecun --optimizer sgd --lr 1 "
    "--average columns --clip 10 --wdecay 2e-4 --batch-size 20 --bptt 105 --epochs 72 --schedule step --decay 0.95 "
    "--decay-from 6"
)
QRNN_FAST = (
    "--recipe fast --zoneout 0.1 --dropout 0.5 --lr 2e-3 --batch-size 20 --epochs 40 --partial-shuffle --amp bf16"
)
"""The paper's model, tied, by Adam in one cycle."""
EXAMPLE_FAST = "--epochs 6 --optimizer adam --lr 4e-3 --wdecay 1.2e-6 --schedule onecycle --partial-shuffle --amp bf16"
"""Six epochs of the same model by Adam in one cycle."""
AWD_LSTM = "--data penn --batch-size 20 --dropouti 0.4 --dropouth 0.25 --seed 141"
AWD_QRNN = (
    "--data penn --model QRNN --batch-size 20 --clip 0.2 --wdrop 0.1 --nhid 1550 --nlayers 4 --emsize 400 "
    "--dropouth 0.3 --dropouti 0.4"
)
AWD_LSTM_WIKI = "--data wikitext-2 --dropouth 0.2 --seed 1882"
AWD_QRNN_WIKI = (
    "--data wikitext-2 --model QRNN --clip 0.25 --dropouti 0.4 --dropouth 0.2 --nhid 1550 --nlayers 4 --seed 4002 "
    "--wdrop 0.1 --batch-size 40"
)
CACHE = "--pointer --lambdasm 0.1 --theta 1.0 --window 500 --pointer-start window"
CACHE_WIKI = "--pointer --lambdasm 0.1279 --theta 0.662 --window 3785 --pointer-start window"
DROPOUTS = ".4 .25 .4 .1 .5"
"""dropouti, dropouth, dropout, dropoute and wdrop of the authors' Penn Treebank model."""
LESS = ".3 .19 .3 .075 .375"
"""Three quarters of them."""
LEAST = ".2 .125 .2 .05 .25"
"""Half of them."""
WIDE = f"train_awd.py --recipe fast --nhid 1150 --lr 3e-3 {dropped(DROPOUTS)}"
"""The authors' sizes, too, as the recipe had them before the search."""
AWD_QRNN_FAST = (
    "train_awd.py --recipe fast --model QRNN --nlayers 4 --nhid 900 --no-wdrop-units --lr 4e-3 "
    f"{dropped('.32 .24 .32 .08 .1')}"
)
"""AWD-QRNN with four fifths of the authors' dropouts, but all of their wdrop."""
AWD_WIDE_WIKI = (
    "train_awd.py --recipe fast --data wikitext-2 --emsize 640 --nhid 640 --nlayers 2 --cutoffs 2800 10000 "
    f"--batch-size 40 --lr 6e-3 --epochs 20 {dropped('.24 .15 .24 .06 .3')}"
)
"""Wide words and few epochs, three fifths of the Penn Treebank model's dropouts."""
UNITS = "--partial-shuffle --wdrop-units"
NARROW = {"epochs": 63, "nhid": 360, "lr": "8e-3"}
"""The best sizes on a fifth of the text, what further rows change one thing of."""
NARROW_HALF = {**NARROW, "epochs": 25, "data": HALF}
DYNAMIC = "--dynamic --lr 5e-5 --lamb 0.002 --bptt 5"
DYNAMIC_QRNN = "--dynamic --lr 1.2e-4 --lamb 0.02 --bptt 20"
DYNAMIC_QRNN_WIKI = "--dynamic --lr 1.2e-4 --lamb 0.008 --bptt 20"

PLANS = {
    "word-language-model": (
        *examples(
            "wikitext-2",  # published: IntelLabs/distiller's
            {
                "lstm-200-tied-40": (None, 99.53),
                "lstm-650-tied": (88.17, 84.21),
                "lstm-1500-tied": (87.49, 83.85),
            },
        ),
        trained("lstm-200-tied-40-decay", f"{EXAMPLE} --data wikitext-2 --tied --wdecay 1e-6", 101.13, 96.29),
    ),
    "word-language-model-penn": (
        *examples(
            "penn",  # published: pytorch/examples' README at bcea1f5; later ones said WikiText-2 of the same figures
            {
                "lstm-200": (None, 117.61),
                "lstm-200-tied": (None, 110.44),
                "lstm-200-tied-40": (None, 87.17),
                "lstm-650": (None, 80.97),
                "lstm-650-tied": (None, 75.96),
                "lstm-1500": (None, 77.42),
                "lstm-1500-tied": (None, 72.3),
            },
        ),
        trained("lstm-200-tied-fast", f"{EXAMPLE} --data penn --tied {EXAMPLE_FAST}", None, 110.44),
    ),
    "wikitext2": (  # L0SG/relational-rnn-pytorch; its RMC's test figure counts a short last chunk as a whole one
        trained("lstm", "train_rnn.py --data wikitext-2", 111.31, 105.56),
        trained("lstm-loop", "train_rnn.py --data wikitext-2 --loop", 111.31, 105.56),
        trained("rmc-paper", "train_rmc.py --data wikitext-2"),
        trained("rmc-port", "train_rmc.py --data wikitext-2 --variant port", 112.77, 107.21),
        trained("qrnn", f"train_qrnn.py --recipe fast --data wikitext-2 --num-params 11e6 {AS_THE_PORT}"),
        trained("lstm-fast", f"train_rnn.py {WIKI_FAST} --lr 3e-3 --epochs 20", 111.31, 105.56),
        trained(
            "rmc-fast", f"train_rmc.py {WIKI_FAST} --variant port --amp bf16 --lr 2e-3 --epochs 12", 112.77, 107.21
        ),
        trained("qrnn-fast", f"train_qrnn.py --recipe fast {WIKI_FAST} --num-params 11e6 --amp bf16 --epochs 12"),
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
    "rmc-search-penn": (
        part(128, 4, 3, 32, False, 1),
        part(128, 4, 3, 32, True, 1),
        part(128, 4, 3, 64, False, 1),
        part(128, 4, 3, 64, True, 1),
        part(256, 4, 3, 256, False, 1),
    ),
    "qrnn-10k": (  # LGirrbach/PyTorch-QRNN, whose figures are of one batch each
        sentences("qrnn", f"train_qrnn.py {LOG_SPACE}", LOG_SPACE_TRAINING, 109.18),
        sentences("lstm", "train_rnn.py", LOG_SPACE_TRAINING, 98.48),
        sentences("qrnn-fast", f"train_qrnn.py {LOG_SPACE}", SENTENCES_FAST, 109.18),
        sentences("lstm-fast", "train_rnn.py", SENTENCES_FAST, 98.48),
    ),
    "qrnn-penn": (  # Bradbury et al. 2017, table 2
        trained("lstm-72", f"train_rnn.py {QRNN_PAPER}", 85.7, 82.0),
        trained("qrnn-72", "train_qrnn.py --data penn --zoneout 0", 82.9, 79.9),
        trained("qrnn-zoneout-72", "train_qrnn.py --data penn", 82.1, 78.3),
        trained("qrnn-zoneout-fast", f"train_qrnn.py --data penn {QRNN_FAST}", 82.1, 78.3),
    ),
    "equal-size": (
        *equal("elman", "train_rnn.py", 10, "--model RNN_TANH --nlayers 2 --lr 1e-3"),
        *equal("gru", "train_rnn.py", 7, "--model GRU --nlayers 2"),
        *equal("lstm", "train_rnn.py", 8, "--nlayers 2"),
        *equal("transformer", "train_rnn.py", 6, "--model Transformer --nhead 2 --nlayers 4 --lr 5e-4 --dropout 0.2"),
        *equal("rmc", "train_rmc.py", 6, "--dropouti 0.4"),
        *equal("qrnn", "train_qrnn.py", 8, "--recipe fast"),
        *equal("awd-lstm", "train_awd.py", 7, AWD_EQUAL),
        *adapted("awd-lstm-minutes"),
        *equal("awd-qrnn", "train_awd.py", 13, f"{AWD_EQUAL} --model QRNN --nlayers 4"),
    ),
    "awd-search": (
        tried("published", DROPOUTS),
        tried("more", ".52 .325 .52 .13 .6"),
        tried("three-quarters", LESS, ""),
        tried("half", LEAST, ""),
        tried("units", DROPOUTS, UNITS),
        tried("units-narrow", DROPOUTS, UNITS, epochs=63, nhid=360),
        tried("units-narrower", DROPOUTS, UNITS, epochs=82, nhid=250),
        tried("narrow-three-quarters", LESS, UNITS, epochs=63, nhid=360),
        tried("narrow-high-rate", DROPOUTS, UNITS, **NARROW),
        tried("narrow-higher-rate", DROPOUTS, UNITS, epochs=63, nhid=360, lr="1.6e-2"),
        tried("narrower-high-rate", DROPOUTS, UNITS, epochs=82, nhid=250, lr="8e-3"),
        tried("narrow-sgd", DROPOUTS, f"{UNITS} --optimizer sgd", epochs=63, nhid=360, lr="30"),
        tried("narrow-40-columns", DROPOUTS, UNITS, epochs=80, nhid=360, lr="8e-3", batch=40),
        tried("narrow-80-columns", DROPOUTS, UNITS, epochs=98, nhid=360, lr="8e-3", batch=80),
        tried("narrow-in-order", DROPOUTS, "--wdrop-units", **NARROW),
        tried("narrow-equal-windows", DROPOUTS, f"{UNITS} --no-variable-bptt", **NARROW),
        tried("narrow-decay", DROPOUTS, f"{UNITS} --wdecay 1.2e-5", **NARROW),
        tried("narrow-float32", DROPOUTS, f"{UNITS} --amp off", **NARROW),
    ),
    "awd-search-half": (
        tried("narrow", DROPOUTS, UNITS, **NARROW_HALF),
        tried("narrow-decay", DROPOUTS, f"{UNITS} --wdecay 1.2e-5", **NARROW_HALF),
        tried("low-rate", DROPOUTS, UNITS, 25, 360, "4e-3", data=HALF),
        tried("three-quarters", LESS, UNITS, **NARROW_HALF),
        tried("half", LEAST, UNITS, **NARROW_HALF),
        tried("wide-words", LESS, f"{UNITS} --emsize 290 --nlayers 2", 25, 290, "8e-3", data=HALF),
        tried("wide-words-more", DROPOUTS, f"{UNITS} --emsize 290 --nlayers 2", 25, 290, "8e-3", data=HALF),
        tried("one-layer", LESS, f"{UNITS} --emsize 320 --nlayers 1", 25, 320, "8e-3", data=HALF),
        tried("qrnn", ".3 .225 .3 .075 .1", "--partial-shuffle --model QRNN --nlayers 4", 25, 490, "4e-3", data=HALF),
    ),
    "awd-penn": (  # in 160 minutes; published: of 500 epochs and more, Merity et al. 2018, Krause et al. 2018
        trained("awd-fast", f"{WIDE} --no-wdrop-units --epochs 38", 60.7, 58.8),
        *adapted("awd-fast", (53.9, 52.8), (51.6, 51.1)),
        trained("awd-fast-units", f"{WIDE} --epochs 36", 60.7, 58.8),
        *adapted("awd-fast-units", (53.9, 52.8), (51.6, 51.1)),
        trained("awd-fast-narrow", f"train_awd.py --recipe fast {dropped(DROPOUTS)}", 60.7, 58.8),
        *adapted("awd-fast-narrow", (53.9, 52.8), (51.6, 51.1)),
        trained("awd-fast-less", "train_awd.py --recipe fast", 60.7, 58.8),
        *adapted("awd-fast-less", (53.9, 52.8), (51.6, 51.1)),
        trained("awd-fast-qrnn", AWD_QRNN_FAST, 60.6, 58.3),
        *adapted("awd-fast-qrnn", (53.4, 52.6), (51.4, 50.5)),
    ),
    "awd-wikitext-2": (  # in less than 90 minutes; published as above
        trained("awd-fast", AWD_WIDE_WIKI, 68.7, 65.6),
        *adapted("awd-fast", (52.2, 50.6), (46.4, 44.3)),
    ),
    "awd": (  # salesforce/awd-lstm-lm; dynamic evaluation: Krause et al. 2018, of models of their own
        *awd(
            "awd-lstm",
            f"{AWD_LSTM} --epochs 500",
            f"{AWD_LSTM} --epochs 500",
            (CACHE, DYNAMIC),
            ((61.2, 58.8), (58.8, 56.5), (53.2, 52.5), (51.6, 51.1)),
        ),
        *awd(
            "awd-qrnn",
            f"{AWD_QRNN} --seed 9001 --epochs 550",
            f"{AWD_QRNN} --seed 404 --epochs 300",
            (CACHE, DYNAMIC_QRNN),
            ((60.6, 58.3), (59.1, 56.7), (53.4, 52.6), (51.4, 50.5)),
        ),
        *awd(
            "awd-lstm-wikitext-2",
            f"{AWD_LSTM_WIKI} --epochs 750",
            f"{AWD_LSTM_WIKI} --epochs 750",
            (CACHE_WIKI, DYNAMIC),
            ((68.7, 65.6), (67.4, 64.7), (52.2, 50.6), (46.4, 44.3)),
        ),
        *awd(
            "awd-qrnn-wikitext-2",
            f"{AWD_QRNN_WIKI} --epochs 500",
            f"{AWD_QRNN_WIKI} --epochs 500",
            (CACHE_WIKI, DYNAMIC_QRNN_WIKI),
            ((69.3, 66.8), (68.5, 65.9), (53.6, 52.1), (45.9, 44.0)),
        ),
        trained("awd-lstm-untied", f"train_awd.py {AWD_LSTM} --no-tied --epochs 500", 91.0),  # a-martyn/awd-lstm's
    ),
    "pruning": (  # IntelLabs/distiller: WikiText-2, the dense row of 650 units, the others of 1,500
        trained(
            "dense", medium(0.5, "--lr 2e-3 --warm 0.2 --partial-shuffle --wdecay 1.2e-6 --epochs 8"), 88.17, 84.21
        ),
        pruned("dense-longer", ""),
        pruned("agp-70", "--sparsity 0.7 --prune-epochs 0:3:1", 90.67, 85.96),
        pruned("agp-70-decay", "--sparsity 0.7 --prune-epochs 0:3:1 --wdecay 1e-6", 90.59, 85.84),
        pruned("agp-70b", "--compress schedules/medium-70b.yaml", 87.40, 82.93),
        pruned("agp-80", "--compress schedules/medium-80.yaml", 89.31, 83.64),
        pruned("agp-80-even", "--sparsity 0.804 --prune-epochs 0:3:1"),
        pruned("agp-90", "--sparsity 0.9 --prune-epochs 0:3:1", 90.70, 85.67),
        pruned("agp-95", "--sparsity 0.95 --prune-epochs 0:3:1", 98.42, 92.79),
        at_once(50),
        at_once(70),
        at_once(80),
        at_once(90),
    ),
}

OF_ANOTHER_CORPUS = ("pruning",)
"""Tables whose published figures are of another corpus than ours, and stand beside them on their own page only."""
MEASURED = {
    "qrnn-speed": ("figure4 --record figure4", "layers --record layers"),
    "rmc-speed": ("speed --only 'RMC, p' 'LSTM, port' --record rmc-speed",),
    "quantization": ("quantization {runs}/pruning/dense/best.pt --record quantization",),
    "wikitext103": (
        "memory --only WikiText-103 --vocab-size 267735 --record wikitext-103-memory",
        *(  # one model after another: together they need more than 24 GiB
            f"speed --only '{model}' --vocab-size 267735 --rounds 1 --warmup 1 --record wikitext-103-{name}"
            for name, model in (
                ("full", "RMC, WikiText-103, full softmax"),
                ("tied", "RMC, WikiText-103, tied"),
                ("adaptive", "RMC, WikiText-103, adaptive"),
                ("awd-qrnn", "AWD-QRNN, WikiText-103, split"),
            )
        ),
    ),
}
"""Tables that are measurements: of each, benchmark.py's sub-commands; {runs}: where all tables' runs are."""


def listing(runs, table=None):
    """A line a table and row, of all tables or of one: what it runs, as it may be typed, what was published.

    Raises UserError for a table that is not planned.
    """
    names = [*MEASURED, *PLANS]
    if table not in (None, *names):
        raise UserError(f"--list {table}: expected a planned table, one of {', '.join(names)}")
    lines = []
    for name in [table] if table else names:
        lines += [
            name,
            *(f"  benchmark.py {line.format(runs=shlex.quote(str(runs)))}" for line in MEASURED.get(name, ())),
        ]
        for row in PLANS.get(name, ()):
            figures = (f"{figure:g} {split}" for split, figure in (("valid", row.valid), ("test", row.test)) if figure)
            published = f" (published: {', '.join(figures)})" if row.valid or row.test else ""
            commands = [command.format(runs=shlex.quote(f"{runs}/{name}"), seed="") for command in row.commands]
            lines.append(f"  {row.name}{published}: {'; '.join(commands)}")
    return "\n".join(lines)
