"""Adoption in one line: our layers in a model, our kernel under torch's attention."""

from __future__ import annotations

import math
import threading
import warnings
from typing import Any

import torch
from torch import Tensor

from pykernels import _backends, _checks, functional, nn

_LAYERS = {
    getattr(torch.nn, name): getattr(nn, name)
    for name in ("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell", "MultiheadAttention")
}


def replace_modules(model: torch.nn.Module, verbose: bool = False) -> torch.nn.Module:
    """Makes every stock layer in `model` that we have one of ours, in place.

    `RNN`, `GRU`, `LSTM`, their cells and `MultiheadAttention` of torch.nn become those of
    `pykernels.nn`, wherever they are, also inside `torch.nn.Transformer` and its layers. A layer
    stays the object that it is and changes its class alone: parameters, and so optimizers, hooks,
    the training flag and modules in several places stay as they are.

    Left alone is what may not do what its class does: a subclass, among them a layer whose weights
    are parametrized (call this first), and a layer with a `forward` of its own.

    In evaluation torch's encoder layer has a path of its own that never calls its attention, and
    its encoder makes nested tensors of padded batches; both are switched off where the attention is
    ours.

    Args:
        model: any module; it may be such a layer itself.
        verbose: print a line for each layer.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is no module.
    """
    done = _change(model, _LAYERS, "replace_modules", verbose)
    for module in model.modules():
        if isinstance(module, torch.nn.TransformerEncoderLayer) and _is_ours(module):
            _set(module, "activation_relu_or_gelu", 0)
        elif isinstance(module, torch.nn.TransformerEncoder) and any(map(_is_ours, module.layers)):
            _set(module, "use_nested_tensor", False)
    if verbose and not done:
        print("replace_modules: nothing to replace")
    return model


def restore_modules(model: torch.nn.Module, verbose: bool = False) -> torch.nn.Module:
    """Makes every layer of ours in `model` torch's again, in place: `replace_modules` undone.

    Args:
        model: any module; it may be such a layer itself.
        verbose: print a line for each layer.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is no module.
    """
    back = {ours: stock for stock, ours in _LAYERS.items()}
    done = _change(model, back, "restore_modules", verbose)
    for module in model.modules():
        module.__dict__.pop("_packed_weights", None)
        module.__dict__.update(module.__dict__.pop(_STOCK, {}))
    if verbose and not done:
        print("restore_modules: nothing to restore")
    return model


#: Where a module keeps what `_set` found.
_STOCK = "_stock_settings"


def _is_ours(layer: torch.nn.Module) -> bool:
    return type(getattr(layer, "self_attn", None)) is nn.MultiheadAttention


def _set(module: torch.nn.Module, name: str, value: object) -> None:
    """Turns a setting of a module of torch's off, so that `restore_modules` finds it."""
    module.__dict__.setdefault(_STOCK, {}).setdefault(name, getattr(module, name))
    setattr(module, name, value)


def _change(
    model: torch.nn.Module, classes: dict[type, type], caller: str, verbose: bool
) -> list[str]:
    """Gives the modules of `model` other classes; the names of those that have one now."""
    _checks.module(caller, "model", model)
    done = []
    for name, module in model.named_modules():
        found = classes.get(type(module))
        place = name or "the model itself"
        if found is not None and "forward" not in module.__dict__:
            module.__class__ = found
            done.append(place)
            say = f"{found.__module__}.{found.__qualname__}"
        elif isinstance(module, tuple(classes)) and not isinstance(module, tuple(classes.values())):
            say = f"{type(module).__name__}, left alone: " + (
                "a subclass" if found is None else "it has a forward of its own"
            )
        else:
            continue
        if verbose:
            print(f"{caller}: {place}: {say}")
    return done


class Activation:
    """What `activate` returns: a context manager whose block is served, and no longer."""

    def __init__(self) -> None:
        self._calls = 1  # that it stands for, until a block takes its place

    def __enter__(self) -> Activation:
        _state.add(calls=-self._calls, blocks=1)
        self._calls = 0
        return self

    def __exit__(self, *_: object) -> None:
        _state.add(blocks=-1)

    def remove(self) -> None:
        """As `deactivate`; torch.nn.attention's registry calls it."""
        deactivate()


def activate() -> Activation:
    """Has stock `torch.nn.functional.scaled_dot_product_attention` run on our CPU kernel.

    Programs need no change: torch's dispatcher is told, for the whole process, forward and
    backward. ``with pykernels.activate():`` does so for a block; a plain call holds until
    `deactivate`. Calls and blocks may nest, repeat and come from several threads. But torch's
    dispatcher is not made to change while others call it: have it on for good, by a plain call,
    before threads call attention some of which are in no block.

    Served are dense CPU tensors of one floating dtype whose leading axes agree, with any mask,
    `enable_gqa`, dropout (which draws other numbers than stock torch) and values of another width.
    Under `torch.compile`, `torch.func` and dispatch modes it is the calls that stock torch has a
    CPU kernel for: ``torch.ops.aten._scaled_dot_product_flash_attention_for_cpu`` is ours. All else
    goes on to stock torch: other devices, subclasses, nested tensors, bad arguments and their
    errors, and every call while ``torch.nn.attention.sdpa_kernel`` leaves FLASH_ATTENTION out.

    torch's own registry knows it too, where there is one:
    ``torch.nn.attention.activate_flash_attention_impl("pykernels")``.

    Raises:
        ImportError: the C++ kernels are not built.
    """
    _backends.load_extension()
    _state.add(calls=1)
    return Activation()


def deactivate() -> None:
    """Ends what calls of `activate` began; blocks that are open run to their ends."""
    _state.clear_calls()


