"""Cache and dynamic evaluation against slow references in float64; what they leave untouched; what is searched."""

import copy
import itertools
import math
from argparse import Namespace

import numpy as np
import pytest
import torch
from torch.nn import functional

from models import build
from utils import UserError, adaptation, evaluation
from utils.adaptation import Learner, attention, cache_shares, gradient_roots, mixed, read, tune

VOCAB, WORDS = 13, 53
RNN = {"emsize": 7, "nhid": 7, "nlayers": 2}
RMC = {"emsize": 7, "headsize": 5, "numheads": 3, "keysize": 2, "memslots": 2}
CORES = {
    "LSTM": ("rnn", {"model": "LSTM", "dropout": 0.3, **RNN}),
    "GRU": ("rnn", {"model": "GRU", **RNN}),
    "Elman": ("rnn", {"model": "RNN_TANH", **RNN}),
    "LSTM loop": ("rnn", {"model": "LSTM", "loop": True, **RNN}),
    "RMC": ("rmc", RMC),
    "RMC port": ("rmc", {**RMC, "variant": "port"}),
    "QRNN": ("qrnn", {"window": 2, "zoneout": 0.2, **RNN}),
    "AWD-LSTM": ("awd", {"model": "LSTM", "tied": True, "wdrop": 0.5, "dropouth": 0.3, **RNN}),
    "AWD-GRU": ("awd", {"model": "GRU", "tied": True, "wdrop": 0.5, **RNN}),
    "AWD-QRNN": ("awd", {"model": "QRNN", "tied": True, "wdrop": 0.5, **RNN}),
}
HEADS = {"full": {}, "adaptive": {"cutoffs": [3, 7]}, "split": {"cutoffs": [3, 7], "splitcross": True}}


def make(core="LSTM", head="full", tied=False):
    """A model with dropout and weights large enough to have a memory, in training mode."""
    torch.manual_seed(41)
    family, arguments = CORES[core]
    config = {"family": family, "core": arguments, "vocab_size": VOCAB, "tied": tied, **HEADS[head]}
    model = build({**config, "dropouti": 0.2, "dropout": 0.3})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.empty_like(parameter).uniform_(-0.4, 0.4))
    return model


@pytest.fixture
def ids():
    """A text of 53 words: 52 targets."""
    return np.random.default_rng(43).integers(VOCAB, size=WORDS).astype(np.int32)


def flags(**changed):
    """What the script's flags are without any adaptation, but for those that are changed."""
    plain = {"amp": "off", "bptt": 5, "temperature": 1.0, "pointer": False, "dynamic": None, "pointer_start": "first"}
    plain |= {"theta": 0.7, "lambdasm": 0.2, "window": 11, "lr": 0.05, "lamb": 0.1, "epsilon": 0.01}
    return Namespace(**(plain | changed))


def cached(hidden, targets, theta, window, start, word_at):
    """p_cache by the equation, in Python: for each step the probability of word_at(step); NaN where there is none."""
    hidden, shares = hidden.double(), []
    for t in range(len(hidden)):
        before = range(max(0, t - window), t)
        if not before or (start == "window" and t <= window):
            shares.append(math.nan)
            continue
        weights = [math.exp(theta * float(hidden[t] @ hidden[i])) for i in before]
        hits = [weight for i, weight in zip(before, weights, strict=True) if targets[i] == word_at(t)]
        shares.append(sum(hits) / sum(weights))
    return torch.tensor(shares, dtype=torch.float64)


