"""The named inputs of every op: one list for tests, benchmarks and the README's support table.

A spec says what is run (sizes, options, memory layout), why it is there, and builds its tensors:

    spec.inputs(torch.float32)  ->  {"x": ..., "w_ih": ..., ...}   arguments of functional.<op>
    spec.options                ->  {"nonlinearity": "tanh", ...}  and its keyword options

The same seed gives the same numbers at every dtype (drawn in float64, then rounded once).

Tags: "bench" shapes that benchmarks time, "quick" the short benchmark, "hostile" edges and odd
layouts, "interpreter" small enough for Triton's interpreter, "gradcheck" small enough for
numerical derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pykernels.ops import _recurrent
from pykernels.ops.attention import band_of, features

LAYOUTS = ("contiguous", "transposed", "expanded", "offset", "strided", "huge")

# Storage elements between two rows of the "huge" layout: an element offset that no 32-bit integer
# holds. The pages in between are never touched, so the memory is reserved and not used.
HUGE_STRIDE = 2**31 + 64


def with_layout(dense: Tensor, layout: str) -> Tensor:
    """The values of `dense` ("expanded": of its first slice, repeated) in another memory layout.

    "transposed"  the last dimension but two and the one before it lie swapped in memory
                  ([T, B, I] as [B, T, I]; [B, N, S, D] as [B, S, N, D]); a matrix lies transposed
    "expanded"    stride 0 in the dimension that a batch or head is usually broadcast over
    "offset"      the storage starts one element late, so that no vector load is aligned
    "strided"     every second element of the last dimension
    "huge"        HUGE_STRIDE elements between slices of the first dimension
    """
    shape = dense.shape
    if layout == "contiguous" or dense.dim() == 0:
        return dense.contiguous()
    if layout == "transposed":
        if dense.dim() == 1:
            return dense.contiguous()
        a = 0 if dense.dim() == 2 else dense.dim() - 3
        return dense.transpose(a, a + 1).contiguous().transpose(a, a + 1)
    if layout == "expanded":
        axis = {1: 0, 2: 0, 3: 1, 4: 1}[dense.dim()]
        if shape[axis] == 0:
            return dense.contiguous()
        return dense.narrow(axis, 0, 1).contiguous().expand(shape)
    if layout == "offset":
        storage = torch.empty(dense.numel() + 1, dtype=dense.dtype, device=dense.device)
        return storage[1:].view(shape).copy_(dense)
    if layout == "strided":
        storage = torch.empty((*shape[:-1], 2 * shape[-1]), dtype=dense.dtype, device=dense.device)
        return storage[..., ::2].copy_(dense)
    if layout == "huge":
        rows = [shape[0], *dense.contiguous().stride()[1:]]
        size = (rows[0] - 1) * HUGE_STRIDE + math.prod(shape[1:])
        # a raw storage: torch.empty may be told to fill what it returns, and would touch every page
        storage = torch.UntypedStorage(size * dense.element_size(), device=dense.device)
        view = torch.tensor([], dtype=dense.dtype, device=dense.device)
        view.set_(storage, 0, shape, (HUGE_STRIDE, *rows[1:]))
        return view.copy_(dense)
    raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")


class _Draw:
    """Random tensors in float64 from one seeded generator.

    It is the CPU's, but for the specs of benchmarks, which may be large: these are drawn on the
    device that wants them.
    """

    def __init__(self, seed: int, device: str | torch.device, tags: frozenset[str]) -> None:
        self.generator = torch.Generator(device if "bench" in tags else "cpu").manual_seed(seed)
        self.options: dict[str, Any] = {
            "generator": self.generator,
            "device": self.generator.device,
        }

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, **self.options)

    def uniform(self, bound: float, *shape: int) -> Tensor:
        return (torch.rand(shape, dtype=torch.float64, **self.options) * 2 - 1) * bound

    def chance(self, p: float, *shape: int) -> Tensor:
        return torch.rand(shape, dtype=torch.float64, **self.options) < p

    def integers(self, end: int, *shape: int) -> Tensor:
        return torch.randint(end, shape, **self.options)


@dataclass(frozen=True)
class RecurrentSpec:
    """Inputs of a recurrent op of G gates, as `functional.rnn` names them.

    x is [T, B, I], w_ih [G H, I], w_hh [G H, H], the biases [G H], h0 [B, H].
    """

    name: str
    why: str
    t: int
    b: int
    i: int
    h: int
    _: KW_ONLY
    bias: bool = True
    h0: bool = True
    reverse: bool = False
    lengths: tuple[int, ...] | None = None
    layout: str = "contiguous"
    tags: frozenset[str] = frozenset()

    op = ""
    gates = 1
    outputs: ClassVar[tuple[str, ...]] = ("y", "h_n")

    @property
    def sizes(self) -> dict[str, int]:
        return {"T": self.t, "B": self.b, "I": self.i, "H": self.h}

    @property
    def options(self) -> dict[str, Any]:
        return {"reverse": self.reverse, "lengths": self.lengths}

    @property
    def ragged(self) -> bool:
        """Whether a step of a sequence is left out."""
        return self.lengths is not None and any(length < self.t for length in self.lengths)

    def features(self, dtype: torch.dtype) -> frozenset[str]:
        """What a backend must list in FEATURES to serve this spec."""
        return _recurrent.features(self.ragged, False)

    def draw(self, draw: _Draw) -> dict[str, Tensor]:
        """Tensors by argument name; weights as torch.nn draws them, uniform in +-1/sqrt(H)."""
        k, rows = 1 / math.sqrt(self.h), self.gates * self.h
        made = {
            "x": draw.normal(self.t, self.b, self.i),
            "w_ih": draw.uniform(k, rows, self.i),
            "w_hh": draw.uniform(k, rows, self.h),
        }
        if self.bias:
            made |= {"b_ih": draw.uniform(k, rows), "b_hh": draw.uniform(k, rows)}
        if self.h0:
            made["h0"] = draw.normal(self.b, self.h)
        return made

    def inputs(
        self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
    ) -> dict[str, Tensor]:
        """What `draw` makes, in the layout of the spec."""
        # the huge layout is for x alone: it reserves gigabytes of address space for each tensor
        return {
            name: with_layout(
                tensor.to(device=device, dtype=dtype),
                "contiguous" if self.layout == "huge" and name != "x" else self.layout,
            )
            for name, tensor in self.draw(_Draw(seed, device, self.tags)).items()
        }


@dataclass(frozen=True)
class RNNSpec(RecurrentSpec):
    """Inputs of `functional.rnn`."""

    _: KW_ONLY
    nonlinearity: str = "tanh"

    op = "rnn"

    @property
    def options(self) -> dict[str, Any]:
        return super().options | {"nonlinearity": self.nonlinearity}


@dataclass(frozen=True)
class GRUSpec(RecurrentSpec):
    """Inputs of `functional.gru`."""

    op = "gru"
    gates = 3


@dataclass(frozen=True)
class LSTMSpec(RecurrentSpec):
    """Inputs of `functional.lstm`: with h0 there is c0 [B, H].

    With `proj_size` = R > 0 there is w_hr [R, H], and w_hh is [4H, R], h0 [B, R].
    """

    _: KW_ONLY
    proj_size: int = 0
    return_cell_states: bool = False

    op = "lstm"
    gates = 4

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("y", "h_n", "c_n", "c")[: 4 if self.return_cell_states else 3]

    @property
    def options(self) -> dict[str, Any]:
        return super().options | {"return_cell_states": self.return_cell_states}

    def features(self, dtype: torch.dtype) -> frozenset[str]:
        """What a backend must list in FEATURES to serve this spec."""
        return _recurrent.features(self.ragged, self.proj_size > 0)

    def draw(self, draw: _Draw) -> dict[str, Tensor]:
        """Tensors by argument name."""
        made = super().draw(draw)
        if self.proj_size:
            k = 1 / math.sqrt(self.h)
            made["w_hh"] = draw.uniform(k, 4 * self.h, self.proj_size)
            made["w_hr"] = draw.uniform(k, self.proj_size, self.h)
        if self.h0:
            made["h0"] = draw.normal(self.b, self.proj_size or self.h)
            made["c0"] = draw.normal(self.b, self.h)
        return made


@dataclass(frozen=True)
class AttentionSpec:
    """Inputs of `functional.attention`.

    q is [B, N, S_q, D], k [B, N_kv, S_k, D], v [B, N_kv, S_k, D_v].
    `mask` is None, "bool" (True = attend) or "float" (added to the scores; one entry in five is
    -inf), of shape `mask_shape`, whose letters stand for the sizes above and "1" for a broadcast
    axis. Every row of a mask keeps a key, unless `dead_rows` asks for every third row to keep none
    (or a mask without a key axis, or the causal rule on top, takes its keys away).
    """

    name: str
    why: str
    b: int
    n: int
    s_q: int
    d: int
    s_k: int = -1  # -1: as many keys as queries
    n_kv: int = -1  # -1: as many key heads as query heads
    d_v: int = -1  # -1: D
    is_causal: bool = False
    window: tuple[int | None, int | None] | None = None
    causal_alignment: str = "top-left"
    scale: float | None = None
    softcap: float = 0.0
    mask: str | None = None
    mask_shape: tuple[str, ...] = ("S_q", "S_k")
    dead_rows: bool = False
    finite_mask: bool = False  # a most negative number in place of -inf
    learned: bool = False  # the float mask has a gradient
    sinks: bool = False
    alibi: tuple[str, ...] = ()  # the shape of the slopes, in these letters
    dropout_p: float = 0.0
    gain: float = 1.0  # standard deviation of the scores is about this
    layout: str = "contiguous"
    tags: frozenset[str] = frozenset()

    op = "attention"
    outputs = ("out", "lse")

    def __post_init__(self) -> None:
        for field, default in (("s_k", self.s_q), ("n_kv", self.n), ("d_v", self.d)):
            if getattr(self, field) == -1:
                object.__setattr__(self, field, default)

    @property
    def sizes(self) -> dict[str, int]:
        return {
            "B": self.b,
            "N": self.n,
            "N_kv": self.n_kv,
            "S_q": self.s_q,
            "S_k": self.s_k,
            "D": self.d,
            "D_v": self.d_v,
        }

    def features(self, dtype: torch.dtype) -> frozenset[str]:
        """What a backend must list in FEATURES to serve this spec."""
        asked = features(
            dtype,
            self.d,
            self.d_v,
            self.band,
            self.softcap,
            self.sinks,
            bool(self.alibi),
            self.dropout_p > 0,
        )
        return asked | {"mask_grad"} if self.learned else asked

    @property
    def band(self) -> tuple[int | None, int | None]:
        """The first and last j - i at which query i sees key j."""
        return band_of(self.s_q, self.s_k, self.is_causal, self.window, self.causal_alignment)

    @property
    def options(self) -> dict[str, Any]:
        return {
            "is_causal": self.is_causal,
            "window": self.window,
            "causal_alignment": self.causal_alignment,
            "scale": self.scale,
            "softcap": self.softcap,
            "dropout_p": self.dropout_p,
            "enable_gqa": self.n_kv != self.n,
        }

    def inputs(
        self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
    ) -> dict[str, Tensor]:
        """Tensors by argument name, standard normal but for q, which carries `gain`."""
        draw = _Draw(seed, device, self.tags)
        made = {
            "q": draw.normal(self.b, self.n, self.s_q, self.d) * self.gain,
            "k": draw.normal(self.b, self.n_kv, self.s_k, self.d),
            "v": draw.normal(self.b, self.n_kv, self.s_k, self.d_v),
        }
        made = {name: t.to(device=device, dtype=dtype) for name, t in made.items()}
        if self.mask is not None:
            mask = self._mask(draw).to(device, torch.bool if self.mask == "bool" else dtype)
            # float16's most negative number would be -inf as soon as a score is added to it
            if self.finite_mask and dtype != torch.float16:
                mask = mask.clamp(min=torch.finfo(dtype).min)
            made["attn_mask"] = mask
        if self.sinks:
            made["sinks"] = draw.normal(self.n).to(device=device, dtype=dtype)
        if self.alibi:
            slopes = draw.normal(*(self.sizes[letter] for letter in self.alibi)).abs()
            made["alibi_slopes"] = slopes.to(device=device, dtype=dtype)
        layouts = dict.fromkeys(made, self.layout)
        if (
            self.layout == "huge"
        ):  # for q alone: it reserves gigabytes of address space for each tensor
            layouts = {name: "huge" if name == "q" else "contiguous" for name in made}
        return {name: with_layout(t, layouts[name]) for name, t in made.items()}

    def _mask(self, draw: _Draw) -> Tensor:
        named = {"1": 1, **self.sizes}
        shape = [named[letter] for letter in self.mask_shape]
        keep = ~draw.chance(0.2, *shape)
        if shape[-1] > 1:
            rows = torch.arange(math.prod(shape[:-1]), device=keep.device).reshape(shape[:-1])
            keep.scatter_(-1, (rows % shape[-1])[..., None], True)
            if self.dead_rows:
                keep[rows % 3 == 1] = False
        if self.mask == "bool":
            return keep
        return draw.normal(*shape).masked_fill(~keep, -math.inf)


@dataclass(frozen=True, slots=True)
class AttentionVarlenSpec:
    """Inputs of `functional.attention_varlen`: sequences of `lengths`, keys of `key_lengths`.

    q is [T_q, N, D], k [T_k, N_kv, D], v [T_k, N_kv, D_v]; with `page_size`, k and v are pages
    in no order, one more than are needed, and `used` counts the keys. With `pool` there are only so
    many pages, which sequences name time and again.
    """

    name: str
    why: str
    lengths: tuple[int, ...]
    n: int
    d: int
    key_lengths: tuple[int, ...] = ()  # (): as many keys as queries
    n_kv: int = -1
    d_v: int = -1
    is_causal: bool = False
    window: tuple[int | None, int | None] | None = None
    causal_alignment: str = "bottom-right"
    softcap: float = 0.0
    sinks: bool = False
    alibi: tuple[str, ...] = ()
    dropout_p: float = 0.0
    used: tuple[int, ...] = ()  # (): all
    page_size: int = 0
    pool: int = 0
    layout: str = "contiguous"
    tags: frozenset[str] = frozenset()

    op = "attention_varlen"
    outputs = ("out", "lse")

    def __post_init__(self) -> None:
        for field, default in (("n_kv", self.n), ("d_v", self.d)):
            if getattr(self, field) == -1:
                object.__setattr__(self, field, default)
        if not self.key_lengths:
            object.__setattr__(self, "key_lengths", self.lengths)

    @property
    def sizes(self) -> dict[str, int]:
        return {"B": len(self.lengths), "N": self.n, "T_q": sum(self.lengths)}

    def features(self, dtype: torch.dtype) -> frozenset[str]:
        """What a backend must list in FEATURES to serve this spec."""
        return features(
            dtype,
            self.d,
            self.d_v,
            band_of(0, 0, self.is_causal, self.window, "top-left"),
            self.softcap,
            self.sinks,
            bool(self.alibi),
            self.dropout_p > 0,
        )

    @property
    def options(self) -> dict[str, Any]:
        return {
            "is_causal": self.is_causal,
            "window": self.window,
            "causal_alignment": self.causal_alignment,
            "softcap": self.softcap,
            "dropout_p": self.dropout_p,
            "enable_gqa": self.n_kv != self.n,
        }

    def inputs(
        self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
    ) -> dict[str, Tensor]:
        """Tensors by argument name, floating ones standard normal."""
        draw = _Draw(seed, device, self.tags)
        shape: tuple[int, ...] = (sum(self.key_lengths),)
        if self.page_size:
            pages = [math.ceil(n / self.page_size) for n in self.used]
            shape = (self.pool or sum(pages) + 1, self.page_size)
        made = {
            "q": draw.normal(sum(self.lengths), self.n, self.d),
            "k": draw.normal(*shape, self.n_kv, self.d),
            "v": draw.normal(*shape, self.n_kv, self.d_v),
        }
        if self.sinks:
            made["sinks"] = draw.normal(self.n)
        if self.alibi:
            made["alibi_slopes"] = draw.normal(*(self.sizes[letter] for letter in self.alibi)).abs()
        made = {
            name: with_layout(t.to(device=device, dtype=dtype), self.layout)
            for name, t in made.items()
        }
        made["cu_seqlens_q"] = _starts(self.lengths)
        if self.page_size:
            table = torch.zeros(len(pages), max(pages), dtype=torch.int32)
            order = (torch.arange(sum(pages), 0, -1) % shape[0]).split(pages)
            for row, taken in zip(table, order, strict=True):
                row[: len(taken)] = taken
            made["block_table"] = table
        else:
            made["cu_seqlens_k"] = _starts(self.key_lengths)
        if self.used:
            made["seqused_k"] = torch.tensor(self.used, dtype=torch.int32)
        return {name: t.to(device) for name, t in made.items()}


def _starts(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@dataclass(frozen=True)
class LinearCrossEntropySpec:
    """Inputs of `functional.linear_cross_entropy`.

    x is [*lead, H], weight [V, H], target [*lead]; a share `ignored` of the targets, the first of
    them too, is `ignore_index`.
    """

    name: str
    why: str
    lead: tuple[int, ...]
    h: int
    v: int
    _: KW_ONLY
    bias: bool = True
    class_weight: bool = False
    ignored: float = 0.0
    ignore_index: int = -100
    reduction: str = "mean"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    return_lse: bool = False
    gain: float = 1.0  # standard deviation of the logits is about this
    layout: str = "contiguous"
    tags: frozenset[str] = frozenset()

    op = "linear_cross_entropy"

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("loss", "lse") if self.return_lse else ("loss",)

    @property
    def sizes(self) -> dict[str, int]:
        return {"N": math.prod(self.lead), "H": self.h, "V": self.v}

    def features(self, dtype: torch.dtype) -> frozenset[str]:
        """What a backend must list in FEATURES to serve this spec."""
        return frozenset()

    @property
    def options(self) -> dict[str, Any]:
        names = ("ignore_index", "reduction", "label_smoothing", "z_loss", "return_lse")
        return {name: getattr(self, name) for name in names}

    def inputs(
        self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
    ) -> dict[str, Tensor]:
        """Tensors by argument name: x standard normal, the weight such that `gain` holds."""
        draw = _Draw(seed, device, self.tags)
        made = {
            "x": draw.normal(*self.lead, self.h),
            "weight": draw.normal(self.v, self.h) * self.gain / math.sqrt(self.h),
        }
        if self.bias:
            made["bias"] = draw.normal(self.v)
        if self.class_weight:
            made["class_weight"] = draw.uniform(1, self.v).abs() + 0.1
        made = {
            name: with_layout(t.to(device=device, dtype=dtype), self.layout)
            for name, t in made.items()
        }
        target = draw.integers(self.v, *self.lead)
        if self.ignored:
            out = draw.chance(self.ignored, *self.lead)
            out.reshape(-1)[:1] = True
            target[out] = self.ignore_index
        return made | {"target": target.to(device)}


Spec = RecurrentSpec | AttentionSpec | AttentionVarlenSpec | LinearCrossEntropySpec


def _tags(*tags: str) -> frozenset[str]:
    known = {"bench", "quick", "hostile", "interpreter", "gradcheck"}
    if unknown := set(tags) - known:
        raise ValueError(f"unknown tags {sorted(unknown)}")
    return frozenset(tags)


BENCH = _tags("bench")
QUICK = _tags("bench", "quick")
HOSTILE = _tags("hostile")
SMALL = _tags("hostile", "interpreter")
TINY = _tags("hostile", "interpreter", "gradcheck")


def _recurrent_specs(kind: type[RecurrentSpec], quick: Collection[str]) -> list[RecurrentSpec]:
    """The specs that every recurrent op has; of the benchmark's, those in `quick` are quick."""

    def spec(name: str, why: str, tags: frozenset[str], *sizes: int, **rest: Any) -> RecurrentSpec:
        return kind(f"{kind.op}-{name}", why, *sizes, tags=tags, **rest)

    def bench(sizes: str, why: str) -> RecurrentSpec:
        return spec(sizes, why, QUICK if sizes in quick else BENCH, *map(int, sizes.split("x")))

    return [
        # --- what benchmarks time
        bench("50x1x300x512", "a sentence at a time: the weights bind, not the arithmetic"),
        bench("50x32x300x512", "a language model's batch"),
        bench("50x64x300x512", "the same, twice as wide a batch"),
        bench("512x16x128x128", "a long sequence whose weights fit the first cache"),
        bench("1024x1x64x64", "longest and smallest: the cost of one step"),
        # --- plain
        spec("plain", "the ordinary case, small", TINY, 5, 3, 6, 8),
        spec("reverse", "time runs backwards", TINY, 5, 3, 6, 8, reverse=True),
        spec("no-bias", "both biases absent", TINY, 5, 3, 6, 8, bias=False),
        spec("no-h0", "the state starts at zero", TINY, 5, 3, 6, 8, h0=False),
        # --- least sizes
        spec("t1", "one step: y and h_n are the same numbers", TINY, 1, 3, 6, 8),
        spec("t1-reverse", "one step backwards", SMALL, 1, 3, 6, 8, reverse=True),
        spec("t2", "one step with a predecessor", TINY, 2, 1, 2, 3),
        spec("t0", "no step: h_n is h0, the weights get zero gradient", SMALL, 0, 3, 6, 8),
        spec("t0-no-h0", "no step and no state: h_n is zero", SMALL, 0, 3, 6, 8, h0=False),
        spec("b0", "an empty batch", SMALL, 5, 0, 6, 8),
        spec("b1", "one sequence: a matrix-vector product per step", SMALL, 6, 1, 7, 12),
        spec("h1", "one hidden unit", TINY, 5, 8, 6, 1),
        spec("i1", "one input feature", TINY, 5, 3, 1, 8),
        spec("all1", "every size is one", TINY, 1, 1, 1, 1),
        # --- around the vector width (4, 8, 16 lanes)
        *(
            spec(f"h{h}", "vector width +-1 in H", HOSTILE, 4, 5, 6, h)
            for h in (7, 9, 15, 16, 31, 32)
        ),
        spec("h17", "one past two vectors in H", SMALL, 4, 5, 6, 17),
        spec("h33", "one past a block of 32 in H", SMALL, 3, 5, 6, 33),
        *(
            spec(f"i{i}", "vector width +-1 in I", HOSTILE, 4, 5, i, 10)
            for i in (7, 8, 9, 15, 16, 31, 32, 33)
        ),
        spec("i17", "one past two vectors in I", SMALL, 4, 5, 17, 10),
        *(
            spec(f"b{b}", "register tile +-1 in B", HOSTILE, 3, b, 5, 11)
            for b in (2, 4, 6, 7, 8, 9, 13, 16, 33)
        ),
        spec("b17", "one past a tensor-core tile in B", SMALL, 3, 17, 5, 11),
        # --- across the blocks of the matrix product
        spec("h340", "H crosses blocks and is no multiple of one", HOSTILE, 4, 3, 40, 340),
        spec("h321", "one past a depth block in H", HOSTILE, 3, 7, 20, 321),
        spec("i600", "I longer than a depth block of the product", HOSTILE, 3, 4, 600, 20),
        spec("h600", "R longer than one, and fewer steps than are prepared", HOSTILE, 2, 7, 3, 600),
        *(
            spec(f"b{b}", "B crosses the rows of a step, H several blocks", HOSTILE, 2, b, 5, 140)
            for b in (50, 115)
        ),
        spec("rows", "T*B crosses row blocks of the input product", HOSTILE, 70, 9, 12, 24),
        spec("long", "error and gradient through many steps", HOSTILE, 200, 2, 8, 16),
        # --- sequences of different lengths
        spec("ragged", "lengths in no order", TINY, 5, 4, 3, 4, lengths=(3, 5, 1, 4)),
        spec(
            "ragged-reverse",
            "each starts at its own last step",
            TINY,
            5,
            4,
            3,
            4,
            lengths=(3, 5, 1, 4),
            reverse=True,
        ),
        spec("ragged-full", "no step is left out", SMALL, 5, 3, 6, 8, lengths=(5, 5, 5)),
        spec(
            "ragged-equal",
            "the same steps of each are left out",
            SMALL,
            5,
            3,
            6,
            8,
            lengths=(3,) * 3,
        ),
        spec("ragged-ones", "one step each", SMALL, 4, 3, 6, 8, lengths=(1,) * 3),
        spec("ragged-b1", "one sequence that ends early", SMALL, 6, 1, 7, 12, lengths=(4,)),
        spec(
            "ragged-bare",
            "neither bias nor state, backwards",
            TINY,
            4,
            3,
            2,
            3,
            lengths=(2, 4, 2),
            bias=False,
            h0=False,
            reverse=True,
        ),
        spec(
            "ragged-one-long",
            "most steps have one row alone",
            HOSTILE,
            40,
            19,
            9,
            33,
            lengths=(*(1 + n % 3 for n in range(18)), 40),
        ),
        spec(
            "ragged-one-long-reverse",
            "most steps have one row alone, and the many join last",
            HOSTILE,
            40,
            19,
            9,
            33,
            lengths=(40, *(1 + n % 3 for n in range(18))),
            reverse=True,
        ),
        spec(
            "ragged-wide",
            "row and column blocks with steps of every size",
            HOSTILE,
            21,
            17,
            20,
            321,
            lengths=tuple(1 + (7 * n) % 20 for n in range(17)),
        ),
        spec(
            "ragged-transposed",
            "x comes batch first",
            SMALL,
            5,
            4,
            6,
            9,
            lengths=(2, 2, 5, 3),
            layout="transposed",
        ),
        # --- memory layouts
        spec("transposed", "x comes batch first", SMALL, 5, 4, 6, 9, layout="transposed"),
        spec("expanded", "stride 0: one row for the batch", SMALL, 5, 4, 6, 9, layout="expanded"),
        spec("offset", "no pointer is aligned", SMALL, 5, 4, 8, 16, layout="offset"),
        spec("strided", "the last axis is not dense", SMALL, 5, 4, 6, 9, layout="strided"),
        spec("huge-stride", "offsets past 32 bits", HOSTILE, 2, 3, 6, 9, layout="huge"),
    ]


