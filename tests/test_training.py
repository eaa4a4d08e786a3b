"""Our layers in what torch offers for training: as stock layers, number for number."""

import copy

import pytest
import torch
from cases import flat_tensors
from torch import nn as stock
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import cached
from torch.utils.checkpoint import checkpoint

from pykernels import nn

TIGHT = {"rtol": 1e-10, "atol": 1e-11}


class StockLoss(stock.Linear):
    """What `nn.LinearCrossEntropyLoss` stands for."""

    def forward(self, x, target):
        return stock.functional.cross_entropy(super().forward(x), target)


class Model(stock.Module):
    """A layer of every kind, of ours or of torch's, from x [T, B, 6] and classes [B] to a loss."""

    def __init__(self, kinds, dropout=0.0, **options):
        super().__init__()
        loss = StockLoss if kinds is stock else nn.LinearCrossEntropyLoss
        self.rnn = kinds.RNN(6, 8, **options)
        self.gru = kinds.GRU(8, 8, bidirectional=True, **options)
        self.lstm = kinds.LSTM(16, 8, num_layers=2, dropout=dropout, **options)
        self.attention = kinds.MultiheadAttention(8, 2, dropout=dropout, **options)
        self.cells = stock.ModuleList(
            [kinds.RNNCell(8, 8, **options), kinds.GRUCell(8, 8, **options)]
        )
        self.cell = kinds.LSTMCell(8, 8, **options)
        self.loss = loss(8, 5, bias=False, **options)

    def sequences(self, x):
        for layer in (self.rnn, self.gru, self.lstm):
            x, _ = layer(x)
        return self.attention(x, x, x, need_weights=False)[0]

    def steps(self, x):
        h = x[-1]
        for cell in self.cells:
            h = cell(x[0], h)
        return self.cell(h, (h, h))[0]

    def forward(self, x, target):
        return self.loss(self.steps(self.sequences(x)), target)


