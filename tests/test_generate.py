"""Text from a checkpoint: what is drawn, from which distribution, and where it goes."""

import errno
import itertools
import math
import os
from fractions import Fraction

import pytest
import torch
from test_apart import MODELS, config_of

import generate
from data.corpus import EOS, UNK
from models import build, products
from utils import UserError, checkpoint, runtime

CPU = torch.device("cpu")
PROMPT = "the w3 w6"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Every test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def loaded(tiny_checkpoint):
    """The small model, its vocabulary, and the ids of PROMPT with what comes before it."""
    model, vocabulary, _ = checkpoint.load_model(tiny_checkpoint, CPU)
    return model, vocabulary, [vocabulary.ids[word] for word in [EOS, *PROMPT.split()]]


@pytest.fixture
def text(tiny_checkpoint, capsys):
    """text(*FLAGS): the text that generate.py prints with --outf -."""

    def call(*flags, path=tiny_checkpoint):
        generate.main(["--checkpoint", str(path), "--outf", "-", *map(str, flags)])
        return capsys.readouterr().out

    return call


@pytest.fixture
def edited(tiny_checkpoint, place):
    """edited(CHANGE): the path of a copy of the checkpoint on which CHANGE was called."""

    def call(change):
        saved = checkpoint.load(tiny_checkpoint)
        change(saved)
        checkpoint.save(place / "edited.pt", saved)
        return place / "edited.pt"

    return call


@torch.inference_mode()
def teach(model, prompt, drawn):
    """Hidden vectors and log probabilities (words, samples, ...) before each drawn word, in one pass over the text."""
    prompt = torch.tensor(prompt)[:, None].expand(-1, drawn.shape[1])
    hidden, _ = model.hidden(torch.cat([prompt, drawn[:-1]]), model.initial_state(drawn.shape[1]))
    return hidden[len(prompt) - 1 :], model.log_probs(hidden)[len(prompt) - 1 :]


def test_equal_seeds_give_equal_text(text):
    """Another seed and another sample of the same seed do not."""
    first = text("--words", 50, "--seed", 5)
    assert text("--words", 50, "--seed", 5) == first
    assert text("--words", 50, "--seed", 6) != first
    one, two = text("--words", 50, "--seed", 5, "--samples", 2).split("\n\n")
    assert one.split() != two.split()


@pytest.mark.parametrize(("words", "lengths"), ((1, [1]), (20, [20]), (21, [20, 1]), (57, [20, 20, 17])))
@pytest.mark.parametrize("samples", (1, 3))
def test_text_has_20_words_a_line_and_a_blank_line_between_samples(text, loaded, words, lengths, samples):
    """The number of words is exact, all are of the vocabulary, the prompt is not among them."""
    printed = text("--words", words, "--samples", samples, "--prompt", PROMPT)
    assert printed.endswith("\n") and not printed.endswith("\n\n")
    parts = printed[:-1].split("\n\n")
    lines = [[line.split(" ") for line in part.split("\n")] for part in parts]
    assert [[len(line) for line in part] for part in lines] == [lengths] * samples
    assert {word for part in lines for line in part for word in line} <= set(loaded[1].words)


def test_the_screen_gets_only_text(tiny_checkpoint, capsys):
    """With --outf - progress goes to standard error, a line each --log-interval words; no file is made."""
    generate.main(["--checkpoint", str(tiny_checkpoint), "--outf", "-", "--words", "47", "--log-interval", "20"])
    out, err = capsys.readouterr()
    assert len(out.split()) == 47 and "|" not in out
    assert err.splitlines() == [f"| Generated {done}/47 words" for done in (0, 20, 40)]
    assert os.listdir() == []


def test_text_goes_to_generated_txt(tiny_checkpoint, text, capsys, place):
    """The same text; progress on standard output, nothing on standard error; an old file is replaced."""
    printed = text("--words", 47, "--seed", 3)
    for flags, name in (([], "generated.txt"), (["--outf", "deep.txt"], "deep.txt"), ([], "generated.txt")):
        generate.main(["--checkpoint", str(tiny_checkpoint), "--words", "47", "--seed", "3", *flags])
        out, err = capsys.readouterr()
        assert (place / name).read_text(encoding="utf-8") == printed
        assert "| Generated 0/47 words" in out and f"47 words in {name}" in out and err == ""
    assert sorted(os.listdir()) == ["deep.txt", "generated.txt"]


def test_a_failed_write_leaves_the_old_text(tiny_checkpoint, fails, monkeypatch, place):
    """A full disk: exit code 2, one line, nothing half written."""
    (place / "generated.txt").write_text("old\n")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in fails(generate.main, "--checkpoint", tiny_checkpoint, "--words", 5)
    assert os.listdir() == ["generated.txt"]
    assert (place / "generated.txt").read_text() == "old\n"


