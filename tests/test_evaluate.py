"""The script that scores: the figures of the training run again, other corpora, and texts word by word."""

import json
import math
import re
import shutil

import pytest
import torch

import benchmark
import evaluate
from data.corpus import EOS, UNK
from utils import UserError, checkpoint, evaluation, report

SPLIT = re.compile(
    r"\| (\w+) +\| loss +(\S+) \| ppl +(\S+) \| ([\d,]+) targets \| batch (\d+)(?: \| (\d+) unknown words)?"
)
LINE = re.compile(r"\| line (\d+) \| (\d+) words \| (\d+) unknown \| ppl (\S+) \| (.*)")
TOTAL = re.compile(r"\| (.+) \| (\d+) words, line ends included \| (\d+) unknown \| loss (\S+) \| ppl (\S+)")


@pytest.fixture
def printed(tiny_checkpoint, capsys):
    """printed(*FLAGS): the lines that evaluate.py prints about the small model."""

    def call(*flags):
        evaluate.main(["--checkpoint", str(tiny_checkpoint), *map(str, flags)])
        return capsys.readouterr().out.splitlines()

    return call


@pytest.fixture
def results(tiny_run):
    """What the training run found at batch 1."""
    return json.loads((tiny_run / "run.json").read_text())["results"]


def test_the_figures_of_the_training_run_are_found_again(printed, results):
    """Its corpus is the default; loss to four digits, perplexity to two, number of targets, batch size 1."""
    rows = [SPLIT.fullmatch(line).groups() for line in printed()]
    assert rows == [
        (split, f"{score['loss']:.4f}", f"{score['perplexity']:.2f}", f"{score['targets']:,}", "1", None)
        for split, score in results.items()
    ]
    assert [row[0] for row in rows] == ["valid", "test"]


def test_more_columns_are_near(printed, results):
    """Three columns score the same targets within 0.5%, and say that they are three."""
    for line in printed("--eval-batch", 3):
        split, _, perplexity, targets, batch, _ = SPLIT.fullmatch(line).groups()
        want = results[split]
        assert (batch, targets) == ("3", f"{want['targets']:,}")
        assert math.isclose(float(perplexity), want["perplexity"], rel_tol=0.005)


def test_another_corpus_is_read_with_the_models_vocabulary(printed, tiny_corpus, tmp_path, results):
    """Unknown words are counted, and scored as <unk>; a corpus needs no training split for this."""
    folder = tmp_path / "other"
    folder.mkdir()
    shutil.copy(tiny_corpus / "valid.txt", folder)
    text = (tiny_corpus / "test.txt").read_text(encoding="utf-8")
    (folder / "test.txt").write_text(f"zebra the w3 quagga\nzebra\n{text}", encoding="utf-8")
    valid, test = (SPLIT.fullmatch(line).groups() for line in printed("--data", folder))
    assert valid[2] == f"{results['valid']['perplexity']:.2f}" and valid[5] is None
    assert test[3] == f"{results['test']['targets'] + 7:,}" and test[5] == "3"
    (folder / "test.txt").write_text(f"{UNK} the w3 {UNK}\n{UNK}\n{text}", encoding="utf-8")
    _, again = (SPLIT.fullmatch(line).groups() for line in printed("--data", folder))
    assert again == (*test[:5], None)


def test_bfloat16_is_near(printed, results, tmp_path):
    """--amp reaches the model: not the same figures, but within 1%."""
    printed("--amp", "bf16", "--record", tmp_path / "bf16.json")
    for split, score in report.read_record(tmp_path / "bf16.json")["results"].items():
        assert math.isclose(score["perplexity"], results[split]["perplexity"], rel_tol=0.01)
        assert not math.isclose(score["loss"], results[split]["loss"], rel_tol=1e-6)


LINES = ["w3 w6 the w1", "", "w25 zebra <unk>", "quagga"]


@pytest.fixture
def surprise(tiny_checkpoint):
    """-log p, in float64, of every word of LINES and their ends, in one pass that starts with <eos>."""
    model, vocabulary, _ = checkpoint.load_model(tiny_checkpoint, torch.device("cpu"))
    words = [word for line in LINES for word in [*line.split(), EOS]]
    ids = torch.tensor([vocabulary.ids.get(word, vocabulary.ids[UNK]) for word in [EOS, *words]])[:, None]
    model = model.double()
    with torch.no_grad():
        hidden, _ = model.hidden(ids[:-1], model.initial_state(1))
        logits = hidden[:, 0] @ model.head.weight.T + model.head.bias
    return (logits.exp().sum(-1).log() - logits.gather(-1, ids[1:])[:, 0]).tolist()