RNN_SPECS: list[RecurrentSpec] = [
    *_recurrent_specs(RNNSpec, {"50x32x300x512", "512x16x128x128", "1024x1x64x64"}),
    RNNSpec("rnn-relu", "the other nonlinearity", 5, 3, 6, 8, nonlinearity="relu", tags=TINY),
    RNNSpec(
        "rnn-bare",
        "no bias, no h0, relu and reverse at once",
        4,
        2,
        3,
        5,
        bias=False,
        h0=False,
        nonlinearity="relu",
        reverse=True,
        tags=TINY,
    ),
    RNNSpec(
        "rnn-long-relu",
        "many steps where nothing saturates",
        100,
        3,
        8,
        24,
        nonlinearity="relu",
        reverse=True,
        tags=HOSTILE,
    ),
    RNNSpec(
        "rnn-ragged-relu",
        "the other nonlinearity",
        5,
        4,
        3,
        4,
        lengths=(3, 5, 1, 4),
        nonlinearity="relu",
        tags=SMALL,
    ),
]

GRU_SPECS: list[RecurrentSpec] = [
    *_recurrent_specs(GRUSpec, {"50x32x300x512"}),
    GRUSpec(
        "gru-bare",
        "no bias, no h0 and reverse at once",
        4,
        2,
        3,
        5,
        bias=False,
        h0=False,
        reverse=True,
        tags=TINY,
    ),
]


