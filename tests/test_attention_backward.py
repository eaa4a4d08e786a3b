"""`attention_backward`: keys in pieces, merged by their log-sum-exp, against all at once."""

import functools
import itertools
import math
import re

import pytest
import torch
from cases import EXACT, INTERPRETING, cases, check, leaves, need

from pykernels import functional
from pykernels.testing import AttentionSpec
from pykernels.testing.specs import find

BACKENDS = ("reference", "cpp", "triton")


class InPieces(torch.autograd.Function):
    """Attention to a few keys, then to the others; backward has the merged out and lse alone."""

    @staticmethod
    def forward(ctx, options, q, k, v, attn_mask, sinks, alibi_slopes):
        options["alibi_slopes"] = alibi_slopes
        lses, outs = [], []
        for i, (place, piece) in enumerate(pieces(k, v, attn_mask)):
            out, lse = functional.attention(
                q, *piece, sinks=None if i else sinks, **place, return_lse=True, **options
            )
            lses.append(lse)
            outs.append(out)
        # in float64: what the merging rounds is not what is tested
        lses = [one.double() for one in lses]
        lse = torch.logaddexp(*lses)
        base = lse.masked_fill(lse == -math.inf, 0)
        out = sum(
            o.double() * (one - base).exp()[..., None] for o, one in zip(outs, lses, strict=True)
        ).to(q.dtype)
        lse = lse.to(torch.promote_types(q.dtype, torch.float32))
        ctx.options = options
        ctx.save_for_backward(q, k, v, attn_mask, sinks, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, attn_mask, sinks, out, lse = ctx.saved_tensors
        found = []
        for i, (place, (k_, v_, mask)) in enumerate(pieces(k, v, attn_mask)):
            found.append(
                functional.attention_backward(
                    *(dout, q, k_, v_, out, lse, mask),
                    dlse=dlse,
                    sinks=sinks if i else None,
                    mask_grad=ctx.needs_input_grad[4],
                    **place,
                    **ctx.options,
                )
            )
        a, b = found
        dmask = None
        if ctx.needs_input_grad[4]:
            whole = attn_mask.shape[-1] == 1
            dmask = sum((a[3], b[3])) if whole else torch.cat([a[3], b[3]], -1)
        assert (a.dsinks, b.dsinks is None) == (None, sinks is None)
        dk, dv = (torch.cat(both, 2) for both in ((a.dk, b.dk), (a.dv, b.dv)))
        return None, a.dq + b.dq, dk, dv, dmask, b.dsinks, None


def pieces(k, v, mask):
    """Where a query's own place is, and (k, v, mask), of the first keys and of the others."""
    cut = k.shape[2] // 3
    for part, place in ((slice(cut), "top-left"), (slice(cut, None), "bottom-right")):
        own = mask if mask is None or mask.shape[-1] == 1 else mask[..., part]
        yield {"causal_alignment": place}, (k[:, :, part], v[:, :, part], own)


def in_pieces(q, k, v, attn_mask=None, *, sinks=None, alibi_slopes=None, return_lse, **options):
    """`functional.attention`, from pieces."""
    del options["dropout_p"], options["causal_alignment"]
    return InPieces.apply(options, q, k, v, attn_mask, sinks, alibi_slopes)


# As many keys as queries wherever places count: then both alignments mean the same in all keys. No
# scores that are large (specs with a gain): lse is rounded at their size, and the weights with it.
NAMES = [
    f"attention-{name}"
    for name in (
        "plain",
        "window-causal",
        "scale-negative",
        "kv-longer",
        "sk0",
        "b0",
        "d1",
        "d300",
        "dv-wider",
        "gqa-causal",
        "mask-dead",
        "mask-dead-tiles",
        "bias-dead",
        "bias-strided",
        "learned-2d",
        "learned-rows",
        "learned-keys",
        "learned-window",
        "sinks-dead",
        "sinks-learned",
        "alibi-all",
        "s257-causal",
        "few-spans",
    )
]


def chosen(spec, backend, dtype):
    """In the interpreter a few; what is special to the reference, in float32."""
    if backend == "triton" and INTERPRETING:
        few = {"attention-plain": (torch.float32, torch.bfloat16), "attention-mask-dead": EXACT[:1]}
        return dtype in few.get(spec.name, ())
    return backend != "reference" or dtype == torch.float32


@pytest.mark.parametrize(
    ("spec", "backend", "dtype"),
    [case for case in cases(*map(find, NAMES)) if chosen(*case.values)],
)
def test_pieces_are_the_whole(spec, backend, dtype):
    if backend == "triton" and spec.is_causal:
        pytest.skip("it has no causal rule aligned at the last key")
    check(spec, backend, dtype, op=in_pieces)


CROSS = [
    AttentionSpec(
        f"attention-cross-{at}",
        "every option beside every other",
        2,
        4,
        37,
        11,
        n_kv=(4, 2, 1)[at % 3],
        d_v=(11, 5)[at % 2],
        mask={"learned": "float"}.get(mask, mask),
        mask_shape=(("B", "1", "S_q", "S_k"), ("N", "S_q", "S_k"), ("S_q", "S_k"))[at % 3],
        dead_rows=at % 2 == 0,
        learned=mask == "learned",
        **band,
        softcap=softcap,
        sinks=sinks,
        alibi=alibi,
    )
    for at, (mask, band, softcap, sinks, alibi) in enumerate(
        itertools.product(
            (None, "bool", "float", "learned"),
            ({}, {"is_causal": True}, {"window": (9, 4)}),
            (0.0, 1.5),
            (False, True),
            ((), ("N",)),
        )
    )
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_options_together(dtype):
    """In one call, and in pieces."""
    for spec in CROSS if dtype == torch.float32 else CROSS[::3]:
        check(spec, "cpp", dtype)
        check(spec, "cpp", dtype, op=in_pieces)


def arguments(spec, dtype=torch.float64, backend="cpp"):
    """Tensors of `attention_backward` by name, random dout and dlse among them."""
    made = {name: t.detach() for name, t in leaves(spec, dtype, backend).items()}
    out, lse = functional.attention(**made, **spec.options, return_lse=True, backend=backend)
    made |= {"out": out, "lse": lse, "dout": torch.randn_like(out), "dlse": torch.randn_like(lse)}
    return made


def options_of(spec):
    return {name: value for name, value in spec.options.items() if name != "dropout_p"} | {
        "mask_grad": spec.learned
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_what_autograd_gives(backend):
    """One piece is all: also without dlse, and of any strides."""
    spec = find("attention-gqa")
    need(spec, backend, torch.float64)
    made = leaves(spec, torch.float64, backend)
    out, lse = functional.attention(**made, **spec.options, return_lse=True, backend=backend)
    dout = torch.randn_like(out).mT.contiguous().mT
    run = functools.partial(functional.attention_backward, **options_of(spec), backend=backend)
    for dlse in (None, torch.randn_like(lse)):
        loss = (out * dout).sum() + (0 if dlse is None else (lse * dlse).sum())
        expected = torch.autograd.grad(loss, list(made.values()), retain_graph=True)
        with torch.no_grad():
            found = run(dout, **made, out=out, lse=lse.mT.contiguous().mT, dlse=dlse)
        assert found[3:] == (None, None)
        for one, two in zip(found[:3], expected, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("name", ["sinks-learned", "mask-dead", "gqa", "learned-softcap", "alibi"])
def test_gradients_of_the_gradients(name, backend):
    spec = find(f"attention-{name}")
    made = arguments(spec)
    # -inf, of a row that sees no key, has no numerical derivative; and slopes have none at all
    names = [
        name
        for name, t in made.items()
        if t.is_floating_point() and name != "alibi_slopes" and not (t == -math.inf).any()
    ]

    def run(*tensors):
        given = made | dict(zip(names, tensors, strict=True))
        found = functional.attention_backward(**given, **options_of(spec), backend=backend)
        return tuple(t for t in found if t is not None)

    inputs = [made[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["plain", "sinks-learned"])
def test_operator(name):
    """What torch knows of it; compiled, mapped and in forward mode it is what it is in eager."""
    spec = find(f"attention-{name}")
    made = arguments(spec)
    op = torch.ops.pykernels.attention_backward_from_lse.default
    order = ("dout", "q", "k", "v", "out", "lse", "attn_mask", "sinks", "alibi_slopes", "dlse")
    given = [made.get(each) for each in order]
    if given[6] is not None:
        given[6] = given[6][(None,) * (4 - given[6].dim())]
    given = tuple(t if t is None else t.clone().requires_grad_() for t in given)
    options = {"band": (None, None), "scale": 0.4, "mask_grad": spec.learned, "keep": True}
    if spec.learned:
        torch.library.opcheck(op, given, {**options, "backend": "cpp"})

    run = functools.partial(functional.attention_backward, **options_of(spec), backend="cpp")

    def present(*values):
        found = run(**dict(zip(made, values, strict=True)))
        return tuple(t for t in found if t is not None)

    expected = present(*made.values())
    compiled = torch.compile(present, fullgraph=True, backend="aot_eager")
    for one, two in zip(compiled(*made.values()), expected, strict=True):
        assert torch.equal(one, two)
    many = [torch.stack([t, t.flip(-1)]) for t in made.values()]
    found = torch.func.vmap(present)(*many)
    for i in range(2):
        for one, two in zip(found, present(*(t[i] for t in many)), strict=True):
            torch.testing.assert_close(one[i], two, rtol=1e-12, atol=1e-13)
    tangents = tuple(torch.randn_like(t) for t in made.values())
    values, derivatives = torch.func.jvp(present, tuple(made.values()), tangents)
    step = 1e-6
    ends = [
        present(*(t + sign * step * d for t, d in zip(made.values(), tangents, strict=True)))
        for sign in (1, -1)
    ]
    for value, derivative, want, up, down in zip(values, derivatives, expected, *ends, strict=True):
        torch.testing.assert_close(value, want, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(derivative, (up - down) / (2 * step), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"dout": torch.zeros(1, 2, 3, 5)},
            ValueError,
            "`dout` must be [B, N, S_q, D_v] = [1, 2, 3, 4], got [1, 2, 3, 5]",
        ),
        (
            {"out": torch.zeros(1, 2, 3, 4).double()},
            TypeError,
            "`out` must have the dtype of the input, torch.float32, got torch.float64",
        ),
        (
            {"lse": torch.zeros(1, 2, 4)},
            ValueError,
            "`lse` must be [B, N, S_q] = [1, 2, 3], got [1, 2, 4]",
        ),
        (
            {"lse": torch.zeros(1, 2, 3).half()},
            TypeError,
            "`lse` must have dtype torch.float32, got torch.float16",
        ),
        ({"lse": None}, TypeError, "`lse` must be a Tensor, got NoneType"),
        (
            {"dlse": torch.zeros(2, 3)},
            ValueError,
            "`dlse` must be [B, N, S_q] = [1, 2, 3], got [2, 3]",
        ),
        (
            {"k": torch.zeros(1, 2, 7, 5)},
            ValueError,
            "`k` must be [B, N_kv, S_k, D] = [1, 2, 7, 4]",
        ),
        (
            {"attn_mask": torch.zeros(3, 6)},
            ValueError,
            "`attn_mask` must be broadcastable to [B, N, S_q, S_k] = [1, 2, 3, 7], got [3, 6]",
        ),
        *(
            ({name: 1}, TypeError, f"`{name}` must be True or False, got int")
            for name in ("is_causal", "enable_gqa", "mask_grad")
        ),
        (
            {"mask_grad": True},
            ValueError,
            "`attn_mask` must be additive where mask_grad is True, got None",
        ),
        (
            {"mask_grad": True, "attn_mask": torch.ones(3, 7, dtype=torch.bool)},
            ValueError,
            "`attn_mask` must be additive where mask_grad is True, got a boolean one",
        ),
        ({"window": (-1, 0)}, ValueError, "`window` must be of sides of at least 0"),
        ({"sinks": torch.zeros(3)}, ValueError, "`sinks` must be [N] = [2], got [3]"),
        (
            {"backend": "triton"}
            | {name: torch.zeros(1, 2, 3, 300) for name in ("dout", "q", "k", "v", "out")},
            ValueError,
            "backend 'triton' cannot serve this call",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors(change, error, words):
    sizes = {"dout": (3, 4), "q": (3, 4), "k": (7, 4), "v": (7, 4), "out": (3, 4), "lse": (3,)}
    given = {name: torch.zeros(1, 2, *size) for name, size in sizes.items()} | change
    with pytest.raises(error, match="attention_backward: " + re.escape(words)):
        functional.attention_backward(**given)