def test_a_place_that_cannot_be_written_is_the_users_mistake(tiny_checkpoint, fails):
    """Exit code 2 and one line that names it."""
    assert "missing/text.txt" in fails(
        generate.main, "--checkpoint", tiny_checkpoint, "--words", 5, "--outf", "missing/text.txt"
    )


def test_no_unk(edited, text, loaded):
    """A model that hardly says anything else never says it; without the flag it does."""
    unk = loaded[1].ids[UNK]

    def change(saved):
        saved["weights"]["head.bias"][unk] += 20

    path = edited(change)
    assert text("--words", 97, path=path).split().count(UNK) > 90
    for flags in ((), ("--top-k", 3), ("--top-p", 0.5), ("--temperature", 0.001)):
        assert UNK not in text("--words", 97, "--no-unk", *flags, path=path).split()


@pytest.mark.parametrize("amp", ("off", "bf16"))
def test_top_k_1_is_greedy(text, loaded, amp):
    """The likeliest word at each step, found by reading everything so far from the start; the seed does not matter."""
    model, vocabulary, ids = loaded
    flags = ("--words", 61, "--prompt", PROMPT, "--amp", amp)
    printed = text(*flags, "--top-k", 1, "--seed", 1)
    assert text(*flags, "--top-k", 1, "--seed", 2, "--temperature", 3) == printed
    if amp == "bf16":
        return
    with torch.inference_mode():
        for word in printed.split():
            hidden, _ = model.hidden(torch.tensor(ids)[:, None], model.initial_state(1))
            best = int(model.log_probs(hidden)[-1, 0].argmax())
            assert vocabulary.words[best] == word
            ids.append(best)


def test_low_temperatures_are_nearly_greedy(loaded):
    """At the lowest one every word is within 0.03 nats of the likeliest; at 1 few texts are."""
    model, _, prompt = loaded
    gaps = []
    for temperature in (1e-3, 1.0):
        torch.manual_seed(1)
        drawn = generate.sample(model, prompt, 61, 2, temperature)
        _, log_probs = teach(model, prompt, drawn)
        gaps.append((log_probs.amax(-1) - log_probs.gather(-1, drawn[..., None])[..., 0]).max())
    assert gaps[0] < 0.03 < 1 < gaps[1]


@pytest.mark.parametrize("flags", (("--temperature", "0.0009"), ("--top-p", "0"), ("--top-p", "1.1"), ("--top-k", "0")))
def test_flags_out_of_range_are_refused(fails, flags):
    """By the parser, with the flag's name."""
    assert flags[0] in fails(generate.main, *flags)


def kept_by_hand(probs, top_k, top_p):
    """The set of words that stay, of distinct probabilities."""
    probs = list(map(Fraction, probs))
    order = sorted(range(len(probs)), key=lambda word: -probs[word])[:top_k]
    total = sum(probs[word] for word in order)
    kept, mass = set(), 0
    for word in order:
        if top_p is not None and kept and mass >= Fraction(top_p) * total:
            break
        kept.add(word)
        mass += probs[word]
    return kept


@pytest.mark.parametrize("top_k", (None, 1, 2, 7, 10, 11, 50))
@pytest.mark.parametrize("top_p", (None, 1e-6, 0.2, 0.53, 0.9, 1.0))
def test_restrict_keeps_what_a_loop_over_words_keeps(top_k, top_p):
    """Row by row of different steepness; what stays keeps its log probability, in its place."""
    torch.manual_seed(1)
    log_probs = (torch.randn(5, 11, dtype=torch.float64) * torch.tensor([[0.1], [1], [2], [3], [9]])).log_softmax(-1)
    before = log_probs.clone()
    result = generate.restrict(log_probs, top_k, top_p)
    assert torch.equal(log_probs, before)
    for row, kept in zip(log_probs.tolist(), result.tolist(), strict=True):
        want = kept_by_hand([math.exp(value) for value in row], top_k, top_p)
        assert kept == [value if word in want else -math.inf for word, value in enumerate(row)]


@pytest.mark.parametrize(("top_k", "top_p", "size"), ((3, None, 3), (None, 0.35, 4), (6, 0.45, 3), (1, None, 1)))
def test_restrict_with_ties_keeps_as_many_as_it_says(top_k, top_p, size):
    """Two words of 1/4 and eight of 1/16, and ten alike: which of the equal ones stay is free."""
    uneven = torch.tensor([1, 4, 1, 1, 4, 1, 1, 1, 1, 1], dtype=torch.float64).div(16).log()
    kept = generate.restrict(torch.stack([uneven, torch.full_like(uneven, math.log(0.1))]), top_k, top_p).isfinite()
    assert kept[1].sum() == size
    assert kept[0].sum() == min(size, 2 if top_p else size)
    assert kept[0, [1, 4]].sum() == min(size, 2)


