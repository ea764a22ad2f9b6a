"""The rows of planned tables: what one trains or scores, and how those that are alike are made."""

from dataclasses import dataclass

EPOCHS = "-epochs"
"""Ends the names of rows that are compared after as many epochs; others are compared over minutes."""
SENTENCES = (
    "--data wikitext-2-sentences --sentences --vocab train --vocab-size 10002 --emsize 300 --nhid 640 --nlayers 2 "
    "--no-tied --batch-size 32"
)
"""The 10,000 most frequent words, <sos> and <eos>."""
EQUAL = (
    "--data penn --num-params 11e6 --tied --optimizer adam --lr 2e-3 --schedule onecycle --clip 0.25 --wdecay 1.2e-6 "
    "--batch-size 20 --bptt 35 --partial-shuffle --dropout 0.4 --amp bf16"
)
"""11 million parameters, the head's included; one optimizer for all, a lower rate where this is too much."""
EXAMPLE = "train_rnn.py --recipe example"
EXAMPLES = {
    "lstm-200": "--epochs 6",
    "lstm-200-tied": "--epochs 6 --tied",
    "lstm-200-tied-40": "--tied",
    "lstm-650": "--emsize 650 --nhid 650 --dropout 0.5",
    "lstm-650-tied": "--emsize 650 --nhid 650 --dropout 0.5 --tied",
    "lstm-1500": "--emsize 1500 --nhid 1500 --dropout 0.65",
    "lstm-1500-tied": "--emsize 1500 --nhid 1500 --dropout 0.65 --tied",
}
"""The commands of pytorch/examples' README; 40 epochs where not said."""
TRIED = (
    "--optimizer adam --schedule onecycle --betas 0.75 0.99 --clip 0.25 --amp bf16 --threads 1 --log-interval 500 "
    "--seed 1 --emsize 180"
)
"""The fast recipe's training, of a fifth of the parameters and less, by one core."""
FIFTH = "data/penn-fifth"
HALF = "penn --train-tokens 465000"
"""Parts of Penn Treebank's training split, as --data has them."""
LEARN = "--dynamic --tune --tune-tokens 10000 --max-batches 200"


@dataclass(frozen=True)
class Row:
    """A row of a table.

    name: of its run and record. commands: scripts with their flags; the last, train_*.py or evaluate.py, leaves the
    record; "-m data.sentences" makes a corpus. valid, test: published perplexities, if any. In commands {runs} is the
    table's folder of runs, {seed} what a name has behind it for a further seed.
    """

    name: str
    commands: tuple
    valid: float = None
    test: float = None


def trained(name, flags, valid=None, test=None):
    """A Row of one command."""
    return Row(name, (flags,), valid, test)


def medium(dropout, flags):
    """Command of the seed's LSTM of 650 units, on the smaller corpus: an epoch takes four minutes of two cores."""
    model = f"--tied --emsize 650 --nhid 650 --dropout {dropout}"
    return f"train_rnn.py --data penn --recipe example {model} --amp bf16 --optimizer adam --schedule onecycle {flags}"


LONGER = medium(0.35, "--lr 2e-3 --warm 0.5 --epochs 4 --start-from dense{seed}")
"""What every pruned row and the control train after the dense row; the last masks come when the rate is highest."""


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


def search(emsize, heads, layers, key, output, slots, test=None, corpus="--data wikitext-2"):
    """A Row of the port's search: embedding and head of one size."""
    name = f"rmc-{emsize}-{heads}-{layers}-{key}-{slots}" + ("-output" if output else "")
    sizes = f"--emsize {emsize} --headsize {emsize} --numheads {heads} --attmlplayers {layers} --keysize {key}"
    drop = "" if output else " --dropout 0"
    return trained(name, f"train_rmc.py {corpus} --variant port {sizes} --memslots {slots}{drop}", test=test)


def part(*arguments):
    """A Row of the search on a part of Penn Treebank, as many updates of each."""
    return search(*arguments, corpus="--data penn --train-tokens 100000 --batch-size 20 --bptt 35 --epochs 12")


def awd(name, first, second, adaptations, published):
    """Four Rows of the authors' model: trained, fine-tuned, and that one with the cache and by dynamic evaluation.

    first, second: flags of the two trainings. published: (valid, test) of each.
    """
    tuned = f"{name}-finetuned"
    rows = (
        (name, f"train_awd.py {first}"),
        (tuned, f"train_awd.py {second} --finetune {name}{{seed}}"),
        *(
            (f"{name}-{kind}", f"evaluate.py --checkpoint {{runs}}/{tuned}{{seed}}/best.pt {flags}")
            for kind, flags in zip(("cache", "dynamic"), adaptations, strict=True)
        ),
    )
    return [trained(*row, *figures) for row, figures in zip(rows, published, strict=True)]


def tried(name, dropouts, flags="--partial-shuffle", epochs=42, nhid=520, lr="4e-3", batch=20, data=FIFTH):
    """A Row of the search for the fast recipe. dropouts: as dropped has them. data: FIFTH or HALF."""
    sizes = f"--epochs {epochs} --nhid {nhid} --lr {lr} --batch-size {batch}"
    return trained(name, f"train_awd.py --data {data} {TRIED} {sizes} {dropped(dropouts)} {flags}".strip())


def dropped(dropouts):
    """Flags of dropouti, dropouth, dropout, dropoute and wdrop, their values as text in this order."""
    names = ("dropouti", "dropouth", "dropout", "dropoute", "wdrop")
    return " ".join(f"--{flag} {value}" for flag, value in zip(names, dropouts.split(), strict=True))


def adapted(name, cache=(), dynamic=()):
    """Three Rows of a trained one's model: with the cache, by dynamic evaluation, by both.

    Their settings are chosen on the valid split. cache, dynamic: published (valid, test).
    """
    command = f"evaluate.py --checkpoint {{runs}}/{name}{{seed}}/best.pt"
    return (
        trained(f"{name}-cache", f"{command} --pointer --tune", *cache),
        trained(f"{name}-dynamic", f"{command} {LEARN}", *dynamic),
        trained(f"{name}-both", f"{command} --pointer {LEARN}"),
    )


def examples(corpus, published):
    """Rows of word_language_model's commands on a corpus. published: (valid, test) by name."""
    return tuple(
        trained(name, f"{EXAMPLE} --data {corpus} {flags}", *published.get(name, ()))
        for name, flags in EXAMPLES.items()
    )


def sentences(name, command, training, test):
    """A Row of the log-space seed's comparison. command: script and model. training: how."""
    make = "-m data.sentences data/wikitext-2"
    return Row(name, (make, f"{command} {SENTENCES} {training}"), test=test)


def equal(name, script, epochs, flags=""):
    """Two Rows of a family, at equal parameters: of equal epochs and of equal minutes, a cycle each.

    epochs: as many as take about 30 minutes of two cores of the processor that the row's record names.
    """
    command = f"{script} {EQUAL} {flags}".strip()
    return tuple(
        trained(f"{name}{kind}", f"{command} --epochs {number}") for kind, number in ((EPOCHS, 3), ("-minutes", epochs))
    )
