"""What compression really gives, as benchmark.py measures it: checkpoints as they are used, and products by themselves.

Each in a process of its own (utils/workers.py).
"""

import importlib.util
import warnings
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from data.batching import columns, windows
from data.corpus import SPLITS, Vocabulary, encode_file, find_corpus, split_file
from generate import sample
from models import build
from models.native import Int8, narrow
from models.sparse import Rows, compressed_rows

from . import UserError, checkpoint, report, runtime, timing
from . import quantization as integers
from .distiller import Distiller
from .evaluation import evaluate
from .measurements import finish, time_ways
from .tables import SCORED
from .workers import Worker

STEPS, COLUMNS = 35, 10
"""Of a batch that is timed: word_language_model's."""
ZEROS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Parts of a matrix, whose products in compressed rows are timed."""
PER_CHANNEL = {"mode": "asymmetric", "per_channel": True}
QUANTIZATIONS = {
    "float32": (None, 86.87),
    "float16": ({"fp16": ["all"]}, 86.80),
    "int8, symmetric, per tensor": ({}, 104.2),
    "int8, asymmetric, per channel": (PER_CHANNEL, 100.45),
    "the same, --clip avg": ({**PER_CHANNEL, "clip": "avg"}, 88.85),
    "asymmetric, per channel; encoder, decoder, eltwise in float16": (
        {**PER_CHANNEL, "fp16": ["encoder", "decoder", "eltwise"]},
        86.77,
    ),
    "the same, --clip avg; encoder, decoder in float16": (
        {**PER_CHANNEL, "clip": "avg", "fp16": ["encoder", "decoder"]},
        88.96,
    ),
}
"""The rows of distiller's table: settings, and the perplexity that it prints for them, of WikiText-2's valid split."""
PRODUCTS = [(rows, 650, outputs) for outputs in (2600, 10000) for rows in (1, 10, 350)]
"""Sizes (rows, inputs, outputs) of an LSTM of 650 units and its softmax."""
WAYS = (
    "fp32", "bf16", "int8, ours", "int8, torch.ao", "int8, torchao", *(f"rows, {part:.0%} zeros" for part in ZEROS)
)  # fmt: skip


class Measured:
    """A checkpoint as evaluate.py and generate.py use it."""

    def __init__(self, path, amp, args):
        self.device, _ = runtime.setup(args)
        self.path, self.amp = path, amp

    def memory(self):
        """Peak MiB of loading it and generating 20 words, above what was there before; call it first."""
        return timing.memory_above(lambda: (self.load(), self.words(20)), self.device)

    def load(self):
        """Read the file."""
        self.model, self.vocabulary, self.saved = checkpoint.load_model(self.path, self.device)
        ids = np.random.default_rng(0).integers(self.model.vocab_size, size=COLUMNS * (STEPS + 1))
        self.window = next(windows(columns(ids, COLUMNS).to(self.device), [STEPS]))
        self.state = self.model.initial_state(COLUMNS)

    def facts(self):
        """Size of the file, numbers in it, zeros among them, and what is computed in what."""
        stored = {tensor.data_ptr(): tensor.nbytes for tensor in self.model.state_dict().values()}
        return {
            "file_mib": Path(self.path).stat().st_size / 2**20,
            "weights_mib": sum(stored.values()) / 2**20,
            "parameters": self.model.num_params(),
            "zeros": sum(int((parameter == 0).sum()) for parameter in self.model.parameters()),
            "types": integers.summary(self.saved["config"]),
        }

    @torch.inference_mode()
    def batch(self):
        """Milliseconds of one batch of an evaluation."""
        with runtime.autocast(self.device, self.amp):
            return timing.once(lambda: self.model(*self.window, self.state)[0].item())

    def words(self, count=100):
        """Milliseconds of a generated word."""
        with runtime.autocast(self.device, self.amp):
            return timing.once(lambda: sample(self.model, [0], count)) / count

    def score(self, folder, split, batch_size, tokens):
        """Perplexity of the first `tokens` of a split; all if None."""
        ids, _ = encode_file(split_file(folder, split), self.vocabulary)
        sos = checkpoint.sentence_start(self.saved, self.vocabulary)
        return evaluate(self.model, ids[:tokens], batch_size, self.amp, sos=sos).perplexity


class Simulated:
    """A checkpoint's model, and what it becomes in integers."""

    def __init__(self, path, args):
        runtime.setup(args)
        self.model, _, self.saved = checkpoint.load_model(path, "cpu")
        if self.saved["args"].get("sentences"):
            raise UserError(f"{path} was trained on sentences: distiller's table is of a text that is read on and on")

    def collect(self, ids):
        """Take statistics from a text."""
        self.statistics = integers.collect(self.saved, ids)

    def score(self, settings, ids, batch_size):
        """Perplexity of ids (N,) under settings, names of quantization.SETTINGS; None: in float32."""
        model = self.model
        if settings is not None:
            settings = {**integers.SETTINGS, **settings, "statistics": self.statistics}
            model = build({**self.saved["config"], "quantization": settings}).eval()
            model.load_state_dict(self.saved["weights"])
        return evaluate(model, ids, batch_size).perplexity