@pytest.mark.parametrize("end", ("\n", ""), ids=("line end", "no line end"))
def test_a_text_is_scored_by_line_and_word(printed, surprise, tmp_path, end):
    """Each word with its log probability, unknown ones in brackets; each line and the whole with their perplexity."""
    path = tmp_path / "text.txt"
    path.write_text("\n".join(LINES) + end, encoding="utf-8")
    *lines, total = printed("--text", path)
    assert len(lines) == len(LINES)
    left = iter(surprise)
    for number, (line, want) in enumerate(zip(lines, LINES, strict=True), 1):
        shown, words, unknown, perplexity, scores = LINE.fullmatch(line).groups()
        names = [f"[{word}]" if word in ("zebra", "quagga") else word for word in [*want.split(), EOS]]
        losses = [next(left) for _ in names]
        assert (int(shown), int(words)) == (number, len(names))
        assert int(unknown) == sum(name.startswith("[") for name in names)
        assert scores.split()[::2] == names
        assert [float(score) for score in scores.split()[1::2]] == pytest.approx([-x for x in losses], abs=0.00501)
        assert float(perplexity) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4, abs=0.00501)
    name, words, unknown, loss, perplexity = TOTAL.fullmatch(total).groups()
    mean = sum(surprise) / len(surprise)
    assert (name, int(words), int(unknown)) == (str(path), len(surprise), 2)
    assert float(loss) == pytest.approx(mean, abs=0.0000501)
    assert float(perplexity) == pytest.approx(math.exp(mean), rel=1e-4, abs=0.00501)


def test_the_total_is_that_of_score_words(printed, tiny_checkpoint, tmp_path):
    """The script prints what the library computes."""
    path = tmp_path / "text.txt"
    path.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    model, vocabulary, _ = checkpoint.load_model(tiny_checkpoint, torch.device("cpu"))
    scored = evaluation.score_words(
        vocabulary, [line.split() for line in LINES], lambda ids: evaluation.trace(model, ids)[0][:, 0]
    )
    log_probs = [log_prob for line in scored for _, log_prob, _ in line]
    loss = TOTAL.fullmatch(printed("--text", path)[-1]).group(4)
    assert loss == f"{-sum(log_probs) / len(log_probs):.4f}"


def test_texts_that_cannot_be_read(script, fails, tiny_checkpoint, tmp_path):
    """Empty, missing, a folder, not UTF-8: exit code 2 and one line that names the file."""
    path = tmp_path / "text.txt"
    flags = ("--checkpoint", tiny_checkpoint, "--text", path)
    done = script("evaluate.py", *flags)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and str(path) in done.stderr
    path.write_bytes(b"")
    assert f"{path} is empty" in fails(evaluate.main, *flags)
    path.write_bytes("the w3\nnaïve\n".encode("latin-1"))
    message = fails(evaluate.main, *flags)
    assert f"{path} is not UTF-8" in message and "0xef" in message
    assert str(tmp_path) in fails(evaluate.main, *flags[:3], tmp_path)


def test_mistakes_are_one_line(fails, monkeypatch, tiny_checkpoint, tmp_path):
    """No checkpoint, no corpus, half a corpus, too many columns, no GPU."""
    flags = ("--checkpoint", tiny_checkpoint)
    assert "missing.pt" in fails(evaluate.main, "--checkpoint", tmp_path / "missing.pt")
    assert "no corpus folder gone" in fails(evaluate.main, *flags, "--data", "gone")
    assert "valid.txt" in fails(evaluate.main, *flags, "--data", tmp_path)
    assert "--eval-batch" in fails(evaluate.main, *flags, "--eval-batch", 10**6)
    assert "--eval-batch" in fails(evaluate.main, *flags, "--eval-batch", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="sees no GPU"):
        evaluate.main(["--checkpoint", str(tiny_checkpoint), "--cuda"])


