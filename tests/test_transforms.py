"""Our ops under torch.func: vmap, grad, jvp and what is made of them, in float64."""

import cases
import pytest
import torch
from cases import BAD_CALLS
from cases import flat_tensors as flat
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from pykernels import functional, nn
from pykernels.testing.specs import find

GATES = {"rnn": 1, "gru": 3, "lstm": 4}
OPS = [*GATES, "attention", "attention_backward", "attention_varlen", "linear_cross_entropy"]
#: What the ops take beside what is differentiated.
STARTS, CLASSES = torch.tensor([0, 2, 5]), torch.tensor([1, 0, -100, 5])
MAPPED = 4


def inputs(op, sizes=()):
    """Tensors of `functional.<op>`, with the axes `sizes` before those they have."""
    generator = torch.Generator().manual_seed(0)
    if op == "attention":
        shapes = [(2, 4, 5, 6)] * 3
    elif op == "attention_backward":
        shapes = [(2, 4, 5, 6)] * 5 + [(2, 4, 5)]
    elif op == "attention_varlen":
        shapes = [(6, 2, 4)] * 3  # with a row behind the last sequence
    elif op == "linear_cross_entropy":
        shapes = [(4, 5), (7, 5), (7,)]
    else:
        rows = GATES[op] * 5
        shapes = [(4, 3, 2), (rows, 2), (rows, 5), (rows,), (rows,), (3, 5)]
        shapes += [(3, 5)] if op == "lstm" else []
    make = {"generator": generator, "dtype": torch.float64}
    return [torch.randn(*sizes, *shape, **make) / 2 for shape in shapes]


def call(op, backend=None, **options):
    """`functional.<op>` -> a tuple of tensors."""
    run = getattr(functional, op)
    if op == "attention":
        options["return_lse"] = True
    if op == "attention_varlen":  # its lse is -inf in the row behind

        def run(*args, backend):
            options = {"is_causal": True, "return_lse": True, "backend": backend}
            out, lse = functional.attention_varlen(*args, STARTS, **options)
            return out, lse[:, :5]

    if op == "linear_cross_entropy":

        def run(x, weight, bias, backend):
            options = {"reduction": "none", "z_loss": 0.1, "return_lse": True}
            return functional.linear_cross_entropy(
                x, weight, CLASSES, bias, **options, backend=backend
            )

    return lambda *args: tuple(flat(run(*args, backend=backend, **options)))


def cut(op, args):
    """Less of the arguments, for derivatives that take long."""
    if op.startswith("attention") and op != "attention_varlen":
        return [t[:1, :1, :3, :2] if t.dim() == 4 else t[:1, :1, :3] for t in args]
    return args


def total(run):
    """One number of what `run` returns, in which every output counts otherwise."""
    return lambda *args: sum((i + 1) * t.sin().sum() for i, t in enumerate(run(*args)))


def close(found, expected, rtol=1e-10, atol=1e-11):
    found, expected = flat(found), flat(expected)
    assert len(found) == len(expected)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=rtol, atol=atol)
    assert any(t.any() for t in expected)


def looped(run, in_dims, *args):
    """What vmap is short for."""
    results = []
    for i in range(MAPPED):
        pairs = zip(args, in_dims, strict=True)
        results.append(flat(run(*(t if d is None else t.select(d, i) for t, d in pairs))))
    return [torch.stack(each) for each in zip(*results, strict=True)]


def dims(op):
    """Which arguments are mapped, and along which axis: data, weights, all, one alone."""
    count = len(inputs(op))
    if op == "attention":
        return [(0, 0, 0), (0, None, None), (None, 0, None), (1, 2, 0)]
    if op == "attention_backward":
        nothing = (None,) * 5
        return [(0,) * 6, (0, *nothing), (None, 0, *nothing[1:]), (*nothing, 0), (1, 2, 0, 3, 1, 2)]
    if op in ("attention_varlen", "linear_cross_entropy"):
        return [(0, 0, 0), (0, None, None), (None, 0, None), (1, 2, 1)]
    states = (None,) * (count - 5)
    return [
        (0, *[None] * 4, *states),
        (0, *[None] * 4, *[0] * len(states)),
        (2, *[None] * 4, *[1] * len(states)),
        (None, *[None] * 4, *[0] * len(states)),
        (None, 0, None, None, None, *states),
        (0,) * count,
    ]


