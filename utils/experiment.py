"""From flags to a finished run: what is done once, before and around the loop."""

import tempfile
from pathlib import Path

import torch

from data.batching import scored_columns, sentences
from models import build
from models.softmax import IGNORE

from . import UserError, checkpoint, onnx_export, parsing, report, runtime
from .distributed import Processes
from .pruning import Pruning, chosen_schedule
from .report import RunFolder
from .summary import summary_text
from .text import Columns, Sentences
from .trainer import Trainer

DECISIVE = ("optimizer", "lr", "momentum", "schedule", "clip", "wdecay", "epochs", "batch_size", "bptt", "dropout")
DECISIVE += ("tied", "init", "seed", "vocab", "vocab_size", "eval_batch", "amp")
OF_TRAINING = {"dropout", "dropouth", "dropouti", "dropoute", "locked", "wdrop", "wdrop_units", "zoneout"}
OF_TRAINING |= {"alpha", "beta", "ar_norm", "init", "loop", "backend"}
"""Of a model's configuration, what decides nothing about the function that trained weights are."""


def train(families, parser, recipes, model_config, widths, argv=None):
    """What every train script does: parse flags, load the corpus, build the model's configuration, fit.

    families: those of models.CORES that it trains. parser, recipes: for parsing.parse_training. model_config: (args,
    vocabulary size) -> the dictionary for models.build. widths: names of the flags that --num-params sets.
    Returns the run record, None with --summary.
    """
    args, resumed = parsing.parse_training(parser, recipes, argv, families)
    corpus = parsing.load_corpus(args)
    words = len(corpus.vocabulary)
    if args.num_params and resumed is None:
        parsing.settle_width(args, widths, lambda: model_config(args, words))
    return fit(args, corpus, model_config(args, words), resumed)


def fit(args, corpus, config, resumed=None):
    """Train the model that `config` describes on `corpus`, evaluate its best checkpoint, keep all in a run folder.

    args: flags of utils.cli. config: for models.build. resumed: a checkpoint to go on from, as parsing.parse_training
    returns it. Returns the run record.

    Raises UserError for what the user must mend, TrainingError when the loss is not finite any more.
    """
    device, machine = runtime.setup(args)
    if args.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            args.runs_dir, args.save, args.epochs = folder, str(Path(folder) / "model.pt"), 1
            args.onnx_export = args.onnx_export and str(Path(folder) / "model.onnx")
            return _fit(args, corpus, config, resumed, device, machine)
    return _fit(args, corpus, config, resumed, device, machine)