def test_restrict_to_the_whole_mass_keeps_every_word():
    """However steep and long the tail: --top-p 1 is no restriction."""
    torch.manual_seed(1)
    log_probs = (torch.randn(2, 30011) * torch.tensor([[1.0], [5.0]])).log_softmax(-1)
    assert torch.equal(generate.restrict(log_probs, top_p=1.0), log_probs)


def test_restrict_leaves_banned_words_out():
    """-inf stays -inf, also where more words are asked for than are left."""
    log_probs = torch.tensor([[-1.0, -math.inf, -2.0, -math.inf, -1.5]])
    for top_k, top_p in ((4, None), (None, 1.0), (5, 1.0)):
        assert torch.equal(generate.restrict(log_probs, top_k, top_p), log_probs)


def distance(drawn, log_probs):
    """Chi-square statistic of draws against a distribution, over its degrees of freedom; rare words are one."""
    expected = log_probs.double().exp() * len(drawn)
    counts = torch.bincount(drawn, minlength=len(expected)).double()
    assert not counts[expected == 0].any()
    rare = expected < 10
    expected, counts = (torch.cat([part[~rare], part[rare].sum()[None]]) for part in (expected, counts))
    expected, counts = expected[expected > 0], counts[expected > 0]
    return float(((counts - expected) ** 2 / expected).sum() / (len(expected) - 1))


@pytest.mark.parametrize(
    ("arguments", "top"),
    (({}, None), ({"temperature": 1.7}, None), ({"top_k": 5}, 5), ({"top_p": 0.6}, None), ({"banned": [2, 5]}, None)),
    ids=("plain", "temperature", "top-k", "top-p", "banned"),
)
def test_words_are_drawn_as_often_as_their_probability_says(loaded, arguments, top):
    """20,000 first words against the model's own probabilities, changed by hand; against others they do not fit."""
    model, _, prompt = loaded
    torch.manual_seed(1)
    drawn = generate.sample(model, prompt, 1, samples=20_000, **arguments)[0]
    _, log_probs = teach(model, prompt, drawn[None, :1])
    log_probs = log_probs[0, 0].double() / arguments.get("temperature", 1)
    kept = kept_by_hand(log_probs.exp().tolist(), top, arguments.get("top_p"))
    allowed = torch.tensor([word in kept and word not in arguments.get("banned", ()) for word in range(len(log_probs))])
    log_probs = log_probs.masked_fill(~allowed, -torch.inf)
    assert distance(drawn, log_probs.log_softmax(-1)) < 3
    assert distance(drawn, (log_probs * 0.8).log_softmax(-1)) > 6


def test_draws_are_those_of_a_walk_along_the_sums():
    """The first word whose sum in float64 is above the number drawn; never one of probability 0, at either end."""
    probs = torch.rand(7, 23)
    probs[:, [0, 5, 6, 22]] = 0
    probs[3], probs[4] = 0, 0
    probs[3, 1] = probs[4, 21] = 1e-30
    torch.manual_seed(2)
    drawn = torch.cat([generate.draw(probs) for _ in range(300)])
    torch.manual_seed(2)
    for words in drawn.tolist():
        points = torch.rand(7, 1, dtype=torch.float64)[:, 0].tolist()
        for word, point, row in zip(words, points, probs.tolist(), strict=True):
            sums = list(itertools.accumulate(row))
            assert word == next(index for index, value in enumerate(sums) if value > point * sums[-1])


@pytest.mark.parametrize(("number", "words"), ((0, [1, 2]), (1, [2, 2])))
def test_numbers_at_the_ends_draw_the_first_and_the_last_word_there_is(monkeypatch, number, words):
    """Not those of probability 0 beside them: 0 is drawn now and then, and a number below 1 may round to the sum."""
    monkeypatch.setattr(torch, "rand", lambda shape, dtype: torch.full(shape, number, dtype=dtype))
    assert generate.draw(torch.tensor([[0, 0.2, 0.5, 0], [0, 0, 1, 0]])).tolist() == [words]