ADAPTED = re.compile(r"\| (\w+) +\| loss +(\S+) \| ppl +(\S+) \| ([\d,]+) targets \| batch 1 \| (--.*) \| \d+ s")

POINTER = (
    "--save PTB.pt --lambdasm 0.1 --theta 1.0 --window 500 --bptt 5000 --data data/penn",
    "--save PTB.pt --lambdasm 0.1 --theta 1.0 --window 500 --bptt 5000 --data data/penn --model QRNN",
    "--save WT2.pt --lambdasm 0.1279 --theta 0.662 --window 3785 --bptt 2000 --data data/wikitext-2",
    "--save WT2.pt --lambdasm 0.1279 --theta 0.662 --window 3785 --bptt 2000 --model QRNN --data data/wikitext-2",
)


@pytest.mark.parametrize("line", POINTER)
def test_published_pointer_lines(line):
    """Those of salesforce/awd-lstm-lm, with --pointer, mean what they say there."""
    args, given = evaluate.parse(["--pointer", *line.split()])
    want = dict(zip(line.split()[::2], line.split()[1::2], strict=True))
    assert given["pointer"] is True and len(given) == 1 + len(want)
    assert args.checkpoint == want.pop("--save")
    for flag, value in want.items():
        assert str(getattr(args, flag[2:])) == value or getattr(args, flag[2:]) == float(value)


def test_defaults_of_the_adaptation():
    """Those of pointer.py; rates per 5 words of a segment, so that twice the segment has twice the rate and pull."""
    args, _ = evaluate.parse([])
    assert (args.theta, args.lambdasm, args.window) == (0.6625523432485668, 0.12785920428335693, 3785)
    assert (args.pointer, args.dynamic, args.temperature, args.bptt) == (False, None, 1.0, evaluation.STEPS)
    for words, flags in ((20, []), (5, ["--bptt", "5"])):
        args, _ = evaluate.parse(["--dynamic", *flags])
        assert (args.dynamic, args.bptt, args.epsilon) == ("rms", words, 2e-5)
        assert (args.lr, args.lamb) == pytest.approx((5e-5 * words / 5, 2e-3 * words / 5))
    assert evaluate.parse(["--dynamic", "sgd", "--lr", "3", "--lamb", "0"])[0].lamb == 0


@pytest.mark.parametrize(
    "flags",
    [
        ["--pointer", "--theta", "0.3", "--lambdasm", "0.2", "--window", "7"],
        ["--pointer", "--pointer-start", "window", "--window", "7"],
        ["--dynamic", "--lr", "1e-4", "--max-batches", "3"],
        ["--dynamic", "sgd", "--lr", "0.1", "--bptt", "5"],
        ["--dynamic", "--pointer", "--temperature", "1.1"],
        ["--temperature", "1.1"],
    ],
    ids=" ".join,
)
def test_adapted_figures(flags, printed, results, tiny_checkpoint):
    """Other losses than the plain model's, of the same targets, with the settings beside them; twice the same; the
    checkpoint is not touched."""
    before = tiny_checkpoint.read_bytes()
    rows = [ADAPTED.fullmatch(line).groups() for line in printed(*flags)]
    assert [row[0] for row in rows] == ["valid", "test"]
    for split, loss, perplexity, targets, settings in rows:
        assert targets == f"{results[split]['targets']:,}"
        assert float(loss) != round(results[split]["loss"], 4)
        assert math.isclose(math.exp(float(loss)), float(perplexity), rel_tol=1e-3)
        assert all(f"{flag}" in settings for flag in flags if flag.startswith("--") and flag != "--max-batches")
    again = [ADAPTED.fullmatch(line).groups() for line in printed(*flags)]
    assert again == rows and tiny_checkpoint.read_bytes() == before


def test_the_settings_shown_give_the_figures_shown(printed):
    """--tune says what it chose as flags; with them, the same perplexities. It tried nothing on test."""
    *told, chosen, valid, test = printed("--pointer", "--dynamic", "--tune", "--tune-tokens", "200")
    assert any(line.startswith("| tried lr") for line in told) and "200 words of valid" in chosen
    rows = [ADAPTED.fullmatch(line).groups() for line in (valid, test)]
    assert rows[0][4] == rows[1][4] == chosen.split(" | ")[1]
    again = [ADAPTED.fullmatch(line).groups() for line in printed("--pointer", "--dynamic", *rows[0][4].split())]
    assert [float(row[1]) for row in again] == pytest.approx([float(row[1]) for row in rows], abs=2e-4)