@pytest.mark.parametrize("start", adaptation.STARTS)
@pytest.mark.parametrize("window", [1, 7, 19, 500])
@pytest.mark.parametrize("rows", [1, 5, 512])
def test_the_cache_is_the_equation(monkeypatch, rows, window, start):
    """In pieces of any length; pairs of the piece itself count as those before it do."""
    monkeypatch.setattr(adaptation, "ROWS", rows)
    torch.manual_seed(0)
    hidden, targets = torch.randn(31, 3), torch.randint(5, (31,))
    expected = cached(hidden, targets.tolist(), 0.7, window, start, targets.tolist().__getitem__)
    shares = cache_shares(hidden, targets, 0.7, window, start)
    torch.testing.assert_close(shares.double(), expected, rtol=1e-5, atol=1e-7, equal_nan=True)
    says_nothing = min(31, window + 1) if start == "window" else 1
    assert shares.isnan().sum() == says_nothing and shares[says_nothing:].gt(0).any() == (says_nothing < 31)


def test_the_mixture_is_a_distribution(ids):
    """(1 - lambda) p + lambda p_cache over all words sums to 1 at every step; its entry for the target is `mixed`."""
    model, lambdasm = make(), 0.3
    log_probs, hidden = evaluation.trace(model, ids, keep=True)
    targets = torch.from_numpy(ids[1:].astype(np.int64))
    model.eval()
    with torch.no_grad():
        state = model.initial_state(1)
        p = model.log_probs(model.hidden(torch.from_numpy(ids[:-1].astype(np.int64))[:, None], state)[0])[:, 0].exp()
    cache = torch.zeros_like(p).index_add_(1, targets, attention(hidden, 0.7, 11))
    mixture = torch.where(cache.isnan(), p, (1 - lambdasm) * p + lambdasm * cache)
    torch.testing.assert_close(mixture.sum(1), torch.ones(WORDS - 1), rtol=0, atol=1e-6)
    got = mixed(log_probs[:, 0], cache_shares(hidden, targets, 0.7, 11), lambdasm).exp()
    torch.testing.assert_close(got, mixture.gather(1, targets[:, None])[:, 0], rtol=1e-5, atol=0)
    assert not torch.allclose(got, p.gather(1, targets[:, None])[:, 0], rtol=1e-3)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("core", CORES)
def test_nothing_changes_at_zero(core, head, ids):
    """Lambda 0, temperature 1, rate and pull 0: the plain model, for every family and head; and evaluate's loss."""
    model = make(core, head)
    plain = read(model, ids, flags())
    assert -plain.double().mean().item() == pytest.approx(evaluation.evaluate(model, ids).loss, rel=1e-6)
    torch.testing.assert_close(read(model, ids, flags(pointer=True, lambdasm=0.0)), plain, rtol=1e-6, atol=0)
    for rule in adaptation.RULES:
        roots = [torch.ones_like(parameter) for parameter in model.parameters()]
        still = read(model, ids, flags(dynamic=rule, lr=0.0, lamb=0.0), roots)
        torch.testing.assert_close(still, plain, rtol=1e-5, atol=0)
        moved = read(model, ids, flags(dynamic=rule), roots)
        assert moved.isfinite().all() and not torch.allclose(moved, plain, rtol=1e-3)


def logits_of(model, words, state):
    """Logits (T, V) of a tied or untied full softmax, written out."""
    hidden, state = model.hidden(words[:, None], state)
    return hidden[:, 0] @ model.head.weight.T + model.head.bias, tuple(part.detach() for part in state)


