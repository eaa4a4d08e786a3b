"""The drop-in layers against torch.nn's: the same numbers in every form of call."""

import copy
import inspect
import itertools
import pickle
import re

import numpy as np
import pytest
import torch
from torch import nn

import pykernels
from pykernels.nn import GRU, LSTM, RNN, GRUCell, LSTMCell, MultiheadAttention, RNNCell
from pykernels.testing.evaluate import flat

# The same arithmetic in another order, in float64.
TIGHT = {"rtol": 1e-11, "atol": 1e-12}


def twins(ours, theirs):
    """Ours and torch's layer with the same parameters, moved through state_dict both ways."""
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    return ours, theirs


def leaf(given):
    """A copy of a tensor, or of a tuple of them, that needs a gradient."""
    if torch.is_tensor(given):
        return given.clone().requires_grad_()
    return tuple(leaf(t) for t in given)


def same(ours, theirs, *inputs, sow=None, **options):
    """Outputs, and gradients of inputs and parameters under random upstream gradients, agree.

    `sow` seeds the generator before each call, for layers that drop.
    """
    results = []
    for layer in (ours, theirs):
        leaves = [leaf(t) for t in inputs]
        given = {n: t.clone() if torch.is_tensor(t) else t for n, t in options.items()}
        if sow is not None:
            torch.manual_seed(sow)
        outs = layer(*leaves, **given)
        outs = flat([out for out in ([outs] if torch.is_tensor(outs) else outs) if out is not None])
        generator = torch.Generator().manual_seed(7)
        ups = [torch.randn(out.shape, generator=generator, dtype=out.dtype) for out in outs]
        wanted = [*flat(leaves), *layer.parameters()]
        grads = torch.autograd.grad(outs, wanted, ups, allow_unused=True)
        results.append((outs, grads))
    (outs, grads), (their_outs, their_grads) = results
    assert len(outs) == len(their_outs)
    for one, two in zip(outs, their_outs, strict=True):
        torch.testing.assert_close(one, two, **TIGHT)
    for one, two in zip(grads, their_grads, strict=True):
        if two is None or one is None:
            assert one is two or (one if two is None else two).count_nonzero() == 0
        else:
            torch.testing.assert_close(one, two, **TIGHT)
    return outs


LAYERS = {"RNN": (RNN, nn.RNN), "GRU": (GRU, nn.GRU), "LSTM": (LSTM, nn.LSTM)}
CELLS = {
    "RNN": (RNNCell, nn.RNNCell),
    "GRU": (GRUCell, nn.GRUCell),
    "LSTM": (LSTMCell, nn.LSTMCell),
}
# Each kind of layer with each option that it alone has.
KINDS = [
    ("RNN", {"nonlinearity": "tanh"}),
    ("RNN", {"nonlinearity": "relu"}),
    ("GRU", {}),
    ("LSTM", {}),
    ("LSTM", {"proj_size": 3}),
]
kinds = pytest.mark.parametrize(("kind", "own"), KINDS, ids=str)
every = pytest.mark.parametrize("kind", LAYERS)


def layers(kind, *args, **options):
    """Our layer and torch's with the same parameters."""
    ours, theirs = LAYERS[kind]
    return twins(ours(*args, **options), theirs(*args, **options))


def first_states(layer, B, dtype=torch.float64):
    """Random first states of a layer on a batch of B, as it takes them; of one sequence if None."""
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    batch = () if B is None else (B,)
    h = torch.randn(count, *batch, layer.proj_size or layer.hidden_size, dtype=dtype)
    if layer.mode != "LSTM":
        return h
    return h, torch.randn(count, *batch, layer.hidden_size, dtype=dtype)


PACKS = {
    "sorted": (5, 3, 3, 1),
    "unsorted": (3, 5, 1, 3),
    "equal": (4, 4, 4, 4),
    "one": (5,),
}


def pack(lengths, enforce_sorted, size=5, dtype=torch.float64):
    sequences = [torch.randn(length, size, dtype=dtype) for length in lengths]
    return nn.utils.rnn.pack_sequence(sequences, enforce_sorted=enforce_sorted)