def _lstm(name: str, why: str, tags: frozenset[str], sizes: Iterable[int], **rest: Any) -> LSTMSpec:
    return LSTMSpec(f"lstm-{name}", why, *sizes, tags=tags, **rest)


LSTM_SPECS: list[RecurrentSpec] = [
    *_recurrent_specs(LSTMSpec, {"50x32x300x512", "1024x1x64x64"}),
    _lstm(
        "bare",
        "no bias, no states and reverse at once",
        TINY,
        (4, 2, 3, 5),
        bias=False,
        h0=False,
        reverse=True,
    ),
    # --- projections
    _lstm("proj", "the state is narrower than the cells", TINY, (4, 3, 3, 5), proj_size=2),
    _lstm(
        "proj-bare",
        "the same without bias and states, backwards",
        TINY,
        (4, 3, 3, 5),
        proj_size=2,
        bias=False,
        h0=False,
        reverse=True,
    ),
    _lstm("proj-r1", "a state of one number", SMALL, (4, 3, 6, 8), proj_size=1),
    _lstm("proj-square", "the state is as wide as the cells", SMALL, (4, 3, 6, 8), proj_size=8),
    _lstm("proj-wider", "the state is wider than the cells", SMALL, (4, 3, 6, 8), proj_size=11),
    _lstm("proj-t0", "no step", SMALL, (0, 3, 6, 8), proj_size=5),
    _lstm("proj-b0", "an empty batch", SMALL, (4, 0, 6, 8), proj_size=5),
    _lstm("proj-b1", "one sequence", HOSTILE, (6, 1, 7, 20), proj_size=9),
    *(
        _lstm(f"proj-r{r}", "vector width +-1 in R", HOSTILE, (4, 5, 6, 40), proj_size=r)
        for r in (7, 8, 9, 15, 16, 17, 31, 33)
    ),
    _lstm("proj-wide", "H and R cross blocks", HOSTILE, (4, 7, 20, 340), proj_size=321),
    _lstm("proj-long", "through many steps", HOSTILE, (100, 2, 8, 16), proj_size=5, reverse=True),
    _lstm(
        "proj-transposed",
        "no tensor is dense",
        SMALL,
        (5, 4, 6, 9),
        proj_size=5,
        layout="transposed",
    ),
    _lstm("proj-strided", "no tensor is dense", SMALL, (5, 4, 6, 9), proj_size=5, layout="strided"),
    _lstm(
        "proj-ragged",
        "with lengths in no order",
        TINY,
        (4, 3, 2, 4),
        proj_size=2,
        lengths=(2, 4, 1),
    ),
    _lstm(
        "proj-ragged-reverse",
        "and backwards, in blocks",
        HOSTILE,
        (12, 9, 20, 33),
        proj_size=17,
        lengths=(2, 12, 1, 5, 5, 9, 3, 3, 11),
        reverse=True,
    ),
    # --- all cell states
    _lstm("cells", "c is an output with a gradient", TINY, (4, 3, 3, 5), return_cell_states=True),
    _lstm(
        "cells-reverse",
        "the same backwards, from zero states",
        SMALL,
        (4, 3, 6, 8),
        return_cell_states=True,
        h0=False,
        reverse=True,
    ),
    _lstm("cells-t0", "no step", SMALL, (0, 3, 6, 8), return_cell_states=True),
    _lstm("cells-b1", "one sequence", SMALL, (6, 1, 7, 20), return_cell_states=True),
    _lstm(
        "cells-h33", "one past a block of 32 in H", HOSTILE, (4, 5, 6, 33), return_cell_states=True
    ),
    _lstm("cells-h340", "H crosses blocks", HOSTILE, (4, 3, 40, 340), return_cell_states=True),
    _lstm(
        "cells-proj",
        "of H numbers, not R",
        SMALL,
        (4, 3, 6, 8),
        return_cell_states=True,
        proj_size=3,
    ),
    _lstm(
        "cells-ragged",
        "c is zero after the end",
        TINY,
        (4, 3, 2, 3),
        return_cell_states=True,
        lengths=(2, 4, 1),
    ),
    _lstm(
        "cells-ragged-proj",
        "all at once",
        SMALL,
        (4, 3, 6, 8),
        return_cell_states=True,
        lengths=(2, 4, 1),
        proj_size=3,
        reverse=True,
    ),
]