@pytest.fixture
def slow_roots():
    """slow_roots(MODEL, IDS, STEPS, COLUMNS): R by the definition, in float64, a column of text after the other."""

    def brute_force(model, ids, steps, columns):
        model = copy.deepcopy(model).double().eval()
        length = len(ids) // columns
        texts = [torch.from_numpy(ids[c * length : (c + 1) * length].astype(np.int64)) for c in range(columns)]
        states, squares, windows = [model.initial_state(1)] * columns, None, 0
        for begin in range(0, length - 1, steps):
            model.zero_grad()
            losses = []
            for c, text in enumerate(texts):
                words = text[begin : begin + steps + 1]
                logits, states[c] = logits_of(model, words[:-1], states[c])
                losses.append(functional.cross_entropy(logits, words[1:]))
            torch.stack(losses).mean().backward()
            own = [parameter.grad**2 for parameter in model.parameters()]
            squares = own if squares is None else [a + b for a, b in zip(squares, own, strict=True)]
            windows += 1
        return [(square / windows).sqrt() for square in squares]

    return brute_force


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("columns", "steps"), [(1, 5), (3, 4), (7, 3)])
def test_gradient_roots(monkeypatch, ids, slow_roots, columns, steps, tied):
    """Of every parameter by relative error; a last, shorter window counts as one; the model is left as it was."""
    monkeypatch.setattr(adaptation, "COLUMNS", columns)
    model = make(tied=tied)
    roots = gradient_roots(model, ids, steps)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    expected = slow_roots(model, ids, steps, columns)
    for (name, _), root, want in zip(model.named_parameters(), roots, expected, strict=True):
        assert (root - want).norm() <= 1e-5 * want.norm(), name


def test_fewer_windows_of_the_training_text(monkeypatch, ids):
    """`most` windows from the start are those of a text that ends there; few words make few columns."""
    model = make()
    assert len(gradient_roots(model, ids[:3], 5)) == len(list(model.parameters()))
    monkeypatch.setattr(adaptation, "COLUMNS", 1)
    short, ended, whole = (gradient_roots(model, *text) for text in ((ids, 5, "off", 2), (ids[:11], 5), (ids, 5)))
    for (name, _), root, want, other in zip(model.named_parameters(), short, ended, whole, strict=True):
        assert torch.equal(root, want), name
        assert not torch.allclose(root, other, rtol=1e-3), name


def slow_dynamic(model, ids, rule, lr, lamb, epsilon, roots, steps):
    """Dynamic evaluation by its definition, in float64: log p of every target."""
    model = copy.deepcopy(model).double().eval()
    text, state = torch.from_numpy(ids.astype(np.int64)), model.initial_state(1)
    trained = [parameter.detach().clone() for parameter in model.parameters()]
    mean = sum(root.mean() for root in roots) / len(roots)
    log_probs = []
    for begin in range(0, len(text) - 1, steps):
        words = text[begin : begin + steps + 1]
        logits, state = logits_of(model, words[:-1], state)
        log_probs += (-functional.cross_entropy(logits, words[1:], reduction="none")).tolist()
        model.zero_grad()
        functional.cross_entropy(logits, words[1:]).backward()
        with torch.no_grad():
            for parameter, start, root in zip(model.parameters(), trained, roots, strict=True):
                if rule == "rms":
                    pull, push = lamb * torch.clamp(root / mean, max=1 / lamb), lr / (root + epsilon)
                else:
                    pull, push = lamb, lr
                parameter += pull * (start - parameter) - push * parameter.grad
    return torch.tensor(log_probs, dtype=torch.float64)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("core", ["LSTM", "GRU", "RMC", "QRNN", "AWD-LSTM", "AWD-QRNN"])
@pytest.mark.parametrize(("rule", "steps", "lamb"), [("rms", 5, 0.1), ("rms", 1, 0.4), ("sgd", 7, 0.03)])
def test_dynamic_evaluation_is_the_definition(core, rule, steps, lamb, tied, ids):
    """Every target's log probability; with lambda 0.4 the pull of some weights is cut at 1. (RMC's output is wider.)"""
    model = make(core, tied=tied and core != "RMC")
    torch.manual_seed(1)
    roots = [torch.rand_like(parameter) ** 2 for parameter in model.parameters()]
    mean = torch.stack([root.mean() for root in roots]).mean()
    if lamb == 0.4:
        assert any((root * lamb > mean).any() for root in roots)
    rate = 0.002 if rule == "rms" else 0.5
    got = read(model, ids, flags(dynamic=rule, lr=rate, lamb=lamb, bptt=steps), roots)
    expected = slow_dynamic(model, ids, rule, rate, lamb, 0.01, [root.double() for root in roots], steps)
    torch.testing.assert_close(got.double(), expected, rtol=2e-4, atol=1e-5)
    assert (got.double() - read(model, ids, flags()).double()).norm() > 0.01


