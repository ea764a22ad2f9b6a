"""Adaptation at test time: a cache of recent words, dynamic evaluation, the softmax's temperature, and their search."""

import itertools
import math

import torch

from data.batching import columns, window_lengths, windows

from . import UserError, evaluation, report, runtime

STARTS = ("first", "window")
RULES = ("rms", "sgd")
COLUMNS = 100
"""Columns of the training text whose gradients are averaged before they are squared, as Krause et al. have it."""
ROWS = 512
"""Steps whose cache is looked up at once."""

THETAS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.45, 0.65, 1.0, 1.5, 2.0)
WINDOWS = (50, 100, 200, 500, 1000, 2000, 3785)
LAMBDAS = tuple(number / 50 for number in range(1, 21))
TEMPERATURES = (0.85, 0.9, 0.93, 0.96, 0.98, 1.0, 1.02, 1.04, 1.07, 1.1, 1.15)
RATIO = 1.5
"""What --tune tries: all of these for cache and temperature, steps by this ratio for dynamic evaluation."""
FAR = 1e6
"""How far below the rate that it begins with --tune looks for one whose loss is finite."""


def attention(hidden, theta, window, start="first", begin=0):
    """Weights of the continuous cache (Grave et al. 2017, arXiv 1612.04426, section 3) at the steps from `begin` on.

    hidden (N, H): the hidden vectors h of all steps so far. Step t looks at the `window` steps i before it:
    softmax_i(theta * h_t . h_i). start: "first", from the second step on, with as many as there are; "window": only
    after more than `window` steps, as in pointer.py of salesforce/awd-lstm-lm.
    Returns weights (N - begin, K) over the last K steps; a row is NaN where the cache has no say.
    """
    first = max(0, begin - window)
    keys = torch.arange(first, len(hidden), device=hidden.device)
    steps = torch.arange(begin, len(hidden), device=hidden.device)[:, None]
    allowed = (keys < steps) & (keys >= steps - window)
    if start == "window":
        allowed &= steps > window
    scores = theta * hidden[begin:] @ hidden[first:].t()
    return torch.softmax(scores.masked_fill_(~allowed, -math.inf), 1)


def cache_shares(hidden, targets, theta, window, start="first"):
    """The cache's probability of each target: the sum of the weights of those steps that the same word came after.

    hidden (N, H), targets (N,), the words that came next -> (N,), NaN where the cache has no say. The rest: attention.
    """
    shares = [hidden.new_empty(0)]
    for begin in range(0, len(hidden), ROWS):
        end = min(begin + ROWS, len(hidden))
        weights = attention(hidden[:end], theta, window, start, begin)
        followed = targets[end - weights.shape[1] : end] == targets[begin:end, None]
        shares.append((weights * followed).sum(1))
    return torch.cat(shares)


def mixed(log_probs, shares, lambdasm):
    """log((1 - lambdasm) p + lambdasm p_cache), or log p where p_cache is NaN; log_probs, shares (N,)."""
    mixture = torch.logaddexp(log_probs + math.log1p(-lambdasm), (shares * lambdasm).log())
    return torch.where(shares.isnan(), log_probs, mixture)


class Learner:
    """Dynamic evaluation of Krause et al. 2018 (arXiv 1709.07432): learn from each segment after it was scored.

        rms:  w <- w + lamb D (w_0 - w) - lr g / (R + epsilon),  D = min(R / mean(R), 1 / lamb)
        sgd:  w <- w + lamb (w_0 - w) - lr g

    w_0: the trained weights; g: the gradient of the segment's mean loss; R: gradient_roots; mean(R): over tensors, of
    each one's mean, as in benkrause/dynamic-evaluation.
    """

    def __init__(self, model, rule, lr, lamb, epsilon=0.0, roots=None):
        self.parameters = list(model.parameters())
        self.trained = [parameter.detach().clone() for parameter in self.parameters]
        self.rule, self.lr, self.lamb = rule, lr, lamb
        if rule == "rms":
            mean = torch.stack([root.mean() for root in roots if root.numel()]).mean()
            self.pull = [(root * (lamb / mean)).clamp_(max=1.0) for root in roots]
            self.push = [lr / (root + epsilon) for root in roots]

    @torch.no_grad()
    def step(self, loss):
        """Learn from a segment's mean loss, 0-d."""
        gradients = torch.autograd.grad(loss, self.parameters)
        if self.rule == "rms":
            torch._foreach_lerp_(self.parameters, self.trained, self.pull)
            torch._foreach_addcmul_(self.parameters, self.push, gradients, -1.0)
        else:
            torch._foreach_lerp_(self.parameters, self.trained, self.lamb)
            torch._foreach_add_(self.parameters, gradients, alpha=-self.lr)

    @torch.no_grad()
    def restore(self):
        """Back to the trained weights."""
        torch._foreach_copy_(self.parameters, self.trained)


def learner(model, args, roots):
    """The Learner that the flags ask for, or None."""
    return Learner(model, args.dynamic, args.lr, args.lamb, args.epsilon, roots) if args.dynamic else None


