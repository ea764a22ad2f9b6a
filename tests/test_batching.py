"""Columns, BPTT windows and columns for evaluation: nothing of the stream is lost, doubled or out of order."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.batching import (
    column_starts,
    columns,
    padded,
    scored_columns,
    sentence_batches,
    sentences,
    variable_lengths,
    window_lengths,
    windows,
)
from data.files import CorpusError

ALPHABET = np.array([ord(letter) for letter in "abcdefghijklmnopqrstuvwxyz"], np.int32)
IGNORE = -7


def column_by_column(tensors):
    """The numbers of (T, B) tensors, one below the other, as one list that reads column after column."""
    return torch.cat(list(tensors)).T.flatten().tolist()


@pytest.fixture
def stream():
    """23 steps of 5 columns, every token different."""
    return columns(np.arange(115, dtype=np.int32), 5)


def test_columns_are_those_of_the_alphabet_picture():
    """The picture of word_language_model: y and z do not fill a row and are left out."""
    rows = ["".join(map(chr, row)) for row in columns(ALPHABET, 4).tolist()]
    assert rows == ["agms", "bhnt", "ciou", "djpv", "ekqw", "flrx"]


def test_windows_are_int64_that_torch_can_index_with():
    """The columns take no more memory than the corpus's ids; an embedding reads int64 of one memory order fastest."""
    stream = columns(ALPHABET, 3)
    assert stream.dtype == torch.int32
    for part in next(windows(stream, [5])):
        assert part.dtype == torch.int64 and part.is_contiguous()


def test_one_column_is_the_whole_stream():
    """B = 1 leaves nothing out; two tokens are the shortest stream with a target."""
    assert columns(ALPHABET, 1).tolist() == [[letter] for letter in ALPHABET.tolist()]
    assert columns(ALPHABET[:2], 1).shape == (2, 1)


@pytest.mark.parametrize(("count", "batch_size"), [(0, 1), (1, 1), (13, 7), (5, 11)])
def test_columns_without_a_target_are_refused(count, batch_size):
    """Below two tokens a column there is nothing to predict: one line says what was given and what to change."""
    with pytest.raises(CorpusError) as error:
        columns(np.zeros(count, np.int32), batch_size)
    assert str(error.value).startswith(f"{count} tokens can't fill {batch_size} columns")
    assert "--batch-size" in str(error.value)
    assert "\n" not in str(error.value)


def test_columns_may_each_start_elsewhere():
    """Each from its own start around its end, over the windows' borders; the stream itself stays."""
    stream = columns(ALPHABET, 4)
    pairs = list(windows(stream, [2, 3], starts=torch.tensor([[0, 1, 5, 2]])))
    rows = ["".join(map(chr, row)) for row in torch.cat([tokens for tokens, _ in pairs]).tolist()]
    assert rows == ["ahru", "bimv", "cjnw", "dkox", "elps"]
    rows = ["".join(map(chr, row)) for row in torch.cat([targets for _, targets in pairs]).tolist()]
    assert rows == ["bimv", "cjnw", "dkox", "elps", "fgqt"]
    assert "".join(map(chr, stream[0].tolist())) == "agms"


def test_starts_of_columns_differ_and_are_fixed_by_the_seed():
    """Any of the words, alike for each column and epoch; so for 3,000 columns of 7 words within 5 deviations."""
    starts = column_starts(7, 3000, [5, 1])
    assert starts.shape == (1, 3000) and torch.equal(starts, column_starts(7, 3000, [5, 1]))
    assert not torch.equal(starts, column_starts(7, 3000, [5, 2]))
    assert (starts[0].bincount(minlength=7) - 3000 / 7).abs().max() < 5 * 20