class TestLayers:
    @kinds
    @pytest.mark.parametrize("bidirectional", [False, True])
    @pytest.mark.parametrize("count", [1, 3])
    @pytest.mark.parametrize("batch_first", [False, True])
    @pytest.mark.parametrize("batched", [True, False])
    def test_as_torch(self, kind, own, bidirectional, count, batch_first, batched):
        for bias, state in itertools.product((True, False), repeat=2):
            options = {
                "num_layers": count,
                "bias": bias,
                "batch_first": batch_first,
                "bidirectional": bidirectional,
                "dtype": torch.float64,
            }
            ours, theirs = layers(kind, 5, 7, **options, **own)
            x = torch.randn(*((4, 3) if batched else (4,)), 5, dtype=torch.float64)
            B = (4 if batch_first else 3) if batched else None
            hx = first_states(ours, B)
            y, *last = same(ours, theirs, x, *([hx] if state else []))
            assert y.shape[:-1] == x.shape[:-1]
            for one, two in zip(last, [hx] if torch.is_tensor(hx) else hx, strict=True):
                assert one.shape == two.shape

    @kinds
    @pytest.mark.parametrize("lengths", PACKS)
    @pytest.mark.parametrize("enforce_sorted", [True, False])
    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_packed_sequence(self, kind, own, lengths, enforce_sorted, bidirectional):
        if enforce_sorted and lengths == "unsorted":
            return
        options = {"num_layers": 2, "bidirectional": bidirectional, "dtype": torch.float64}
        ours, theirs = layers(kind, 5, 7, **options, **own)
        packed = pack(PACKS[lengths], enforce_sorted)

        class Packed(nn.Module):
            """A layer as a function of the packed rows, which have a gradient."""

            def __init__(self, layer):
                super().__init__()
                self.layer = layer

            def forward(self, data, *hx):
                y, last = self.layer(packed._replace(data=data), *hx)
                assert isinstance(y, nn.utils.rnn.PackedSequence)
                for one, two in zip(y[1:], packed[1:], strict=True):
                    assert (one is None and two is None) or torch.equal(one, two)
                return y.data, last

        pair = Packed(ours), Packed(theirs)
        same(*pair, packed.data)
        same(*pair, packed.data, first_states(ours, len(PACKS[lengths])))

    @every
    def test_packed_with_dropout_draws_what_torch_draws(self, kind):
        options = {"num_layers": 2, "dropout": 0.4, "dtype": torch.float64}
        ours, theirs = layers(kind, 5, 7, **options)
        packed = pack((3, 5, 1), enforce_sorted=False)
        results = []
        for layer in (ours, theirs):
            torch.manual_seed(3)
            results.append(layer(packed)[0].data)
        torch.testing.assert_close(*results, **TIGHT)

    @every
    @pytest.mark.parametrize("batch_first", [False, True])
    @pytest.mark.parametrize("bidirectional", [False, True])
    def test_dropout_draws_what_torch_draws(self, kind, batch_first, bidirectional):
        options = {
            "num_layers": 3,
            "dropout": 0.4,
            "batch_first": batch_first,
            "bidirectional": bidirectional,
            "dtype": torch.float64,
        }
        ours, theirs = layers(kind, 5, 7, **options)
        x = torch.randn(4, 3, 5, dtype=torch.float64)
        same(ours, theirs, x, sow=3)
        assert not torch.equal(ours(x)[0], ours(x)[0])
        ours.eval(), theirs.eval()
        same(ours, theirs, x)
        assert torch.equal(ours(x)[0], ours(x)[0])

    @pytest.mark.parametrize(
        ("kind", "args"),
        [
            ("RNN", (5, 7, 2, "relu", False, True, 0.1, True)),
            ("GRU", (5, 7, 2, False, True, 0.1, True)),
            ("LSTM", (5, 7, 2, False, True, 0.1, True, 3)),
        ],
    )
    def test_positional_arguments_of_the_constructor(self, kind, args):
        ours, theirs = layers(kind, *args)
        assert repr(ours) == repr(theirs)
        assert isinstance(ours, LAYERS[kind][1])
        assert [len(w) for w in ours.all_weights] == [len(w) for w in theirs.all_weights]
        ours.flatten_parameters()
        torch.manual_seed(1), ours.reset_parameters()
        torch.manual_seed(1), theirs.reset_parameters()
        for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(one, two)

    @pytest.mark.parametrize(
        ("kind", "options", "error"),
        [
            ("RNN", {"proj_size": 2}, ValueError),
            ("GRU", {"proj_size": 2}, ValueError),
            ("LSTM", {"proj_size": 7}, ValueError),
            ("LSTM", {"num_layers": 0}, ValueError),
            ("GRU", {"dropout": 2}, ValueError),
            ("RNN", {"nonlinearity": "gelu"}, ValueError),
            ("GRU", {"bias": 1}, TypeError),
        ],
    )
    def test_bad_constructor(self, kind, options, error):
        for layer in LAYERS[kind]:
            with pytest.raises(error):
                layer(5, 7, **options)

    @kinds
    def test_empty_batch_and_sequence(self, kind, own):
        ours, theirs = layers(kind, 5, 7, 2, **own)
        x = torch.randn(4, 0, 5)
        for one, two in zip(flat(ours(x)), flat(theirs(x)), strict=True):
            assert one.shape == two.shape
        for options, shape in (({}, (0, 3, 5)), ({"batch_first": True}, (3, 0, 5)), ({}, (0, 5))):
            ours, theirs = layers(kind, 5, 7, 2, **own, **options)
            words = re.escape(f"{kind}: `input` must be of one step at least, got {list(shape)}")
            with pytest.raises(ValueError, match=words):
                ours(torch.randn(shape))
            with pytest.raises(RuntimeError, match="larger than 0"):
                theirs(torch.randn(shape))

    @kinds
    def test_copies_and_pickles(self, kind, own):
        layer = LAYERS[kind][0](5, 7, 2, bidirectional=True, **own)
        x = torch.randn(4, 3, 5)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert type(other) is type(layer)
            assert torch.equal(other(x)[0], layer(x)[0])

    @every
    def test_dtypes(self, kind):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            for layer in (LAYERS[kind][0](5, 7).to(dtype), LAYERS[kind][0](5, 7, dtype=dtype)):
                outs = flat(layer(torch.randn(4, 3, 5, dtype=dtype)))
                assert {out.dtype for out in outs} == {dtype}

    @every
    def test_device(self, kind):
        assert LAYERS[kind][0](5, 7, device="meta").weight_hh_l0.device.type == "meta"

    @every
    @pytest.mark.parametrize("form", ["batch", "single", "packed"])
    @pytest.mark.parametrize("bidirectional", [False, True])
    @pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
    def test_autocast(self, kind, form, bidirectional, half):
        """Values and dtypes are torch's, whatever those of the input and of the first state.

        torch's kernel of an LSTM on padded batches gives autocast's dtype, where the processor has
        it; values are compared without.
        """
        ours, theirs = layers(kind, 5, 7, 2, bidirectional=bidirectional)
        kernel = kind == "LSTM" and form != "packed"
        for of_x, of_hx in itertools.product((torch.float32, half), (None, torch.float32, half)):
            x = torch.randn(4, 3, 5, dtype=of_x)
            x = pack((3, 4, 1), False, 5, of_x) if form == "packed" else x
            x = x[:, 0] if form == "single" else x
            B = None if form == "single" else 3
            given = (x,) if of_hx is None else (x, first_states(ours, B, of_hx))
            with torch.autocast("cpu", half), torch.backends.mkldnn.flags(enabled=not kernel):
                for one, two in zip(flat(ours(*given)), flat(theirs(*given)), strict=True):
                    assert one.dtype == (half if kernel else two.dtype)
                    torch.testing.assert_close(one.float(), two.float(), rtol=3e-2, atol=3e-2)

    @kinds
    def test_parametrised_weight(self, kind, own):
        """A weight that torch recomputes at each use is read at each use."""
        ours, theirs = layers(kind, 5, 7, dtype=torch.float64, **own)
        for layer in (ours, theirs):
            torch.manual_seed(2)
            nn.utils.parametrizations.spectral_norm(layer, "weight_hh_l0")
            layer.eval()
        x = torch.randn(4, 3, 5, dtype=torch.float64)
        weights = [getattr(ours, f"{name}_l0") for name in ("weight_ih", "weight_hh")]
        weights += [ours.bias_ih_l0, ours.bias_hh_l0]
        rest = {"w_hr": ours.weight_hr_l0} if ours.proj_size else {}
        rest |= {"nonlinearity": ours.nonlinearity} if kind == "RNN" else {}
        expected = getattr(pykernels.functional, kind.lower())(x, *weights, **rest)
        assert torch.equal(ours(x)[0], expected[0])

    @every
    def test_help(self, kind):
        """It names what the constructor takes and what the layer holds; its example runs."""
        layer = LAYERS[kind][0]
        words, _, example = inspect.getdoc(layer).partition("Example::")
        takes = {*inspect.signature(nn.RNNBase.__init__).parameters} - {"self", "mode", "proj_size"}
        takes |= {"RNN": {"nonlinearity"}, "LSTM": {"proj_size"}}.get(kind, set())
        holds = {name.replace("l0", "l[k]") for name, _ in layer(2, 3).named_parameters()}
        assert all(name in words for name in takes | holds)
        exec(inspect.cleandoc(example), {"pykernels": pykernels, "torch": torch})

    @every
    def test_functional_call(self, kind):
        ours, theirs = layers(kind, 5, 7, dtype=torch.float64)
        other = {name: torch.randn_like(t) for name, t in ours.named_parameters()}
        x = torch.randn(4, 3, 5, dtype=torch.float64)
        one, two = (torch.func.functional_call(layer, other, (x,)) for layer in (ours, theirs))
        torch.testing.assert_close(one[0], two[0], **TIGHT)
        assert not torch.equal(ours(x)[0], one[0])

    @every
    def test_tied_frozen_and_transposed_weights(self, kind):
        ours, theirs = layers(kind, 7, 7, 2, dtype=torch.float64)
        x = torch.randn(4, 3, 7, dtype=torch.float64)
        for layer in (ours, theirs):
            layer.weight_hh_l1 = layer.weight_hh_l0
            layer.weight_ih_l1 = nn.Parameter(layer.weight_ih_l1.detach().T.contiguous().T)
            layer.bias_ih_l0.requires_grad_(False)
            layer.zero_grad()
            layer(x)[0].square().sum().backward()
        assert ours.bias_ih_l0.grad is None
        for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
            if two.grad is not None:
                torch.testing.assert_close(one.grad, two.grad, **TIGHT)

    @every
    def test_learns(self, kind):
        """A sum of a sequence's signs is learnt: gradients point downhill."""
        layer, head = LAYERS[kind][0](1, 16), nn.Linear(16, 1)
        parameters = [*layer.parameters(), *head.parameters()]
        optimizer = torch.optim.Adam(parameters, 1e-2)
        losses = []
        for _ in range(60):
            x = torch.randn(6, 32, 1)
            loss = (head(layer(x)[0][-1])[:, 0] - x.sign().sum(0)[:, 0]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert sum(losses[-10:]) < 0.5 * sum(losses[:10])

    @every
    @pytest.mark.parametrize(
        ("make", "error", "words"),
        [
            (lambda: ([1.0],), TypeError, "{}: `input` must be a Tensor, got list"),
            (
                lambda: (torch.randn(4),),
                ValueError,
                r"{}: `input` must be \[T, B, I\] or \[T, I\], got 1 dimensions: \[4\]",
            ),
            (
                lambda: (torch.randn(4, 3, 6),),
                ValueError,
                r"{}: `input` must be \[T, B, I\] = \[4, 3, 5\], got \[4, 3, 6\]",
            ),
            (
                lambda: (torch.randn(4, 6),),
                ValueError,
                r"{}: `input` must be \[T, I\] = \[4, 5\], got \[4, 6\]",
            ),
            (
                lambda: (torch.randn(4, 3, 5).double(),),
                TypeError,
                "`w_ih` must have the dtype of the input, torch.float64, got torch.float32",
            ),
            (
                lambda: (torch.ones(4, 3, 5, dtype=torch.int64),),
                TypeError,
                "must have a floating-point dtype, got torch.int64",
            ),
            (
                lambda: (pack((3, 1), True, 6, torch.float32),),
                ValueError,
                r"{}: `input.data` must be \[N, I\] = \[4, 5\], got \[4, 6\]",
            ),
        ],
    )
    def test_bad_input(self, kind, make, error, words):
        with pytest.raises(error, match=words.format(kind)):
            LAYERS[kind][0](5, 7, 2)(*make())
        with pytest.raises((TypeError, ValueError, RuntimeError, AttributeError)):
            LAYERS[kind][1](5, 7, 2)(*make())

    @every
    @pytest.mark.parametrize(
        ("shape", "state", "error", "words"),
        [
            (
                (4, 3, 5),
                torch.randn(3, 7),
                ValueError,
                r" must be \[layers \* directions, B, H\] = \[2, 3, 7\], got \[3, 7\]",
            ),
            (
                (4, 3, 5),
                torch.randn(1, 3, 7),
                ValueError,
                r" must be .* = \[2, 3, 7\], got \[1, 3, 7\]",
            ),
            (
                (4, 5),
                torch.randn(2, 1, 7),
                ValueError,
                r" must be \[layers \* directions, H\] = \[2, 7\], got \[2, 1, 7\]",
            ),
            (
                "packed",
                torch.randn(2, 3, 7),
                ValueError,
                r" must be \[layers \* directions, B, H\] = \[2, 2, 7\], got \[2, 3, 7\]",
            ),
            (
                (4, 3, 5),
                torch.randn(2, 3, 7).double(),
                TypeError,
                " must have the dtype of the input, torch.float32, got torch.float64",
            ),
            ((4, 3, 5), 0.5, TypeError, " must be a Tensor, got float"),
        ],
    )
    def test_bad_state(self, kind, shape, state, error, words):
        x = pack((3, 1), True, 5, torch.float32) if shape == "packed" else torch.randn(shape)
        name, hx = ("`hx`", state) if kind != "LSTM" else (r"`hx\[0\]`", (state, state))
        with pytest.raises(error, match=f"{kind}: {name}{words}"):
            LAYERS[kind][0](5, 7, 2)(x, hx)


class TestLSTM:
    @pytest.mark.parametrize(
        ("hx", "error", "words"),
        [
            (
                torch.randn(1, 3, 7),
                TypeError,
                r"LSTM: `hx` must be a pair \(h_0, c_0\) of Tensors, got Tensor",
            ),
            ((torch.randn(1, 3, 7),), TypeError, r"must be a pair \(h_0, c_0\) of Tensors, got 1"),
            (
                (torch.randn(1, 3, 7), torch.randn(1, 3, 7)),
                ValueError,
                r"LSTM: `hx\[0\]` must be \[layers \* directions, B, R\] = \[1, 3, 2\], got",
            ),
            (
                (torch.randn(1, 3, 2), torch.randn(1, 3, 2)),
                ValueError,
                r"LSTM: `hx\[1\]` must be \[layers \* directions, B, H\] = \[1, 3, 7\], got",
            ),
        ],
    )
    def test_bad_state(self, hx, error, words):
        with pytest.raises(error, match=words):
            LSTM(5, 7, proj_size=2)(torch.randn(4, 3, 5), hx)

    def test_the_states_may_be_a_list(self):
        layer, hx = LSTM(5, 7), (torch.randn(1, 3, 7), torch.randn(1, 3, 7))
        x = torch.randn(4, 3, 5)
        assert torch.equal(layer(x, hx)[0], layer(x, list(hx))[0])


class TestCells:
    @pytest.mark.parametrize("kind", ["RNN", "RNN relu", "GRU", "LSTM"])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("shape", [(3,), ()])
    @pytest.mark.parametrize("state", [True, False])
    def test_as_torch(self, kind, bias, shape, state):
        kind, *relu = kind.split()
        options = {"bias": bias, "dtype": torch.float64}
        options |= {"nonlinearity": "relu"} if relu else {}
        ours, theirs = (cell(5, 7, **options) for cell in CELLS[kind])
        twins(ours, theirs)
        assert repr(ours) == repr(theirs)
        x, *hx = (torch.randn(*shape, n, dtype=torch.float64) for n in (5, 7, 7))
        hx = tuple(hx) if kind == "LSTM" else hx[0]
        for out in same(ours, theirs, x, *([hx] if state else [])):
            assert out.shape == (*shape, 7)

    @every
    def test_unrolled_is_the_layer(self, kind):
        layer, cell = (made[kind][0](5, 7, dtype=torch.float64) for made in (LAYERS, CELLS))
        cell.load_state_dict(
            {name.removesuffix("_l0"): t for name, t in layer.state_dict().items()}
        )
        x = torch.randn(6, 3, 5, dtype=torch.float64)
        hx, steps = None, []
        for row in x:
            hx = cell(row, hx)
            steps.append(flat(hx)[0])
        torch.testing.assert_close(torch.stack(steps), layer(x)[0], **TIGHT)

    @pytest.mark.parametrize("kind", ["GRU", "LSTM"])  # of an RNNCell torch needs the state itself
    @pytest.mark.parametrize("shape", [(3,), ()])
    def test_a_state_may_be_written_to(self, kind, shape):
        """As whoever sets the states of sequences that have ended to zero does."""
        ours, theirs = twins(*(cell(5, 7, dtype=torch.float64) for cell in CELLS[kind]))
        x, found = torch.randn(4, *shape, 5, dtype=torch.float64), []
        for cell in (ours, theirs):
            hx = None
            for step in x:
                hx = cell(step, hx)
                for state in flat(hx):
                    state[..., ::2] = 0
            loss = sum(state.square().sum() for state in flat(hx))
            found.append(torch.autograd.grad(loss, list(cell.parameters())))
        torch.testing.assert_close(*found, **TIGHT)

    @every
    def test_sizes_of_numpy(self, kind):
        sizes = np.int64(5), np.prod((7, 1))
        ours, theirs = (cell(*sizes, dtype=torch.float64) for cell in CELLS[kind])
        same(*twins(ours, theirs), torch.randn(3, 5, dtype=torch.float64))

    @every
    def test_parametrised_weight(self, kind):
        ours, theirs = twins(*(cell(5, 7, dtype=torch.float64) for cell in CELLS[kind]))
        x = torch.randn(3, 5, dtype=torch.float64)
        for layer in (ours, theirs):
            nn.utils.parametrizations.weight_norm(layer, "weight_hh")
            with torch.no_grad():
                layer.parametrizations.weight_hh.original0.mul_(2)
        h, c = torch.randn(2, 3, 7, dtype=torch.float64)
        same(ours, theirs, x, (h, c) if kind == "LSTM" else h)

    @every
    def test_autocast(self, kind):
        """Values and dtypes are torch's, whatever those of the input and of the state."""
        half = torch.bfloat16
        ours, theirs = twins(*(cell(5, 7) for cell in CELLS[kind]))
        for of_x, of_hx in itertools.product((torch.float32, half), (None, torch.float32, half)):
            x, h = torch.randn(3, 5, dtype=of_x), torch.randn(3, 7, dtype=of_hx)
            hx = (h, h + 1) if kind == "LSTM" else h
            given = (x,) if of_hx is None else (x, hx)
            with torch.autocast("cpu", half):
                for one, two in zip(flat(ours(*given)), flat(theirs(*given)), strict=True):
                    assert one.dtype == two.dtype
                    torch.testing.assert_close(one.float(), two.float(), rtol=3e-2, atol=3e-2)

    @every
    def test_copies_and_pickles(self, kind):
        cell, x = CELLS[kind][0](5, 7), torch.randn(3, 5)
        for other in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
            assert type(other) is type(cell)
            assert torch.equal(flat(other(x))[0], flat(cell(x))[0])

    @every
    @pytest.mark.parametrize(
        ("sizes", "error", "words"),
        [
            ((0, 7), ValueError, "`input_size` must be at least 1, got 0"),
            ((5, -1), ValueError, "`hidden_size` must be at least 1, got -1"),
            ((5, 7.0), TypeError, "`hidden_size` must be an integer, got float"),
        ],
    )
    def test_bad_constructor(self, kind, sizes, error, words):
        with pytest.raises(error, match=f"{kind}Cell: {words}"):
            CELLS[kind][0](*sizes)

    def test_bad_nonlinearity(self):
        with pytest.raises(ValueError, match=r"RNNCell: `nonlinearity` must be .* got 'gelu'"):
            RNNCell(5, 7, nonlinearity="gelu")

    @every
    @pytest.mark.parametrize(
        ("shape", "state", "words"),
        [
            (
                (2, 3, 5),
                None,
                r"{kind}Cell: `input` must be \[B, I\] or \[I\], got 3 dimensions",
            ),
            ((3, 6), None, r"{kind}Cell: `input` must be \[B, I\] = \[3, 5\], got \[3, 6\]"),
            ((6,), None, r"{kind}Cell: `input` must be \[I\] = \[5\], got \[6\]"),
            ((3, 5), (2, 7), r"{op}_cell: `{hx}` must be \[B, H\] = \[3, 7\], got \[2, 7\]"),
            ((5,), (1, 7), r"{op}_cell: `{hx}` must be \[H\] = \[7\], got \[1, 7\]"),
        ],
    )
    def test_bad_input(self, kind, shape, state, words):
        hx = None if state is None else torch.zeros(state)
        if kind == "LSTM" and hx is not None:
            hx = (hx, hx)
        name = r"hx\[0\]" if kind == "LSTM" else "hx"
        with pytest.raises(ValueError, match=words.format(kind=kind, op=kind.lower(), hx=name)):
            CELLS[kind][0](5, 7)(torch.zeros(shape), hx)

    def test_lstm_state_is_a_pair(self):
        with pytest.raises(
            TypeError, match=r"LSTMCell: `hx` must be a pair \(h, c\) of Tensors, got Tensor"
        ):
            LSTMCell(5, 7)(torch.zeros(3, 5), torch.zeros(3, 7))


B, L, S, E, N = 3, 5, 7, 8, 2


def attention_pair(**options):
    options = {"dtype": torch.float64} | options
    ours, theirs = twins(
        MultiheadAttention(E, N, **options), nn.MultiheadAttention(E, N, **options)
    )
    with torch.no_grad():  # torch starts biases at zero, where a forgotten one would not show
        for name, parameter in theirs.named_parameters():
            if "bias" in name:
                parameter.normal_()
    return twins(ours, theirs)


def operands(form, kdim=E, vdim=E, length=L):
    shapes = {
        "sequence": [(length, B, E), (S, B, kdim), (S, B, vdim)],
        "batch": [(B, length, E), (B, S, kdim), (B, S, vdim)],
        "single": [(length, E), (S, kdim), (S, vdim)],
    }[form]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def self_attention(layer):
    """The layer as a function of one tensor, so that query, key and value are the same object."""

    class SelfAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, **options):
            return self.layer(x, x, x, **options)

    return SelfAttention()


