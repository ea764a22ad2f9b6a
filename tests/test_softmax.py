"""The full softmax against sums in float64, written out target by target; the adaptive one against torch's."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from models import softmax
from models.language_model import check_cutoffs
from models.softmax import IGNORE, AdaptiveSoftmax, FullSoftmax, SplitSoftmax, default_cutoffs, split_cutoffs

STEPS, BATCH, NHID, WORDS = 5, 3, 7, 19


def make(dtype=torch.float64, shared=None, scale=1.0):
    """A head with a bias that is not zero, hidden vectors, and targets of which one step and one more are ignored."""
    torch.manual_seed(1)
    head = FullSoftmax(NHID, WORDS, shared)
    nn.init.normal_(head.bias)
    hidden = torch.randn(STEPS, BATCH, NHID, dtype=torch.float64) * scale
    targets = torch.randint(WORDS, (STEPS, BATCH))
    targets[2] = targets[4, 1] = IGNORE
    return head.to(dtype), hidden.to(dtype), targets


def make_long(dtype=torch.float64):
    """As make, with 69 targets: more than the features that a chunk has rows at least."""
    head, _, _ = make(dtype)
    hidden, targets = torch.randn(23, BATCH, NHID, dtype=dtype), torch.randint(WORDS, (23, BATCH))
    targets[11] = targets[22, 1] = IGNORE
    return head, hidden, targets


def logits_by_hand(head, hidden):
    """Logits of one hidden vector as a list of floats."""
    rows, bias = head.weight.double().tolist(), head.bias.double().tolist()
    return [math.fsum(map(float.__mul__, row, hidden.double().tolist())) + b for row, b in zip(rows, bias, strict=True)]


def log_probs_by_hand(head, hidden):
    """log softmax of one hidden vector."""
    logits = logits_by_hand(head, hidden)
    top = max(logits)
    log_sum = top + math.log(math.fsum(math.exp(value - top) for value in logits))
    return [value - log_sum for value in logits]


def loss_by_hand(head, hidden, targets):
    """Sum of the negative log probabilities of the targets that are scored."""
    scored = (targets != IGNORE).nonzero().tolist()
    return -math.fsum(log_probs_by_hand(head, hidden[t, b])[targets[t, b]] for t, b in scored)


def relative_error(got, want):
    want = torch.as_tensor(want, dtype=torch.float64)
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("scale", (1.0, 1e4), ids=("moderate", "extreme"))
def test_log_probs_are_the_log_softmax_and_sum_to_one(scale):
    """Also where exp of a logit overflows."""
    head, hidden, _ = make(scale=scale)
    log_probs = head.log_probs(hidden)
    want = [[log_probs_by_hand(head, vector) for vector in column] for column in hidden]
    assert log_probs.shape == (STEPS, BATCH, WORDS)
    assert relative_error(log_probs, want) < 1e-12
    assert relative_error(log_probs.exp().sum(-1), torch.ones(STEPS, BATCH)) < 1e-12
    assert relative_error(head.log_probs(hidden[1, 2]), want[1][2]) < 1e-12


@pytest.mark.parametrize("scale", (1.0, 1e4), ids=("moderate", "extreme"))
@pytest.mark.parametrize(("dtype", "tolerance"), ((torch.float64, 1e-12), (torch.float32, 1e-5)), ids=("f64", "f32"))
def test_loss_sums_over_the_targets_that_are_scored(dtype, tolerance, scale):
    """In float64 and float32, a step that is ignored whole and one that is in part."""
    head, hidden, targets = make(dtype, scale=scale)
    loss = head.loss(hidden, targets)
    assert loss.dtype == dtype
    assert relative_error(loss, loss_by_hand(head, hidden, targets)) < tolerance


@pytest.mark.parametrize(("steps", "batch"), ((1, 3), (5, 1), (1, 1)))
def test_one_step_and_one_column(steps, batch):
    """The loss of a part is the loss of the part."""
    head, hidden, targets = make()
    hidden, targets = hidden[:steps, :batch], targets[:steps, :batch]
    assert relative_error(head.loss(hidden, targets), loss_by_hand(head, hidden, targets)) < 1e-12


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_what_is_not_a_number_is_seen(dtype):
    """One broken row breaks the loss, so that training stops; a row that is not scored does not."""
    head, hidden, targets = make(dtype)
    (place,) = (targets.flatten() != IGNORE).nonzero()[:1].flatten()
    hidden.view(-1, hidden.shape[-1])[place] = math.nan
    assert head.loss(hidden, targets).isnan()
    assert head.loss(hidden.requires_grad_(), targets).isnan()


def test_nothing_to_score_is_no_loss():
    """All targets ignored: 0, and gradients of 0 instead of nan."""
    head, hidden, targets = make()
    loss = head.loss(hidden.requires_grad_(), torch.full_like(targets, IGNORE))
    loss.backward()
    assert loss == 0
    assert not any(tensor.grad.any() for tensor in (hidden, head.weight, head.bias))


@pytest.mark.parametrize(("dtype", "tolerance"), ((torch.float64, 1e-12), (torch.float32, 1e-5)), ids=("f64", "f32"))
def test_gradients_are_softmax_minus_one_hot(dtype, tolerance):
    """With d = softmax - one-hot of the scored targets: d W, d^T h and the sum of d."""
    head, hidden, targets = make(dtype)
    head.loss(hidden.requires_grad_(), targets).backward()
    slope = torch.zeros(STEPS, BATCH, WORDS, dtype=torch.float64)
    for t, b in (targets != IGNORE).nonzero().tolist():
        slope[t, b] = torch.tensor(log_probs_by_hand(head, hidden[t, b]), dtype=torch.float64).exp()
        slope[t, b, targets[t, b]] -= 1
    want = {
        "hidden": (hidden.grad, slope @ head.weight.double()),
        "weight": (head.weight.grad, torch.einsum("tbv,tbh->vh", slope, hidden.double())),
        "bias": (head.bias.grad, slope.sum((0, 1))),
    }
    errors = {name: relative_error(*pair) for name, pair in want.items()}
    assert not {name: error for name, error in errors.items() if not error < tolerance}


def test_gradients_that_are_asked_for_twice():
    """A graph that is kept gives them again, each times its own factor, before the last time, which takes memory."""
    head, hidden, targets = make()
    hidden.requires_grad_()
    leaves = [hidden, head.weight, head.bias]
    loss = head.loss(hidden, targets)
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [gradient.clone() for gradient in once]
    for factor, last in ((3.0, False), (1.0, False), (0.5, True)):
        again = torch.autograd.grad(factor * loss, leaves, retain_graph=not last)
        for name, first, now in zip(("hidden", "weight", "bias"), once, again, strict=True):
            assert relative_error(now, factor * first) < 1e-12, name
    for name, first, before in zip(("hidden", "weight", "bias"), once, kept, strict=True):
        assert first.equal(before), name


def test_gradcheck():
    """Loss and log probabilities against finite differences, by hidden vectors, weight and bias."""
    head, hidden, targets = make()
    inputs = (hidden[:3, :2].requires_grad_(), head.weight, head.bias)
    assert torch.autograd.gradcheck(lambda hidden, *_: head.loss(hidden, targets[:3, :2]), inputs)
    assert torch.autograd.gradcheck(lambda hidden, *_: head.log_probs(hidden), inputs)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_narrow_logits_are_summed_in_float32(dtype):
    """What a narrow type loses, it loses in the product: the sums over the vocabulary are exact to float32."""
    head, hidden, targets = make(dtype)
    log_probs, loss = head.log_probs(hidden), head.loss(hidden, targets)
    assert log_probs.dtype == loss.dtype == torch.float32
    logits = nn.functional.linear(hidden, head.weight, head.bias).double()
    assert relative_error(log_probs, logits - logits.exp().sum(-1, keepdim=True).log()) < 1e-6
    logits = nn.functional.linear(hidden, head.weight).double() + head.bias  # the loss adds the bias in float32
    want = logits - logits.exp().sum(-1, keepdim=True).log()
    assert relative_error(loss, -want[targets != IGNORE].gather(-1, targets[targets != IGNORE][:, None]).sum()) < 1e-6


@pytest.mark.parametrize("bias", (True, False), ids=("bias", "no bias"))
@pytest.mark.parametrize("rows", (0, 11, 69), ids=("as many as features", "uneven chunks", "one chunk"))
@pytest.mark.parametrize(("dtype", "tolerance"), ((torch.float64, 1e-14), (torch.float32, 1e-6)), ids=("f64", "f32"))
def test_chunks_equal_torch_in_float64(monkeypatch, rows, bias, dtype, tolerance):
    """Loss and every gradient equal those of torch's cross_entropy over all logits, whatever the chunk.

    In float32 by the compiled kernels, with gradients and without.
    """
    monkeypatch.setitem(softmax.CHUNK, "cpu", rows * WORDS + 1)
    head, hidden, targets = make_long(dtype)
    with torch.no_grad():
        without = softmax.cross_entropy(hidden, head.weight, head.bias if bias else None, targets)
    leaves = [hidden.requires_grad_(), head.weight] + [head.bias] * bias
    b = head.bias if bias else None
    loss = softmax.cross_entropy(hidden, head.weight, b, targets)
    logits = nn.functional.linear(*(None if part is None else part.double() for part in (hidden, head.weight, b)))
    logits = logits.flatten(0, 1)
    expected = nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum", ignore_index=IGNORE)
    assert relative_error(loss, expected.detach()) < tolerance
    assert without == loss
    pairs = zip(torch.autograd.grad(3 * loss, leaves), torch.autograd.grad(3 * expected, leaves), strict=True)
    errors = {name: relative_error(*pair) for name, pair in zip(("hidden", "weight", "bias"), pairs, strict=False)}
    assert not {name: error for name, error in errors.items() if not error < 10 * tolerance}


@pytest.mark.parametrize("words", (5, WORDS), ids=("uneven parts of the weight", "the whole weight"))
@pytest.mark.parametrize("chunk", (1, 1 << 23), ids=("chunks", "one chunk"))
def test_bfloat16_products_and_float32_sums(monkeypatch, chunk, words):
    """Under autocast the three products take operands rounded to bfloat16; the rest is as in float64."""
    monkeypatch.setitem(softmax.CHUNK, "cpu", chunk)
    monkeypatch.setitem(softmax.WORDS, "cpu", words)
    head, hidden, targets = make_long(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = head.loss(hidden.requires_grad_(), targets)
    loss.backward()

    def rounded(tensor):
        return tensor.detach().bfloat16().double()

    scored = (targets != IGNORE).flatten()
    x, w, t = rounded(hidden).flatten(0, 1)[scored], rounded(head.weight), targets.flatten()[scored]
    logits = rounded(x @ w.t()) + head.bias.detach()
    p = logits.softmax(-1)
    assert relative_error(loss, -(p.gather(1, t[:, None])).log().sum()) < 1e-6
    slope = p - nn.functional.one_hot(t, WORDS)
    assert relative_error(head.bias.grad, slope.sum(0)) < 1e-6
    assert relative_error(hidden.grad.flatten(0, 1)[scored], rounded(rounded(slope) @ w)) < 1e-3
    assert relative_error(head.weight.grad, rounded(slope).t() @ x) < 3e-3
    assert hidden.grad.dtype == head.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
def test_all_logits_are_never_there(monkeypatch, training):
    """No tensor that the loss makes has more elements than a chunk or the hidden vectors."""
    monkeypatch.setitem(softmax.CHUNK, "cpu", 1)
    head, hidden, targets = make_long()
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(part.numel() for part in (result,) if isinstance(part, torch.Tensor))
            return result

    with torch.set_grad_enabled(training), Sizes():
        loss = head.loss(hidden.requires_grad_(training), targets)
        if training:
            loss.backward()
    assert WORDS * NHID in sizes
    assert max(sizes) <= max(WORDS * NHID, hidden.numel()) < hidden.numel() // NHID * WORDS


def test_own_weights_start_uniform_and_a_shared_one_is_the_same_parameter():
    """Own: within +-0.1 and filling it, bias 0. Shared: not copied, not changed, a parameter of the head."""
    head = FullSoftmax(101, 103)
    assert head.weight.shape == (103, 101)
    assert 0.0995 < head.weight.max() <= 0.1
    assert -0.0995 > head.weight.min() >= -0.1
    assert abs(head.weight.mean()) < 0.003
    assert head.bias.shape == (103,)
    assert not head.bias.any()
    weight = nn.Parameter(torch.randn(WORDS, NHID))
    before = weight.detach().clone()
    shared = FullSoftmax(NHID, WORDS, weight)
    assert shared.weight is weight
    assert torch.equal(weight, before)
    assert [name for name, _ in shared.named_parameters()] == ["weight", "bias"]


ADAPTIVE = [(13, [3, 7]), (29, [2]), (31, [5, 6, 30])]


def adaptive(vocab_size, cutoffs):
    """An adaptive head over 11 features in float64, and torch's own with the same weights."""
    torch.manual_seed(4)
    head = AdaptiveSoftmax(11, vocab_size, cutoffs).double()
    return head, head.clusters