def test_the_search_sees_valid_alone(printed, tiny_corpus, tmp_path):
    """Other text in test.txt changes nothing of what is chosen."""
    folder = tmp_path / "other"
    shutil.copytree(tiny_corpus, folder)
    (folder / "test.txt").write_text("the w3 w3 w3\n" * 20, encoding="utf-8")
    flags = ("--pointer", "--tune", "--tune-tokens", "150")
    assert printed(*flags)[:-2] == printed(*flags, "--data", folder)[:-2]


def test_a_text_is_adapted_too(printed, tmp_path):
    """The cache makes a word that was there more probable."""
    path = tmp_path / "text.txt"
    path.write_text("w3 w6\n" * 30, encoding="utf-8")
    lines = [printed("--text", path, *flags)[-1] for flags in ([], ["--pointer"])]
    plain, cached = (float(TOTAL.fullmatch(line).group(4)) for line in lines)
    assert cached < plain


def test_the_record_and_its_table(printed, results, tiny_run, tmp_path):
    """The figures as printed, with what they depend on; benchmark.py puts them below the run they are of."""
    both = ("--pointer", "--window", "7", "--dynamic", "sgd", "--lr", "0.01")
    for name, flags in (("plain", ()), ("both", both)):
        lines = printed(*flags, "--record", tmp_path / f"{name}.json")
        record = report.read_record(tmp_path / f"{name}.json")
        for line, split in zip(lines, ("valid", "test"), strict=False):
            assert f"ppl {record['results'][split]['perplexity']:8.2f}" in line
        assert (
            record["corpus"]["name"] == "tiny"
            and record["name"] == name
            and f"--record {tmp_path}" in record["command"]
        )
    assert "--window 7 --pointer-start first --dynamic sgd --lr 0.01" in record["adaptation"]
    benchmark.main(["table", "mine", *map(str, (tiny_run, *tmp_path.glob("*.json"))), "--results", str(tmp_path)])
    page = (tmp_path / "mine.md").read_text()
    assert page.count(f"| {results['test']['perplexity']:.2f} |") == 2
    assert f"| `{record['adaptation']}` |" in page and f"| {record['results']['test']['perplexity']:.2f} |" in page
    benchmark.main(["table", "mine", "--results", str(tmp_path)])
    assert (tmp_path / "mine.md").read_text() == page


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--record", "nowhere/x.json"], ["--record nowhere/x.json", "no folder"]),
        (["--record", "."], ["--record .", "a folder"]),
        (["--record", "x.json", "--text", "x"], ["--record", "--text"]),
        (["--text", "x", "--eval-batch", "3"], ["--text", "--eval-batch 3"]),
        (["--theta", "1"], ["--theta goes with --pointer"]),
        (["--pointer-start", "window"], ["--pointer-start goes with --pointer"]),
        (["--lamb", "0.1"], ["--lamb goes with --dynamic"]),
        (["--max-batches", "1"], ["--max-batches goes with --dynamic"]),
        (["--dynamic", "sgd", "--max-batches", "1"], ["--max-batches goes with --dynamic rms", "not with sgd"]),
        (["--dynamic", "sgd", "--epsilon", "1"], ["--epsilon goes with --dynamic rms", "not with sgd"]),
        (["--tune-tokens", "9"], ["--tune-tokens goes with --tune"]),
        (["--pointer", "--eval-batch", "10"], ["--eval-batch 10", "one column"]),
        (["--tune", "--text", "x"], ["--tune", "without --text"]),
        (["--dynamic", "adam"], ["--dynamic", "rms", "sgd"]),
        (["--pointer", "--lambdasm", "1"], ["--lambdasm", "0.999"]),
        (["--temperature", "0"], ["--temperature", "above 0"]),
        (["--model", "QRNN"], ["LSTM", "not QRNN", "leave out --model"]),
    ],
    ids=" ".join,
)
def test_adaptation_mistakes_are_one_line(flags, words, fails, tiny_checkpoint):
    """What does not go together, what is out of range, a checkpoint of another model."""
    message = fails(evaluate.main, "--checkpoint", tiny_checkpoint, *flags)
    assert all(word in message for word in words), message