MASKS = {
    "none": lambda form: {},
    "padding": lambda form: {"key_padding_mask": padding(form)},
    "float padding": lambda form: {
        "key_padding_mask": torch.randn(padding(form).shape, dtype=torch.float64)
    },
    "2-D": lambda form: {"attn_mask": hide(L, S)},
    "float 2-D": lambda form: {"attn_mask": torch.randn(L, S, dtype=torch.float64)},
    "3-D": lambda form: {"attn_mask": hide((1 if form == "single" else B) * N, L, S)},
    "both": lambda form: {"attn_mask": hide(L, S), "key_padding_mask": padding(form)},
    "both 3-D": lambda form: {
        "attn_mask": hide((1 if form == "single" else B) * N, L, S),
        "key_padding_mask": padding(form),
    },
    "both float": lambda form: {
        "attn_mask": torch.randn(L, S, dtype=torch.float64),
        "key_padding_mask": torch.randn(padding(form).shape, dtype=torch.float64),
    },
}


def padding(form):
    """True = ignore: the last keys of each row, fewer in the later ones; key 0 is always there."""
    lengths = torch.tensor([2, 4, 7])[:, None]
    mask = torch.arange(S) >= lengths
    return mask[0] if form == "single" else mask


def hide(*shape):
    mask = torch.rand(shape) < 0.3
    mask[..., 0] = False  # every row keeps a key that no padding takes
    return mask