@pytest.mark.parametrize(("vocab_size", "cutoffs"), ADAPTIVE, ids=str)
def test_adaptive_equals_torch(vocab_size, cutoffs):
    """Log probabilities, the loss of every word, every gradient, the hidden vectors' too."""
    head, reference = adaptive(vocab_size, cutoffs)
    hidden = torch.randn(vocab_size, 3, 11, dtype=torch.double, requires_grad=True)
    targets = torch.arange(vocab_size)[:, None].expand(-1, 3)
    log_probs = head.log_probs(hidden)
    torch.testing.assert_close(log_probs.flatten(0, 1), reference.log_prob(hidden.flatten(0, 1)))
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(vocab_size, 3, dtype=torch.double))
    loss = head.loss(hidden, targets)
    theirs = -reference(hidden.flatten(0, 1), targets.flatten()).output.sum()
    torch.testing.assert_close(loss, theirs)
    torch.testing.assert_close(loss, -log_probs.gather(-1, targets[..., None]).sum())
    names, parameters = zip(("hidden", hidden), *head.named_parameters(), strict=True)
    expected = torch.autograd.grad(theirs, parameters)
    for name, ours, gradient in zip(names, torch.autograd.grad(loss, parameters), expected, strict=True):
        assert (ours - gradient).norm() <= 1e-12 * gradient.norm(), name


