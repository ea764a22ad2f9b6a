"""What measures in a process of its own: a step, its reference, a made-up corpus."""

import copy

import pytest
import torch

import benchmark
from data import Corpus
from utils import UserError, workers

SCRIPT, FLAGS = "train_rnn", "--recipe port --emsize 11 --nhid 11 --batch-size 7 --bptt 13"


@pytest.mark.parametrize("loop", ("", " --loop"))
def test_a_candidate_measures_its_own_step(loop):
    """Two calls are two updates; a loss near its reference's, unless a weight of the computation is another."""
    args = benchmark.build_parser().parse_args(
        ["speed", "--vocab-size", "53", "--threads", str(torch.get_num_threads())]
    )
    candidate = workers.Candidate(SCRIPT, FLAGS + loop, None, None, args)
    assert candidate.tokens.shape == candidate.targets.shape == (13, 7) and candidate.tokens.max() < 53
    assert candidate.difference() < 1e-6
    before, state = copy.deepcopy(candidate.model.state_dict()), candidate.state
    full, forward = candidate.step()
    assert full >= forward > 0 and candidate.forward() > 0
    assert not torch.equal(before["head.weight"], candidate.model.head.weight)
    assert not torch.equal(state[0], candidate.state[0])
    assert candidate.launches() > 20
    milliseconds, gflop = candidate.products()
    # embedding to gates, hidden to gates, head; each with its two gradients
    assert gflop == pytest.approx(3 * 2 * 7 * 13 * 11 * (44 + 44 + 53) / 1e9, rel=0.02) and milliseconds > 0
    loss = candidate.model.head.loss
    candidate.model.head.loss = lambda hidden, targets, *weight: loss(hidden, targets, *weight) * 1.001
    assert candidate.difference() == pytest.approx(1e-3, rel=0.01)


def test_a_process_that_dies_is_one_line():
    """Its UserError is raised here; one that dies without a word is named."""
    args = benchmark.build_parser().parse_args(["speed", "--vocab-size", "53"])
    with pytest.raises(UserError, match=r"^gone/rnn_models\.py is not there: name a checkout of L0SG[^\n]*$"):
        workers.Worker(SCRIPT, FLAGS, "port-rnn", "gone", args)
    with pytest.raises(UserError, match=r"^[^\n]*cutoffs[^\n]*$"):  # the model's own words
        workers.Worker(SCRIPT, f"{FLAGS} --adaptivesoftmax --cutoffs 1000", None, None, args)
    worker = workers.Worker(SCRIPT, FLAGS, None, None, args)
    worker.process.kill()
    with pytest.raises(UserError, match=r"^a process that measures has died[^\n]*$"):
        worker("launches")


def test_a_zipf_corpus(tmp_path):
    """As many words and types as asked for, by falling frequency."""
    workers.write_zipf(tmp_path, 30011, 53)
    corpus = Corpus.load(tmp_path, notice=lambda line: None)
    assert len(corpus.vocabulary) == 53 + 1
    assert (corpus.train != corpus.vocabulary.ids["<eos>"]).sum() == 30011
    words = [word for word in corpus.vocabulary.words if word != "<eos>"]
    assert words[:3] == ["w0", "w1", "w2"]
