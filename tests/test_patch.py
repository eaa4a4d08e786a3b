"""One line makes a program ours, and another one takes it back."""

import copy
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pykernels
from pykernels import _backends, patch
from pykernels.testing import assert_close

TIGHT = {"rtol": 1e-10, "atol": 1e-11}
KINDS = {
    "RNN": lambda: nn.RNN(5, 7, 2, nonlinearity="relu", bidirectional=True),
    "GRU": lambda: nn.GRU(5, 7, 2, batch_first=True),
    "LSTM": lambda: nn.LSTM(5, 7, 2, proj_size=3, dropout=0.1),
    "RNNCell": lambda: nn.RNNCell(5, 7),
    "GRUCell": lambda: nn.GRUCell(5, 7, bias=False),
    "LSTMCell": lambda: nn.LSTMCell(5, 7),
    "MultiheadAttention": lambda: nn.MultiheadAttention(8, 2, kdim=3, batch_first=True),
}


def leaves(outputs):
    if torch.is_tensor(outputs):
        return [outputs]
    return [t for part in outputs if part is not None for t in leaves(part)]


class Everything(nn.Module):
    """A model with each kind of layer, at different depths, and one of them twice."""

    def __init__(self):
        super().__init__()
        self.cells = nn.ModuleList([nn.RNNCell(6, 6), nn.GRUCell(6, 6), nn.LSTMCell(6, 6)])
        self.body = nn.ModuleDict({"rnn": nn.RNN(6, 6), "more": nn.Sequential(nn.Linear(6, 6))})
        self.gru, self.lstm = nn.GRU(6, 6), nn.LSTM(6, 6)
        self.tied = self.gru
        self.attention = nn.MultiheadAttention(6, 2)

    def forward(self, x):
        x = torch.stack([cell(row, None) for cell, row in zip(self.cells[:2], x[:2], strict=True)])
        x = x + self.cells[2](x[0])[0]
        x, _ = self.tied(self.gru(self.body["more"](self.body["rnn"](x)[0]))[0])
        x, _ = self.lstm(x)
        return self.attention(x, x, x)[0]