class Product:
    """y = x w^T of x (M, K), w (N, K) in one way, a name of WAYS."""

    def __init__(self, way, sizes, checkout, args):
        runtime.setup(args)
        torch.manual_seed(0)
        rows, features, outputs = sizes
        self.x, self.weight = torch.randn(rows, features), torch.randn(outputs, features)
        if way.startswith("rows"):
            zeros = ZEROS[WAYS.index(way) - len(WAYS)]
            self.weight[torch.rand(outputs, features) < zeros] = 0
        self.call = self.calls(way)

    def calls(self, way):
        """x -> y."""
        weight = self.weight
        if way == "fp32":
            return lambda x: functional.linear(x, weight)
        if way == "bf16":
            narrow_weight = weight.bfloat16()
            return lambda x: functional.linear(x.bfloat16(), narrow_weight)
        if way.startswith("rows"):
            module = torch.nn.Module()
            values, module.w_columns, module.w_starts = compressed_rows(weight)
            operations = Rows({id(values): (module, "w", weight.shape[1])})
            return lambda x: operations.linear("", x, values, None)
        if way == "int8, ours":
            module = torch.nn.Module()
            q, module.scales = narrow(weight)
            operations = Int8({id(q): (module, "scales")})
            return lambda x: operations.linear("", x, q, None)
        linear = torch.nn.Linear(weight.shape[1], len(weight), bias=False).eval()
        linear.weight.data.copy_(weight)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if way == "int8, torch.ao":
                return torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(linear))
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

            quantize_(linear, Int8DynamicActivationInt8WeightConfig())
        return linear

    @torch.inference_mode()
    def difference(self):
        """Relative difference from float64."""
        exact = self.x.double() @ self.weight.double().t()
        return ((self.call(self.x) - exact).norm() / exact.norm()).item()

    @torch.inference_mode()
    def step(self):
        """Milliseconds of a product, the median of those that fit into a fiftieth of a second."""
        return timing.median_time(lambda: self.call(self.x), 0.02)


def ways():
    """WAYS that this installation has; those that it has not, with a line."""
    if importlib.util.find_spec("torchao"):
        return WAYS
    report.say("| torchao is not installed: left out (pip install torchao)")
    return tuple(way for way in WAYS if way != "int8, torchao")


def products(args):
    """Time products of matrices in float32, bfloat16, int8 and compressed rows, at the sizes of an LSTM of 650."""
    _, machine = runtime.setup(args)
    rows, every = [], ways()
    for sizes in PRODUCTS:
        rows += time_ways(args, Product, sizes, every)
    finish(args, machine, {"kind": "products", "rows": rows}, "compression")


def quantization(args):
    """Perplexity of a model in simulated integers, by ours and, on the same weights and statistics, by distiller."""
    _, machine = runtime.setup(args)
    saved = checkpoint.load(args.checkpoint)
    folder, vocabulary = find_corpus(args.data or saved["args"]["data"]), Vocabulary(**saved["vocabulary"])
    texts = {split: encode_file(split_file(folder, split), vocabulary)[0] for split in SPLITS}
    workers = {"ours": Worker(args.checkpoint, args, kind=Simulated)}
    if args.distiller:
        workers["distiller"] = Worker(args.checkpoint, args.distiller, args, kind=Distiller)
    rows = [{"name": name, "published": published} for name, (_, published) in QUANTIZATIONS.items()]
    for who, worker in workers.items():
        worker("collect", texts[args.split][: args.statistics_tokens + 1])
        for row in rows:
            settings, _ = QUANTIZATIONS[row["name"]]
            row[who] = {
                split: worker("score", settings, texts[split][: args.tokens], args.eval_batch) for split in SCORED
            }
            report.say(f"| {who} | {row['name']} | " + " | ".join(f"{s} ppl {p:.2f}" for s, p in row[who].items()))
        worker.end()
    figures = {"kind": "quantization", "corpus": folder.name, "eval_batch": args.eval_batch, "rows": rows}
    figures["statistics"] = f"{args.statistics_tokens:,} tokens of {args.split}"
    finish(args, machine, figures, "compression")


def compression(args):
    """Size, peak memory, speed and perplexity of checkpoints, the first also in bf16: what compression really gives."""
    _, machine = runtime.setup(args)
    given = [place.split("=", 1) if "=" in place else (place, place) for place in args.checkpoints]
    if len(dict(given)) < len(given):
        raise UserError(f"compression {' '.join(args.checkpoints)}: two have one name; give each another, NAME=PATH")
    dense = given[0][1]
    folder = find_corpus(args.data or checkpoint.load(dense)["args"]["data"])
    candidates = {name: (path, args.amp, args) for name, path in given}
    candidates[f"{next(iter(candidates))}, bf16"] = (dense, "bf16", args)
    workers = {name: Worker(*candidate, kind=Measured) for name, candidate in candidates.items()}
    rows = {name: {"name": name, "memory_mib": worker("memory"), **worker("facts")} for name, worker in workers.items()}
    for name, worker in workers.items():
        for split in SCORED:
            rows[name][split] = worker("score", folder, split, args.eval_batch, args.tokens)
        report.say(f"| {name} | valid ppl {rows[name]['valid']:.2f} | test ppl {rows[name]['test']:.2f}")
        rows[name] |= {"batch_ms": [], "word_ms": []}
    for number in report.progress(range(args.warmup + args.rounds), "compression"):
        for name, worker in workers.items():
            taken = worker("batch"), worker("words")
            if number >= args.warmup:
                rows[name]["batch_ms"].append(taken[0])
                rows[name]["word_ms"].append(taken[1])
    for worker in workers.values():
        worker.end()
    figures = {"kind": "compression", "corpus": folder.name, "eval_batch": args.eval_batch}
    figures |= {"steps": STEPS, "columns": COLUMNS, "rows": list(rows.values())}
    finish(args, machine, figures, "compression")
