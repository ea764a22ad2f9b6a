"""Perplexity against a brute force in float64: each target once, at its own weight, whatever batch, window or order."""

import copy
import math
from itertools import chain, pairwise

import numpy as np
import pytest
import torch

from data.corpus import Corpus, Vocabulary
from data.files import CorpusError
from models import RNN, LanguageModel
from utils import evaluation
from utils.evaluation import Score, evaluate, perplexity, score_words, trace

KINDS = ("LSTM", "GRU", "RNN_TANH", "RNN_RELU")
VOCAB = 13
TARGETS = 101
CLOSE = 1e-6  # relative; float32 sums of a hundred losses agree with float64 to a few 1e-8
LINES = [["a", "b", "c"], [], ["k"], ["nowhere", "a", "<unk>", "zebra"], list("abcdefghijk" * 3)]


@pytest.fixture
def build():
    """build(KIND, VOCAB, EMSIZE, TIED): a model with dropout everywhere and weights large enough to have a memory."""

    def make(kind="LSTM", vocab_size=VOCAB, emsize=5, tied=False):
        torch.manual_seed(29)
        core = RNN(kind, emsize, emsize if tied else 7, 2, dropout=0.3)
        model = LanguageModel(vocab_size, core, tied, dropouti=0.4, dropout=0.5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.uniform_(-0.7, 0.7)
        return model

    return make


@pytest.fixture
def ids():
    """A text of 102 words: 101 targets."""
    return np.random.default_rng(31).integers(VOCAB, size=TARGETS + 1).astype(np.int32)


@pytest.fixture
def surprisals():
    """surprisals(MODEL, IDS): -log p of each word but the first, one word at a time, in float64, from a zero state."""

    @torch.no_grad()
    def brute_force(model, ids):
        twin = copy.deepcopy(model).double().eval()
        state, losses = twin.initial_state(1), []
        for token, target in pairwise(ids.tolist()):
            hidden, state = twin.hidden(torch.tensor([[token]]), state)
            logits = twin.head.weight @ hidden[0, 0] + twin.head.bias
            losses.append((logits.logsumexp(0) - logits[target]).item())
        return losses

    return brute_force


@pytest.fixture
def in_columns(surprisals):
    """in_columns(MODEL, IDS, B, WARMUP): every column on its own, after the `warmup` words before it, at most L."""

    def brute_force(model, ids, batch_size, warmup):
        length = math.ceil((len(ids) - 1) / batch_size)
        losses = []
        for start in range(0, len(ids) - 1, length):
            begin = max(0, start - min(warmup, length))
            losses += surprisals(model, ids[begin : start + length + 1])[start - begin :]
        return losses

    return brute_force


@pytest.fixture
def vocabulary():
    """<eos>, which is not word 0, <unk> and eleven letters."""
    return Vocabulary(["a", "<eos>", "b", "<unk>", *"cdefghijk"], [1] * VOCAB)


def words_of(model, vocabulary, lines, amp="off"):
    """score_words by the model as it is."""
    return score_words(vocabulary, lines, lambda ids: trace(model, ids, amp=amp)[0][:, 0])


@pytest.fixture
def steps(monkeypatch):
    """steps(T): evaluation goes in windows of T."""
    return lambda steps: monkeypatch.setattr(evaluation, "STEPS", steps)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_batch_1_equals_brute_force(build, ids, surprisals, kind, tied):
    """One pass from the zero state over all words, without dropout although the model is in training mode."""
    model = build(kind, tied=tied)
    expected = surprisals(model, ids)
    score = evaluate(model, ids)
    assert (score.targets, score.batch_size, len(expected)) == (TARGETS, 1, TARGETS)
    assert score.loss == pytest.approx(sum(expected) / TARGETS, rel=CLOSE)


@pytest.mark.parametrize("count", [2, 3])
def test_the_shortest_texts(build, ids, surprisals, count):
    """One target, T = 1 and B = 1, and two targets in two columns of one."""
    model = build()
    expected = sum(surprisals(model, ids[:count])) / (count - 1)
    for batch_size in range(1, count):
        score = evaluate(model, ids[:count], batch_size)
        assert (score.targets, score.loss) == (count - 1, pytest.approx(expected, rel=CLOSE))


@pytest.mark.parametrize("bptt", [1, 3, 7, 50, 100, 101, 1000])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_window_does_not_change_the_result(build, ids, in_columns, steps, bptt, batch_size):
    """The last window, mostly shorter, counts by its own length, not by that of the others."""
    model = build()
    steps(bptt)
    score = evaluate(model, ids, batch_size)
    assert score.loss == pytest.approx(sum(in_columns(model, ids, batch_size, 256)) / TARGETS, rel=CLOSE)
    assert score.targets == TARGETS


def test_a_short_last_window_weighs_less(build, ids, surprisals, steps):
    """What the port's own loop gets wrong: the mean of windows' means, or each weighted by bptt, is another number."""
    model = build()
    losses = surprisals(model, ids)
    steps(97)
    loss = evaluate(model, ids).loss
    means = np.mean(losses[:97]), np.mean(losses[97:])
    assert loss == pytest.approx((97 * means[0] + 4 * means[1]) / TARGETS, rel=CLOSE)
    assert abs(loss - (97 * means[0] + 97 * means[1]) / TARGETS) > 0.1
    assert abs(loss - np.mean(means)) > 0.01


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("warmup", [0, 3, 256])
@pytest.mark.parametrize("batch_size", [2, 3, 5, 10, 97])
def test_columns_equal_brute_force(build, ids, in_columns, monkeypatch, kind, warmup, batch_size):
    """Every target once in every number of columns, each column warmed up on just the words before it."""
    monkeypatch.setattr(evaluation, "WARMUP", warmup)
    model = build(kind)
    losses = in_columns(model, ids, batch_size, warmup)
    score = evaluate(model, ids, batch_size)
    assert len(losses) == score.targets == TARGETS
    assert score.batch_size == batch_size
    assert score.loss == pytest.approx(sum(losses) / TARGETS, rel=CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_two_fully_warmed_columns_equal_one(build, ids, kind):
    """A warm-up over all text before column 1 makes its state that of one pass; a cold start would not."""
    model = build(kind)
    one, two = evaluate(model, ids), evaluate(model, ids, 2)
    assert two.loss == pytest.approx(one.loss, rel=CLOSE)
    cold = evaluate(model, ids[: TARGETS // 2 + 2]).loss * 51 + evaluate(model, ids[TARGETS // 2 + 1 :]).loss * 50
    assert abs(cold / TARGETS - one.loss) > 1e-4


@pytest.mark.parametrize("batch_size", [3, 5])
def test_more_columns_stay_near_one(build, ids, batch_size):
    """Each is warmed on one column's length, which this model does not remember longer."""
    model = build()
    assert evaluate(model, ids, batch_size).loss == pytest.approx(evaluate(model, ids).loss, rel=1e-4)


def test_more_columns_than_targets_are_refused(build, ids):
    """The error of scored_columns comes through; the model stays as it was."""
    model = build().train()
    with pytest.raises(CorpusError, match="11 tokens have 10 targets, fewer than 11 columns"):
        evaluate(model, ids[:11], 11)
    assert model.training


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_evaluation_leaves_no_trace(build, ids, training, batch_size):
    """Mode, random state, weights, gradients are as before; a second call gives the same bits; training goes on."""
    model = build().train(training)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    score = evaluate(model, ids, batch_size)
    assert [module.training for module in model.modules()] == [training] * len(list(model.modules()))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert evaluate(model, ids, batch_size) == score
    tokens = torch.from_numpy(ids[:-1].astype(np.int64))[:, None]
    model(tokens, tokens, model.initial_state(1))[0].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_no_graph_is_recorded(build, vocabulary, ids):
    """Memory does not grow with the text: what the core puts out needs no gradient, warm-up included."""
    model, outputs = build(), []
    model.core.register_forward_hook(lambda module, inputs, output: outputs.append(output[0]))
    evaluate(model, ids, 3)
    words_of(model, vocabulary, LINES)
    assert [output.requires_grad for output in outputs] == [False] * 3


def test_a_label_changes_nothing_but_the_display(build, ids, steps):
    """Progress goes around the same windows."""
    model = build()
    steps(7)
    assert evaluate(model, ids, label="valid") == evaluate(model, ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 5])
def test_bfloat16_stays_close(build, ids, kind, batch_size):
    """Another number, since products are rounded, but within 1% of float32's."""
    model = build(kind)
    full, half = evaluate(model, ids, batch_size), evaluate(model, ids, batch_size, amp="bf16")
    assert half.loss == pytest.approx(full.loss, rel=1e-2)
    assert half.loss != full.loss


def test_a_large_vocabulary_makes_short_windows(build, vocabulary, surprisals, monkeypatch):
    """The log probabilities of a text are never kept for more steps than LOGITS allows, at least one; same result."""
    model = build(KINDS[0])
    lines = [["a", "b", "c", "d"], ["e"]]
    whole = words_of(model, vocabulary, lines)
    lengths = []
    original = model.log_probs
    monkeypatch.setattr(model, "log_probs", lambda hidden: (lengths.append(len(hidden)), original(hidden))[1])
    for limit, longest in ((2 * VOCAB + 1, 2), (1, 1)):
        monkeypatch.setattr(evaluation, "LOGITS", limit)
        parts = words_of(model, vocabulary, lines)
        assert max(lengths) == longest
        lengths.clear()
        for one, other in zip(chain(*whole), chain(*parts), strict=True):
            assert one[0] == other[0] and one[1] == pytest.approx(other[1], rel=CLOSE)


def test_perplexity_is_exp_of_the_loss():
    """And inf, not an OverflowError, where there is none."""
    assert perplexity(0.0) == 1
    assert perplexity(math.log(89.0)) == pytest.approx(89, rel=1e-12)
    assert perplexity(1e4) == perplexity(math.inf) == math.inf
    assert Score(math.log(89.0), 7, 1).perplexity == pytest.approx(89, rel=1e-12)
    assert Score(1e4, 7, 1).perplexity == math.inf


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bptt", [1, 7, 512])
def test_words_are_scored_as_in_one_pass(build, vocabulary, surprisals, steps, kind, bptt):
    """Word by word the brute force over the lines in order, after an <eos>; in sum what evaluate() gives."""
    model = build(kind)
    steps(bptt)
    words = [word for line in LINES for word in [*line, "<eos>"]]
    ids = np.array([vocabulary.ids.get(word, 3) for word in ["<eos>", *words]], np.int32)
    expected = [-loss for loss in surprisals(model, ids)]
    scored = words_of(model, vocabulary, LINES)
    assert [[word for word, _, _ in line] for line in scored] == [[*line, "<eos>"] for line in LINES]
    assert [log_prob for line in scored for _, log_prob, _ in line] == pytest.approx(expected, abs=1e-5)
    total = math.fsum(log_prob for line in scored for _, log_prob, _ in line)
    assert total == pytest.approx(sum(expected), rel=CLOSE)
    assert total == pytest.approx(-evaluate(model, ids).loss * len(words), rel=CLOSE)


def test_unknown_words_are_marked(build, vocabulary):
    """They get the probability of <unk>, but are told from an <unk> of the text."""
    model = build()
    unknown, known = (words_of(model, vocabulary, [[word]])[0][0] for word in ("nowhere", "<unk>"))
    assert (unknown[0], unknown[2], known[0], known[2]) == ("nowhere", False, "<unk>", True)
    assert unknown[1] == known[1]


def test_words_are_scored_without_dropout_and_in_bfloat16(build, vocabulary):
    """Two calls of a model in training mode are bit-equal; bfloat16 is close, not equal."""
    model = build().train()
    first = words_of(model, vocabulary, LINES)
    assert words_of(model.train(), vocabulary, LINES) == first
    half = words_of(model, vocabulary, LINES, amp="bf16")
    values = [[log_prob for line in scored for _, log_prob, _ in line] for scored in (first, half)]
    assert values[0] != values[1]
    assert values[0] == pytest.approx(values[1], rel=5e-2)


def test_no_lines_are_no_words(build, vocabulary):
    """An empty text is not an error."""
    assert words_of(build(), vocabulary, []) == []


def test_batch_10_is_near_batch_1_on_real_text(build, corpus_folder, tmp_path):
    """Penn Treebank's 10,000 words, 20,011 tokens of its validation text: perplexities within 1%."""
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").symlink_to(corpus_folder("penn") / f"{split}.txt")
    corpus = Corpus.load(tmp_path, notice=[].append)
    model = build(vocab_size=len(corpus.vocabulary))
    one, ten = (evaluate(model, corpus.valid[:20_011], batch_size) for batch_size in (1, 10))
    assert one.targets == ten.targets == 20_010
    assert ten.perplexity == pytest.approx(one.perplexity, rel=1e-2)
    assert one.perplexity > 1000
