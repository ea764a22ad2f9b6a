"""Optimizers against their equations, schedules against torch's own and against rules written out here."""

import io
from types import SimpleNamespace

import pytest
import torch
from torch.optim import lr_scheduler

from models import RNN, LanguageModel
from utils.optim import Average, build_optimizer, build_schedule, rescaled

LR = 0.7
ADAM, SGD, MOMENTUM = {"optimizer": "adam"}, {"optimizer": "sgd"}, {"optimizer": "sgd", "momentum": 0.9}


@pytest.fixture
def flags():
    """flags(**CHANGES): the flags that optimizers and schedules read."""

    def make(**changes):
        plateau = {"plateau_factor": 0.25, "plateau_patience": 0, "plateau_threshold": 0.0}
        defaults = {"optimizer": "sgd", "lr": LR, "momentum": 0.0, "wdecay": 0.0, "decay": 1.0, "decay_from": 1}
        defaults |= {"betas": [0.9, 0.999], "warm": 0.3}
        return SimpleNamespace(**{**defaults, **plateau, **changes})

    return make


@pytest.fixture
def start(flags):
    """start(SCHEDULE, **CHANGES): a schedule and the optimizer it steers, over two groups of parameters."""

    def make(schedule, **changes):
        args = flags(schedule=schedule, **changes)
        groups = [{"params": [torch.nn.Parameter(torch.zeros(size))]} for size in (3, 5)]
        optimizer = build_optimizer(args, groups)
        return build_schedule(args, optimizer), optimizer

    return make


@pytest.fixture
def parameters():
    """Two float64 parameters, filled the same each time it is called."""

    def make():
        generator = torch.Generator().manual_seed(17)
        shapes = ((3, 5), (7,))
        return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in shapes]

    return make


@pytest.fixture
def updates(parameters):
    """updates(OPTIMIZER, PARAMETERS): five steps with given gradients; yields the gradients before each step."""

    def run(optimizer, own):
        generator = torch.Generator().manual_seed(19)
        for _ in range(5):
            for parameter in own:
                parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            yield [parameter.grad.clone() for parameter in own]
            optimizer.step()

    return run


def rates(optimizer):
    """The rate, which all groups share."""
    (rate,) = {group["lr"] for group in optimizer.param_groups}
    return rate


def momenta(optimizer):
    """SGD's momentum or Adam's first beta, which all groups share."""
    (momentum,) = {group["betas"][0] if "betas" in group else group["momentum"] for group in optimizer.param_groups}
    return momentum