@given(count=st.integers(2, 300), batch_size=st.integers(1, 19), bptt=st.integers(1, 41))
def test_windows_give_back_the_stream(count, batch_size, bptt):
    """Column by column, tokens are the stream without each column's last token, targets without its first."""
    batch_size = min(batch_size, count // 2)
    length = count // batch_size
    ids = np.random.default_rng(count).permutation(count).astype(np.int32)
    pairs = list(windows(columns(ids, batch_size), window_lengths(length - 1, bptt)))
    starts = [b * length for b in range(batch_size)]
    assert column_by_column(tokens for tokens, _ in pairs) == [
        token for start in starts for token in ids[start : start + length - 1].tolist()
    ]
    assert column_by_column(targets for _, targets in pairs) == [
        token for start in starts for token in ids[start + 1 : start + length].tolist()
    ]


@pytest.mark.parametrize("bptt", [1, 2, 3, 11, 21, 22, 23, 1000])
def test_every_window_is_bptt_long_but_the_last(stream, bptt):
    """22 targets a column, cut by lengths that divide 22 and that do not, and by one longer than the column."""
    full, rest = divmod(22, bptt)
    lengths = [bptt] * full + [rest] * (rest > 0)
    assert window_lengths(len(stream) - 1, bptt) == lengths
    shapes = [(tuple(tokens.shape), tuple(targets.shape)) for tokens, targets in windows(stream, lengths)]
    assert shapes == [((length, 5), (length, 5)) for length in lengths]


@pytest.mark.parametrize("bptt", [1, 3, 11, 1000])
def test_windows_from_a_start_are_the_tail(stream, bptt):
    """A resumed epoch sees the windows that the interrupted one would have seen, and none past the end."""
    lengths = window_lengths(len(stream) - 1, bptt)
    whole = list(windows(stream, lengths))
    for start in range(len(whole) + 2):
        tail = list(windows(stream, lengths, start))
        assert len(tail) == max(0, len(whole) - start)
        for pair, expected in zip(tail, whole[start:], strict=True):
            assert torch.equal(torch.stack(pair), torch.stack(expected))


@given(
    steps=st.integers(1, 3000), bptt=st.integers(1, 90), seed=st.integers(0, 9), longest=st.none() | st.integers(5, 90)
)
def test_variable_lengths_cover_every_step(steps, bptt, seed, longest):
    """They add up to the whole, none but the last below 5 or above the longest, and a seed fixes them."""
    lengths = variable_lengths(steps, bptt, seed, longest)
    assert sum(lengths) == steps and min(lengths) >= 1
    assert all(5 <= length <= (longest or steps) for length in lengths[:-1])
    assert lengths[-1] <= (longest or steps)
    assert lengths == variable_lengths(steps, bptt, seed, longest)


def test_variable_lengths_are_distributed_as_published():
    """Section 4.1 of the paper: N(70, 5) in 95 of 100 cases, N(35, 5) in 5; another epoch has others."""
    lengths = np.array(variable_lengths(3_000_000, 70, [1111, 1])[:-1])
    short = lengths < 52.5
    assert abs(short.mean() - 0.05) < 0.005
    for part, middle in ((lengths[~short], 70), (lengths[short], 35)):
        assert abs(part.mean() + 0.5 - middle) < 0.3 and abs(part.std() - 5) < 0.3, middle
    assert variable_lengths(1000, 70, [1111, 2]) != variable_lengths(1000, 70, [1111, 1])
    assert max(variable_lengths(100_000, 70, 3, 72)) == 72


def test_variable_windows_give_back_the_stream(stream):
    """State is carried from one to the next: nothing is left out or comes twice, all in order (a peer sorts them)."""
    lengths = variable_lengths(len(stream) - 1, 6, 5)
    assert len(lengths) > 2
    pairs = list(windows(stream, lengths))
    assert torch.equal(torch.cat([tokens for tokens, _ in pairs]), stream[:-1])
    assert torch.equal(torch.cat([targets for _, targets in pairs]), stream[1:])


SIZES = [
    pytest.param(count, batch_size, id=f"{count}-{batch_size}")
    for count, batch_size in [(2, 1), (3, 2), (30, 1), (30, 29), (31, 2), (30, 7), (6, 4), (12, 9), (97, 13), (98, 97)]
]


@pytest.mark.parametrize(("count", "batch_size"), SIZES)
@pytest.mark.parametrize("warmup", [0, 1, 5, 1000])
def test_every_target_is_scored_once_after_its_own_token(count, batch_size, warmup):
    """Token and target, column by column, are the stream's neighbours in order, word 0 included."""
    ids = np.random.default_rng(count).permutation(count).astype(np.int32)
    _, tokens, targets = scored_columns(ids, batch_size, warmup, IGNORE)
    assert tokens.shape == targets.shape == (-(-(count - 1) // batch_size), batch_size)
    assert tokens.dtype == targets.dtype == torch.int64
    pairs = zip(column_by_column([tokens]), column_by_column([targets]), strict=True)
    assert [pair for pair in pairs if pair[1] != IGNORE] == list(zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True))


@pytest.mark.parametrize(("count", "batch_size"), SIZES)
@pytest.mark.parametrize("warmup", [0, 1, 5, 1000])
def test_warm_tokens_are_those_right_before_each_column(count, batch_size, warmup):
    """At most a column's length of them, none for column 0; columns that are all padding may read anything."""
    ids = np.random.default_rng(count).permutation(count).astype(np.int32)
    warm, tokens, _ = scored_columns(ids, batch_size, warmup, IGNORE)
    length = len(tokens)
    width = min(warmup, length)
    assert warm.shape == (width, batch_size - 1)
    assert warm.dtype == torch.int64
    for b in range(1, batch_size):
        start = b * length
        if start < count - 1:
            assert warm[:, b - 1].tolist() == ids[start - width : start].tolist()


def test_every_size_up_to_forty_scores_every_target_once():
    """All N and B: the multiset of scored targets is the stream without its first token."""
    for count in range(2, 41):
        ids = np.arange(1, count + 1, dtype=np.int32)
        for batch_size in range(1, count):
            _, _, targets = scored_columns(ids, batch_size, 3, IGNORE)
            assert column_by_column([targets])[: count - 1] == ids[1:].tolist()
            assert (targets == IGNORE).sum() == targets.numel() - (count - 1)


def test_columns_past_the_end_hold_nothing_but_padding():
    """11 targets in 9 columns are 6 columns of up to two; the other three score nothing and hold valid ids."""
    _, tokens, targets = scored_columns(np.arange(12, dtype=np.int32), 9, 5, IGNORE)
    assert (targets != IGNORE).sum(0).tolist() == [2, 2, 2, 2, 2, 1, 0, 0, 0]
    assert tokens.min() >= 0
    assert tokens.max() < 12


@pytest.mark.parametrize(("count", "batch_size", "targets"), [(0, 1, 0), (1, 1, 0), (7, 7, 6), (3, 11, 2)])
def test_fewer_targets_than_columns_are_refused(count, batch_size, targets):
    """One line says how many targets there are and what to change."""
    with pytest.raises(CorpusError) as error:
        scored_columns(np.zeros(count, np.int32), batch_size, 5, IGNORE)
    assert str(error.value).startswith(f"{count} tokens have {targets} targets, fewer than {batch_size} columns")
    assert "--eval-batch" in str(error.value)
    assert "\n" not in str(error.value)


@given(st.lists(st.lists(st.integers(1, 9), max_size=5), min_size=1, max_size=30), st.integers(1, 7))
def test_sentences_lose_nothing(lines, batch_size):
    """Cut and put together again: each sentence but those without a target, in one batch, its targets where it has."""
    stream = np.array([id for line in lines for id in (0, *line)], np.int32)
    parts = sentences(stream, 0)
    assert [part[1:].tolist() for part in parts] == [line for line in lines if line]
    for seed in (None, [3, 1]):
        batches = sentence_batches([len(part) for part in parts], batch_size, seed)
        assert sorted(i for batch in batches for i in batch) == list(range(len(parts)))
        assert sum(len(batch) < batch_size for batch in batches) <= 1
        for batch in batches:
            tokens, targets = padded([parts[i] for i in batch], IGNORE)
            for column, number in enumerate(batch):
                steps = len(parts[number]) - 1
                assert tokens[:steps, column].tolist() == parts[number][:-1].tolist()
                assert targets[:steps, column].tolist() == parts[number][1:].tolist()
                assert (targets[steps:, column] == IGNORE).all() and len(targets) >= steps


def test_sentences_of_a_batch_have_one_length():
    """17 of 2 and 17 of 5 in batches of 17; a seed decides which batch comes first, and who are side by side."""
    lengths = [2, 5] * 17
    orders = [sentence_batches(lengths, 17, [seed]) for seed in range(8)]
    assert all(len({lengths[i] for i in batch}) == 1 for order in orders for batch in order)
    assert len({lengths[order[0][0]] for order in orders}) == 2
    assert sentence_batches(lengths, 17, [5]) == orders[5] != orders[4]
    assert [sorted(batch) for batch in sentence_batches(lengths, 5, [1])] != [
        sorted(batch) for batch in sentence_batches(lengths, 5, [2])
    ]


def test_a_text_that_does_not_begin_with_a_sentence_is_refused():
    """Its first words would be nobody's."""
    with pytest.raises(CorpusError, match="does not begin with <sos>"):
        sentences(np.array([3, 0, 4]), 0)