@pytest.mark.parametrize("amp", ("off", "bf16"))
@pytest.mark.parametrize("head", ({}, {"tied": False, "cutoffs": [5, 11]}, {"splitcross": True, "cutoffs": [5, 11]}))
@pytest.mark.parametrize(("family", "core"), [*MODELS, ("rmc", {**MODELS[-1][1], "numblocks": 1, "gatestyle": "unit"})])
@torch.no_grad()
def test_word_by_word_equals_one_pass_in_every_family(family, core, head, amp):
    """In one column, where steps are taken another way."""
    model = build({**config_of(family, core), **head}).eval()
    tokens = torch.randint(model.vocab_size, (11, 1))
    want, _ = model.hidden(tokens, model.initial_state(1))
    want, state, steps = model.log_probs(want), model.initial_state(1), []
    with products.fixed_weights(), runtime.autocast(CPU, amp):
        for token in tokens:
            hidden, state = model.hidden(token[None], state)
            steps.append(model.log_probs(hidden))
    error = (torch.cat(steps) - want).norm() / want.norm()
    assert error < (1e-2 if amp == "bf16" else 1e-5)


@pytest.mark.parametrize("samples", (1, 3))
def test_step_by_step_equals_one_pass(loaded, monkeypatch, samples):
    """Hidden vectors as in one pass over prompt and text, and the same draws from that pass's probabilities."""
    model, _, prompt = loaded
    steps, hidden_step = [], model.hidden

    def hidden(tokens, state):
        output, state = hidden_step(tokens, state)
        steps.append((len(tokens), output[-1:]))
        return output, state

    monkeypatch.setattr(model, "hidden", hidden)
    torch.manual_seed(3)
    drawn = generate.sample(model, prompt, 43, samples=samples)
    monkeypatch.undo()
    hidden, log_probs = teach(model, prompt, drawn)
    assert drawn.shape == (43, samples) and drawn.dtype == torch.int64
    assert [length for length, _ in steps] == [len(prompt)] + [1] * 42
    torch.testing.assert_close(torch.cat([output for _, output in steps]), hidden, rtol=1e-5, atol=1e-6)
    torch.manual_seed(3)
    assert torch.equal(torch.cat([generate.draw(step.softmax(-1)) for step in log_probs]), drawn)


def test_the_flags_decide_what_is_drawn(loaded, text):
    """The script's text is what `sample` draws with its seed: the prompt follows a line end, each flag counts."""
    model, vocabulary, prompt = loaded
    arguments = {"samples": 31, "temperature": 1.3, "top_k": 17, "top_p": 0.8}
    flags = [part for name, value in arguments.items() for part in (f"--{name.replace('_', '-')}", value)]
    torch.manual_seed(5)
    columns = generate.sample(model, prompt, 7, **arguments, banned=[vocabulary.ids[UNK]]).T.tolist()
    want = "\n".join(" ".join(vocabulary.words[word] for word in column) + "\n" for column in columns)
    flags += ["--words", 7, "--seed", 5, "--no-unk", "--prompt", PROMPT]
    assert text(*flags) == want
    changes = (("--prompt", "the w6 w3"), ("--temperature", 2), ("--top-k", 2), ("--top-p", 0.1))
    assert want not in [text(*flags, *change) for change in changes]


def test_progress_is_reported_before_each_word(loaded):
    """By the number of words done, and only once each."""
    model, _, prompt = loaded
    done = []
    generate.sample(model, prompt, 5, report=done.append)
    assert done == [0, 1, 2, 3, 4]


def test_nothing_but_the_checkpoint_is_needed(edited, text):
    """The corpus is gone and what only training needs is too; --data is accepted and not read."""
    printed = text("--words", 31)

    def change(saved):
        for part in ("optimizer", "schedule", "rng", "position", "history", "best", "corpus"):
            del saved[part]
        saved["args"]["data"] = "gone"

    path = edited(change)
    assert text("--words", 31, path=path) == printed
    assert text("--words", 31, "--data", "gone/too", path=path) == printed


def test_unknown_words_of_the_prompt_are_named(script, tiny_checkpoint):
    """Exit code 2 and one line, nothing printed; known words are not named."""
    done = script("generate.py", "--checkpoint", tiny_checkpoint, "--prompt", "the zebra w3 quagga", "--outf", "-")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "zebra, quagga;" in done.stderr


def test_mistakes_are_one_line(fails, monkeypatch, tiny_checkpoint):
    """No GPU; no checkpoint where --checkpoint or its default says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "sees no GPU" in fails(generate.main, "--cuda", "--checkpoint", tiny_checkpoint)
    assert "missing.pt" in fails(generate.main, "--checkpoint", "missing.pt")
    assert "no checkpoint model.pt" in fails(generate.main)
    with pytest.raises(UserError, match=r"--prompt .* know: zebra;"):
        generate.main(["--checkpoint", str(tiny_checkpoint), "--prompt", "zebra the"])
    assert os.listdir() == []
