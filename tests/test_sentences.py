"""A corpus of sentences against one made word by word; models that read each from the zero state."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import TINY, live
from test_apart import MODELS, config_of

import evaluate
import generate
import train_qrnn
import train_rnn
from data import Corpus, sentences
from data.batching import padded
from data.corpus import EOS, SOS
from models import build
from models.softmax import IGNORE
from utils import UserError, checkpoint, evaluation

TEXT = """ = Robert Boulter =

 Robert Boulter is an English actor . He had a role . What now ? Yes !
 Mr. Smith said : " No . " 1 @.@ 5 million ... went
 . lone
"""
CUT = [
    "= robert boulter =",
    "robert boulter is an english actor .",
    "he had a role .",
    "what now ?",
    "yes !",
    'mr. smith said : " no .',
    '" 1 @.@ 5 million ... went',
    ".",
    "lone",
]


@pytest.fixture
def corpus(tmp_path):
    """A folder of three splits, the last two of single sentences."""
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "train.txt").write_text(TEXT, encoding="utf-8")
    for split in ("valid", "test"):
        (folder / f"{split}.txt").write_text("It is . No\n", encoding="utf-8")
    return folder


def test_where_sentences_end(corpus):
    """At the end of a line and at a full stop, question or exclamation mark that is a word; all in lower case."""
    assert [" ".join(words) for words in sentences.sentences_of(corpus / "train.txt")] == CUT


def test_lengths_between_the_quantiles_of_train(corpus, capsys):
    """The same bounds for all splits; <sos> before each; a second call changes nothing, another text is refused."""
    lengths = [len(line.split()) for line in CUT]
    low, high = (round(np.quantile(lengths, q)) for q in (0.05, 0.95))
    assert 1 <= low < high < max(lengths) + 1
    assert not sentences.main([str(corpus)])
    made = corpus.parent / "made-sentences"
    kept = [line for line in CUT if low <= len(line.split()) <= high]
    assert (made / "train.txt").read_text() == "".join(f"<sos> {line}\n" for line in kept)
    assert f"of {low} to {high} words: train {len(kept)}" in capsys.readouterr().out
    assert (made / "test.txt").read_text().splitlines()[0] == "<sos> it is ."
    assert not sentences.main([str(corpus)])
    assert "is there already" in capsys.readouterr().out
    (made / "valid.txt").write_text("<sos> else\n")
    assert sentences.main([str(corpus)]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert {path.name for path in corpus.parent.iterdir()} == {"made", "made-sentences"}


def test_what_has_no_sentences_is_one_line(corpus, capsys):
    """A split without any that is long enough; a corpus that is not there."""
    (corpus / "test.txt").write_text(" \n")
    assert sentences.main([str(corpus)]) == 2
    assert sentences.main([str(corpus / "nowhere")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and "test.txt has no sentence of" in errors[0] and "no corpus folder" in errors[1]
    assert [path.name for path in corpus.parent.iterdir()] == ["made"]


def test_the_vocabulary_of_the_notebook(corpus_folder, tmp_path):
    """--vocab train --vocab-size 10002: the 10,000 most frequent words of the sentences, <sos> and <eos>."""
    source = corpus_folder("wikitext-2")
    texts, bounds = sentences.texts(source)
    assert bounds == (5, 49)
    counts = Counter(word for line in texts["train"].splitlines() for word in line.split() if word != SOS)
    assert "<unk>" in counts
    sentences.make(str(source), tmp_path / "made")
    vocabulary = Corpus.load(tmp_path / "made", "train", 10_002, notice=lambda line: None).vocabulary
    own = [count for word, count in zip(vocabulary.words, vocabulary.counts, strict=True) if word in counts]
    unknown = sum(counts.values()) - sum(count for _, count in counts.most_common(10_000))
    assert sum(count for _, count in counts.most_common(10_000)) == sum(own) - unknown
    assert len(own) == 10_000 and len(vocabulary) == 10_002
    assert len(texts["train"].splitlines()) == 77_510


TRANSFORMER = ("transformer", {"emsize": 6, "nhead": 2, "nhid": 7, "nlayers": 2, "context": 5, "dropout": 0.3})


@pytest.mark.parametrize(("family", "core"), [*(m for m in MODELS if m[0] in ("rnn", "qrnn")), TRANSFORMER])
def test_a_padded_batch_is_its_sentences(family, core):
    """Loss, number of targets and every gradient, relative, in float64: their sums one by one."""
    torch.manual_seed(7)
    model = build(config_of(family, core)).double().eval()
    rng = np.random.default_rng(11)
    parts = [rng.integers(model.vocab_size, size=size) for size in (2, 7, 3, 11)]
    total = 0
    for part in parts:
        tokens, targets = torch.from_numpy(part[:-1, None]), torch.from_numpy(part[1:, None])
        total = total + model(tokens, targets, [each.double() for each in model.initial_state(1)])[0].sum()
    want = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    tokens, targets = padded(parts, IGNORE)
    assert tokens.shape == targets.shape == (10, 4)
    loss, _, count, _ = model(tokens, targets, [each.double() for each in model.initial_state(4)])
    assert count.item() == 19
    torch.testing.assert_close(loss.sum(), total)
    got = torch.autograd.grad(loss.sum(), list(model.parameters()), allow_unused=True)
    for (name, _), ours, theirs in zip(model.named_parameters(), got, want, strict=True):
        assert (ours is None) == (theirs is None), name
        assert ours is None or (ours - theirs).norm() <= 1e-9 * theirs.norm() + 1e-15, name


@pytest.mark.parametrize("script", (train_rnn, train_qrnn), ids=("rnn", "qrnn"))
def test_train_resume_evaluate_generate(script, tiny_sentences, tmp_path, monkeypatch, capsys):
    """As any run; every sentence is scored whatever the batch, its <sos> apart."""
    monkeypatch.chdir(tmp_path)
    common = ["--data", str(tiny_sentences), *TINY, "--sentences", "--lr=0.01"]
    if script is train_qrnn:
        common += ["--recipe=fast", "--schedule=constant", "--zoneout=0.1", "--window=3", "--dropout=0.1"]
    live(script, common, tiny_sentences, capsys)
    model, vocabulary, saved = checkpoint.load_model("model.pt", torch.device("cpu"))
    corpus = Corpus.load(tiny_sentences, notice=lambda line: None)
    sos = checkpoint.sentence_start(saved, vocabulary)
    assert vocabulary.words[sos] == SOS
    scores = [evaluation.evaluate(model, corpus.test, columns, sos=sos) for columns in (1, 3, 1000)]
    starts = (corpus.test == sos).sum()
    assert {score.targets for score in scores} == {len(corpus.test) - starts}
    assert max(s.loss for s in scores) - min(s.loss for s in scores) < 1e-5 * scores[0].loss
    assert saved["args"]["sentences"] is True


def test_each_word_of_a_sentence_is_scored_after_sos(tiny_sentences, tmp_path, monkeypatch, capsys):
    """By hand, word by word from the zero state, for a corpus and for --text."""
    monkeypatch.chdir(tmp_path)
    train_rnn.main(["--data", str(tiny_sentences), *TINY, "--sentences", "--dropout=0"])
    model, vocabulary, _ = checkpoint.load_model("model.pt", torch.device("cpu"))
    lines = (tiny_sentences / "test.txt").read_text().splitlines()[:7]
    losses = []
    for line in lines:
        state, words = model.initial_state(1), [*line.split(), EOS]
        for word, following in pairwise(words):
            hidden, state = model.hidden(torch.tensor([[vocabulary.ids[word]]]), state)
            losses.append(-model.log_probs(hidden)[0, 0, vocabulary.ids[following]].item())
    ids, _ = vocabulary.encode(" ".join(f"{line} {EOS}" for line in lines).split())
    score = evaluation.evaluate(model, ids, 3, sos=vocabulary.ids[SOS])
    assert score.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    for written in (lines, [line.removeprefix(f"{SOS} ") for line in lines]):
        (tmp_path / "some.txt").write_text("".join(line + "\n" for line in written))
        capsys.readouterr()
        evaluate.main(["--text", "some.txt"])
        assert f"ppl {evaluation.perplexity(score.loss):.2f}" in capsys.readouterr().out.splitlines()[-1]
    with pytest.raises(UserError, match="has not ended"):
        generate.main(["--prompt", f"the {EOS}", "--words", "3", "--outf", "-"])


def test_text_begins_anew_after_each_sentence(tiny_sentences, tmp_path, monkeypatch):
    """What each column draws from, against the same words read by hand from <sos> and the zero state."""
    monkeypatch.chdir(tmp_path)
    train_rnn.main(["--data", str(tiny_sentences), *TINY, "--sentences", "--lr=0.02", "--dropout=0"])
    model, vocabulary, _ = checkpoint.load_model("model.pt", torch.device("cpu"))
    seen, draw = [], generate.draw
    monkeypatch.setattr(generate, "draw", lambda probs: seen.append(probs) or draw(probs))
    generate.main(["--words=40", "--samples=3", "--prompt=the w3"])
    eos, sos = (vocabulary.ids[word] for word in (EOS, SOS))
    samples = (tmp_path / "generated.txt").read_text().split("\n\n")
    begun = 0
    for column, sample in enumerate(samples):
        words, _ = vocabulary.encode(sample.split())
        read = [sos, *vocabulary.encode(["the", "w3"])[0]]
        for probs, word in zip(seen, words, strict=True):
            want = model.log_probs(model.hidden(torch.tensor(read)[:, None], model.initial_state(1))[0])[-1, 0].exp()
            want[sos] = 0
            torch.testing.assert_close(probs[column], want / want.sum(), rtol=1e-4, atol=1e-6)
            begun += word == eos
            read = [sos] if word == eos else [*read, word]
    assert begun > 5 and SOS not in sample


def test_what_does_not_go_with_sentences_is_one_line(tiny_corpus, tiny_sentences, tmp_path, monkeypatch, fails):
    """A text without <sos>, adaptation of such a model, windows of other lengths."""
    monkeypatch.chdir(tmp_path)
    assert "no <sos>" in fails(train_rnn.main, "--data", tiny_corpus, *TINY, "--sentences")
    assert "--sentences has batches" in fails(train_rnn.main, "--sentences", "--variable-bptt")
    train_rnn.main(["--data", str(tiny_sentences), *TINY, "--sentences", "--epochs=1"])
    for flags in (["--pointer"], ["--dynamic", "sgd"], ["--temperature", "0.9"]):
        assert "was trained on sentences" in fails(evaluate.main, *flags)