def _attention_bench(
    b: int, n: int, s: int, d: int, why: str, tags: frozenset[str]
) -> list[AttentionSpec]:
    name = f"attention-{b}x{n}x{s}x{d}"
    return [
        AttentionSpec(name, why, b, n, s, d, tags=tags),
        AttentionSpec(f"{name}-causal", f"{why}, causal", b, n, s, d, is_causal=True, tags=tags),
    ]


def _attention(
    name: str, why: str, tags: frozenset[str], sizes: Iterable[int], **rest: Any
) -> AttentionSpec:
    b, n, s_q, d = sizes
    return AttentionSpec(f"attention-{name}", why, b, n, s_q, d, tags=tags, **rest)


ATTENTION_SPECS: list[AttentionSpec] = [
    # --- what benchmarks time
    *_attention_bench(1, 8, 512, 64, "one sequence of ordinary length", BENCH),
    *_attention_bench(4, 8, 512, 64, "a small batch", QUICK),
    *_attention_bench(1, 8, 2048, 64, "a long sequence", QUICK),
    *_attention_bench(1, 8, 2048, 128, "a long sequence with wide heads", BENCH),
    *_attention_bench(8, 12, 128, 64, "BERT's heads on short sentences", BENCH),
    *_attention_bench(16, 12, 64, 64, "and on shorter ones", BENCH),
    *_attention_bench(1, 8, 4096, 64, "what a window is measured by", BENCH)[1:],
    AttentionSpec(
        "attention-1x8x4096x64-window256",
        "256 keys back: an eighth of what the causal rule leaves",
        1,
        8,
        4096,
        64,
        is_causal=True,
        window=(256, 0),
        tags=BENCH,
    ),
    AttentionSpec(
        "attention-decode-1x8x1x4096x64",
        "one new token against a cache: memory binds",
        1,
        8,
        1,
        64,
        s_k=4096,
        tags=QUICK,
    ),
    # --- plain
    _attention("plain", "the ordinary case, small", TINY, (2, 2, 5, 4)),
    _attention("causal", "each query sees itself and before", TINY, (2, 2, 5, 4), is_causal=True),
    # --- bands
    _attention("window", "three keys back, one ahead", TINY, (2, 2, 9, 4), window=(3, 1)),
    _attention("window-self", "each query sees itself", TINY, (1, 2, 5, 4), window=(0, 0)),
    _attention("window-left", "no bound ahead", SMALL, (1, 2, 40, 8), window=(5, None)),
    _attention("window-right", "no bound back", SMALL, (1, 2, 40, 8), window=(None, 5)),
    _attention("window-wide", "wider than the keys", SMALL, (1, 2, 7, 8), window=(99, 99)),
    _attention(
        "window-causal",
        "both rules",
        SMALL,
        (2, 4, 150, 16),
        n_kv=2,
        window=(20, 7),
        is_causal=True,
    ),
    _attention(
        "window-tiles", "ends inside of tiles", HOSTILE, (1, 1, 700, 16), s_k=900, window=(130, 65)
    ),
    _attention(
        "window-aligned",
        "aligned at the last key",
        SMALL,
        (1, 2, 70, 16),
        s_k=200,
        window=(33, 3),
        causal_alignment="bottom-right",
    ),
    _attention(
        "causal-aligned",
        "as in a cache",
        SMALL,
        (1, 2, 5, 8),
        s_k=37,
        is_causal=True,
        causal_alignment="bottom-right",
    ),
    _attention(
        "causal-aligned-kv-shorter",
        "early queries see no key",
        SMALL,
        (1, 2, 37, 8),
        s_k=5,
        is_causal=True,
        causal_alignment="bottom-right",
    ),
    _attention(
        "window-blind",
        "late queries see no key",
        SMALL,
        (1, 2, 60, 8),
        s_k=20,
        window=(4, 2),
    ),
    _attention(
        "window-mask",
        "with a mask",
        SMALL,
        (2, 2, 50, 8),
        window=(9, 4),
        mask="float",
        dead_rows=True,
    ),
    _attention(
        "window-bool",
        "with a mask",
        SMALL,
        (2, 2, 50, 8),
        window=(9, 4),
        mask="bool",
        dead_rows=True,
    ),
    # --- capped scores
    _attention("softcap", "a cap that bites", TINY, (1, 2, 5, 4), softcap=0.7),
    _attention("softcap-wide", "Gemma's cap", SMALL, (1, 2, 40, 16), softcap=50.0, gain=20.0),
    _attention(
        "softcap-window",
        "with a window, shared heads and a scale",
        SMALL,
        (1, 4, 70, 16),
        n_kv=2,
        softcap=3.0,
        scale=-0.4,
        window=(20, 5),
        gain=4.0,
    ),
    _attention(
        "softcap-float",
        "with a mask",
        SMALL,
        (2, 2, 30, 8),
        softcap=2.0,
        mask="float",
        dead_rows=True,
    ),
    _attention(
        "softcap-bool",
        "with a mask",
        SMALL,
        (2, 2, 30, 8),
        softcap=2.0,
        mask="bool",
        is_causal=True,
    ),
    _attention("scale", "an explicit scale", TINY, (1, 2, 5, 4), scale=0.3),
    _attention(
        "scale-negative", "a scale below zero flips the maximum", SMALL, (1, 2, 9, 8), scale=-0.5
    ),
    _attention("scale-zero", "every key weighs the same", SMALL, (1, 2, 9, 8), scale=0.0),
    # --- lengths
    _attention("kv-longer", "more keys than queries", TINY, (1, 2, 3, 4), s_k=7),
    _attention("kv-shorter", "fewer keys than queries", TINY, (1, 2, 7, 4), s_k=3),
    _attention(
        "causal-kv-longer",
        "top-left: the last keys are unseen",
        TINY,
        (1, 2, 3, 4),
        s_k=7,
        is_causal=True,
    ),
    _attention(
        "causal-kv-shorter", "late queries see all keys", TINY, (1, 2, 7, 4), s_k=3, is_causal=True
    ),
    _attention(
        "causal-kv-longer-tiles",
        "whole tiles unseen",
        HOSTILE,
        (1, 2, 40, 8),
        s_k=300,
        is_causal=True,
    ),
    _attention(
        "causal-kv-shorter-tiles",
        "whole tiles past the keys",
        HOSTILE,
        (1, 2, 300, 8),
        s_k=40,
        is_causal=True,
    ),
    _attention("s1", "one query, one key: softmax is 1", TINY, (2, 3, 1, 4)),
    _attention("sq1", "a decode step", SMALL, (2, 3, 1, 8), s_k=37),
    _attention(
        "sq1-causal",
        "one query sees the first key alone",
        SMALL,
        (2, 3, 1, 8),
        s_k=37,
        is_causal=True,
    ),
    _attention("sk1", "one key: no gradient reaches q", SMALL, (2, 3, 9, 8), s_k=1),
    _attention("sk0", "no key: output 0, lse -inf", SMALL, (2, 3, 4, 8), s_k=0),
    _attention("sk0-causal", "no key, causal", SMALL, (2, 3, 4, 8), s_k=0, is_causal=True),
    _attention("sq0", "no query: empty output, zero gradient", SMALL, (2, 3, 0, 8), s_k=5),
    _attention("b0", "an empty batch", SMALL, (0, 3, 4, 8)),
    # --- head sizes
    *(
        _attention(f"d{d}", "vector width +-1 in D", HOSTILE, (1, 2, 10, d))
        for d in (2, 8, 9, 15, 17, 31, 33, 80, 100, 128, 160, 256)
    ),
    _attention("d300", "more than a GPU's registers hold", HOSTILE, (1, 2, 10, 300)),
    _attention("d1", "one feature", TINY, (1, 2, 5, 1)),
    _attention("d7", "one short of a vector", SMALL, (1, 2, 10, 7)),
    _attention("d40", "no power of two", SMALL, (1, 2, 10, 40)),
    _attention("d64", "the usual head", SMALL, (1, 1, 33, 64), is_causal=True),
    _attention("dv-wider", "values wider than keys", TINY, (1, 2, 5, 3), d_v=6),
    _attention(
        "dv-narrower", "values narrower than keys", HOSTILE, (2, 2, 20, 24), d_v=5, is_causal=True
    ),
    _attention("dv1", "one value feature", HOSTILE, (1, 2, 19, 16), d_v=1),
    _attention("dv0", "no value feature, only weights", HOSTILE, (1, 2, 19, 16), d_v=0),
    # --- heads
    _attention("gqa", "two query heads share a key head", TINY, (1, 4, 3, 3), n_kv=2),
    _attention(
        "gqa-causal", "three share one, causal", SMALL, (2, 6, 20, 8), n_kv=2, is_causal=True
    ),
    _attention("mqa", "all query heads share one key head", SMALL, (2, 4, 11, 8), n_kv=1),
    _attention("mqa-decode", "a shared cache, one query", HOSTILE, (2, 8, 1, 64), n_kv=1, s_k=130),
    # --- masks
    _attention("mask-2d", "bool [S_q, S_k]", TINY, (1, 2, 4, 3), mask="bool"),
    _attention(
        "mask-4d",
        "bool [B, N, S_q, S_k]",
        SMALL,
        (2, 3, 9, 8),
        mask="bool",
        mask_shape=("B", "N", "S_q", "S_k"),
    ),
    _attention(
        "mask-keys",
        "bool [B, 1, 1, S_k]: padding",
        SMALL,
        (3, 2, 9, 8),
        mask="bool",
        mask_shape=("B", "1", "1", "S_k"),
    ),
    _attention(
        "mask-heads",
        "bool [N, 1, S_k] by head",
        HOSTILE,
        (2, 3, 20, 8),
        mask="bool",
        mask_shape=("N", "1", "S_k"),
    ),
    _attention(
        "mask-rows",
        "bool [1, N, S_q, 1]: whole rows die",
        SMALL,
        (2, 3, 9, 8),
        mask="bool",
        mask_shape=("1", "N", "S_q", "1"),
    ),
    _attention(
        "mask-dead", "every third row sees no key", TINY, (1, 2, 4, 3), mask="bool", dead_rows=True
    ),
    _attention(
        "mask-dead-tiles",
        "dead rows across tiles",
        HOSTILE,
        (1, 2, 150, 16),
        mask="bool",
        dead_rows=True,
    ),
    _attention(
        "mask-causal",
        "mask and causal both apply",
        SMALL,
        (2, 2, 17, 8),
        mask="bool",
        is_causal=True,
    ),
    _attention(
        "mask-gqa",
        "mask by query head, keys shared",
        HOSTILE,
        (2, 4, 33, 8),
        n_kv=2,
        mask="bool",
        mask_shape=("B", "N", "S_q", "S_k"),
    ),
    _attention("bias-2d", "float [S_q, S_k] with -inf entries", TINY, (1, 2, 4, 3), mask="float"),
    _attention(
        "bias-4d",
        "float [B, N, S_q, S_k]",
        SMALL,
        (2, 3, 9, 8),
        mask="float",
        mask_shape=("B", "N", "S_q", "S_k"),
    ),
    _attention(
        "bias-keys",
        "float [B, 1, 1, S_k]",
        SMALL,
        (3, 2, 9, 8),
        mask="float",
        mask_shape=("B", "1", "1", "S_k"),
    ),
    _attention(
        "bias-rows",
        "float [1, N, S_q, 1]: moves lse alone",
        SMALL,
        (2, 3, 9, 8),
        mask="float",
        mask_shape=("1", "N", "S_q", "1"),
    ),
    _attention(
        "bias-dead", "rows of -inf alone", SMALL, (1, 2, 12, 8), mask="float", dead_rows=True
    ),
    _attention(
        "bias-causal",
        "float mask and causal",
        HOSTILE,
        (2, 2, 70, 16),
        mask="float",
        is_causal=True,
    ),
    _attention(
        "bias-strided",
        "the mask is not dense either",
        HOSTILE,
        (1, 2, 30, 8),
        s_k=21,
        mask="float",
        mask_shape=("B", "N", "S_q", "S_k"),
        layout="strided",
    ),
    # --- learned masks, whose gradient sums over what they broadcast
    _attention(
        "learned-2d", "shared by all heads", TINY, (2, 2, 4, 3), s_k=5, mask="float", learned=True
    ),
    _attention(
        "learned-heads",
        "T5's bias by head",
        SMALL,
        (3, 4, 9, 8),
        mask="float",
        mask_shape=("N", "S_q", "S_k"),
        learned=True,
    ),
    _attention(
        "learned-batch",
        "by sequence, keys shared by heads",
        SMALL,
        (3, 4, 9, 8),
        n_kv=2,
        mask="float",
        mask_shape=("B", "1", "S_q", "S_k"),
        learned=True,
    ),
    _attention(
        "learned-4d",
        "nothing is shared",
        SMALL,
        (2, 3, 9, 8),
        mask="float",
        mask_shape=("B", "N", "S_q", "S_k"),
        learned=True,
    ),
    _attention(
        "learned-keys",
        "a number a key",
        SMALL,
        (3, 2, 9, 8),
        mask="float",
        mask_shape=("B", "1", "1", "S_k"),
        learned=True,
    ),
    _attention(
        "learned-rows",
        "a number a query: moves lse alone",
        SMALL,
        (2, 3, 9, 8),
        mask="float",
        mask_shape=("1", "N", "S_q", "1"),
        learned=True,
    ),
    _attention(
        "learned-one",
        "one number for everything",
        SMALL,
        (2, 3, 9, 8),
        mask="float",
        mask_shape=("1",),
        learned=True,
    ),
    _attention(
        "learned-dead",
        "rows that see no key",
        SMALL,
        (2, 2, 12, 8),
        mask="float",
        dead_rows=True,
        learned=True,
    ),
    _attention(
        "learned-tiles",
        "across tiles, causal",
        HOSTILE,
        (2, 2, 129, 16),
        s_k=257,
        mask="float",
        is_causal=True,
        learned=True,
    ),
    _attention(
        "learned-window",
        "a window on top",
        HOSTILE,
        (2, 2, 300, 16),
        mask="float",
        window=(70, 3),
        learned=True,
    ),
    _attention(
        "learned-softcap",
        "the cap is before the mask",
        SMALL,
        (2, 2, 9, 8),
        mask="float",
        softcap=0.7,
        learned=True,
    ),
    _attention(
        "learned-strided",
        "views of views",
        HOSTILE,
        (2, 2, 30, 8),
        s_k=21,
        mask="float",
        mask_shape=("N", "S_q", "S_k"),
        layout="strided",
        learned=True,
    ),
    # --- sinks, a score by head that no value belongs to
    _attention("sinks", "the softmax leaves some weight", TINY, (2, 2, 5, 4), sinks=True),
    _attention(
        "sinks-causal",
        "gpt-oss: a window, groups",
        SMALL,
        (2, 4, 40, 8),
        n_kv=2,
        is_causal=True,
        window=(9, 0),
        sinks=True,
    ),
    _attention(
        "sinks-dead",
        "rows that see the sink alone",
        SMALL,
        (2, 2, 12, 8),
        mask="bool",
        dead_rows=True,
        sinks=True,
    ),
    _attention(
        "sinks-learned",
        "under an additive mask",
        SMALL,
        (2, 2, 9, 8),
        mask="float",
        learned=True,
        sinks=True,
    ),
    _attention("sinks-softcap", "over capped scores", SMALL, (2, 2, 9, 8), softcap=0.7, sinks=True),
    _attention("sinks-tiles", "across tiles", HOSTILE, (2, 2, 129, 16), s_k=700, sinks=True),
    _attention("sinks-decode", "one query", SMALL, (2, 4, 1, 8), n_kv=2, s_k=37, sinks=True),
    _attention("sinks-sk0", "no key but the sink", SMALL, (2, 3, 4, 8), s_k=0, sinks=True),
    # --- slopes by head
    _attention("alibi", "a number a step", TINY, (2, 2, 5, 4), alibi=("N",)),
    _attention(
        "alibi-batch",
        "slopes by sequence, causal, at the last key",
        SMALL,
        (2, 4, 9, 8),
        s_k=21,
        n_kv=2,
        is_causal=True,
        causal_alignment="bottom-right",
        alibi=("B", "N"),
    ),
    _attention(
        "alibi-all",
        "with a learned mask, a window, a cap and sinks",
        SMALL,
        (2, 2, 60, 8),
        window=(20, 9),
        mask="float",
        dead_rows=True,
        learned=True,
        softcap=1.3,
        sinks=True,
        alibi=("N",),
    ),
    _attention(
        "alibi-tiles", "across tiles", HOSTILE, (1, 2, 129, 16), s_k=700, alibi=("N",), mask="bool"
    ),
    # --- weights dropped
    _attention("dropout", "half of them", TINY, (2, 2, 5, 4), dropout_p=0.5),
    _attention(
        "dropout-causal",
        "groups, a window",
        SMALL,
        (2, 4, 70, 8),
        n_kv=2,
        is_causal=True,
        window=(30, 0),
        dropout_p=0.1,
    ),
    _attention(
        "dropout-all",
        "with all else",
        SMALL,
        (2, 2, 40, 8),
        s_k=83,
        causal_alignment="bottom-right",
        window=(30, 9),
        mask="float",
        dead_rows=True,
        learned=True,
        softcap=1.3,
        sinks=True,
        alibi=("N",),
        dropout_p=0.25,
    ),
    _attention("dropout-every", "none is left", SMALL, (1, 2, 9, 8), dropout_p=1.0),
    _attention("dropout-tiles", "across tiles", HOSTILE, (2, 2, 129, 16), s_k=700, dropout_p=0.3),
    # --- few queries, keys in spans
    _attention("few-spans", "one past two spans", HOSTILE, (1, 2, 1, 17), s_k=2049, d_v=67),
    _attention(
        "few-aligned",
        "a window that ends in another span",
        HOSTILE,
        (2, 2, 3, 8),
        s_k=1200,
        window=(190, 0),
        causal_alignment="bottom-right",
    ),
    _attention(
        "few-all",
        "with all else",
        HOSTILE,
        (2, 4, 2, 8),
        n_kv=2,
        s_k=1200,
        is_causal=True,
        causal_alignment="bottom-right",
        mask="float",
        dead_rows=True,
        learned=True,
        softcap=1.3,
        sinks=True,
        alibi=("B", "N"),
        dropout_p=0.25,
        layout="strided",
    ),
    _attention("few-saturated", "one key outweighs", HOSTILE, (1, 4, 1, 16), s_k=1500, gain=50.0),
    # --- around tile borders
    *(
        _attention(f"s{s}", "tile border +-1, full", HOSTILE, (1, 1, s, 16))
        for s in (16, 31, 33, 47, 48, 49, 63, 64, 65, 127, 128, 129, 255, 256, 257, 513)
    ),
    *(
        _attention(
            f"s{s}-causal", "tile border +-1, causal", HOSTILE, (1, 1, s, 16), is_causal=True
        )
        for s in (16, 31, 33, 47, 48, 49, 63, 64, 65, 127, 128, 129, 255, 256, 257, 513)
    ),
    _attention("tiles", "one past a tile both ways", SMALL, (1, 1, 65, 16), s_k=129),
    _attention("tiles-causal", "the same, causal", SMALL, (1, 1, 129, 16), s_k=65, is_causal=True),
    _attention(
        "tiles-mask", "a mask across tile borders", HOSTILE, (1, 2, 129, 16), s_k=257, mask="bool"
    ),
    # --- large scores
    _attention(
        "saturated", "scores of size 50: softmax is one-hot", SMALL, (2, 4, 64, 16), gain=50.0
    ),
    _attention(
        "saturated-causal", "the same, causal", HOSTILE, (1, 2, 130, 16), gain=50.0, is_causal=True
    ),
    # --- memory layouts
    _attention(
        "transposed", "q, k, v lie as [B, S, N, D]", SMALL, (2, 3, 9, 8), layout="transposed"
    ),
    _attention("expanded", "one key head expanded over N", SMALL, (2, 3, 9, 8), layout="expanded"),
    _attention("offset", "no pointer is aligned", SMALL, (2, 3, 9, 16), layout="offset"),
    _attention(
        "strided",
        "the last axis is not dense",
        SMALL,
        (2, 3, 9, 8),
        layout="strided",
        is_causal=True,
    ),
    # --- extremes
    _attention(
        "bias-min",
        "masks of the most negative number, whole rows of it too: no -inf may come of them",
        SMALL,
        (1, 2, 12, 8),
        mask="float",
        dead_rows=True,
        finite_mask=True,
        learned=True,
    ),
    _attention("n0", "no head", SMALL, (2, 0, 4, 8)),
    _attention("huge-stride", "offsets past 32 bits", HOSTILE, (2, 2, 9, 8), layout="huge"),
]


