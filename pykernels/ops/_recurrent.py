"""What the recurrent ops share: the checks of their arguments, one step, and ragged batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pykernels import _autocast, _backends, _checks
from pykernels.ops import _autograd, _library
from pykernels.ops._calls import Call
from pykernels.ops._packed import PackedWeights, check_packed

#: Rows of the weights by the number of gates, as errors name them.
_ROWS = {1: "H", 3: "3H", 4: "4H"}
_WEIGHTS = ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")
_NONE: frozenset[str] = frozenset()
#: Values of W_hh up to which calls run side by side: more do not stay in a core's own cache beside
#: what else a step reads, while one call on all threads has each keep its part.
_BESIDE = 3 * 2**16

Function = type[torch.autograd.Function]


def define(op: str, *, options: str = "", extras: str = "") -> None:
    """Makes the op known to torch's compilers and transforms."""
    has_cells = op == "lstm"
    last_if = "return_cell_states" if has_cells else ""
    options = f"{options}, " if options else ""

    def empty(x: Tensor, *others: Any, batch_sizes: Any, **options: Any) -> tuple[Tensor, ...]:
        rows, B = x.shape[:-1], x.shape[1] if batch_sizes is None else batch_sizes[0]
        R = others[1].shape[1]
        found = [x.new_empty(*rows, R), x.new_empty(B, R)]
        if has_cells:
            H = others[1].shape[0] // 4
            found.append(x.new_empty(B, H))
            if options[last_if]:
                found.append(x.new_empty(*rows, H))
        return tuple(found)

    def formula(*tensors: Any, **options: Any) -> tuple[Tensor, ...]:
        with_cells = options.pop(last_if, True)
        found: tuple[Tensor, ...]
        found = getattr(_backends.module("reference", op), op)(*tensors, **options)
        return found if with_cells else found[:-1]

    def axes(*tensors: Any, batch_sizes: Any, **options: Any) -> Any:
        if batch_sizes is not None:
            return None  # the rows of a step lie behind those of the one before
        shared = (None, None, None, None)
        kept = [1] * len(extras.split())
        if has_cells:
            return (1, *shared, 0, 0, None), (1, 0, 0, 1, *kept)
        return (1, *shared, 0), (1, 0, *kept)

    _library.Operator(
        op,
        tensors="Tensor x, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? h0"
        + (", Tensor? c0, Tensor? w_hr" if has_cells else ""),
        options=f"{options}bool reverse, SymInt[]? batch_sizes",
        outputs="y h_n c_n c" if has_cells else "y h_n",
        extras=extras,
        last_if=last_if,
        empty=empty,
        formula=formula,
        axes=axes,
    )


def features(ragged: bool, projection: bool) -> frozenset[str]:
    """The optional features that a call asks of a backend."""
    if not (ragged or projection):
        return _NONE
    asked = {"ragged": ragged, "projection": projection}
    return frozenset(name for name, is_asked in asked.items() if is_asked)


def check_input(
    op: str, x: Any, lengths: Any, batch_sizes: Any
) -> tuple[int, tuple[int, ...] | Tensor | None, tuple[int, ...] | None]:
    """`x` and how long its sequences are -> B, the lengths, the batch sizes.

    Lengths that leave out no step come back as None; those of which a compiler sees no numbers as
    they are, to be checked where its graph runs.
    """
    _checks.tensor(op, "x", x)
    _checks.floating(op, "x", x)
    if batch_sizes is not None:
        if lengths is not None:
            _checks.fail(op, "lengths", "None where `batch_sizes` is given", lengths)
        _checks.rank(op, "x", x, "N, I")
        batch_sizes = _checks.batch_sizes(op, batch_sizes, x.shape[0])
        return batch_sizes[0], None, batch_sizes
    _checks.rank(op, "x", x, "T, B, I")
    T, B, _ = x.shape
    if isinstance(lengths, Tensor) and torch.compiler.is_compiling():
        _checks.integers(op, "lengths", lengths, "B")
        _checks.shape(op, "lengths", lengths, "B", (B,))
    elif lengths is not None:
        lengths = _checks.lengths(op, lengths, T, B)
        if all(length == T for length in lengths):
            lengths = None
    return B, lengths, None