DIMS = [(op, each) for op in OPS for each in dims(op)]


def mapped(op, in_dims):
    """Arguments whose mapped ones have an axis more, where `in_dims` says."""
    alone, many = inputs(op), inputs(op, (MAPPED,))
    return [
        one if d is None else all_.movedim(0, d)
        for one, all_, d in zip(alone, many, in_dims, strict=True)
    ]


@pytest.mark.parametrize(("op", "in_dims"), DIMS)
def test_vmap(op, in_dims):
    args = mapped(op, in_dims)
    close(vmap(call(op), in_dims)(*args), looped(call(op), in_dims, *args))


@pytest.mark.parametrize(("op", "in_dims"), DIMS)
def test_gradients_of_each_sample(op, in_dims):
    """vmap over grad: of every argument, mapped or not."""
    args = mapped(op, in_dims)
    every = tuple(range(len(args)))
    found = vmap(grad(total(call(op)), every), in_dims)(*args)
    expected = looped(grad(total(call(op, "reference")), every), in_dims, *args)
    close(found, expected)


@pytest.mark.parametrize("op", OPS)
def test_gradient_of_a_mapped_sum(op):
    """grad over vmap, where the tensors that are not mapped gather from all samples."""
    in_dims = (0,) + (None,) * (len(inputs(op)) - 1)
    args = mapped(op, in_dims)
    every = tuple(range(len(args)))

    def run(backend):
        return lambda *args: vmap(total(call(op, backend)), in_dims)(*args).square().sum()

    close(grad(run("cpp"), every)(*args), grad(run("reference"), every)(*args))


@pytest.mark.parametrize("op", OPS)
def test_maps_in_maps(op):
    alone = inputs(op)
    x = torch.stack([alone[0] * i for i in range(1, 7)]).unflatten(0, (2, 3))
    run = call(op)
    found = vmap(vmap(lambda x: run(x, *alone[1:])))(x)
    expected = [[run(each, *alone[1:]) for each in some] for some in x]
    for i, t in enumerate(found):
        close(t, torch.stack([torch.stack([each[i] for each in some]) for some in expected]))


@pytest.mark.parametrize("transform", [jacrev, jacfwd])
@pytest.mark.parametrize("op", OPS)
def test_jacobians(op, transform):
    args = inputs(op)
    for i in range(len(args)):
        found = transform(call(op), i)(*args)
        close(found, jacrev(call(op, "reference"), i)(*args))


@pytest.mark.parametrize("op", OPS)
def test_jvp(op):
    """Against the numerical derivative along the tangent, and the dual numbers of autograd."""
    args, tangents = inputs(op), [torch.randn_like(t) for t in inputs(op)]
    run = call(op)
    out, found = jvp(run, tuple(args), tuple(tangents))
    close(out, run(*args))
    h = 1e-6
    ahead = run(*(t + h * d for t, d in zip(args, tangents, strict=True)))
    behind = run(*(t - h * d for t, d in zip(args, tangents, strict=True)))
    close(found, [(a - b) / (2 * h) for a, b in zip(ahead, behind, strict=True)], 1e-6, 1e-7)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, d) for t, d in zip(args, tangents, strict=True)]
        close([forward_ad.unpack_dual(t).tangent for t in run(*duals)], found)


@pytest.mark.parametrize("op", OPS)
def test_second_derivatives(op):
    """By every road, against autograd's of the reference."""
    args = [t.narrow(0, 0, 2) if op in GATES and i == 0 else t for i, t in enumerate(inputs(op))]
    args = cut(op, args)
    if op in GATES:
        args[0] = args[0][:, :1]
        args = [t if i < 5 and i else t[..., :1, :] for i, t in enumerate(args)]

    def along(transform, op, backend):
        return transform(lambda t: total(call(op, backend))(t, *args[1:]))(args[0])

    expected = torch.autograd.functional.hessian(
        lambda t: total(call(op, "reference"))(t, *args[1:]), args[0]
    )
    for transform in (
        hessian,
        lambda f: jacrev(jacrev(f)),
        lambda f: jacrev(jacfwd(f)),
        lambda f: jacfwd(jacfwd(f)),
    ):
        close(along(transform, op, "cpp"), expected)