class TestReplaceModules:
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_model_itself(self, kind):
        layer = KINDS[kind]()
        parameters, state = list(layer.parameters()), copy.deepcopy(layer.state_dict())
        found = pykernels.replace_modules(layer)
        assert type(found) is getattr(pykernels.nn, kind)
        assert all(a is b for a, b in zip(found.parameters(), parameters, strict=True))
        assert found.state_dict().keys() == state.keys()
        assert all(torch.equal(found.state_dict()[name], state[name]) for name in state)
        assert pykernels.restore_modules(found) is found
        assert type(found) is getattr(nn, kind)

    def test_outputs_and_gradients(self):
        model = Everything().double()
        x, found = torch.randn(2, 3, 6, dtype=torch.float64), []
        for change in (lambda m: m, pykernels.replace_modules, pykernels.restore_modules):
            assert change(model) is model
            out = model(x)
            up = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).double()
            found.append([out, *torch.autograd.grad(out, list(model.parameters()), up)])
        for ours, back, stock in zip(found[1], found[2], found[0], strict=True):
            torch.testing.assert_close(ours, stock, **TIGHT)
            assert torch.equal(back, stock)

    def test_every_layer_is_replaced_and_restored(self):
        model = Everything()
        before = {name: type(module) for name, module in model.named_modules()}
        pykernels.replace_modules(model)
        ours = {n for n, m in model.named_modules() if type(m).__module__.startswith("pykernels")}
        assert ours == {
            "cells.0",
            "cells.1",
            "cells.2",
            "body.rnn",
            "gru",
            "lstm",
            "attention",
        }
        assert model.tied is model.gru
        pykernels.replace_modules(model)  # again does nothing
        pykernels.restore_modules(model)
        assert {name: type(module) for name, module in model.named_modules()} == before

    def test_optimizers_hooks_and_flags_go_on(self):
        model = nn.Sequential(nn.GRU(5, 7), nn.Identity()).eval()
        model[0].train()
        model[0].weight_ih_l0.requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        calls = []
        model[0].register_forward_hook(lambda *_: calls.append("forward"))
        model[0].register_forward_pre_hook(lambda *_: calls.append("before"))
        model[0].register_full_backward_hook(lambda *_: calls.append("backward"))
        pykernels.replace_modules(model)
        assert model[0].training
        assert not model.training
        assert not model[0].weight_ih_l0.requires_grad
        before = model[0].weight_hh_l0.clone()
        model[0](torch.randn(4, 3, 5, requires_grad=True))[0].sum().backward()
        optimizer.step()
        assert calls == ["before", "forward", "backward"]
        assert not torch.equal(model[0].weight_hh_l0, before)

    def test_subclasses_are_left_alone(self, capsys):
        class Own(nn.LSTM):
            pass

        normed = nn.utils.parametrizations.weight_norm(nn.GRU(5, 7), "weight_hh_l0")
        wrapped = nn.RNN(5, 7)
        wrapped.forward = lambda x: x
        model = nn.ModuleList([Own(5, 7), normed, wrapped, pykernels.nn.RNN(5, 7), nn.RNN(5, 7)])
        before = list(map(type, model))
        pykernels.replace_modules(model, verbose=True)
        assert list(map(type, model)) == [*before[:4], pykernels.nn.RNN]
        assert capsys.readouterr().out.splitlines() == [
            "replace_modules: 0: Own, left alone: a subclass",
            "replace_modules: 1: ParametrizedGRU, left alone: a subclass",
            "replace_modules: 2: RNN, left alone: it has a forward of its own",
            "replace_modules: 4: pykernels.nn.rnn.RNN",
        ]

    def test_it_says_what_it_did(self, capsys):
        pykernels.replace_modules(nn.GRU(5, 7), verbose=True)
        pykernels.replace_modules(nn.Linear(5, 7), verbose=True)
        pykernels.restore_modules(pykernels.nn.GRU(5, 7), verbose=True)
        pykernels.restore_modules(nn.Linear(5, 7), verbose=True)
        pykernels.replace_modules(nn.GRU(5, 7))
        assert capsys.readouterr().out.splitlines() == [
            "replace_modules: the model itself: pykernels.nn.gru.GRU",
            "replace_modules: nothing to replace",
            "restore_modules: the model itself: torch.nn.modules.rnn.GRU",
            "restore_modules: nothing to restore",
        ]

    def test_bad_model(self):
        for change in (pykernels.replace_modules, pykernels.restore_modules):
            words = f"{change.__name__}: `model` must be a torch.nn.Module, got list"
            with pytest.raises(TypeError, match=words):
                change([nn.GRU(5, 7)])

    def test_packed_weights_are_forgotten(self):
        """Weights packed in evaluation do not outlive the class that packed them."""
        layer = pykernels.replace_modules(nn.LSTM(5, 7)).eval()
        with torch.no_grad():
            layer(torch.randn(4, 3, 5))
        assert "_packed_weights" in layer.__dict__
        pykernels.restore_modules(layer)
        assert layer.__dict__.keys() == nn.LSTM(5, 7).__dict__.keys()

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_and_pickles(self, copied):
        model = copied(pykernels.replace_modules(Everything()))
        assert type(model.lstm) is pykernels.nn.LSTM
        assert model.tied is model.gru
        assert type(pykernels.restore_modules(model).lstm) is nn.LSTM


def transformer(**options):
    options = {"dtype": torch.float64, "dropout": 0.0} | options
    model = nn.Transformer(8, 2, 2, 2, 16, batch_first=True, **options)
    with torch.no_grad():  # biases start at zero, where a forgotten one would not show
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def attended(monkeypatch):
    """The number of calls of our attention by our layers."""
    calls, real = [], pykernels.functional.attention

    def spy(*args, **options):
        calls.append(args[0].shape)
        return real(*args, **options)

    monkeypatch.setattr(pykernels.functional, "attention", spy)
    return calls