def twins(**options):
    ours, theirs = Model(nn, **options), Model(stock, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def batch(dtype=torch.float64, grad=False):
    x = torch.randn(5, 4, 6, dtype=dtype, requires_grad=grad)
    return x, torch.tensor([0, 3, 1, 4])


def gradients(model, loss, x):
    return [loss, *torch.autograd.grad(loss, [x, *model.parameters()])]


def equal(found, expected):
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    """What is computed again, dropout and all, is the same to the bit."""
    model, (x, target) = Model(nn, dropout=0.3, dtype=torch.float64), batch(grad=True)

    def again(run, *args):
        return checkpoint(run, *args, use_reentrant=reentrant)

    torch.manual_seed(3)
    expected = gradients(model, model(x, target), x)
    model.zero_grad()
    x.grad = None
    torch.manual_seed(3)
    loss = model.loss(again(model.steps, again(model.sequences, x)), target)
    loss.backward()  # autograd.grad goes past a reentrant checkpoint
    equal([loss, x.grad, *(p.grad for p in model.parameters())], expected)


def test_what_is_saved_may_lie_elsewhere():
    model, (x, target) = Model(nn, dtype=torch.float64), batch(grad=True)
    expected = gradients(model, model(x, target), x)
    with torch.autograd.graph.save_on_cpu():
        loss = model(x, target)
    equal(gradients(model, loss, x), expected)


def test_hooks_run_as_on_stock_layers():
    """Of modules, forward and backward, and of gradients; one that changes a value is heeded."""
    results, (x, target) = [], batch(grad=True)

    def negate(p):
        p.grad.neg_()

    for model in twins(dtype=torch.float64):
        seen = []
        for name, module in model.named_modules():
            if name in ("", "cells"):
                continue

            def note(kind, name=name, seen=seen):
                return lambda *_, **__: seen.append((kind, name))

            module.register_forward_pre_hook(note("before"))
            module.register_forward_hook(note("after"))
            if not name.startswith("attention"):  # out_proj's weights are read past its forward
                module.register_full_backward_hook(note("backward"))
        model.cell.register_forward_hook(lambda module, args, out: (out[0] * 2, out[1]))
        model.rnn.weight_hh_l0.register_hook(lambda grad: grad * 3)
        model.gru.bias_hh_l0.register_post_accumulate_grad_hook(negate)
        model(x, target).backward()
        results.append((seen, [p.grad for p in model.parameters()]))
    (ours, our_grads), (theirs, their_grads) = results
    assert ours == theirs
    assert {kind for kind, _ in ours} == {"before", "after", "backward"}
    torch.testing.assert_close(our_grads, their_grads, **TIGHT)


def test_the_meta_device_knows_all_sizes():
    """Forward and backward of a model that has no memory."""
    model, (x, target) = Model(nn, device="meta"), batch(torch.float32)
    x = x.to("meta").requires_grad_()
    loss = model(x, target.to("meta"))
    grads = gradients(model, loss, x)
    assert [t.shape for t in grads] == [(), x.shape, *(p.shape for p in model.parameters())]
    assert all(t.device.type == "meta" for t in grads)


def test_deferred_initialisation():
    """Made without memory, then given some: by the layers' own rule, or from a state_dict."""
    with torch.device("meta"):
        ours, theirs = Model(nn), Model(stock)
    results = []
    for model in (ours, theirs):
        model.to_empty(device="cpu")
        torch.manual_seed(1)
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None) or getattr(
                module, "_reset_parameters", None
            )
            if reset is not None:
                reset()
        results.append(list(model.parameters()))
    equal(*results)

    with torch.device("meta"):
        ours = Model(nn)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    args = batch(torch.float32)
    torch.testing.assert_close(ours(*args), theirs(*args))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_with_a_scaler(dtype):
    """Parameters in float32 learn as stock ones; a step with an overflow is left out."""
    models, (x, target) = twins(), batch(torch.float32)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**8) for _ in models]
    before = copy.deepcopy(models[0].state_dict())
    for i, scale in enumerate((2.0**8, 2.0**8, 2.0**7)):
        for model, scaler in zip(models, scalers, strict=True):
            optimizer = torch.optim.SGD(model.parameters(), 0.5)
            optimizer.zero_grad()
            # without torch's own kernel of an LSTM, which some processors lack
            with torch.autocast("cpu", dtype), torch.backends.mkldnn.flags(enabled=False):
                loss = model(x, target)
            assert loss.dtype == torch.float32
            scaler.scale(loss * torch.inf if i == 1 else loss).backward()
            scaler.unscale_(optimizer)
            found = [p.grad for p in model.parameters()]
            assert all(grad.dtype == torch.float32 for grad in found)
            assert all(grad.isfinite().all() for grad in found) == (i != 1)
            scaler.step(optimizer)
            scaler.update()
            assert scaler.get_scale() == (2.0**7 if i else scale)
    for (name, one), two in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=2e-2, atol=2e-2)
        assert not torch.equal(one, before[name])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_on_a_gpu(dtype):
    """Layers give autocast's dtype, the loss and all gradients are float32, every weight learns."""
    device = "cuda"
    model, (x, target) = Model(nn, device=device), batch(torch.float32)
    x, target = x.to(device), target.to(device)
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler(device, init_scale=2.0**8)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    with torch.autocast(device, dtype):
        assert model.sequences(x).dtype == dtype
        loss = model(x, target)
    assert loss.dtype == torch.float32
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    scaler.step(optimizer)
    scaler.update()
    for name, p in model.named_parameters():
        assert p.isfinite().all()
        assert not torch.equal(p, before[name])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell", "MultiheadAttention"]
)
def test_dtypes_of_autocast_on_a_gpu(name, dtype):
    """Every output, states and weights of attention too, is of the dtype that stock layers give."""
    x = torch.randn(5, 8, device="cuda")
    found = []
    for kinds in (nn, stock):
        layer = getattr(kinds, name)(8, 2, device="cuda")
        with torch.autocast("cuda", dtype):
            outputs = layer(x, x, x) if name == "MultiheadAttention" else layer(x)
        found.append([t.dtype for t in flat_tensors(outputs)])
    assert found[0] == found[1]


def test_deterministic_algorithms():
    """Nothing refuses to run where torch's flag forbids what differs from run to run."""
    model, (x, target) = Model(nn, dropout=0.3), batch(torch.float32, grad=True)
    torch.use_deterministic_algorithms(True, warn_only=False)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(gradients(model, model(x, target), x))
    equal(*results)


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrisations(norm):
    """A weight computed anew at each use, in training and in evaluation, with its gradients."""
    models, (x, target) = twins(dtype=torch.float64), batch(grad=True)
    names = {"rnn": "weight_ih_l0", "gru": "weight_hh_l0_reverse", "lstm": "weight_hh_l1"}
    names |= {"attention": "in_proj_weight", "cell": "weight_hh", "loss": "weight"}
    names |= {"cells.0": "weight_ih", "cells.1": "weight_hh"}
    results = []
    for model in models:
        torch.manual_seed(2)  # of the vectors that spectral_norm iterates
        for layer, weight in names.items():
            norm(model.get_submodule(layer), weight)
        with cached():  # one iteration a call, however often a layer reads its weight
            results.append(gradients(model, model(x, target), x))
        model.eval()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)
            results[-1].append(model(x, target))
    torch.testing.assert_close(*results, **TIGHT)