@pytest.mark.parametrize("op", OPS)
def test_tangent_of_a_gradient(op):
    """jvp of what vjp returned, which was recorded before there was any tangent."""
    args = inputs(op)
    results = []
    for backend in ("cpp", "reference"):
        out, pull = vjp(call(op, backend), *args)
        upstream = tuple(t.cos() for t in out)
        results.append(jvp(lambda *up, pull=pull: pull(up), upstream, upstream))
    close(*results)


@pytest.mark.parametrize("op", OPS)
def test_gradgrad_of_the_operators(op):
    """Those that a compiled graph holds, backward operator and all."""
    args = [t.clone().requires_grad_() for t in cut(op, inputs(op))]
    names = set()

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.add(func._opname)
            return func(*args, **(kwargs or {}))

    def run(*args):
        with Seen():
            return call(op)(*args)

    def gradient(*args):
        with Seen():
            return torch.autograd.grad(total(call(op))(*args), args, create_graph=True)

    assert torch.autograd.gradcheck(run, args)
    assert torch.autograd.gradcheck(gradient, args, fast_mode=True)
    name = "attention_backward_from_lse" if op == "attention_backward" else op
    assert {name, f"{name}_backward"} <= names


@pytest.mark.parametrize("name", ["attention-learned-2d", "lstm-proj", "lstm-cells"])
def test_forward_mode_of_specs(name):
    spec = find(name)
    made = spec.inputs(torch.float64)
    names = [name for name, t in made.items() if t.is_floating_point()]

    def run(*args):
        return cases.call(spec, made | dict(zip(names, args, strict=True)), "cpp")

    args = [made[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(
        run, args, check_forward_ad=True, check_backward_ad=False, fast_mode=True
    )


@pytest.mark.parametrize("op", GATES)
def test_lengths_and_options(op):
    x, *rest = inputs(op)
    xs = torch.stack([x * i for i in range(1, MAPPED + 1)])
    for options in ({"lengths": [2, 4, 1]}, {"reverse": True}):
        run = call(op, **options)
        every = tuple(range(1 + len(rest)))
        dims = (0, *[None] * len(rest))
        close(vmap(run, dims)(xs, *rest), looped(run, dims, xs, *rest))
        close(
            vmap(grad(total(run), every), dims)(xs, *rest),
            looped(grad(total(call(op, "reference", **options)), every), dims, xs, *rest),
        )


@pytest.mark.parametrize("op", GATES)
def test_cells(op):
    x, *weights = inputs(op)[:5]
    cell = getattr(functional, f"{op}_cell")
    run = lambda x: flat(cell(x, None, *weights))  # noqa: E731
    close(vmap(run)(x), looped(run, (0,), x))
    close(vmap(run)(x[0]), run(x[0]))
    close(vmap(vmap(run))(x), [t.unflatten(0, (4, 3)) for t in run(x.flatten(0, 1))])


ATTENTIONS = {
    "mask": lambda i: {"attn_mask": torch.arange(i, 25 + i).reshape(5, 5) % 3 > 0},
    "added": lambda i: {"attn_mask": torch.linspace(-i, i, 5, dtype=torch.float64)},
    "sinks": lambda i: {"sinks": torch.linspace(-i, i, 4, dtype=torch.float64)},
    "slopes": lambda i: {"alibi_slopes": torch.linspace(0, i, 4)},
    "slopes2": lambda i: {"alibi_slopes": torch.linspace(0, i, 8).reshape(2, 4)},
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_targets_that_are_mapped(reduction):
    """One loss of each sample, and its gradients; the target is checked as in an eager call."""
    x, weight, bias = inputs("linear_cross_entropy")
    xs, targets = torch.stack([x * i for i in range(1, MAPPED + 1)]), torch.arange(16).reshape(4, 4)

    def loss(backend):
        def run(x, weight, bias, target):
            return functional.linear_cross_entropy(
                x, weight, target, bias, reduction=reduction, backend=backend
            ).sum()

        return run

    dims, args = (0, None, None, 0), (xs, weight, bias, targets % 7)
    close(vmap(loss(None), dims)(*args), looped(lambda *a: [loss(None)(*a)], dims, *args))
    found = vmap(grad(loss(None), (0, 1, 2)), dims)(*args)
    close(found, looped(grad(loss("reference"), (0, 1, 2)), dims, *args))
    for transform in (lambda run: run, lambda run: jacfwd(run)):
        with pytest.raises(ValueError, match=r"`target` must be from 0 to V - 1 = 6 .* got 7 at"):
            vmap(transform(loss(None)), dims)(xs, weight, bias, targets)


@pytest.mark.parametrize("mapped", [False, True])
def test_places_of_varlen(mapped):
    """Sequences that lie elsewhere in each sample; sinks and slopes of its own."""
    made = [t.clone() for t in inputs("attention_varlen", (MAPPED,))]
    starts = torch.tensor([[0, i, 5] for i in range(MAPPED)]) if mapped else STARTS
    heads = torch.linspace(0.1, 1, 2 * MAPPED, dtype=torch.float64).reshape(MAPPED, 2)

    def run(backend):
        def of(q, k, v, starts, sinks, slopes):
            options = {"sinks": sinks, "alibi_slopes": slopes, "backend": backend}
            return functional.attention_varlen(q, k, v, starts, **options).sin().sum()

        return grad(of, (0, 1, 2, 4))

    dims = (0, 0, 0, 0 if mapped else None, 0, 0)
    args = (*made, starts, heads, heads * 2)
    close(vmap(run(None), dims)(*args), looped(run("reference"), dims, *args))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("options", ATTENTIONS.values(), ids=ATTENTIONS)
def test_options_of_attention(options, shared):
    """Mapped, and shared by what is mapped; with the gradients of those that have one."""
    q, k, v = inputs("attention", (MAPPED,))
    made = [options(i) for i in range(1, MAPPED + 1)]
    (name,) = made[0]
    extra = made[0][name] if shared else torch.stack([each[name] for each in made])
    learned = name == "sinks" or (name == "attn_mask" and extra.dtype == torch.float64)
    in_dims = (0, 0, 0, None if shared else 0)
    of = (0, 1, 2, 3) if learned else (0, 1, 2)

    def run(backend):
        return lambda q, k, v, t: functional.attention(
            q, k, v, is_causal=True, backend=backend, **{name: t}
        )

    close(vmap(run(None), in_dims)(q, k, v, extra), looped(run(None), in_dims, q, k, v, extra))

    def gradient(backend):
        return grad(lambda *args: run(backend)(*args).sin().sum(), of)

    close(
        vmap(gradient(None), in_dims)(q, k, v, extra),
        looped(gradient("reference"), in_dims, q, k, v, extra),
    )


def test_dropout_is_drawn_as_vmap_is_told():
    q = inputs("attention")[0].expand(MAPPED, 2, 4, 5, 6)

    def run(randomness):
        drop = lambda q: functional.scaled_dot_product_attention(q, q, q, dropout_p=0.5)  # noqa: E731
        return vmap(drop, randomness=randomness)(q)

    one, *others = run("same")
    assert all(torch.equal(one, other) for other in others)
    one, *others = run("different")
    assert not any(torch.equal(one, other) for other in others)
    with pytest.raises(RuntimeError, match="randomness"):
        run("error")


@pytest.mark.parametrize("way", ["is_grads_batched", "vmap"])
@pytest.mark.parametrize("op", [*OPS, "layers", "directions"])
def test_mapped_upstream_gradients(op, way):
    """Of a call that vmap came too late to see: as jacobian(vectorize=True) asks for."""
    if op in ("layers", "directions"):
        layer = nn.LSTM(2, 5, num_layers=2, bidirectional=op == "directions").double()
        args = [inputs("lstm")[0].requires_grad_(), *layer.parameters()]
        found = flat(layer(args[0]))
    else:
        args = [t.requires_grad_() for t in inputs(op)]
        found = call(op)(*args)
    ups = [torch.randn(MAPPED, *t.shape, dtype=t.dtype) for t in found]

    def pull(*ups, **options):
        given = {"retain_graph": True, "allow_unused": True} | options
        return torch.autograd.grad(found, args, ups, **given)

    one_by_one = [pull(*each) for each in zip(*ups, strict=True)]
    expected = [torch.stack(each) for each in zip(*one_by_one, strict=True)]
    got = pull(*ups, is_grads_batched=True) if way != "vmap" else vmap(pull)(*ups)
    assert not any(t.requires_grad for t in got)
    close(got, expected)


def test_vectorized_jacobian_and_batched_gradcheck():
    layer, x = nn.GRU(2, 5, num_layers=2).double(), inputs("gru")[0]
    run = lambda x: layer(x)[0].sum(1)  # noqa: E731
    jacobian = torch.autograd.functional.jacobian
    close(jacobian(run, x, vectorize=True), jacobian(run, x))
    assert torch.autograd.gradcheck(run, x.requires_grad_(), check_batched_grad=True)


MODULES = ["RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell", "MultiheadAttention"]


@pytest.mark.parametrize("name", MODULES)
def test_gradients_of_each_sample_of_a_module(name):
    """The recipe of torch's per-sample gradients, on our layers as on stock ones."""
    kwargs = {} if name.endswith("Cell") else {"num_layers": 2, "bidirectional": True}
    if name == "MultiheadAttention":
        ours, stock = (kind.MultiheadAttention(6, 2).double() for kind in (nn, torch.nn))
    else:
        ours, stock = (getattr(kind, name)(6, 4, **kwargs).double() for kind in (nn, torch.nn))
    ours.load_state_dict(stock.state_dict())
    params = dict(ours.named_parameters())
    xs = torch.randn(MAPPED, 5, 6, dtype=torch.float64)

    def given(x):
        return (x, x, x) if name == "MultiheadAttention" else (x,)

    def loss(outputs):
        return sum((i + 1) * t.sin().sum() for i, t in enumerate(flat(outputs)))

    def of_one(params, x):
        return loss(functional_call(ours, params, given(x)))

    found = vmap(grad(of_one), (None, 0))(params, xs)
    for i, x in enumerate(xs):
        stock.zero_grad()
        loss(stock(*given(x))).backward()
        for key, p in stock.named_parameters():
            torch.testing.assert_close(found[key][i], p.grad, rtol=1e-9, atol=1e-10)


def test_gradients_of_each_sample_of_the_loss():
    """Each with targets of its own; the layer is a Linear and torch's cross_entropy."""
    layer = nn.LinearCrossEntropyLoss(6, 9, bias=True).double()
    params = dict(layer.named_parameters())
    xs, targets = torch.randn(MAPPED, 5, 6, dtype=torch.float64), torch.randint(9, (MAPPED, 5))

    def loss(params, x, target):
        return functional_call(layer, params, (x, target))

    def torchs(params, x, target):
        logits = torch.nn.functional.linear(x, **params)
        return torch.nn.functional.cross_entropy(logits, target)

    each = (None, 0, 0)
    found, expected = (vmap(grad(run), each)(params, xs, targets) for run in (loss, torchs))
    for key in params:
        close(found[key], expected[key])


def test_an_ensemble():
    """Layers of the same kind, their weights stacked, in one call."""
    models = [nn.LSTM(6, 4).double() for _ in range(MAPPED)]
    params, _ = torch.func.stack_module_state(models)
    x = torch.randn(5, 2, 6, dtype=torch.float64)
    found = vmap(lambda params: functional_call(models[0], params, (x,))[0])(params)
    close(found, torch.stack([model(x)[0] for model in models]))


def test_layers_in_evaluation():
    """No packed weights stand in for those that a transform brings."""
    for layer in (nn.LSTM(6, 4), nn.RNNCell(6, 4), nn.LSTMCell(6, 4)):
        layer.eval()
        x = torch.randn(MAPPED, 3, 6)
        with torch.no_grad():
            layer(x[0])
            close(
                vmap(layer)(x),
                [torch.stack(t) for t in zip(*(flat(layer(each)) for each in x), strict=True)],
                1e-5,
                1e-6,
            )


@pytest.mark.parametrize("op", OPS)
def test_compiled(op):
    """torch.compile over vmap."""
    args = inputs(op)
    xs = torch.stack([args[0] * i for i in range(1, MAPPED + 1)])
    run = vmap(lambda x: call(op)(x, *args[1:]))
    torch._dynamo.reset()
    close(torch.compile(run, fullgraph=True, backend="aot_eager")(xs), run(xs))


@pytest.mark.parametrize("run", BAD_CALLS.values(), ids=BAD_CALLS)
@pytest.mark.parametrize(
    "transform", [vmap, lambda run: lambda x: jvp(run, (x,), (x,))], ids=["vmap", "jvp"]
)
def test_bad_input(run, transform):
    """The error of the call on one sample."""
    x = torch.randn(2, 5, 3, 4)
    with pytest.raises((ValueError, TypeError)) as expected:
        run(x[0])
    with pytest.raises(expected.type) as found:
        transform(run)(x if transform is vmap else x[0])
    assert str(found.value) == str(expected.value)