class TestTransformer:
    """torch's encoder and decoder with our attention in them."""

    @pytest.mark.parametrize("masked", ["none", "causal", "padding", "both"])
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("norm_first", [True, False])
    @pytest.mark.filterwarnings("ignore:enable_nested_tensor")
    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    @pytest.mark.filterwarnings("ignore:Support for mismatched")
    def test_as_torch(self, masked, training, norm_first, attended):
        theirs = transformer(norm_first=norm_first).train(training)
        ours = pykernels.replace_modules(copy.deepcopy(theirs))
        source, target = (torch.randn(3, n, 8, dtype=torch.float64) for n in (7, 5))
        options = {}
        if masked in ("causal", "both"):
            mask = nn.Transformer.generate_square_subsequent_mask
            options |= {"tgt_mask": mask(5), "tgt_is_causal": True}
            options |= {"src_mask": mask(7), "src_is_causal": True}
        if masked in ("padding", "both"):
            keys = torch.arange(7) >= torch.tensor([[7], [4], [2]])
            options |= {"src_key_padding_mask": keys, "memory_key_padding_mask": keys}
            options |= {"tgt_key_padding_mask": keys[:, :5]}
        outs = [model(source, target, **options) for model in (ours, theirs)]
        torch.testing.assert_close(*outs, **TIGHT)
        assert len(attended) == 6  # 2 layers in the encoder; 2, each with 2, in the decoder
        upstream = torch.randn_like(outs[0])
        grads = [
            torch.autograd.grad(out, list(model.parameters()), upstream)
            for out, model in zip(outs, (ours, theirs), strict=True)
        ]
        torch.testing.assert_close(*grads, **TIGHT)

    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    def test_evaluation_without_gradients(self, padded, attended):
        """Where torch would run its own path: past our attention, or on nested tensors."""
        theirs = transformer().encoder.eval()
        ours = copy.deepcopy(theirs)
        x = torch.randn(3, 7, 8, dtype=torch.float64)
        mask = torch.arange(7) >= torch.tensor([[7], [4], [2]]) if padded else None
        with torch.no_grad():
            expected = theirs(x, src_key_padding_mask=mask)
            assert torch.equal(ours(x, src_key_padding_mask=mask), expected)
            assert not attended
            out = pykernels.replace_modules(ours)(x, src_key_padding_mask=mask)
            assert len(attended) == 2
            seen = slice(None) if mask is None else ~mask  # torch zeroes what is padding
            torch.testing.assert_close(out[seen], expected[seen], **TIGHT)
            pykernels.restore_modules(ours)
            assert torch.equal(ours(x, src_key_padding_mask=mask), expected)
        assert len(attended) == 2
        for one, two in zip(ours.modules(), theirs.modules(), strict=True):
            assert one.__dict__.keys() == two.__dict__.keys()

    def test_twice_and_back(self):
        encoder = transformer().encoder
        before = (encoder.use_nested_tensor, encoder.layers[0].activation_relu_or_gelu)
        pykernels.replace_modules(pykernels.replace_modules(encoder))
        assert (encoder.use_nested_tensor, encoder.layers[0].activation_relu_or_gelu) != before
        pykernels.restore_modules(pykernels.restore_modules(encoder))
        assert (encoder.use_nested_tensor, encoder.layers[0].activation_relu_or_gelu) == before

    @pytest.mark.parametrize("training", [True, False])
    def test_dropout_of_the_layers(self, training):
        """In training the layers drop, and in evaluation nothing does."""
        model = pykernels.replace_modules(transformer(dropout=0.5)).train(training)
        x = torch.randn(2, 5, 8, dtype=torch.float64)
        assert torch.equal(model(x, x), model(x, x)) != training


@pytest.fixture(autouse=True)
def inactive():
    yield
    pykernels.deactivate()
    assert patch._state._library is None


@pytest.fixture
def served(monkeypatch):
    """The calls that reached our kernel, forward and backward, whichever way."""
    extension, calls = _backends.load_extension(), []
    for name, called in (("attention_forward", "fwd"), ("attention_backward", "bwd")):
        monkeypatch.setattr(extension, name, spy(calls, called, getattr(extension, name)))
    return calls