def check_tensors(
    op: str,
    gates: int,
    x: Tensor,
    weights: Sequence[Any],
    states: Sequence[Any],
    names: Sequence[str],
) -> tuple[int, int]:
    """All tensors but x, and the sizes of the weights -> H and R.

    Written for speed, as a step is so short: a message is worded only where a check has failed.

    Args:
        op: what errors call the op.
        gates: how many it has.
        x: the input, [..., I].
        weights: w_ih, w_hh, b_ih, b_hh and, if there is a projection, w_hr.
        states: the first states, whose sizes are left to `_checks.shape`.
        names: what errors call the states.
    """
    w_ih, w_hh, b_ih, b_hh, w_hr = weights if len(weights) == 5 else (*weights, None)
    if w_ih is None or w_hh is None:
        _checks.tensor(op, "w_ih", w_ih)
        _checks.tensor(op, "w_hh", w_hh)
    _checks.alike(op, x, (*_WEIGHTS[: len(weights)], *names), (*weights, *states))
    G, I = _ROWS[gates], x.shape[-1]
    w_hh_shape = w_hh.shape
    if w_hr is None:
        if len(w_hh_shape) != 2:
            _checks.rank(op, "w_hh", w_hh, "H, H" if gates == 1 else f"{G}, H")
        H = R = max(w_hh_shape) // gates  # the longer side, should the matrix lie transposed
    else:
        _checks.rank(op, "w_hr", w_hr, "R, H")
        R, H = w_hr.shape
    if I < 1 or H < 1 or R < 1:
        for name, size in (("input size", I), ("hidden size", H), ("projection size", R)):
            _checks.positive(op, name, size)
    rows = gates * H
    if w_hh_shape != (rows, R):
        _checks.shape(op, "w_hh", w_hh, f"{G}, {'H' if w_hr is None else 'R'}", (rows, R))
    if w_ih.shape != (rows, I):
        _checks.shape(op, "w_ih", w_ih, f"{G}, I", (rows, I))
    if b_ih is not None and b_ih.shape != (rows,):
        _checks.shape(op, "b_ih", b_ih, G, (rows,))
    if b_hh is not None and b_hh.shape != (rows,):
        _checks.shape(op, "b_hh", b_hh, G, (rows,))
    return H, R


def call(
    op: str,
    function: Function,
    tensors: tuple[Any, ...],
    backend: str | None,
    options: dict[str, Any],
    lengths: tuple[int, ...] | Tensor | None,
    batch_sizes: tuple[int, ...] | None,
) -> Call | _Padded | _Masked:
    """A call over a whole sequence, of checked arguments.

    Args:
        op, function: the op and its Function.
        tensors: x, w_ih, w_hh, b_ih, b_hh, h0; for an lstm c0 and w_hr too.
        backend: as the caller asks.
        options: the op's own.
        lengths, batch_sizes: as `check_input` returns them.

    Returns:
        What makes y, h_n of such tensors; for an lstm c_n too, and all cell states if the options
        ask for them.
    """
    x = tensors[0]
    hidden = isinstance(lengths, Tensor)
    ragged = not hidden and (lengths is not None or batch_sizes is not None)
    projection = len(tensors) == 8 and tensors[7] is not None
    chosen = _backends.select(op, backend, x.device, x.dtype, features(ragged, projection))
    if lengths is None:
        return Call(op, function, chosen, options | {"batch_sizes": batch_sizes})
    if isinstance(lengths, Tensor):
        return _Masked(Call(op, function, chosen, options | {"batch_sizes": None}), lengths)
    rows = _Rows(lengths, x.shape[0], x.device)
    return _Padded(Call(op, function, chosen, options | {"batch_sizes": rows.batch_sizes}), rows)