ATTENTION_VARLEN_SPECS: list[AttentionVarlenSpec] = [
    AttentionVarlenSpec(f"attention_varlen-{name}", why, lengths, *sizes, tags=tags, **rest)
    for name, why, tags, lengths, sizes, rest in [
        ("plain", "three sequences", TINY, (3, 1, 5), (2, 4), {}),
        (
            "causal",
            "with fewer queries than keys",
            TINY,
            (3, 1, 2),
            (2, 4),
            {"key_lengths": (4, 1, 5), "is_causal": True},
        ),
        (
            "top-left",
            "the other alignment",
            SMALL,
            (3, 7, 20),
            (2, 8),
            {"key_lengths": (9, 1, 25), "is_causal": True, "causal_alignment": "top-left"},
        ),
        (
            "blind",
            "more queries than keys: the first see none",
            SMALL,
            (9, 4),
            (2, 8),
            {"key_lengths": (4, 1), "is_causal": True},
        ),
        ("window", "before and behind", SMALL, (40, 3, 90), (2, 16), {"window": (9, 4)}),
        (
            "gqa",
            "shared heads of another width",
            SMALL,
            (30, 61),
            (4, 8),
            {"n_kv": 2, "d_v": 5, "is_causal": True},
        ),
        (
            "empty",
            "sequences of no query, no key, nothing",
            SMALL,
            (0, 5, 3, 0),
            (2, 8),
            {"key_lengths": (4, 0, 6, 0)},
        ),
        ("one", "one sequence", SMALL, (33,), (2, 8), {}),
        (
            "ones",
            "a query each: decoding without a cache's gaps",
            SMALL,
            (1, 1, 1, 1),
            (4, 8),
            {"key_lengths": (5, 70, 1, 300), "n_kv": 2, "is_causal": True},
        ),
        (
            "used",
            "slots that are not full",
            TINY,
            (2, 1, 3),
            (2, 4),
            {"key_lengths": (4, 3, 5), "used": (3, 0, 5), "is_causal": True},
        ),
        (
            "all",
            "everything at once",
            SMALL,
            (20, 7, 41),
            (4, 8),
            {
                "key_lengths": (31, 7, 90),
                "n_kv": 2,
                "used": (31, 5, 77),
                "window": (30, 9),
                "softcap": 1.3,
                "sinks": True,
                "alibi": ("B", "N"),
                "dropout_p": 0.25,
                "layout": "transposed",
            },
        ),
        ("slopes", "slopes by head", SMALL, (20, 7), (4, 8), {"alibi": ("N",)}),
        ("tiles", "across tiles", HOSTILE, (129, 700, 3), (1, 16), {"is_causal": True}),
        ("strided", "no tensor is dense", SMALL, (9, 17), (2, 8), {"layout": "strided"}),
        (
            "pages",
            "a cache in pages",
            SMALL,
            (2, 1, 9),
            (4, 8),
            {"n_kv": 2, "used": (13, 37, 9), "page_size": 8, "is_causal": True},
        ),
        (
            "pages-decode",
            "one query each",
            HOSTILE,
            (1, 1, 1),
            (2, 64),
            {"used": (1300, 0, 37), "page_size": 16, "is_causal": True},
        ),
        (
            "pages-again",
            "more keys than rows of the cache",
            SMALL,
            (3, 1),
            (2, 16),
            {"used": (81, 33), "page_size": 16, "pool": 1},
        ),
        (
            "pages-ring",
            "and a window",
            HOSTILE,
            (40, 1),
            (2, 16),
            {"used": (640, 100), "page_size": 16, "pool": 2, "window": (500, 0)},
        ),
        (
            "pages-all",
            "a chunk of queries with all else",
            HOSTILE,
            (40, 1, 33),
            (4, 16),
            {
                "n_kv": 2,
                "used": (600, 5, 77),
                "page_size": 5,
                "window": (200, 0),
                "softcap": 1.3,
                "sinks": True,
                "alibi": ("B", "N"),
                "dropout_p": 0.25,
                "layout": "strided",
            },
        ),
    ]
]