def test_adaptive_tails_have_a_feature():
    """A small model's last clusters, too: else their words would be equally probable for ever."""
    torch.manual_seed(3)
    model = AdaptiveSoftmax(11, 53, [7, 13, 19, 29])
    assert [down.out_features for down, _ in model.clusters.tail] == [2, 1, 1, 1]
    assert model.log_probs(torch.randn(1, 1, 11))[..., 29:].std() > 1e-3


def test_adaptive_does_not_score_ignored_targets_and_gives_unused_tails_a_gradient():
    """Only words of the head occur: the tails' gradients are zeros, not absent."""
    head, _ = adaptive(13, [3, 7])
    hidden = torch.randn(5, 2, 11, dtype=torch.double)
    targets = torch.tensor([[0, 2], [1, IGNORE], [IGNORE, IGNORE], [2, 2], [0, 1]])
    scored = targets != IGNORE
    expected = -head.log_probs(hidden)[scored].gather(-1, targets[scored][:, None]).sum()
    loss = head.loss(hidden, targets)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) == ("tail" not in name), name


def test_adaptive_under_bfloat16():
    """Products in bfloat16, sums and the loss in float32, a gradient for every weight."""
    torch.manual_seed(0)
    head = AdaptiveSoftmax(32, 101, [10, 40])
    hidden, targets = torch.randn(17, 3, 32), torch.randint(101, (17, 3))
    exact = head.loss(hidden, targets)
    with torch.autocast("cpu", torch.bfloat16):
        loss = head.loss(hidden, targets)
        log_probs = head.log_probs(hidden)
    assert loss.dtype == log_probs.dtype == torch.float32
    assert abs(loss - exact) < 0.01 * exact
    loss.backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