def gradient_roots(model, ids, steps, amp="off", most=None):
    """R of Learner: the root of the mean, over windows of the training text, of the squared gradient.

    ids (N,) are read in COLUMNS columns (fewer if they are few) and windows of `steps`, without dropout, from the zero
    state on; each gradient is that of a window's mean loss. most: windows to use, all if None.
    Returns a tensor for each parameter of the model.
    """
    device, parameters = next(model.parameters()).device, list(model.parameters())
    stream = columns(ids, max(1, min(COLUMNS, len(ids) // 2))).to(device)
    lengths = window_lengths(len(stream) - 1, steps)[:most]
    squares = [torch.zeros_like(parameter) for parameter in parameters]
    training, state = model.training, model.initial_state(stream.shape[1])
    model.eval()
    label = "gradients of the training text"
    for _, (tokens, targets) in zip(report.progress(lengths, label), windows(stream, lengths), strict=True):
        with runtime.autocast(device, amp):
            loss, _, count, state = model(tokens, targets, state)
        state = evaluation.detach(state)
        gradients = torch.autograd.grad((loss / count).sum(), parameters)
        torch._foreach_addcmul_(squares, gradients, gradients)
    model.train(training)
    return [square.div_(len(lengths)).sqrt_() for square in squares]


def read(model, ids, args, roots=None, label=None):
    """The log probability of each of the N-1 targets of ids (N,), adapted as the flags say.

    args: needs amp, bptt, temperature, pointer and its theta, lambdasm, window, pointer_start, dynamic (a rule or None)
    and its lr, lamb, epsilon. roots: gradient_roots, for rule rms. With both, the cache is of what the learning model
    makes of the words, and what it learns from is its own loss.
    """
    learning = learner(model, args, roots)
    log_probs, hidden = evaluation.trace(
        model, ids, args.bptt, args.amp, label, [args.temperature], learning, keep=args.pointer
    )
    log_probs = log_probs[:, 0]
    if not args.pointer:
        return log_probs
    targets = torch.as_tensor(ids[1:], device=hidden.device)
    return mixed(log_probs, cache_shares(hidden, targets, args.theta, args.window, args.pointer_start), args.lambdasm)


def tune(model, ids, args, given, roots=None):
    """Set those flags that are not in `given` to values with the least loss on ids (N,), text of the validation split.

    First rate, then pull of dynamic evaluation, each from where it stands by RATIO down, or else up, as long as it
    helps; then, in one pass with these, temperature and cache in all combinations. Says what it tried. The other
    arguments: as in read. Returns the names of the flags it chose.
    """
    chosen = [name for name in ("lr", "lamb") if args.dynamic and name not in given]
    tried = {}
    for name in chosen:
        _walk(name, args, lambda: _dynamic_loss(model, ids, args, roots, tried))
    grid = {"temperature": TEMPERATURES}
    if args.pointer:
        grid |= {"theta": THETAS, "window": WINDOWS, "lambdasm": LAMBDAS}
    grid = {name: (getattr(args, name),) if name in given else values for name, values in grid.items()}
    losses = _grid_losses(model, ids, args, grid, learner(model, args, roots))
    for place, (name, values) in enumerate(grid.items()):
        least = {value: min(loss for key, loss in losses.items() if key[place] == value) for value in values}
        shown = " | ".join(f"{value:g}: {evaluation.perplexity(loss):.2f}" for value, loss in least.items())
        report.say(f"| tried {name}, ppl with the best of the others | {shown}")
    best = min(losses, key=losses.get)
    for name, value in zip(grid, best, strict=True):
        setattr(args, name, value)
    return chosen + [name for name in grid if name not in given]


def _walk(name, args, loss):
    """Leave args.NAME at the value of least loss(), from where it stands; a rate, first, where that is finite.

    Raises UserError where it is not.
    """
    given, least = getattr(args, name), loss()
    while least == math.inf and name == "lr" and args.lr > given / FAR:
        args.lr /= RATIO
        least = loss()
    if least == math.inf:
        raise UserError(f"--tune: the loss is not finite with --lr {args.lr:.3g} --lamb {args.lamb:.3g}: give others")
    best = start = getattr(args, name)
    for ratio in (1 / RATIO, RATIO):
        setattr(args, name, best * ratio)
        while (name != "lamb" or args.lamb <= 1) and (value := loss()) < least:
            best, least = getattr(args, name), value
            setattr(args, name, best * ratio)
        if best != start:
            break
    setattr(args, name, best)


def _dynamic_loss(model, ids, args, roots, tried):
    """Mean loss with the learner alone; what was `tried` is not tried again."""
    key = args.lr, args.lamb
    if key not in tried:
        setting = f"lr {args.lr:.3g} lamb {args.lamb:.3g}"
        log_probs, _ = evaluation.trace(
            model, ids, args.bptt, args.amp, f"trying {setting}", learner=learner(model, args, roots)
        )
        loss = -log_probs.double().mean().item()
        tried[key] = loss if math.isfinite(loss) else math.inf
        report.say(f"| tried {setting} | ppl {evaluation.perplexity(tried[key]):.2f}")
    return tried[key]


def _grid_losses(model, ids, args, grid, learning):
    """Mean loss of each combination of the values in grid: {(temperature,) or with theta, window, lambdasm: loss}."""
    label = "trying temperatures" + " and caches" * args.pointer
    log_probs, hidden = evaluation.trace(
        model, ids, args.bptt, args.amp, label, grid["temperature"], learning, keep=args.pointer
    )
    plain = dict(zip(grid["temperature"], log_probs.unbind(1), strict=True))
    if not args.pointer:
        return {(temperature,): -own.double().mean().item() for temperature, own in plain.items()}
    targets, losses = torch.as_tensor(ids[1:], device=hidden.device), {}
    for theta, window in report.progress(list(itertools.product(grid["theta"], grid["window"])), "trying caches"):
        shares = cache_shares(hidden, targets, theta, window, args.pointer_start)
        for (temperature, own), lambdasm in itertools.product(plain.items(), grid["lambdasm"]):
            losses[temperature, theta, window, lambdasm] = -mixed(own, shares, lambdasm).double().mean().item()
    return losses