class _Padded:
    """A call on sequences of different lengths, which runs on the steps that count."""

    def __init__(self, call: Call, rows: _Rows) -> None:
        self.call, self.rows = call, rows

    def outputs(
        self, tensors: tuple[Any, ...], *, packed: PackedWeights | None
    ) -> tuple[Tensor, ...]:
        """The outputs for x [T, B, I] and the rest, padded like it."""
        x, *weights = tensors[:5]
        rows = self.rows
        states = (None if t is None else t.index_select(0, rows.order) for t in tensors[5:7])
        gathered = (rows.gather(x), *weights, *states, *tensors[7:])
        y, h_n, *more = self.call.outputs(gathered, packed=packed)
        last = (t.index_select(0, rows.place) for t in (h_n, *more[:1]))
        return rows.scatter(y), *last, *map(rows.scatter, more[1:])

    def unseen(self, is_recorded: bool) -> None:
        """Not to be remembered: it holds a number for each row of a batch."""


class _Masked:
    """A call on sequences whose lengths a compiler sees no numbers of: all steps run.

    Sizes in a graph cannot hang on numbers in a tensor, so steps that do not count are zeros, and
    the states are read where each sequence ends.
    """

    def __init__(self, call: Call, lengths: Tensor) -> None:
        self.reverse = call.options["reverse"]
        self.call, self.lengths = call.with_options(reverse=False), lengths
        self.has_cells = call.op == "lstm"

    def outputs(
        self, tensors: tuple[Any, ...], *, packed: PackedWeights | None
    ) -> tuple[Tensor, ...]:
        """As `_Padded`."""
        x, *rest = tensors
        T = x.shape[0]
        lengths = torch.ops.pykernels.checked_lengths(self.lengths, T, self.call.op).to(x.device)
        step = torch.arange(T, device=x.device)[:, None]
        unused = (step >= lengths)[..., None]  # [T, B, 1]
        turned = (lengths - 1 - step).clamp(min=0)  # [T, B]: the last step first
        last = (lengths - 1)[None]

        def laid(t: Tensor) -> Tensor:
            return (_steps(t, turned) if self.reverse else t).masked_fill(unused, 0)

        call = self.call.with_options(return_cell_states=True) if self.has_cells else self.call
        y, _, *cells = call.outputs((laid(x), *rest), packed=packed)
        found = [y, *cells[1:]]
        ends = [_steps(t, last)[0] for t in found]
        wanted = 2 if self.call.options.get("return_cell_states") else 1
        y, *more = map(laid, found[:wanted])
        return y, *ends, *more

    def unseen(self, is_recorded: bool) -> None:
        """As `_Padded`."""


def _steps(t: Tensor, step: Tensor) -> Tensor:
    """[T, B, H] at steps [S, B] of each sequence: [S, B, H]."""
    return t.gather(0, step[..., None].expand(-1, -1, t.shape[2]))


@torch.library.custom_op("pykernels::checked_lengths", mutates_args=())
def _checked_lengths(lengths: Tensor, T: int, op: str) -> Tensor:
    """A copy of what was checked where numbers can be seen."""
    _checks.lengths_between(op, tuple(lengths.tolist()), T, len(lengths))
    return lengths.clone()


@_checked_lengths.register_fake
def _(lengths: Tensor, T: int, op: str) -> Tensor:
    return lengths.new_empty(lengths.shape)


