"""What only a GPU can show: kernels as they run there, streams, devices, cuDNN, DataParallel. `pytest -m gpu`."""

import copy
import itertools
import warnings

import pytest
import torch

from models import AWD, build, forget_mult
from models.forget_mult import cuda, doctor, pooling
from models.forget_mult.reference import wide
from utils import runtime

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and a torch built for CUDA: none here"),
]
SECOND = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU: none here")
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}


def relative(got, want):
    """Largest difference over the largest number."""
    return ((got.cpu().double() - want).abs().max() / want.abs().max()).item()


@pytest.fixture(autouse=True)
def float32():
    """Products of float32 are what they say; torch's own choice for cuDNN is TF32."""
    runtime.use_tf32(False, False)


@pytest.fixture
def usable():
    """The kernels can be loaded; why not is an error here, no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cuda.usable(torch.device("cuda", 0))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (105, 20, 640), (37, 5, 67), (3, 64, 8192)], ids=str)
def test_recurrence(usable, dtype, shape):
    """Against the loop in float64 on the CPU: h and all gradients; also several columns a thread."""
    parts = [torch.rand(shape), torch.randn(shape), torch.randn(shape[1:])]
    found = []
    for device, kind, backend in (("cuda", dtype, None), ("cpu", torch.float64, "reference")):
        leaves = [part.to(dtype).to(device, kind).requires_grad_() for part in parts]
        h = forget_mult(*leaves, backend=backend)
        h.double().square().sum().backward()
        found.append([h.detach(), *(leaf.grad for leaf in leaves)])
    for got, want in zip(*found, strict=True):
        assert relative(got, want) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("mode", "kinds"), pooling.MODES.items())
def test_pooling(usable, dtype, mode, kinds):
    """Likewise, with a mask of zoneout."""
    gates, initial = torch.randn(31, 7, kinds * 67), torch.randn(7, 67)
    update, found = torch.rand(31, 7, 67) < 0.8, []
    for device, kind, backend in (("cuda", dtype, None), ("cpu", torch.float64, "reference")):
        raw = gates.to(dtype).to(device, kind).requires_grad_()
        first = initial.to(device, wide(raw)).requires_grad_()
        output, last = pooling.pool(raw, first, mode, "tanh", update.to(device), 1.0, False, backend)
        (output.double().square().sum() + last.double().sum()).backward()
        found.append([output.detach(), last.detach(), raw.grad, first.grad])
    for got, want in zip(*found, strict=True):
        assert relative(got, want) < TOLERANCES[dtype]


def test_the_stream_of_the_caller(usable):
    """A kernel waits for what its own stream does first, however long that takes, and no other."""
    stream, gate = torch.cuda.Stream(), torch.rand(70, 20, 640, device="cuda")
    want = forget_mult(gate, gate)
    torch.cuda.synchronize()
    for _ in range(5):
        with torch.cuda.stream(stream):
            late = torch.zeros_like(gate)
            torch.cuda._sleep(50_000_000)
            late.copy_(gate)
            h = forget_mult(late, late)
        stream.synchronize()
        torch.testing.assert_close(h, want)


@SECOND
def test_a_second_device(usable):
    """Kernels are loaded on each device, and the caller's stays current."""
    gate = torch.rand(7, 3, 5)
    h = forget_mult(gate.to("cuda:1"), gate.to("cuda:1"))
    assert h.device.index == 1 and torch.cuda.current_device() == 0
    torch.testing.assert_close(h.cpu(), forget_mult(gate, gate))