def spy(calls, name, real):
    def run(*args, **options):
        calls.append(name)
        return real(*args, **options)

    return run


def operands(*sizes, kv=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(4)
    *lead, S_q, S_k, D = sizes
    shapes = [(*lead, S_q, D)] + 2 * [(*(lead if kv is None else kv), S_k, D)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def results(function, tensors):
    """Output and gradients under a random upstream gradient."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    out = function(*tensors)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, upstream)]


def hidden(*shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(6)) > 0.3
    mask[..., 0] = True
    return mask


sdpa = F.scaled_dot_product_attention
# What stock torch has a CPU kernel for, and what it has none for.
FUSED = {
    "plain": ((2, 4, 5, 7, 8), None, {}),
    "causal": ((2, 4, 9, 9, 8), None, {"is_causal": True, "scale": 0.3}),
    "boolean": ((2, 4, 5, 7, 8), None, {"attn_mask": hidden(5, 7)}),
    "boolean 4-D": ((2, 4, 5, 7, 8), None, {"attn_mask": hidden(2, 1, 5, 7)}),
    "additive": ((2, 4, 5, 7, 8), None, {"attn_mask": hidden(5, 7).double(), "scale": 2.0}),
    "boolean and causal": ((2, 4, 7, 7, 8), None, {"attn_mask": hidden(7, 7), "is_causal": True}),
    "grouped": ((2, 4, 5, 7, 8), (2, 2), {"enable_gqa": True}),
    "no scale": ((2, 4, 5, 7, 8), None, {"scale": 0.0}),
    "negative scale": ((2, 4, 5, 7, 8), None, {"scale": -0.5}),
}
OTHERS = {
    "2-D": ((5, 7, 8), None, {}),
    "3-D": ((4, 5, 7, 8), None, {"is_causal": True}),
    "5-D": ((2, 3, 4, 5, 7, 8), None, {"attn_mask": hidden(3, 1, 5, 7)}),
    "grouped 3-D": ((4, 5, 7, 8), (2,), {"enable_gqa": True}),
    "mask 3-D": ((2, 4, 5, 7, 8), None, {"attn_mask": hidden(4, 5, 7)}),
}
ALL = FUSED | OTHERS


class TestActivate:
    @pytest.mark.parametrize("case", ALL)
    def test_forward_and_backward(self, case, served):
        sizes, kv, options = ALL[case]
        tensors = operands(*sizes, kv=kv)

        def run(*given):
            return F.scaled_dot_product_attention(*given, **options)

        expected = results(run, tensors)
        assert not served
        with pykernels.activate():
            found = results(run, tensors)
        assert served == ["fwd", "bwd"]
        torch.testing.assert_close(found, expected, **TIGHT)
        results(run, tensors)
        assert served == ["fwd", "bwd"]

    @pytest.mark.parametrize("case", FUSED)
    @pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3)])
    def test_results_lie_as_torch_s(self, case, order, served):
        """The result as the query: programs view what they transpose back. Gradients as inputs."""
        sizes, kv, options = FUSED[case]
        tensors = operands(*sizes, kv=kv)
        tensors = [
            t.permute(order).contiguous().permute(np.argsort(order).tolist()) for t in tensors
        ]
        expected = sdpa(*tensors, **options)
        assert expected.stride() == tensors[0].stride()
        with pykernels.activate():
            found = results(lambda *given: sdpa(*given, **options), tensors)
        assert served == ["fwd", "bwd"]
        assert found[0].stride() == expected.stride()
        assert [t.stride() for t in found[1:]] == [t.stride() for t in tensors]
        torch.testing.assert_close(found[0], expected, **TIGHT)

    @pytest.mark.parametrize("case", FUSED)
    def test_torch_s_own_kernel(self, case, served):
        """What compiled programs call: results of the same values, strides and dtypes."""
        sizes, kv, options = FUSED[case]
        options = {name: given for name, given in options.items() if name != "enable_gqa"}
        if "attn_mask" in options and options["attn_mask"].dtype == torch.bool:
            number = torch.zeros(options["attn_mask"].shape, dtype=torch.float64)
            options["attn_mask"] = number.masked_fill(~options["attn_mask"], -torch.inf)
        causal = options.pop("is_causal", False)
        q, k, v = operands(*sizes, kv=kv)
        q = q.transpose(1, 2).contiguous().transpose(1, 2)  # as layers make it of [B, S, N * D]
        upstream = torch.randn_like(q)
        forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

        def run():
            out, lse = forward(q, k, v, 0.0, causal, **options)
            return out, lse, *backward(upstream, q, k, v, out, lse, 0.0, causal, **options)

        expected = run()
        with pykernels.activate():
            found = run()
        assert served == ["fwd", "bwd"]
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, two, **TIGHT)
        fake = forward(*(t.to("meta") for t in (q, k, v)), 0.0, causal)
        assert [t.stride() for t in found[:2]] == [t.stride() for t in fake]

    def test_a_query_that_sees_no_key(self):
        q, k, v = operands(1, 2, 3, 4, 8)
        mask = torch.zeros(3, 4, dtype=torch.float64)
        mask[1] = -torch.inf
        forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        with pykernels.activate():
            out, lse = forward(q, k, v, attn_mask=mask)
            grads = backward(torch.ones_like(out), q, k, v, out, lse, 0.0, False, attn_mask=mask)
        assert (out[:, :, 1] == 0).all()
        assert (grads[0][:, :, 1] == 0).all()
        assert all(grad.isfinite().all() for grad in grads)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("way", ["eager", "aten"])
    def test_exactness(self, dtype, way):
        """By the one rule, in each dtype, at both places where torch comes to us."""
        tensors = operands(2, 4, 33, 41, 16, dtype=dtype)

        def run(*given):
            if way == "eager":
                return F.scaled_dot_product_attention(*given)
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*given)[0]

        stock = results(run, tensors)
        truth = results(run, [t.double() for t in tensors])
        with pykernels.activate():
            found = results(run, tensors)
        assert not all(map(torch.equal, found, stock))
        for one, two, three in zip(found, truth, stock, strict=True):
            assert_close(one, two, three)

    @pytest.mark.parametrize("case", FUSED)
    def test_compiled(self, case, served):
        sizes, kv, options = FUSED[case]
        tensors = operands(*sizes, kv=kv)

        @torch.compile(backend="aot_eager", fullgraph=True)
        def run(*given):
            return F.scaled_dot_product_attention(*given, **options).sin()

        with pykernels.activate():
            found = results(run, tensors)
            assert served == ["fwd", "bwd"]
            results(run, tensors)
            assert served == 2 * ["fwd", "bwd"]
        expected = results(run, tensors)  # the same compiled program, on stock torch
        assert served == 2 * ["fwd", "bwd"]
        torch.testing.assert_close(found, expected, **TIGHT)
        torch._dynamo.reset()

    @pytest.mark.parametrize("grad", [True, False])
    def test_inductor(self, grad, served):
        """The whole compiler, which checks the strides of what it is given."""
        q, k, v = operands(2, 4, 17, 17, 16)

        @torch.compile(fullgraph=True)
        def run(q, k, v):
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return out.transpose(1, 2).flatten(2).cos()

        tensors = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
        with pykernels.activate(), torch.set_grad_enabled(grad):
            found = results(run, tensors) if grad else [run(*tensors)]
        assert served == (["fwd", "bwd"] if grad else ["fwd"])
        with torch.set_grad_enabled(grad):
            expected = results(run, tensors) if grad else [run(*tensors)]
        torch.testing.assert_close(found, expected, **TIGHT)
        torch._dynamo.reset()

    def test_inference_mode_and_no_grad(self, served):
        q, k, v = operands(2, 4, 5, 7, 8)
        expected = sdpa(q, k, v)
        with pykernels.activate():
            for context in (torch.inference_mode(), torch.no_grad()):
                with context:
                    torch.testing.assert_close(sdpa(q.clone(), k, v), expected, **TIGHT)
        assert served == ["fwd", "fwd"]

    def test_autocast(self, served):
        q, k, v = operands(2, 4, 5, 7, 8, dtype=torch.float32)
        with pykernels.activate(), torch.autocast("cpu", torch.bfloat16):
            assert sdpa(q, k, v).dtype == torch.bfloat16
        assert served == ["fwd"]

    def test_layers_of_stock_torch(self, served):
        """C++ and Python callers alike: here torch.nn's own attention."""
        layer = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
        x = torch.randn(2, 5, 8, dtype=torch.float64)
        expected = layer(x, x, x, need_weights=False)[0]
        with pykernels.activate():
            found = layer(x, x, x, need_weights=False)[0]
        torch.testing.assert_close(found, expected, **TIGHT)
        assert served == ["fwd"]

    def test_twice_differentiable(self):
        q, k, v = operands(1, 2, 3, 4, 4)
        with pykernels.activate():
            inputs = [t.requires_grad_() for t in (q, k, v)]
            assert torch.autograd.gradgradcheck(lambda *t: sdpa(*t), inputs)

    def test_learned_mask(self, served):
        q, k, v = operands(2, 4, 5, 7, 8)
        mask = torch.randn(4, 5, 7, dtype=torch.float64)

        def run(q, k, v, mask):
            return sdpa(q, k, v, mask)

        expected = results(run, [q, k, v, mask])
        with pykernels.activate():
            torch.testing.assert_close(results(run, [q, k, v, mask]), expected, **TIGHT)
        assert served == ["fwd", "bwd"]

    def test_values_of_another_width(self, served):
        q, k, v = operands(2, 4, 5, 7, 8)
        v = v[..., :3]
        expected = results(sdpa, [q, k, v])
        with pykernels.activate():
            torch.testing.assert_close(results(sdpa, [q, k, v]), expected, **TIGHT)
        assert served == ["fwd", "bwd"]

    def test_dropout(self, served):
        q, k, v = operands(2, 4, 50, 70, 8)
        with pykernels.activate():
            one, two = sdpa(q, k, v, dropout_p=0.5), sdpa(q, k, v, dropout_p=0.5)
        assert not torch.equal(one, two)
        assert served == ["fwd", "fwd"]

    def test_vmap_and_grad(self, served):
        q, k, v = operands(3, 2, 4, 5, 7, 8)

        def loss(*given):
            return sdpa(*given).square().sum()

        def both():
            return torch.func.vmap(sdpa)(q, k, v), *torch.func.grad(loss, (0, 1, 2))(
                q[0], k[0], v[0]
            )

        expected = both()
        with pykernels.activate():
            torch.testing.assert_close(both(), expected, **TIGHT)
        assert {"fwd", "bwd"} <= set(served)

    def test_a_graph_has_torch_s_operator(self):
        """What traces real tensors records torch's call, not the result of ours."""
        from torch.fx.experimental.proxy_tensor import make_fx

        q, k, v = operands(2, 4, 5, 7, 8)
        with pykernels.activate():
            graph = make_fx(sdpa)(q, k, v)
        names = {str(node.target) for node in graph.graph.nodes}
        assert any("scaled_dot_product" in name for name in names)
        other = torch.randn_like(q)
        torch.testing.assert_close(graph(other, k, v), sdpa(other, k, v), **TIGHT)

    def test_fake_tensors(self):
        from torch._subclasses import FakeTensorMode

        with pykernels.activate(), FakeTensorMode():
            out = sdpa(*(torch.randn(2, 4, n, 8) for n in (5, 7, 7)))
        assert out.shape == (2, 4, 5, 8)

    def test_what_the_user_chose_is_kept(self, served):
        q, k, v = operands(2, 4, 5, 7, 8)
        with pykernels.activate():
            with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
                sdpa(q, k, v)
            assert not served
            sdpa(q, k, v)
        assert served == ["fwd"]

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    def test_what_goes_on_to_stock(self, served):
        """Subclasses, nested and meta tensors, shapes that only broadcast."""

        class Own(torch.Tensor):
            pass

        q, k, v = operands(2, 4, 5, 7, 8)
        nested = torch.nested.nested_tensor([torch.randn(4, 3, 8), torch.randn(4, 3, 8)])
        with pykernels.activate():
            assert type(sdpa(q.as_subclass(Own), k, v)) is Own
            assert sdpa(nested, nested, nested).is_nested
            assert sdpa(*(t.to("meta") for t in (q, k, v))).device.type == "meta"
            served.clear()
            assert sdpa(q, k[:1], v[:1]).shape == q.shape
        assert not served

    @pytest.mark.parametrize(
        "make",
        [
            lambda q, k, v: sdpa(q, k[..., :4], v),
            lambda q, k, v: sdpa(q, k.float(), v),
            lambda q, k, v: sdpa(q, k, v, torch.ones(3, 3, dtype=torch.bool)),
            lambda q, k, v: sdpa(q, k[:, :3], v[:, :3], enable_gqa=True),
            lambda q, k, v: sdpa(q, k, v, dropout_p=2.0),
            lambda q, k, v: sdpa(q[0, 0, 0], k, v),
        ],
    )
    def test_errors_are_torch_s(self, make):
        tensors = operands(2, 4, 5, 7, 8)
        words = []
        for activated in (False, True):
            if activated:
                pykernels.activate()
            with pytest.raises((RuntimeError, TypeError, IndexError)) as caught:
                make(*tensors)
            words.append((caught.type, str(caught.value)))
        assert words[0] == words[1]

    def test_off_until_asked_for(self, served):
        sdpa(*operands(2, 4, 5, 7, 8))
        assert not served

    def test_nested_and_repeated(self):
        def active():
            return patch._state._library is not None

        assert not active()
        with pykernels.activate():
            with pykernels.activate():
                assert active()
            assert active()
        assert not active()
        pykernels.activate()
        pykernels.activate()
        with pykernels.activate():
            assert active()
        assert active()
        pykernels.deactivate()
        assert not active()
        pykernels.deactivate()
        with pykernels.activate():
            pykernels.deactivate()
            assert active()  # a block runs to its end
        assert not active()
        with pytest.raises(KeyError, match="inside"), pykernels.activate():
            raise KeyError("inside")
        assert not active()
        block = pykernels.activate()
        with block:
            pass
        pykernels.activate()
        with block:  # entered again it takes no other call's place
            pass
        assert active()
        pykernels.deactivate()

    def test_from_several_threads(self):
        q, k, v = operands(2, 4, 5, 7, 8)
        expected, wrong = sdpa(q, k, v), []

        def work():
            for _ in range(20):
                with pykernels.activate():
                    if patch._state._library is None or not torch.allclose(sdpa(q, k, v), expected):
                        wrong.append(1)

        threads = [threading.Thread(target=work) for _ in range(4)]
        with pykernels.activate():  # the last one out would take it from under a call
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert not wrong
        assert patch._state._library is None

    @pytest.mark.skipif(
        not hasattr(nn.attention, "activate_flash_attention_impl"),
        reason="this torch has no registry of attention",
    )
    def test_torch_s_registry(self, served):
        q, k, v = operands(2, 4, 5, 7, 8)
        assert "pykernels" in nn.attention.list_flash_attention_impls()
        nn.attention.activate_flash_attention_impl("pykernels")
        sdpa(q, k, v)
        assert served == ["fwd"]
        nn.attention.restore_flash_attention_impl()
        sdpa(q, k, v)
        assert served == ["fwd"]

    def test_no_word_is_said(self):
        """Neither the import nor the registration warns, and torch is as it was at the end."""
        program = (
            "import torch, pykernels\n"
            "q = torch.randn(1, 2, 3, 8)\n"
            "f = torch.nn.functional.scaled_dot_product_attention\n"
            "before = f(q, q, q)\n"
            "with pykernels.activate():\n"
            "    torch.testing.assert_close(f(q, q, q), before)\n"
            "assert torch.equal(f(q, q, q), before)\n"
        )
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == done.stderr == ""