def cell_call(
    op: str,
    function: Function,
    gates: int,
    tensors: tuple[Any, ...],
    names: tuple[str, ...],
    backend: str | None,
    options: dict[str, Any],
) -> Call:
    """A step of `op`, of arguments that are checked here.

    Args:
        op, function: the op and its Function.
        gates: how many the op has.
        tensors: as `step` takes them.
        names: what errors call the states.
        backend: as the caller asks.
        options: the op's own.
    """
    cell, input, weights, states = f"{op}_cell", tensors[0], tensors[1:5], tensors[5:]
    _checks.tensor(cell, "input", input)
    _checks.floating(cell, "input", input)
    _checks.rank(cell, "input", input, "B, I", "I")
    H, _ = check_tensors(cell, gates, input, weights, states, names)
    batched = input.dim() == 2
    B = input.shape[0] if batched else 1
    axes, sizes = ("B, H", (B, H)) if batched else ("H", (H,))
    for name, state in zip(names, states, strict=True):
        if state is not None:
            _checks.shape(cell, name, state, axes, sizes)
    chosen = _backends.select(op, backend, input.device, input.dtype)
    # As the rows of a packed sequence, which spares autograd a view.
    in_rows = not _library.looked_at(chosen) and "ragged" in chosen.FEATURES
    options = options | {"reverse": False, "batch_sizes": (B,) if in_rows else None}
    # All states are the last one.
    return Call(op, function, chosen, options, skip=(1,) if in_rows else ())


def step(
    cell: str,
    check: Callable[..., Call],
    tensors: tuple[Any, ...],
    packed: PackedWeights | None,
    backend: str | None,
    *nonlinearity: str,
) -> Sequence[Tensor]:
    """One step of an op: what its cell does.

    Args:
        cell: what errors call it.
        check: what makes a `cell_call` of the tensors, the backend and so on.
        tensors: the input, [B, I] or [I]; w_ih, w_hh, b_ih, b_hh; the states before the step,
            [B, H], or [H] as the input, or None.
        packed, backend, nonlinearity: as the caller asks.

    Returns:
        The states after the step.
    """
    input, weights, states = tensors[0], tensors[1:5], tensors[5:]
    if packed is not None:
        check_packed(cell, packed)
        relu = nonlinearity == ("relu",)
        after = packed.step(weights, input, states, relu=relu, backend=backend)
        if after is not None:
            return after
    call = check(tensors, backend, *nonlinearity)
    batched, given = input.dim() == 2, tensors
    if not batched:
        rows = (None if state is None else state[None] for state in states)
        given = (input[None], *weights, *rows)
    if call.options["batch_sizes"] is None:
        given = (given[0][None], *given[1:])
    if len(states) == 2:
        given = (*given, None)  # no projection
    found = call.outputs(given, packed=packed)
    after = found[:1] + found[2:] if found[1] is None else found[1:]
    return after if batched else tuple(state[0] for state in after)