@pytest.mark.filterwarnings("ignore:Support for mismatched")
class TestMultiheadAttention:
    @pytest.mark.parametrize("form", ["sequence", "batch", "single"])
    @pytest.mark.parametrize("mask", MASKS)
    @pytest.mark.parametrize("need_weights", [True, False])
    def test_masks(self, form, mask, need_weights):
        ours, theirs = attention_pair(batch_first=form == "batch")
        same(ours, theirs, *operands(form), need_weights=need_weights, **MASKS[mask](form))

    @pytest.mark.parametrize(
        "options",
        [
            {"bias": False},
            {"kdim": 3, "vdim": 9},
            {"kdim": 3, "vdim": 9, "bias": False},
            {"add_bias_kv": True},
            {"add_zero_attn": True},
            {"add_bias_kv": True, "add_zero_attn": True},
            {"add_bias_kv": True, "kdim": 5},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("form", ["sequence", "batch", "single"])
    @pytest.mark.parametrize("mask", ["none", "both", "float 2-D", "3-D"])
    def test_constructor_options(self, options, form, mask):
        ours, theirs = attention_pair(batch_first=form == "batch", **options)
        inputs = operands(form, options.get("kdim", E), options.get("vdim", E))
        for need_weights in (True, False):
            same(ours, theirs, *inputs, need_weights=need_weights, **MASKS[mask](form))

    @pytest.mark.parametrize("form", ["sequence", "batch", "single"])
    @pytest.mark.parametrize("average", [True, False])
    def test_weights(self, form, average):
        ours, theirs = attention_pair(batch_first=form == "batch")
        _out, weights = same(ours, theirs, *operands(form), average_attn_weights=average)
        batch, heads = () if form == "single" else (B,), () if average else (N,)
        assert weights.shape == (*batch, *heads, L, S)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        assert ours(*operands(form), need_weights=False)[1] is None

    @pytest.mark.parametrize("batch_first", [True, False])
    def test_self_attention(self, batch_first):
        """query is key is value: one product for all three projections."""
        ours, theirs = (self_attention(layer) for layer in attention_pair(batch_first=batch_first))
        same(ours, theirs, torch.randn(B, L, E, dtype=torch.float64), need_weights=False)

    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("need_weights", [True, False])
    @pytest.mark.parametrize("kind", ["bool", "float"])
    def test_is_causal(self, padded, need_weights, kind):
        mask = nn.Transformer.generate_square_subsequent_mask(S, dtype=torch.float64)
        mask = mask if kind == "float" else mask == -torch.inf
        options = {"key_padding_mask": padding("batch")} if padded else {}
        ours, theirs = attention_pair(batch_first=True)
        inputs = operands("batch", length=S)
        same(
            ours,
            theirs,
            *inputs,
            attn_mask=mask,
            is_causal=True,
            need_weights=need_weights,
            **options,
        )

    @pytest.mark.parametrize("behind", ["add_bias_kv", "add_zero_attn"])
    def test_is_causal_with_keys_behind(self, behind):
        """An appended key is seen by every query; in torch too, but where the hint hides it."""
        mask = nn.Transformer.generate_square_subsequent_mask(S) == -torch.inf
        ours, theirs = attention_pair(batch_first=True, **{behind: True})
        inputs = operands("batch", length=S)
        shown = torch.zeros(B, S, dtype=torch.bool)
        for weights, padding in itertools.product((True, False), (None, shown)):
            given = {"attn_mask": mask, "need_weights": weights, "key_padding_mask": padding}
            expected = theirs(*inputs, **given)[0]
            hinted = theirs(*inputs, **given, is_causal=True)[0]
            for hint in (True, False):
                found = ours(*inputs, **given, is_causal=hint)[0]
                torch.testing.assert_close(found, expected, **TIGHT)
            hides = not weights and padding is None
            assert torch.allclose(hinted, expected, **TIGHT) != hides

    @pytest.mark.parametrize("mask", ["none", "both", "float 2-D"])
    def test_dropout_with_weights_draws_what_torch_draws(self, mask):
        ours, theirs = attention_pair(batch_first=True, dropout=0.3)
        inputs, options = operands("batch"), MASKS[mask]("batch")
        same(ours, theirs, *inputs, sow=5, **options)
        for need_weights in (True, False):
            ours.eval(), theirs.eval()
            same(ours, theirs, *inputs, need_weights=need_weights, **options)

    @pytest.mark.parametrize("mask", ["none", "both", "causal"])
    def test_dropout_without_weights(self, mask):
        """The fused kernel draws numbers of its own; their mean is the output without dropout."""
        ours, _ = attention_pair(batch_first=True, dropout=0.3)
        inputs = operands("batch", length=S if mask == "causal" else L)
        blocked = nn.Transformer.generate_square_subsequent_mask(S) == -torch.inf
        causal = {"attn_mask": blocked, "is_causal": True}
        options = causal if mask == "causal" else MASKS[mask]("batch")

        def draw():
            return ours(*inputs, need_weights=False, **options)[0]

        torch.manual_seed(5)
        draws = torch.stack([draw() for _ in range(400)])
        torch.manual_seed(5)
        assert torch.equal(draw(), draws[0])
        assert not torch.equal(draws[0], draws[1])
        ours.eval()
        off = (draws.mean(0) - draw()) / (draws.std(0) / 20).clamp(min=1e-12)
        assert off.abs().max() < 6
        assert torch.equal(draw(), draw())

    @pytest.mark.parametrize("need_weights", [True, False])
    def test_blind_rows_are_zero(self, need_weights):
        """A query that sees no key: weights 0, output the last bias, finite gradients."""
        layer = MultiheadAttention(E, N, batch_first=True)
        nn.init.normal_(layer.out_proj.bias)
        blocked = torch.zeros(B, S, dtype=torch.bool)
        blocked[1] = True
        inputs = [t.float().requires_grad_() for t in operands("batch")]
        out, weights = layer(*inputs, key_padding_mask=blocked, need_weights=need_weights)
        torch.testing.assert_close(out[1], layer.out_proj.bias.expand(L, E))
        if need_weights:
            assert (weights[1] == 0).all()
        wanted = [*inputs, *layer.parameters()]
        upstream = (
            out.sum()
            if weights is None
            else out.sum() + (weights * torch.randn_like(weights)).sum()
        )
        assert all(g.isfinite().all() for g in torch.autograd.grad(upstream, wanted))

    def test_no_gradients_is_the_same(self):
        ours, theirs = attention_pair(batch_first=True)
        ours.eval(), theirs.eval()
        x = torch.randn(B, S, E, dtype=torch.float64)
        with torch.no_grad():
            for options in ({}, {"need_weights": False}, {"key_padding_mask": padding("batch")}):
                for one, two in zip(
                    ours(x, x, x, **options), theirs(x, x, x, **options), strict=True
                ):
                    assert one is two or torch.allclose(one, two, **TIGHT)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision(self, dtype):
        layer = MultiheadAttention(E, N, batch_first=True, dtype=dtype)
        out, weights = layer(*(t.to(dtype) for t in operands("batch")))
        assert out.dtype == weights.dtype == dtype
        assert out.isfinite().all()

    def test_autocast(self):
        ours, theirs = attention_pair(batch_first=True, dtype=torch.float32)
        inputs = [t.float() for t in operands("batch")]
        mask = torch.randn(L, S)
        with torch.autocast("cpu", torch.bfloat16):
            for one, two in zip(
                ours(*inputs, attn_mask=mask), theirs(*inputs, attn_mask=mask), strict=True
            ):
                assert one.dtype == two.dtype
                torch.testing.assert_close(one.float(), two.float(), rtol=5e-2, atol=5e-2)

    def test_help(self):
        """It names what the constructor takes and what the layer holds; its example runs."""
        layer = pykernels.nn.MultiheadAttention
        words, _, rest = inspect.getdoc(layer).partition("Example::")
        takes = {*inspect.signature(nn.MultiheadAttention.__init__).parameters} - {"self"}
        holds = set()
        for options in ({}, {"kdim": 4, "add_bias_kv": True}):
            holds |= {name for name, _ in layer(8, 2, **options).named_parameters()}
        assert all(name in words for name in takes | holds)
        example = rest.partition("\n\n`")[0]
        exec(inspect.cleandoc(example), {"pykernels": pykernels, "torch": torch})

    @pytest.mark.parametrize("hidden", [-1e6, -1e9, torch.finfo(torch.float32).min])
    def test_weights_of_a_padded_batch(self, hidden):
        """Rows of weights sum to 1 where every key is hidden by a number, as torch's do."""
        ours, theirs = attention_pair(batch_first=True, dtype=torch.float32)
        inputs = [t.float() for t in operands("batch")]
        padding = torch.zeros(inputs[1].shape[:2])
        padding[0] = hidden
        found, expected = (
            layer(*inputs, key_padding_mask=padding, average_attn_weights=False)
            for layer in (ours, theirs)
        )
        torch.testing.assert_close(found[1].sum(-1), torch.ones(found[1].shape[:-1]))
        torch.testing.assert_close(found, expected)

    def test_gradient_of_a_float_mask(self):
        ours, theirs = attention_pair()
        inputs, mask = operands("sequence"), torch.randn(L, S, dtype=torch.float64)
        grads = []
        for layer in (ours, theirs):
            bias = mask.clone().requires_grad_()
            grads.append(
                torch.autograd.grad(layer(*inputs, attn_mask=bias)[0].square().sum(), bias)[0]
            )
        torch.testing.assert_close(*grads, **TIGHT)

    @pytest.mark.parametrize("norm_first", [True, False])
    @pytest.mark.parametrize("masked", ["none", "causal", "padding", "both"])
    def test_inside_transformer_encoder_layer(self, norm_first, masked):
        """Where torch's encoder layer calls the module, all of its gradients are torch's."""
        options = {
            "dim_feedforward": 16,
            "dropout": 0.0,
            "batch_first": True,
            "norm_first": norm_first,
            "dtype": torch.float64,
        }
        theirs = nn.TransformerEncoderLayer(E, N, **options)
        ours = copy.deepcopy(theirs)
        ours.self_attn = MultiheadAttention(E, N, batch_first=True, dtype=torch.float64)
        ours, theirs = twins(ours, theirs)
        kwargs = {}
        if masked in ("causal", "both"):
            mask = nn.Transformer.generate_square_subsequent_mask(S, dtype=torch.float64)
            kwargs |= {"src_mask": mask, "is_causal": True}
        if masked in ("padding", "both"):
            kwargs |= {"src_key_padding_mask": padding("batch")}
        same(ours.train(), theirs.train(), torch.randn(B, S, E, dtype=torch.float64), **kwargs)

    def test_copies_and_pickles(self):
        layer = MultiheadAttention(E, N, kdim=3)
        inputs = [t.float() for t in operands("sequence", kdim=3)]
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert type(other) is MultiheadAttention
            assert isinstance(other, nn.MultiheadAttention)
            assert torch.equal(other(*inputs)[0], layer(*inputs)[0])

    @pytest.mark.parametrize(
        ("change", "options", "error", "words"),
        [
            (
                {0: (L, B, 4)},
                {},
                ValueError,
                r"MultiheadAttention: `query` must be \[L, B, E\] = \[5, 3, 8\], got \[5, 3, 4\]",
            ),
            (
                {0: (E,)},
                {},
                ValueError,
                r"`query` must be \[L, B, E\] or \[L, E\], got 1 dimensions: \[8\]",
            ),
            (
                {1: (S, E)},
                {},
                ValueError,
                r"`key` must be \[S, B, kdim\], got 2 dimensions: \[7, 8\]",
            ),
            (
                {1: (S, 2, E)},
                {},
                ValueError,
                r"`key` must be \[S, B, kdim\] = \[7, 3, 8\], got \[7, 2, 8\]",
            ),
            (
                {2: (6, B, E)},
                {},
                ValueError,
                r"`value` must be \[S, B, vdim\] = \[7, 3, 8\], got \[6, 3, 8\]",
            ),
            (
                {},
                {"attn_mask": (L, L)},
                ValueError,
                r"`attn_mask` must be \[L, S\] = \[5, 7\], got \[5, 5\]",
            ),
            (
                {},
                {"attn_mask": (B, L, S)},
                ValueError,
                r"`attn_mask` must be \[B \* N, L, S\] = \[6, 5, 7\], got \[3, 5, 7\]",
            ),
            (
                {},
                {"attn_mask": (S,)},
                ValueError,
                r"`attn_mask` must be \[L, S\] or \[B \* N, L, S\], got 1 dimensions",
            ),
            (
                {},
                {"key_padding_mask": (S, B)},
                ValueError,
                r"`key_padding_mask` must be \[B, S\] = \[3, 7\], got \[7, 3\]",
            ),
            (
                {},
                {"is_causal": True},
                ValueError,
                "`attn_mask` must be given where is_causal is True, got None",
            ),
        ],
    )
    def test_bad_shapes(self, change, options, error, words):
        inputs = operands("sequence")
        for index, shape in change.items():
            inputs[index] = torch.zeros(shape, dtype=torch.float64)
        options = {
            name: torch.zeros(v) if isinstance(v, tuple) else v for name, v in options.items()
        }
        with pytest.raises(error, match=words):
            attention_pair()[0](*inputs, **options)

    @pytest.mark.parametrize(
        ("options", "error", "words"),
        [
            (
                {"num_heads": 3},
                ValueError,
                "`embed_dim` must be a multiple of `num_heads` = 3, got 8",
            ),
            ({"num_heads": 2.0}, TypeError, "`num_heads` must be an integer, got float"),
            ({"embed_dim": 0}, ValueError, "`embed_dim` must be at least 1, got 0"),
            ({"kdim": 0}, ValueError, "`kdim` must be at least 1, got 0"),
            ({"vdim": -1}, ValueError, "`vdim` must be at least 1, got -1"),
            ({"dropout": 2.0}, ValueError, "`dropout` must be from 0 to 1, got 2.0"),
            ({"dropout": "a"}, TypeError, "`dropout` must be a number, got str"),
        ],
    )
    def test_bad_constructor(self, options, error, words):
        with pytest.raises(error, match=f"MultiheadAttention: {words}"):
            MultiheadAttention(**{"embed_dim": E, "num_heads": N, **options})

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    def test_bad_kinds(self):
        layer, (q, k, v) = MultiheadAttention(E, N), (t.float() for t in operands("sequence"))
        with pytest.raises(TypeError, match="`query` must be a Tensor, got list"):
            layer([1.0], k, v)
        with pytest.raises(
            TypeError,
            match=r"`key` must have the dtype of the input, torch.float32, got torch.float64",
        ):
            layer(q, k.double(), v)
        with pytest.raises(
            TypeError, match=r"must have the dtype of the input, torch.float64, got torch.float32"
        ):
            layer(q.double(), k.double(), v.double())
        with pytest.raises(TypeError, match=r"`attn_mask` must .*, got torch.int64"):
            layer(q, k, v, attn_mask=torch.zeros(L, S, dtype=torch.int64))
        nested = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(2, E)])
        with pytest.raises(TypeError, match="`query` must be a dense tensor"):
            layer(nested, nested, nested)