class _State:
    """How many calls and blocks want our kernel; while there are any, torch's dispatcher has it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls = self._blocks = 0
        self._library: torch.library.Library | None = None

    def add(self, calls: int = 0, blocks: int = 0) -> None:
        with self._lock:
            # a `deactivate` may have come between the call and its block
            self._calls = max(0, self._calls + calls)
            self._blocks += blocks
            self._update()

    def clear_calls(self) -> None:
        with self._lock:
            self._calls = 0
            self._update()

    def _update(self) -> None:
        wanted = self._calls + self._blocks > 0
        if wanted and self._library is None:
            self._library = library = torch.library.Library("aten", "IMPL")
            library.impl("scaled_dot_product_attention", _attention, "AutogradCPU")
            library.impl("scaled_dot_product_attention", _unrecorded, "CPU")
            with warnings.catch_warnings():
                # "Overriding a previously registered kernel": on purpose
                warnings.simplefilter("ignore", UserWarning)
                library.impl(_FLASH, _flash, "CPU")
                library.impl(f"{_FLASH}_backward", _flash_backward, "CPU")
        elif not wanted and self._library is not None:
            self._library._destroy()
            self._library = None


_FLASH = "_scaled_dot_product_flash_attention_for_cpu"
_state = _State()


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``aten::scaled_dot_product_attention`` on CPU tensors, where autograd sees it."""
    arguments = (query, key, value, attn_mask, dropout_p, is_causal)
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    if 0 <= dropout_p <= 1 and _served(query, key, value, attn_mask, enable_gqa):
        return functional.scaled_dot_product_attention(*arguments, **options)
    stock = torch.ops.aten.scaled_dot_product_attention.default
    out: Tensor = stock.decompose(*arguments, **options)
    return out


def _unrecorded(*arguments: Any, **options: Any) -> Tensor:
    """The same where autograd is left out, as in `torch.inference_mode`."""
    with torch.no_grad():
        return _attention(*arguments, **options)


def _served(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    enable_gqa: bool,
) -> bool:
    """Whether a call goes to our kernel at once; stock torch words the errors of bad ones."""
    if not torch.backends.cuda.flash_sdp_enabled():  # one switch for all devices
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False  # who traces or transforms is to see torch's ops
    tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    for t in tensors:
        if type(t) not in (Tensor, torch.nn.Parameter) or t.device.type != "cpu":
            return False
        if t.layout != torch.strided or t.is_nested or t.dim() < 2:
            return False
    dtypes = (query.dtype, torch.float32, torch.bool)
    if attn_mask is not None and attn_mask.dtype not in dtypes:
        return False
    if query.dtype not in _cpp().DTYPES or not query.dtype == key.dtype == value.dtype:
        return False
    *lead, S_q, D = query.shape
    S_k, heads = key.shape[-2], slice(-1 if enable_gqa and lead else None)
    if key.shape[-1] != D or D == 0 or value.shape[-2] != S_k:
        return False
    if key.shape[:-2] != value.shape[:-2] or list(key.shape[:-2])[heads] != lead[heads]:
        return False
    if enable_gqa and (not lead or key.dim() < 3 or 0 in (lead[-1], key.shape[-3])):
        return False
    if enable_gqa and lead[-1] % key.shape[-3]:
        return False
    return attn_mask is None or _broadcasts(attn_mask.shape, (*lead, S_q, S_k))


def _broadcasts(shape: torch.Size, sizes: tuple[int, ...]) -> bool:
    pairs = zip(reversed(shape), reversed(sizes), strict=False)
    return len(shape) <= len(sizes) and all(have in (1, want) for have, want in pairs)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """torch's CPU kernel of attention: out as query lies, and lse [B, N, S_q]."""
    mask, options = _rule(query, attn_mask, is_causal, scale)
    tensors = (query, key, value, mask, None, None, None)
    (out, lse), _ = _cpp().attention_fwd(*tensors, keep=True, **options)
    # Compiled programs rely on the strides that torch's kernel gives its results.
    lse_as_torch = lse.new_empty(lse.transpose(1, 2).shape).transpose(1, 2)
    return _lying(out, torch.empty_like(query)), lse_as_torch.copy_(lse)


def _flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """The gradients of query, key and value."""
    mask, options = _rule(query, attn_mask, is_causal, scale)
    # Our kernel keeps by query, instead of lse, a score and a factor that make a weight of a score;
    # and scores that wait for their scale (csrc/ops/attention_tiles.h, `scale_waits`).
    unit, additive = options["scale"], mask is not None and mask.dtype != torch.bool
    if additive or unit < torch.finfo(logsumexp.dtype).tiny:
        unit = 1
    top = (logsumexp / unit).masked_fill(logsumexp == -math.inf, math.inf)
    rows = torch.stack([top, torch.ones_like(top)])
    saved = (query, key, value, mask, None, None, None, out, rows)
    needs = (True, True, True, False, False, False, False)
    grads = _cpp().attention_bwd(saved, (grad_out, None), needs=needs, **options)
    return tuple(
        _lying(grad, grad.new_empty(grad.transpose(1, 2).shape).transpose(1, 2))
        for grad in grads[:3]
    )


def _cpp() -> Any:
    return _backends.module("cpp", "attention")


def _rule(
    query: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor | None, dict[str, Any]]:
    """The mask in four dimensions, and the options of our kernel."""
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
        if attn_mask.dtype != torch.bool:
            attn_mask = attn_mask.to(query.dtype)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    return attn_mask, {"band": (None, 0 if is_causal else None), "scale": scale}


def _lying(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor with the strides of `like`, which is copied to where they differ."""
    return tensor if tensor.stride() == like.stride() else like.copy_(tensor)


if hasattr(torch.nn.attention, "register_flash_attention_impl"):
    torch.nn.attention.register_flash_attention_impl("pykernels", register_fn=activate)