class GroupFunction(torch.autograd.Function):
    """Autograd over several calls of an op that run side by side; differentiable twice."""

    @staticmethod
    def forward(
        ctx: Any,
        op: str,
        backend: ModuleType,
        options: Sequence[dict[str, Any]],
        chained: bool,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        made = _run_group(op, backend, options, chained, tensors, keep=True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *(t for _, saved in made for t in saved))
        ctx.op, ctx.backend, ctx.options, ctx.chained = op, backend, options, chained
        return _group_outputs([outputs for outputs, _ in made], chained)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needs, saved = ctx.needs_input_grad[4:], ctx.saved_tensors
        tensors, saved = saved[: len(needs)], saved[len(needs) :]
        with _autocast.disabled(tensors[0].device):
            if torch.is_grad_enabled():
                found = _by_formula(ctx, tensors, needs, grads, again=True)
            else:
                try:
                    found = _group_backward(ctx, saved, needs, grads)
                except RuntimeError:
                    if not _autograd.mapped(grads):
                        raise
                    with torch.enable_grad():
                        found = _by_formula(ctx, tensors, needs, grads, again=False)
        wanted = (grad if need else None for grad, need in zip(found, needs, strict=True))
        return None, None, None, None, *wanted


def recurrent_group(
    op: str,
    gates: int,
    x: Tensor,
    calls: Sequence[tuple[Sequence[Any], tuple[Tensor, ...] | None, dict[str, Any]]],
    *,
    chained: bool,
) -> tuple[list[Tensor], list[tuple[Tensor, ...]]] | None:
    """Layers or directions of a module side by side, each on a thread.

    Args:
        op, gates: the op, and how many gates it has.
        x: the input of all calls or, if `chained`, of the first.
        calls: w_ih, w_hh, b_ih, b_hh, w_hr; the first states; the options of `functional.<op>`.
        chained: whether each call takes the y of the one before.

    Returns:
        The y of each call, or of the last of a chain, and the last states of each; None where one
        call after the other is as fast, or no backend has better.
    """
    options = [dict(own) for _, _, own in calls]
    packed = [own.pop("packed") for own in options]
    batch_sizes = options[0]["batch_sizes"]
    w_hh, w_hr = calls[0][0][1], calls[0][0][4]
    if torch.compiler.is_compiling() or torch.get_num_threads() < 2 or w_hh.numel() > _BESIDE:
        return None
    check_input(op, x, None, batch_sizes)
    wanted = features(batch_sizes is not None, w_hr is not None)
    backend = _backends.select(op, None, x.device, x.dtype, wanted)
    if not hasattr(backend, f"{op}_group_fwd"):
        return None
    tensors: list[Tensor | None] = []
    like = x
    for (weights, states, _), own in zip(calls, options, strict=True):
        *plain, w_hr = weights
        check_tensors(op, gates, like, weights if op == "lstm" else plain, (), ())
        if chained:
            like = weights[1]  # as wide as y, which comes next
        if op == "lstm":
            own["return_cell_states"] = False
            tensors += [x, *plain, *(states or (None, None)), w_hr]
        else:
            tensors += [x, *plain, *(states or (None,))]
    if _library.looked_at(backend, tensors):
        return None
    count = len(calls)
    if _autograd.wanted(tuple(tensors)):
        given = (op, backend, options, chained, *tensors)
        flat = GroupFunction.apply(*given)  # type: ignore[no-untyped-call]
    else:
        for own, kept, each in zip(options, packed, _split(tensors, count), strict=True):
            own |= {} if kept is None else kept.option(op, backend, each)
        made = _run_group(op, backend, options, chained, tuple(tensors), keep=False)
        flat = _group_outputs([outputs for outputs, _ in made], chained)
    ys = 1 if chained else count
    return list(flat[:ys]), _split(flat[ys:], count)


def _run_group(
    op: str,
    backend: ModuleType,
    options: Sequence[dict[str, Any]],
    chained: bool,
    tensors: tuple[Any, ...],
    *,
    keep: bool,
) -> list[tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]]:
    """The outputs of each call and what it saved."""
    calls = list(zip(_split(tensors, len(options)), options, strict=True))
    with _autocast.disabled(tensors[0].device):
        run = getattr(backend, f"{op}_group_fwd")
        found: list[tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]]
        found = run(calls, chained=chained, keep=keep)
        return found


def _group_outputs(found: Sequence[tuple[Tensor, ...]], chained: bool) -> tuple[Tensor, ...]:
    """All y, or that of the end of a chain, and the states of each call."""
    ys = [y for y, *_ in found]
    return *(ys[-1:] if chained else ys), *(state for _, *last in found for state in last)


def _group_backward(
    ctx: Any,
    saved: tuple[Any, ...],
    needs: tuple[bool, ...],
    grads: tuple[Tensor | None, ...],
) -> list[Tensor | None]:
    """The gradients of all tensors of all calls, from what forward saved of them."""
    count = len(ctx.options)
    ys = (*[None] * (count - 1), grads[0]) if ctx.chained else grads[:count]
    states = _split(grads[1 if ctx.chained else count :], count)
    calls = [
        (kept, (y, *last), need, own)
        for kept, y, last, need, own in zip(
            _split(saved, count), ys, states, _split(needs, count), ctx.options, strict=True
        )
    ]
    return _group_gradients(ctx.op, ctx.backend, calls, ctx.chained)