@pytest.mark.parametrize(("momentum", "wdecay"), [(0.0, 0.0), (0.0, 0.3), (0.9, 0.0), (0.9, 0.3)])
def test_sgd_is_its_equation(flags, parameters, updates, momentum, wdecay):
    """v = momentum v + g + wdecay p, p = p - lr v."""
    own = parameters()
    values = [parameter.detach().clone() for parameter in own]
    velocities = [torch.zeros_like(value) for value in values]
    for gradients in updates(build_optimizer(flags(momentum=momentum, wdecay=wdecay), own), own):
        velocities = [momentum * v + g + wdecay * p for v, g, p in zip(velocities, gradients, values, strict=True)]
        values = [p - LR * v for p, v in zip(values, velocities, strict=True)]
    for parameter, value in zip(own, values, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wdecay", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_adam_is_its_equation(flags, parameters, updates, wdecay, kind):
    """Kingma & Ba's algorithm 1 with torch's default betas and epsilon; decay is part of the gradient.

    In AdamW (Loshchilov & Hutter 2019, algorithm 2) the weights lose their own part, times the rate.
    """
    own = parameters()
    values = [parameter.detach().clone() for parameter in own]
    first, second = ([torch.zeros_like(value) for value in values] for _ in range(2))
    for step, gradients in enumerate(updates(build_optimizer(flags(optimizer=kind, wdecay=wdecay), own), own), 1):
        for i, gradient in enumerate(gradients):
            if kind == "adam":
                gradient = gradient + wdecay * values[i]
            else:
                values[i] = values[i] - LR * wdecay * values[i]
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.999 * second[i] + 0.001 * gradient**2
            root = (second[i] / (1 - 0.999**step)).sqrt()
            values[i] = values[i] - LR * first[i] / (1 - 0.9**step) / (root + 1e-8)
    for parameter, value in zip(own, values, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wdecay", [0.0, 0.3])
def test_adam_equals_torch_adam(flags, parameters, updates, wdecay):
    """As torch.optim.Adam(lr, weight_decay), nothing else switched on, up to the rounding of its fused form."""
    own, other = parameters(), parameters()
    for optimizer, group in (
        (build_optimizer(flags(optimizer="adam", wdecay=wdecay), own), own),
        (torch.optim.Adam(other, lr=LR, weight_decay=wdecay), other),
    ):
        list(updates(optimizer, group))
    for mine, theirs in zip(own, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_a_tied_matrix_is_updated_once(flags):
    """Embedding and head share one matrix: one step of SGD is one p - lr (g + wdecay p), g summed over both uses."""
    torch.manual_seed(23)
    model = LanguageModel(13, RNN("LSTM", 5, 5, 1), tied=True)
    optimizer = build_optimizer(flags(wdecay=0.3), model.parameters())
    assert sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"]) == (
        13 * 5 + 13 + 4 * 5 * (5 + 5 + 2)
    )
    tokens = torch.arange(7)[:, None]
    loss, _, _, _ = model(tokens, tokens + 1, model.initial_state(1))
    loss.sum().backward()
    before, gradient = model.embedding.weight.detach().clone(), model.embedding.weight.grad.clone()
    optimizer.step()
    torch.testing.assert_close(model.embedding.weight.detach(), before - LR * (gradient + 0.3 * before))
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize("optimizer", [ADAM, SGD, MOMENTUM], ids=["adam", "sgd", "momentum"])
def test_constant_leaves_rate_and_momentum_alone(start, optimizer):
    """Whatever the epoch, the progress and the validation loss."""
    schedule, own = start("constant", **optimizer)
    momentum = momenta(own)
    for epoch, loss in enumerate((5.0, 7.0, 7.0, 3.0), 1):
        schedule.start_batch(epoch, epoch / 4)
        schedule.end_epoch(loss)
        assert (rates(own), momenta(own)) == (LR, momentum)


@pytest.mark.parametrize(("decay", "decay_from"), [(0.5, 1), (0.8, 3), (1.0, 2), (0.5, 100)])
def test_step_equals_exponential_decay_from_an_epoch_on(start, decay, decay_from):
    """The first decay_from epochs run at --lr, then torch's ExponentialLR takes over; no batch moves the rate."""
    schedule, own = start("step", decay=decay, decay_from=decay_from)
    _, other = start("constant")
    exponential = lr_scheduler.ExponentialLR(other, decay)
    for epoch in range(1, 12):
        if epoch > decay_from:
            other.step()
            exponential.step()
        for batch in range(3):
            schedule.start_batch(epoch, (epoch - 1 + batch / 3) / 11)
            assert rates(own) == pytest.approx(rates(other), rel=1e-12)
        schedule.end_epoch(5.0)
        assert rates(own) == pytest.approx(rates(other), rel=1e-12)


def torch_one_cycle(optimizer, total, **settings):
    """Rates and momenta of torch's OneCycleLR, defaults but for the number of batches and the settings."""
    schedule = lr_scheduler.OneCycleLR(optimizer, LR, total_steps=total, **settings)
    curve = [(rates(optimizer), momenta(optimizer))]
    for _ in range(total - 1):
        optimizer.step()
        schedule.step()
        curve.append((rates(optimizer), momenta(optimizer)))
    return curve


@pytest.mark.parametrize("optimizer", [ADAM, MOMENTUM], ids=["adam", "momentum"])
def test_one_cycle_is_the_curve_of_torch(start, optimizer):
    """The same numbers at the same part of each phase; torch's first phase ends at batch 0.3 N - 1 of N - 1."""
    total, peak = 211, 0.3 * 211 - 1
    curve = torch_one_cycle(start("constant", **optimizer)[1], total)
    schedule, own = start("onecycle", **optimizer)
    for i, expected in enumerate(curve):
        schedule.start_batch(1, 0.3 * i / peak if i <= peak else 0.3 + 0.7 * (i - peak) / (total - 1 - peak))
        assert (rates(own), momenta(own)) == pytest.approx(expected, rel=1e-9)


def test_one_cycle_with_other_betas_and_another_warm_up(start):
    """--betas 0.75 0.99 --warm 0.1: beta 1 from 0.8 to 0.7 and back, as torch's schedule with these."""
    total, peak = 211, 0.1 * 211 - 1
    settings = {"pct_start": 0.1, "base_momentum": 0.7, "max_momentum": 0.8}
    curve = torch_one_cycle(start("constant", **ADAM)[1], total, **settings)
    schedule, own = start("onecycle", **ADAM, betas=[0.75, 0.99], warm=0.1)
    for i, expected in enumerate(curve):
        schedule.start_batch(1, 0.1 * i / peak if i <= peak else 0.1 + 0.9 * (i - peak) / (total - 1 - peak))
        assert (rates(own), momenta(own)) == pytest.approx(expected, rel=1e-9)
        assert {group["betas"][1] for group in own.param_groups} == {0.99}


@pytest.mark.parametrize("total", [101, 5003])
def test_one_cycle_approaches_torch_as_batches_grow(start, total):
    """At progress i / (N - 1) the two differ by that shift of the peak alone: less than 6 / N of the rate."""
    curve = torch_one_cycle(start("constant", **MOMENTUM)[1], total)
    schedule, own = start("onecycle", **MOMENTUM)
    for i, (rate, momentum) in enumerate(curve):
        schedule.start_batch(1, i / (total - 1))
        assert rates(own) == pytest.approx(rate, abs=6 / total * LR)
        assert momenta(own) == pytest.approx(momentum, abs=0.1 * 6 / total)


def test_one_cycle_starts_peaks_and_ends_where_it_says(start):
    """lr/25, lr, lr/250,000; momentum 0.95, 0.85, 0.95. Past the end, as rounding may have it, it stays there."""
    schedule, own = start("onecycle", **MOMENTUM)
    for progress, rate, momentum in ((0, 1 / 25, 0.95), (0.3, 1, 0.85), (1, 4e-6, 0.95), (1 + 1e-9, 4e-6, 0.95)):
        schedule.start_batch(1, progress)
        assert rates(own) == pytest.approx(LR * rate, rel=1e-9)
        assert momenta(own) == pytest.approx(momentum, rel=1e-9)


def test_one_cycle_gives_no_momentum_to_sgd_without(start):
    """Plain SGD stays plain, and Adam's second beta is not touched."""
    for progress in (0.0, 0.3, 1.0):
        schedule, own = start("onecycle", **SGD)
        schedule.start_batch(1, progress)
        assert momenta(own) == 0
        schedule, own = start("onecycle", **ADAM)
        schedule.start_batch(1, progress)
        assert {group["betas"][1] for group in own.param_groups} == {0.999}


@pytest.fixture(params=range(5))
def losses(request):
    """Sixty losses on a coarse grid, so that many repeat the best so far, around a slowly falling mean."""
    generator = torch.Generator().manual_seed(request.param)
    noise = torch.randint(-4, 5, (60,), generator=generator)
    return [5 - 0.02 * i + 0.05 * jump for i, jump in enumerate(noise.tolist())]


def test_plateau_is_the_rule_of_word_language_model(start, losses):
    """Factor 0.25, patience 0, threshold 0: the smallest gain counts, an equal loss is none, tiny rates fall on."""
    schedule, own = start("plateau")
    lr, best = LR, None
    for loss in [loss * gain for loss in losses for gain in (1, 1 - 1e-6)]:
        if not best or loss < best:
            best = loss
        else:
            lr /= 4.0
        schedule.start_batch(1, 0.5)
        schedule.end_epoch(loss)
        assert rates(own) == pytest.approx(lr, rel=1e-12)
    assert lr < 1e-8


def test_plateau_halves_after_more_than_five_bad_epochs(start, losses):
    """The port's 0.5, 5, 1e-4: a gain of less than 1e-4 of the best is none; after a cut the count starts anew."""
    sequence = [loss * (1 - 1e-5 * i) for loss in losses[::6] for i in range(17)]
    schedule, own = start("plateau", plateau_factor=0.5, plateau_patience=5, plateau_threshold=1e-4)
    lr, best, bad, cuts = LR, float("inf"), 0, 0
    for loss in sequence:
        if loss < best * (1 - 1e-4):
            best, bad = loss, 0
        else:
            bad += 1
        if bad > 5:
            lr, bad, cuts = lr * 0.5, 0, cuts + 1
        schedule.end_epoch(loss)
        assert rates(own) == pytest.approx(lr, rel=1e-12)
    assert cuts > 3


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("constant", SGD),
        ("plateau", {"plateau_factor": 0.5, "plateau_patience": 2, "plateau_threshold": 1e-4}),
        ("step", {"decay": 0.8, "decay_from": 3}),
        ("onecycle", ADAM),
        ("onecycle", MOMENTUM),
    ],
)
def test_a_schedule_goes_on_where_it_was_saved(start, losses, name, changes):
    """Saved after epoch 23 as a file of plain values, put back into new objects: the later rates are the same."""

    def run(schedule, optimizer, epochs):
        curve = []
        for epoch in epochs:
            schedule.start_batch(epoch, epoch / 60)
            curve.append((rates(optimizer), momenta(optimizer)))
            schedule.end_epoch(losses[epoch - 1])
        return curve

    schedule, optimizer = start(name, **changes)
    run(schedule, optimizer, range(1, 24))
    file = io.BytesIO()
    torch.save([schedule.state_dict(), optimizer.state_dict()], file)
    expected = run(schedule, optimizer, range(24, 61))
    schedule, optimizer = start(name, **changes)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    schedule.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert run(schedule, optimizer, range(24, 61)) == expected
    assert len(set(expected)) > 3 or name == "constant"