def _loss(
    name: str, why: str, tags: frozenset[str], sizes: tuple[Any, int, int], **rest: Any
) -> LinearCrossEntropySpec:
    lead, h, v = sizes
    lead = lead if isinstance(lead, tuple) else (lead,)
    return LinearCrossEntropySpec(
        f"linear_cross_entropy-{name}", why, lead, h, v, **rest, tags=tags
    )


LINEAR_CROSS_ENTROPY_SPECS = [
    _loss("1600x512x30000", "an RNN language model of 30,000 words", BENCH, (1600, 512, 30000)),
    _loss("1024x768x50257", "GPT-2's head", BENCH, (1024, 768, 50257), bias=False),
    _loss("512x256x8000", "a small one", QUICK, (512, 256, 8000)),
    # --- what is asked for
    _loss("plain", "the usual case", TINY, (5, 4, 7)),
    _loss("no-bias", "a tied embedding", TINY, (5, 4, 7), bias=False),
    _loss("sum", "no division", TINY, (5, 4, 7), reduction="sum"),
    _loss("none", "an upstream gradient for each row", TINY, (5, 4, 7), reduction="none"),
    _loss("ignored", "rows that do not count", TINY, (6, 4, 7), ignored=0.4),
    _loss("ignored-class", "a class is ignored", SMALL, (40, 6, 3), ignored=0.3, ignore_index=2),
    _loss("smooth", "label smoothing", TINY, (5, 4, 7), label_smoothing=0.2),
    _loss("smooth-1", "nothing but smoothing", SMALL, (5, 4, 7), label_smoothing=1.0),
    _loss("weights", "the mean is weighted", TINY, (5, 4, 7), class_weight=True, ignored=0.3),
    _loss("z", "z-loss", TINY, (5, 4, 7), z_loss=0.1),
    _loss("lse", "the log-sum-exp and its gradient", TINY, (5, 4, 7), return_lse=True),
    *(
        _loss(
            f"all-{reduction}",
            "everything at once",
            TINY,
            ((2, 3), 4, 7),
            class_weight=True,
            ignored=0.3,
            reduction=reduction,
            label_smoothing=0.1,
            z_loss=0.05,
            return_lse=lse,
        )
        for reduction, lse in (("mean", False), ("sum", True), ("none", True))
    ),
    # --- sizes
    _loss("lead", "rows in three axes", SMALL, ((2, 3, 4), 6, 9), reduction="none"),
    _loss("row", "one row without an axis", SMALL, ((), 6, 9)),
    _loss("n0-sum", "no row", SMALL, (0, 4, 7), reduction="sum"),
    _loss("n0-none", "no row", SMALL, ((2, 0), 4, 7), reduction="none"),
    _loss("h1", "one input", SMALL, (6, 1, 9)),
    _loss("v1", "one word: no loss and no gradient", SMALL, (6, 4, 1)),
    _loss("v2", "two words", SMALL, (40, 8, 2)),
    *(
        _loss(f"s{s}", "vector width, tile and block +-1", HOSTILE, (s, s + 2, s + 1), ignored=0.2)
        for s in (8, 15, 16, 17, 31, 32, 33, 47, 49, 63, 65, 95, 127, 191, 193)
    ),
    _loss("h600", "the hidden size in slices", HOSTILE, (9, 600, 70)),
    _loss("h1030", "in three, the last one short", HOSTILE, (33, 1030, 40), reduction="none"),
    _loss("rows", "several chunks of rows", HOSTILE, (801, 20, 33), ignored=0.1),
    _loss("rows-none", "the same, recomputed", HOSTILE, (801, 20, 33), reduction="none"),
    _loss("rows-smooth", "chunks and smoothing", HOSTILE, (401, 9, 20), label_smoothing=0.1),
    _loss("words-smooth", "blocks and smoothing", HOSTILE, (9, 9, 450), label_smoothing=0.1),
    _loss("words", "so many words that chunks are short", HOSTILE, (150, 5, 70001)),
    _loss("words-z", "the same with a z-loss", HOSTILE, (60, 5, 70001), z_loss=1e-3, bias=False),
    # --- values
    _loss("saturated", "logits of size 50: one-hot", HOSTILE, (20, 8, 60), gain=50.0),
    # --- memory layouts
    *(
        _loss(layout, "views", SMALL, ((3, 4), 6, 9), layout=layout, class_weight=True)
        for layout in ("transposed", "expanded", "offset", "strided")
    ),
]