@pytest.mark.parametrize("rule", adaptation.RULES)
def test_it_scores_before_it_learns(rule, ids):
    """The first segment is the plain model's; what comes later in the text changes no earlier score."""
    model = make()
    roots = [torch.ones_like(parameter) for parameter in model.parameters()]
    both = flags(dynamic=rule, lr=0.3, bptt=7, pointer=True)
    plain, learnt = (read(model, ids, flags(dynamic=rule, lr=rate, bptt=7), roots) for rate in (1e-9, 0.3))
    torch.testing.assert_close(plain[:7], learnt[:7], rtol=1e-6, atol=0)
    assert ((plain - learnt).abs()[7:14] > 1e-4).all()
    other = ids.copy()
    other[21:] = (other[21:] + 1) % VOCAB
    before, after = (read(model, text, both, roots) for text in (ids, other))
    torch.testing.assert_close(before[:20], after[:20], rtol=1e-6, atol=0)
    assert ((before - after).abs()[20:27] > 1e-4).all()


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(ids, training, monkeypatch):
    """Bit for bit and in its mode, after a whole pass and after one that was interrupted; no gradients are kept."""
    model = make().train(training)
    before = copy.deepcopy(model.state_dict())
    learning = Learner(model, "sgd", 0.3, 0.1)

    def untouched():
        same = all(torch.equal(part, before[name]) for name, part in model.state_dict().items())
        return same and model.training is training and all(part.grad is None for part in model.parameters())

    evaluation.trace(model, ids, 5, learner=learning)
    assert untouched()
    steps, step = [], learning.step
    monkeypatch.setattr(learning, "step", lambda loss: (step(loss), steps.append(loss), 1 / (3 - len(steps))))
    with pytest.raises(ZeroDivisionError):
        evaluation.trace(model, ids, 5, learner=learning)
    assert len(steps) == 3 and untouched()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_temperature(head, temperature, ids):
    """p^(1/T), normalized over all words, of every head; for the full softmax that is softmax(logits / T)."""
    model = make("LSTM", head)
    twin = copy.deepcopy(model).double().eval()
    text = torch.from_numpy(ids.astype(np.int64))
    with torch.no_grad():
        hidden, _ = twin.hidden(text[:-1, None], twin.initial_state(1))
        p = twin.log_probs(hidden)[:, 0].exp() ** (1 / temperature)
        if head == "full":
            logits, _ = logits_of(twin, text[:-1], twin.initial_state(1))
            torch.testing.assert_close(p / p.sum(1, keepdim=True), torch.softmax(logits / temperature, 1))
    expected = (p / p.sum(1, keepdim=True)).gather(1, text[1:, None])[:, 0].log()
    torch.testing.assert_close(
        read(model, ids, flags(temperature=temperature)).double(), expected, rtol=1e-5, atol=1e-6
    )


def test_bfloat16_is_near(ids):
    """Other figures than in float32, within 2% of its loss, with both adaptations."""
    model = make("AWD-LSTM", tied=True)
    roots = [torch.ones_like(parameter) for parameter in model.parameters()]
    both = {"pointer": True, "dynamic": "rms"}
    full, half = (read(model, ids, flags(amp=amp, **both), roots).mean() for amp in ("off", "bf16"))
    assert half != full and half.item() == pytest.approx(full.item(), rel=0.02)


@pytest.fixture
def grid(monkeypatch):
    """A search small enough to be done again by hand."""
    values = {"THETAS": (0.3, 1.0), "WINDOWS": (3, 11), "LAMBDAS": (0.05, 0.2), "TEMPERATURES": (0.8, 1.0, 1.5)}
    for name, chosen in values.items():
        monkeypatch.setattr(adaptation, name, chosen)
    return values