def _fit(args, corpus, config, resumed, device, machine):
    if resumed is not None and resumed["corpus"]["checksums"] != corpus.checksums:
        raise UserError(f"--resume {args.resume}: the text of {args.data} is not what the run was trained on")
    check_ends(args, corpus)
    torch.manual_seed(args.seed)
    model = build(config).to(device)
    if resumed is not None:
        checkpoint.load_weights(model, resumed, f"--resume {args.resume}")
        pruned = resumed["pruning"]
    else:
        start = args.finetune or args.start_from
        masks = start_from(args, corpus, model, config) if start else {}
        pruned = {"schedule": chosen_schedule(args), "masks": masks}
    pruning = Pruning(model, source=f"--compress {args.compress}", **pruned)
    if args.summary:
        return report.say(summary_text(model, args.summary))
    processes = Processes(device)
    replicas, parts = runtime.data_parallel(model, device)
    if args.cuda_graphs or args.compile:
        if parts * processes.size > 1:
            flag = "--compile" if args.compile else "--cuda-graphs"
            raise UserError(f"{flag} is for one device: choose a GPU by CUDA_VISIBLE_DEVICES, without torchrun")
        (runtime.compile_passes if args.compile else runtime.graph)(model.core)
    if processes.size > 1:
        replicas, parts = processes.replicate(model), processes.size
    sos = corpus.vocabulary.sentence_start() if args.sentences else None
    text = Sentences(args, corpus, sos, processes) if args.sentences else Columns(args, corpus, parts, processes)
    if processes.rank > 0:
        folder = report.NoFolder()
    elif resumed is None:
        folder = RunFolder.create(args.runs_dir, args.name)
        args.name = folder.path.name
    else:
        folder = RunFolder(Path(args.runs_dir) / args.name)
        for part in folder.path.glob(".*.tmp"):  # a process killed while it wrote
            part.unlink()
    with report.closing_logs(folder):
        processes.draw_apart(args.seed)
        run = Trainer(args, corpus, config, model, replicas, text, sos, folder, processes, pruning)
        folder.open_logs(resumed and resumed["position"]["log_sizes"])
        if resumed is None:
            folder.log(f"| {report.command(args.argv)}", "train")
            folder.log(f"| corpus {corpus.name} | vocabulary {len(corpus.vocabulary):,} | tokens {run.tokens_line()}")
            folder.log(f"| {' '.join(config_line(config))} | parameters {model.num_params():,}", "train")
            folder.log(f"| recipe {args.recipe} | {recipe_line(args)}", "train")
        else:
            run.restore(resumed)
            report.say(f"| resumed {Path(args.runs_dir) / args.name} at epoch {run.epoch}, batch {run.batch}")
        report.say(f"| {machine}" + (f" | {processes.size} processes" if processes.size > 1 else ""))
        report.say(f"| run folder {Path(args.runs_dir) / str(args.name)}")
        record = run.run()
        processes.leave()
        return record


def start_from(args, corpus, model, config):
    """Give the model the best weights of what --finetune or --start-from names; returns its masks (utils/pruning.py).

    config: the model's. Raises UserError when they are another model's or another corpus's, or do not fit.
    """
    flag, path = ("--finetune", args.finetune) if args.finetune else ("--start-from", args.start_from)
    trained = checkpoint.load(path)
    checkpoint.expect_family(trained, path, [config["family"]])
    if trained["vocabulary"]["words"] != corpus.vocabulary.words:
        raise UserError(f"{flag} {path}: its vocabulary is not that of {args.data}; give its --data")
    theirs, ours = _of_weights(trained["config"]), _of_weights(config)
    for name in sorted(ours.keys() & theirs.keys()):
        if ours[name] != theirs[name]:
            raise UserError(
                f"{flag} {path} does not fit: its --{name.replace('_', '-')} is {theirs[name]}, here it is {ours[name]}"
            )
    checkpoint.load_weights(model, trained, path)
    return trained["pruning"]["masks"]


def _of_weights(config):
    """{flag: value} of a model's configuration, of those that decide what its weights are weights of."""
    flags = {**config["core"], **config}
    return {name: value for name, value in flags.items() if name not in {"core", *OF_TRAINING}}


def check_ends(args, corpus):
    """Find before training what would end it after the first epoch.

    Raises CorpusError for splits that can't be evaluated, UserError for a --save or --onnx-export that is no place for
    a file, or the latter without its package.
    """
    if args.sentences:
        for ids in (corpus.valid, corpus.test):
            sentences(ids, corpus.vocabulary.sentence_start())
    else:
        scored_columns(corpus.valid, args.eval_batch, 0, IGNORE)
        scored_columns(corpus.test, 1, 0, IGNORE)
    for flag, path in (("--save", args.save), ("--onnx-export", args.onnx_export)):
        if path is not None:
            report.check_place(flag, path)
    if args.onnx_export:
        onnx_export.check_exporter()


def config_line(config):
    """Family and core arguments, for the log."""
    return [config["family"], *(f"{name}={value}" for name, value in config["core"].items())]


def recipe_line(args):
    """The flags that decide the figures."""
    return " ".join(f"{name}={getattr(args, name)}" for name in DECISIVE if hasattr(args, name))