def _gpu_attention(d: int, s: int) -> list[AttentionSpec]:
    tags = QUICK if (d, s) == (128, 2048) else BENCH
    return _attention_bench(2**14 // s, 2**11 // d, s, d, "16k tokens of 2048 features", tags)


def _gpu_recurrent(kind: type[RecurrentSpec]) -> list[RecurrentSpec]:
    return [
        kind(f"{kind.op}-{sizes}", why, *map(int, sizes.split("x")), tags=tags)
        for sizes, why, tags in (
            ("50x32x300x512", "a language model's batch, I no multiple of 128", QUICK),
            ("512x16x128x128", "a long sequence whose weights one multiprocessor holds", BENCH),
            ("1024x1x64x64", "longest and smallest: the cost of one step", QUICK),
            ("1024x16x768x768", "what cuDNN's persistent LSTM is at its best for", BENCH),
            ("512x65x1000x1000", "a batch and a width that no tile divides", BENCH),
        )
    ]


#: What the benchmark times on a GPU, by op: larger than what is timed on a CPU, and compared there.
GPU_SPECS: dict[str, list[Spec]] = {
    "rnn": [*_gpu_recurrent(RNNSpec)],
    "gru": [*_gpu_recurrent(GRUSpec)],
    "lstm": [*_gpu_recurrent(LSTMSpec)],
    "attention": [
        spec for d in (64, 128, 256) for s in (512, 2048, 8192) for spec in _gpu_attention(d, s)
    ],
    "linear_cross_entropy": [
        _loss("1600x512x30000", "an RNN language model of 30,000 words", QUICK, (1600, 512, 30000)),
        _loss("4096x1024x32000", "a small transformer", BENCH, (4096, 1024, 32000), bias=False),
        _loss("8192x4096x131072", "a large one", BENCH, (8192, 4096, 131072), bias=False),
    ],
}


def find(name: str) -> Spec:
    """The spec called `name`; a KeyError that lists the known names otherwise."""
    specs = (
        *RNN_SPECS,
        *GRU_SPECS,
        *LSTM_SPECS,
        *ATTENTION_SPECS,
        *ATTENTION_VARLEN_SPECS,
        *LINEAR_CROSS_ENTROPY_SPECS,
    )
    for spec in specs:
        if spec.name == name:
            return spec
    known = ", ".join(spec.name for spec in specs)
    raise KeyError(f"no spec is called {name!r}; known: {known}")


def tagged(specs: Iterable[Spec], *tags: str) -> list[Spec]:
    """The specs that carry every one of `tags`."""
    return [spec for spec in specs if spec.tags.issuperset(tags)]