@pytest.mark.parametrize("vocab_size", [3, 7, 29, 10_000, 33_278, 267_735])
def test_default_cutoffs_fit(vocab_size):
    """Whatever the vocabulary, torch takes them."""
    cutoffs = default_cutoffs(vocab_size)
    check_cutoffs(cutoffs, vocab_size)
    assert cutoffs == sorted(set(cutoffs)) and (vocab_size < 50 or cutoffs == [vocab_size // 25, vocab_size // 5])


def split_by_hand(head, hidden):
    """p(w) (N, V) from the definition, in probabilities: tombstones in the head, the last one for the first cluster."""
    first, count = head.cutoffs[0], len(head.cutoffs) - 1
    top = torch.cat([head.weight[:first], head.tail_vectors]), torch.cat([head.bias[:first], head.tail_bias])
    p_head = (hidden @ top[0].t() + top[1]).exp()
    p_head = p_head / p_head.sum(1, keepdim=True)
    parts = [p_head[:, :first]]
    for k in range(1, count + 1):
        low, high = head.cutoffs[k - 1 : k + 1]
        own = (hidden @ head.weight[low:high].t() + head.bias[low:high]).exp()
        parts.append(own / own.sum(1, keepdim=True) * p_head[:, -k, None])
    return torch.cat(parts, 1)


@pytest.mark.parametrize(("vocab_size", "cutoffs"), ADAPTIVE, ids=str)
@pytest.mark.parametrize("tied", (True, False), ids=("tied", "own"))
def test_split_equals_its_definition(vocab_size, cutoffs, tied):
    """Sums to 1; log probabilities, loss of every word and every gradient are those of the definition, in float64."""
    torch.manual_seed(6)
    shared = nn.Parameter(torch.randn(vocab_size, 11)) if tied else None
    head = SplitSoftmax(11, vocab_size, cutoffs, shared).double()
    assert not head.tail_vectors.any() and not head.tail_bias.any()
    for parameter in (head.bias, head.tail_vectors, head.tail_bias):
        nn.init.normal_(parameter)
    hidden = torch.randn(vocab_size, 3, 11, dtype=torch.double, requires_grad=True)
    targets = torch.arange(vocab_size)[:, None].expand(-1, 3)
    p = split_by_hand(head, hidden.flatten(0, 1))
    torch.testing.assert_close(p.sum(1), torch.ones(len(p), dtype=torch.double))
    torch.testing.assert_close(head.log_probs(hidden).flatten(0, 1), p.log())
    loss, want = head.loss(hidden, targets), -p.log().gather(1, targets.reshape(-1, 1)).sum()
    torch.testing.assert_close(loss, want)
    names, leaves = zip(("hidden", hidden), *head.named_parameters(), strict=True)
    expected = torch.autograd.grad(want, leaves)
    for name, ours, gradient in zip(names, torch.autograd.grad(loss, leaves), expected, strict=True):
        assert (ours - gradient).norm() <= 1e-12 * gradient.norm(), name


def test_split_does_not_score_ignored_targets_and_gives_unused_tails_a_gradient():
    """A batch with words of the head alone: every parameter has a gradient; ignored targets change nothing."""
    torch.manual_seed(7)
    head = SplitSoftmax(11, 31, [5, 23]).double()
    hidden, targets = torch.randn(5, 3, 11, dtype=torch.double), torch.randint(5, (5, 3))
    targets[2] = IGNORE
    head.loss(hidden, targets).backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    kept = torch.cat([hidden[:2], hidden[3:]]), torch.cat([targets[:2], targets[3:]])
    torch.testing.assert_close(head.loss(hidden, targets), head.loss(*kept))


def test_split_of_the_published_vocabularies():
    """Penn Treebank and WikiText-2 have a full softmax, WikiText-103 and the Billion Words the authors' clusters."""
    assert split_cutoffs(10_000) is None and split_cutoffs(33_278) is None and split_cutoffs(75_000) is None
    assert split_cutoffs(267_735) == [2800, 20_000, 76_000] and split_cutoffs(793_471) == [4200, 35_000, 180_000]
    for size in (75_001, 267_735, 793_471):
        cutoffs = split_cutoffs(size)
        if size > cutoffs[-1]:
            check_cutoffs(cutoffs, size)