def triggered(args, losses):
    """The epoch, from 1, at whose end averaging starts; None for never."""
    average = Average(args, [torch.nn.Parameter(torch.zeros(2))])
    for epoch, loss in enumerate(losses, 1):
        if average.end_epoch(loss):
            return epoch
    return None


LOSSES = [[9, 8, 7, 6, 5, 4, 3, 2, 1], [9, 8, 7, 7.5, 6, 6.5, 6.4, 6.9, 7.2, 5], [5, 6, 4, 6, 6, 3, 6, 7], [1] * 8]


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("losses", LOSSES, ids=str)
def test_trigger_rules(flags, losses, n):
    """Both rules against their definitions: main.py's line, and algorithm 1 with its logs and its t."""
    stored = []
    by_code = None
    for epoch, loss in enumerate(losses, 1):
        if len(stored) > n and loss > min(stored[:-n]):
            by_code = epoch
            break
        stored.append(loss)
    assert triggered(flags(optimizer="ntasgd", nonmono=n, nt_rule="code", finetune=None), losses) == by_code
    logs, by_paper = {}, None
    for t, loss in enumerate(losses):
        if t > n and loss > min(logs[number] for number in range(t - n, t)):
            by_paper = t + 1
            break
        logs[t] = loss
    assert triggered(flags(optimizer="ntasgd", nonmono=n, nt_rule="paper", finetune=None), losses) == by_paper
    for optimizer in ("sgd", "adam"):
        assert triggered(flags(optimizer=optimizer, nonmono=n, nt_rule="code", finetune=None), losses) is None