@pytest.mark.parametrize("dynamic", [None, "sgd"])
def test_the_search_chooses_the_best(dynamic, ids, grid, capsys):
    """Of all combinations, each scored as read() scores it; it says what it tried."""
    model, args = make(), flags(pointer=True, dynamic=dynamic, lr=0.001)
    names = tune(model, ids, args, {})
    assert names == (["lr", "lamb"] if dynamic else []) + ["temperature", "theta", "window", "lambdasm"]
    out = capsys.readouterr().out
    assert all(f"| tried {name}" in out for name in ("temperature", "theta", "window", "lambdasm"))
    assert out.count("| tried lr") >= (3 if dynamic else 0)
    found, losses = -read(model, ids, args).double().mean().item(), []
    for temperature, theta, window, lambdasm in itertools.product(
        grid["TEMPERATURES"], grid["THETAS"], grid["WINDOWS"], grid["LAMBDAS"]
    ):
        trial = flags(**vars(args) | {"temperature": temperature, "theta": theta, "window": window})
        trial.lambdasm = lambdasm
        losses.append(-read(model, ids, trial).double().mean().item())
    assert found == pytest.approx(min(losses), rel=1e-6) and max(losses) > found * 1.001


def test_what_is_given_is_kept(ids, grid):
    """--tune leaves alone what the command line says."""
    args = flags(pointer=True, dynamic="sgd", lr=0.003, theta=0.123, temperature=1.5)
    names = tune(make(), ids, args, {"lr": 0.003, "theta": 0.123, "temperature": 1.5})
    assert names == ["lamb", "window", "lambdasm"]
    assert (args.lr, args.theta, args.temperature) == (0.003, 0.123, 1.5)


@pytest.mark.parametrize(("best", "start"), [(1.0, 1.0), (1.0, 7.0), (5.0, 0.3), (0.02, 3.0)])
def test_the_walk_ends_at_a_minimum(best, start):
    """Neither of its neighbors is better; it goes as far as it helps, up or down."""
    args, seen = Namespace(lr=start), []

    def loss(value=None):
        seen.append(args.lr if value is None else value)
        return abs(math.log(seen[-1] / best))

    adaptation._walk("lr", args, loss)
    found = args.lr
    assert loss(found) <= min(loss(found * adaptation.RATIO), loss(found / adaptation.RATIO))
    assert abs(math.log(found / best)) <= math.log(adaptation.RATIO) / 2 + 1e-9


def test_the_walk_comes_out_of_what_diverges():
    """From rates that end in nothing but infinity it goes down until they do not."""
    args = Namespace(lr=1000.0)
    adaptation._walk("lr", args, lambda: math.inf if args.lr > 3 else abs(math.log(args.lr)))
    assert abs(math.log(args.lr)) <= math.log(adaptation.RATIO)


def test_the_walk_ends_where_nothing_is_finite():
    """No rate at all, or no rate to choose: one line. Pull goes to 1 at most, and is not lowered into infinity."""
    for name in ("lr", "lamb"):
        with pytest.raises(UserError, match="not finite"):
            adaptation._walk(name, Namespace(lr=1.0, lamb=0.1), lambda: math.inf)
    args = Namespace(lamb=0.3)
    adaptation._walk("lamb", args, lambda: math.inf if args.lamb < 0.25 else -args.lamb)
    assert 1 / adaptation.RATIO < args.lamb <= 1


def test_a_loss_that_is_none_counts_as_infinite(ids, capsys):
    """A rate that ruins the weights is tried, said, and left."""
    args = flags(dynamic="sgd", lr=math.inf)
    loss = adaptation._dynamic_loss(make(), ids, args, None, {})
    assert loss == math.inf and "| tried lr inf lamb 0.1 | ppl inf" in capsys.readouterr().out


def test_an_empty_text(ids):
    """One word has no target: nothing is scored, nothing fails."""
    assert read(make(), ids[:1], flags(pointer=True)).shape == (0,)