def _group_gradients(
    op: str, backend: ModuleType, calls: list[tuple[Any, ...]], chained: bool
) -> list[Tensor | None]:
    """The gradients of all tensors of all calls."""
    if chained:
        # What a layer takes is what the one below gives, so its gradient is always needed.
        calls = [
            (saved, grads, (i > 0 or needs[0], *needs[1:]), own)
            for i, (saved, grads, needs, own) in enumerate(calls)
        ][::-1]
    found = getattr(backend, f"{op}_group_bwd")(calls, chained=chained)
    if chained:
        found = found[::-1]
        found = [found[0], *((None, *rest) for _, *rest in found[1:])]
    return [grad for each in found for grad in each]


def _by_formula(
    ctx: Any,
    tensors: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
    grads: tuple[Tensor | None, ...],
    *,
    again: bool,
) -> list[Tensor | None]:
    """The gradients by the reference's formulas; differentiable if `again`."""
    run = getattr(_backends.module("reference", ctx.op), ctx.op)
    results = 3 if ctx.op == "lstm" else 2
    # Aliases: what one tensor has to do with another is not this gradient's business.
    own: list[Any] = [t if t is None else t.view_as(t) for t in tensors]
    outputs: list[tuple[Tensor, ...]] = []
    for each, options in zip(_split(own, len(ctx.options)), ctx.options, strict=True):
        x = outputs[-1][0] if ctx.chained and outputs else each[0]
        options = {k: v for k, v in options.items() if k != "return_cell_states"}
        outputs.append(run(x, *each[1:], **options)[:results])
    given = [
        (output, grad)
        for output, grad in zip(_group_outputs(outputs, ctx.chained), grads, strict=True)
        # one that hangs on nothing that needs a gradient has none to pass on
        if grad is not None and output.requires_grad
    ]
    if not given:
        return [None] * len(own)
    wanted = [t for t, need in zip(own, needs, strict=True) if need]
    found = iter(
        torch.autograd.grad(
            [output for output, _ in given],
            wanted,
            [grad for _, grad in given],
            create_graph=again,
            allow_unused=True,
        )
    )
    return [next(found) if need else None for need in needs]


def _split(values: Sequence[Any], count: int) -> list[tuple[Any, ...]]:
    """`count` tuples of the same length."""
    size = len(values) // count
    return [tuple(values[i * size : (i + 1) * size]) for i in range(count)]


class _Rows:
    """The steps of a padded batch that count, as the rows of a PackedSequence.

    The longest sequence comes first, so that those which reach a step are the first ones.
    """

    def __init__(self, lengths: tuple[int, ...], T: int, device: torch.device) -> None:
        """`lengths` are B numbers from 1 to T."""
        self.T, self.B = T, len(lengths)
        # Numbers from numbers, so that no size in a compiled graph hangs on what a tensor holds.
        sizes: list[int] = []
        for ended, length in enumerate(sorted(lengths)):
            sizes += [self.B - ended] * (length - len(sizes))
        self.batch_sizes = tuple(sizes)
        descending, order = torch.tensor(lengths).sort(descending=True, stable=True)
        step = torch.arange(T)[:, None]
        reached = (step < descending).flatten().nonzero_static(size=sum(lengths))  # [N, 1]
        self.rows = (step * self.B + order).flatten()[reached[:, 0]].to(device)  # [N], of T * B
        self.order = order.to(device)  # [B]: which sequence is first, second, ...
        self.place = order.argsort().to(device)  # [B]: and back

    def gather(self, x: Tensor) -> Tensor:
        """[T, B, I] -> [N, I]; the gradient of a step that does not count is zero."""
        return x.flatten(0, 1).index_select(0, self.rows)

    def scatter(self, y: Tensor) -> Tensor:
        """[N, H] -> [T, B, H], zeros where no step counts."""
        padded = y.new_zeros(self.T * self.B, y.shape[1]).index_put_((self.rows,), y)
        return padded.view(self.T, self.B, y.shape[1])