def test_the_rules_differ():
    """On losses that fall, rise and stay up."""
    losses = [9, 5, 6, 6.2, 6.1, 6.3]
    base = {"optimizer": "ntasgd", "finetune": None, "nonmono": 2}
    assert [triggered(SimpleNamespace(**base, nt_rule=rule), losses) for rule in ("code", "paper")] == [5, 4]


def test_the_mean_is_that_of_all_weights_since_the_trigger(flags, parameters, updates):
    """Inside `applied` the model has the mean in float64, outside its own weights; steps are SGD's throughout."""
    args = flags(optimizer="ntasgd", nonmono=1, nt_rule="code", finetune=None, wdecay=0.1)
    own, plain = parameters(), parameters()
    optimizer, other = build_optimizer(args, own), build_optimizer(flags(wdecay=0.1), plain)
    average, seen = Average(args, own), []
    steps = zip(updates(optimizer, own), updates(other, plain), range(5), strict=True)
    for _, _, number in steps:  # a step is taken after each turn
        if number:
            average.step()
            if number > 2:
                seen.append([parameter.detach().clone() for parameter in own])
        if number == 2:
            with average.applied() as averaged:
                assert not averaged
            average.start()
            with average.applied() as averaged:
                assert not averaged
    average.step()
    seen.append([parameter.detach().clone() for parameter in own])
    before = [parameter.detach().clone() for parameter in own]
    with average.applied() as averaged:
        assert averaged
        for position, parameter in enumerate(own):
            mean = torch.stack([weights[position] for weights in seen]).mean(0)
            torch.testing.assert_close(parameter.detach(), mean, rtol=1e-12, atol=1e-14)
    assert all(torch.equal(parameter, value) for parameter, value in zip(own, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(own, plain, strict=True))


def test_the_mean_is_torchs_but_for_its_first_step(flags, parameters, updates):
    """torch.optim.ASGD with t0 0 and lambd 0 forgets the weights after step 1; without them the means are equal
    (its weights of the mean are float32)."""
    args = flags(optimizer="ntasgd", nonmono=1, nt_rule="code", finetune=None)
    own, theirs = parameters(), parameters()
    asgd = torch.optim.ASGD(theirs, lr=LR, t0=0, lambd=0.0, alpha=0.0)
    average = Average(args, own)
    for number, _ in enumerate(zip(updates(build_optimizer(args, own), own), updates(asgd, theirs), strict=True)):
        if number == 1:
            average.start()
        elif number > 1:
            average.step()
    average.step()
    with average.applied():
        for mean, parameter in zip(own, theirs, strict=True):
            torch.testing.assert_close(mean.detach(), asgd.state[parameter]["ax"], rtol=1e-6, atol=1e-7)


def test_a_mean_swapped_in_is_swapped_out_whatever_happens(flags):
    """An error in between leaves the weights themselves."""
    parameter = torch.nn.Parameter(torch.ones(3))
    average = Average(flags(optimizer="ntasgd", nonmono=1, nt_rule="code", finetune="run"), [parameter])
    average.step()
    with torch.no_grad():
        parameter.mul_(3)
    average.step()
    with pytest.raises(ZeroDivisionError), average.applied():
        assert parameter.tolist() == [2, 2, 2]
        raise ZeroDivisionError
    assert parameter.tolist() == [3, 3, 3]


def test_when_divides_by_ten_after_each_epoch_listed(start):
    """--when 2 4: epochs 1 and 2 at the rate, 3 and 4 at a tenth, 5 at a hundredth."""
    schedule, optimizer = start("when", when=[2, 4])
    seen = []
    for epoch in range(1, 6):
        schedule.start_batch(epoch, 0.0)
        seen.append(rates(optimizer) / LR)
    assert seen == pytest.approx([1, 1, 0.1, 0.1, 0.01])


def test_rescaled_rates_come_back(start):
    """In all groups."""
    _, optimizer = start("constant")
    with rescaled(optimizer, 0.25):
        assert rates(optimizer) == LR / 4
    assert rates(optimizer) == LR