@pytest.mark.parametrize("model", ("LSTM", "GRU", "QRNN"))
def test_weight_drop(model):
    """Under cuDNN the mask changes the output, its gradient reaches the weights, and a step moves them and it."""
    torch.manual_seed(0)
    core = AWD(model, 11, 17, 2, True, wdrop=0.5).cuda()
    x, state = torch.randn(5, 3, 11, device="cuda"), core.initial_state(3)
    first, second = core(x, state)[0], core(x, state)[0]
    assert not torch.equal(first, second)
    weight = core.layers[0].dropped
    before = weight.detach().clone()
    second.square().sum().backward()
    assert 0.2 < (weight.grad == 0).float().mean() < 0.8
    optimizer = torch.optim.SGD(core.parameters(), 0.1)
    optimizer.step()
    core.eval()
    after = core(x, state)[0]
    assert not torch.equal(weight, before) and torch.equal(after, core(x, state)[0])
    on_cpu = copy.deepcopy(core).cpu()
    torch.testing.assert_close(on_cpu(x.cpu(), on_cpu.initial_state(3))[0], after.cpu(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ("rnn", "awd"))
@pytest.mark.parametrize("model", ("LSTM", "GRU"))
def test_small_gradients_under_autocast(family, model):
    """Gradients a billionth as large are a billionth as large: in cuDNN's float16 they would be 0."""
    torch.manual_seed(0)
    core = {"model": model, "emsize": 11, "nhid": 11, "nlayers": 2} | ({"tied": True} if family == "awd" else {})
    core = build({"family": family, "core": core, "vocab_size": 23, "tied": True}).cuda().core
    x, found = torch.randn(5, 3, 11, device="cuda"), []
    for scale in (1.0, 1e-9):
        with runtime.autocast(x.device, "bf16"):
            output, _ = core(x, core.initial_state(3))
        found.append(torch.autograd.grad((output * scale).sum(), list(core.parameters())))
    for whole, part in zip(*found, strict=True):
        assert relative(part * 1e9, whole.cpu().double()) < 1e-2


GRAPHED = {
    "rmc": {"emsize": 11, "headsize": 3, "numheads": 2},
    "awd": {"model": "LSTM", "emsize": 11, "nhid": 17, "nlayers": 3, "tied": True},
    "qrnn": {"emsize": 11, "nhid": 11, "nlayers": 2},
}


@pytest.mark.parametrize("amp", ("off", "bf16"))
@pytest.mark.parametrize("family", GRAPHED)
def test_cuda_graphs(family, amp):
    """Replayed passes give the losses, states and weights of passes as they come, over several updates."""
    found = []
    for graphed in (False, True):
        torch.manual_seed(0)
        model = build({"family": family, "core": GRAPHED[family], "vocab_size": 23, "tied": True}).cuda()
        if graphed:
            runtime.graph(model.core)
        optimizer, state, losses = torch.optim.SGD(model.parameters(), 0.5), model.initial_state(4), []
        for _ in range(6):
            tokens, targets = torch.randint(23, (2, 9, 4)).cuda()
            optimizer.zero_grad()
            with runtime.autocast(tokens.device, amp):
                loss, _, count, state = model(tokens, targets, tuple(part.detach() for part in state))
            (loss / count).sum().backward()
            optimizer.step()
            losses.append(loss.detach().clone())
        found.append([*losses, *(part.detach().clone() for part in state), *map(torch.clone, model.parameters())])
    for one, two in zip(*found, strict=True):
        assert relative(two, one.cpu().double()) < (2e-5 if amp == "off" else 1e-2)


@pytest.mark.parametrize("units", (False, True))
def test_a_graph_draws_anew(units):
    """Masks of weight drop, or its units, and of locked dropout differ from replay to replay, forward and backward."""
    core = AWD("LSTM", 11, 17, 2, True, dropouth=0.5, wdrop=0.5, wdrop_units=units).cuda()
    runtime.graph(core)
    x, state = torch.randn(5, 3, 11, device="cuda", requires_grad=True), core.initial_state(3)
    found = []
    for _ in range(4):
        core.zero_grad()
        output, _ = core(x, state)
        output.square().sum().backward()
        zeros = core.layers[0].dropped.grad == 0
        assert 0.3 < zeros.float().mean() < 0.7
        found.append((output.detach().clone(), zeros))
    for (one, zeros), (two, others) in itertools.combinations(found, 2):
        assert not torch.equal(one, two) and not torch.equal(zeros, others)


@SECOND
@pytest.mark.parametrize(
    ("family", "core"),
    [
        ("rnn", {"model": "LSTM", "emsize": 11, "nhid": 11, "nlayers": 2}),
        ("qrnn", {"emsize": 11, "nhid": 11, "nlayers": 2}),
        ("awd", {"model": "QRNN", "emsize": 11, "nhid": 17, "nlayers": 3, "tied": True}),
        ("rmc", {"emsize": 11, "headsize": 3, "numheads": 2}),
    ],
)
def test_data_parallel(family, core):
    """Loss, states and gradients of two devices are those of one."""
    torch.manual_seed(0)
    model = build({"family": family, "core": core, "vocab_size": 23, "tied": True}).cuda()
    tokens, targets = torch.randint(23, (2, 9, 4), device="cuda")
    found = []
    for replicas in (model, torch.nn.DataParallel(model, dim=1)):
        model.zero_grad()
        loss, _, count, state = replicas(tokens, targets, model.initial_state(4))
        (loss.sum() / count.sum()).backward()
        found.append([loss.sum(), count.sum(), *state, *(p.grad for p in model.parameters())])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


def test_the_doctor_finds_it_well(usable, capsys):
    """Its self-test on every device."""
    doctor.main()
    out = capsys.readouterr().out
    assert "kernels usable" in out and "not usable" not in out and out.count("off the reference") >= 3
