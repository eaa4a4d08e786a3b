"""Hugging Face transformers on our attention: the logits, gradients and tokens of its own.

Models are tiny, of random weights; nothing is downloaded.
"""

import pytest
import torch

transformers = pytest.importorskip("transformers")

import pykernels  # noqa: E402
from pykernels.integrations import transformers as integration  # noqa: E402

COMMON = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GROUPED = COMMON | {"num_key_value_heads": 2}
# The model, its configuration, and what of transformers' own is the measure: sdpa knows no caps.
DECODERS = {
    "llama": ("Llama", GROUPED, "sdpa"),
    "mistral": ("Mistral", GROUPED | {"sliding_window": 5}, "sdpa"),
    "gemma2": (
        "Gemma2",
        GROUPED
        | {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 5,
            "tie_word_embeddings": False,  # or it repeats its input
            "attn_logit_softcapping": 0.5,  # so low that a forgotten one shows
            "final_logit_softcapping": None,
        },
        "eager",
    ),
    "gpt-oss": (
        "GptOss",
        GROUPED
        | {
            "experts_implementation": "eager",  # the others know no float64
            "head_dim": 8,
            "sliding_window": 5,
            "num_local_experts": 2,
            "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "eager",
    ),
}
TIGHT = {"rtol": 1e-9, "atol": 1e-10}


@pytest.fixture(autouse=True, scope="module")
def register():
    integration.register()
    integration.register()


@pytest.fixture(autouse=True)
def exact_weights(monkeypatch):
    """Eager attention of transformers makes float32 of its weights; here it keeps float64."""
    softmax = torch.nn.functional.softmax

    def widest(x, dim, dtype=None, **options):
        return softmax(x, dim, dtype=None if x.dtype == torch.float64 else dtype, **options)

    monkeypatch.setattr(torch.nn.functional, "softmax", widest)


def pair(kind, suffix, options, measure, **more):
    """The same model twice, in float64: on our attention and on transformers' own."""
    config = getattr(transformers, f"{kind}Config")
    made = getattr(transformers, f"{kind}{suffix}")
    torch.manual_seed(0)
    theirs = (
        made._from_config(config(**options, **more), attn_implementation=measure).double().eval()
    )
    ours = (
        made._from_config(config(**options, **more), attn_implementation="pykernels")
        .double()
        .eval()
    )
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():  # norms start at one and biases at zero, which hide mistakes
        for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
            two.add_(0.3 * torch.randn_like(two))
            one.copy_(two)
    assert ours.config._attn_implementation == "pykernels"
    assert theirs.config._attn_implementation == measure
    return ours, theirs


def compare(ours, theirs, where=None, **inputs):
    """Logits, and gradients of all parameters under a random upstream gradient, agree.

    `where`, [B, T], leaves out the logits of padding, which attend to nothing of use.
    """
    found = []
    for model in (ours, theirs):
        output = model(**inputs)
        logits = output.logits if "logits" in output else output.last_hidden_state
        if where is not None:
            logits = logits[where]
        upstream = torch.randn(
            logits.shape, generator=torch.Generator().manual_seed(3), dtype=logits.dtype
        )
        wanted = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(logits, wanted, upstream, allow_unused=True)
        found.append((logits, grads))
    (logits, grads), (their_logits, their_grads) = found
    torch.testing.assert_close(logits, their_logits, **TIGHT)
    for one, two in zip(grads, their_grads, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-8)


def tokens(*shape):
    return torch.randint(2, 99, shape)


def left_padded():
    """Three sequences of twelve tokens, the second and third with padding in front."""
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[1, :4], mask[2, :9] = 0, 0
    return tokens(3, 12) * mask, mask


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call of our attention."""
    seen = []
    real = pykernels.functional.attention

    def spy(*args, **options):
        seen.append((args, options))
        return real(*args, **options)

    monkeypatch.setattr(integration.functional, "attention", spy)
    return seen


@pytest.mark.parametrize("kind", DECODERS)
class TestDecoders:
    def test_logits_and_gradients(self, kind, calls):
        name, options, measure = DECODERS[kind]
        compare(*pair(name, "ForCausalLM", options, measure), input_ids=tokens(3, 12))
        assert len(calls) == 2

    def test_keys_are_not_repeated(self, kind, calls):
        name, options, measure = DECODERS[kind]
        ours, _ = pair(name, "ForCausalLM", options, measure)
        ours(input_ids=tokens(3, 12))
        for (q, k, v, *_), _ in calls:
            assert q.shape[1] == 4
            assert k.shape[1] == v.shape[1] == 2

    def test_padding(self, kind, calls):
        name, options, measure = DECODERS[kind]
        ids, mask = left_padded()
        models = pair(name, "ForCausalLM", options, measure)
        compare(*models, where=mask.bool(), input_ids=ids, attention_mask=mask)

    def test_steps_with_a_cache(self, kind):
        """A sequence in pieces, the keys and values of the earlier ones from the cache."""
        name, options, measure = DECODERS[kind]
        ours, theirs = pair(name, "ForCausalLM", options, measure)
        ids = tokens(2, 12)
        whole = theirs(input_ids=ids).logits
        cache = transformers.DynamicCache(config=ours.config)
        pieces = [
            ours(input_ids=piece, past_key_values=cache, use_cache=True).logits
            for piece in ids.split([6, 1, 4, 1], 1)
        ]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, **TIGHT)

    @pytest.mark.parametrize("cache", [None, "static"])
    def test_greedy_generation(self, kind, cache):
        name, options, measure = DECODERS[kind]
        ours, theirs = pair(name, "ForCausalLM", options, measure)
        ids, mask = left_padded()
        found = [
            model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=15,
                do_sample=False,
                cache_implementation=cache,
                disable_compile=True,
            )
            for model in (ours, theirs)
        ]
        assert torch.equal(*found)
        assert found[0].shape == (3, 27)
        assert len(found[0][:, 12:].unique()) > 3  # no model that says one word

    def test_dropout(self, kind):
        """In training, weights are dropped: other outputs each time, the same from one seed."""
        name, options, measure = DECODERS[kind]
        ours, _ = pair(name, "ForCausalLM", options, measure, attention_dropout=0.5)
        ids, found = tokens(2, 12), []
        ours.train()
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            found.append(ours(input_ids=ids).logits)
        assert torch.equal(found[0], found[1])
        assert not torch.allclose(found[0], found[2])


def test_compiled_without_a_break(calls):
    """In one graph for any length, forward and backward; gradients come through checkpoints too."""
    name, options, measure = DECODERS["mistral"]
    ours, theirs = pair(name, "ForCausalLM", options | {"num_hidden_layers": 1}, measure)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=True)
    for T in (12, 9):
        compare(compiled, theirs, input_ids=tokens(2, T), use_cache=False)
    assert len(calls) <= 2  # traced, not called
    for model in (ours, theirs):
        model.train().gradient_checkpointing_enable()
    compare(ours, theirs, input_ids=tokens(2, 9))


BERT = {name: COMMON[name] for name in COMMON if not name.endswith("token_id")}


@pytest.mark.parametrize("padded", [False, True])
def test_bert(padded, calls):
    models = pair("Bert", "ForMaskedLM", BERT, "sdpa")
    ids = tokens(3, 12)
    mask = torch.arange(12) < torch.tensor([[12], [7], [3]]) if padded else None
    compare(
        *models, where=mask, input_ids=ids, attention_mask=None if mask is None else mask.long()
    )
    assert len(calls) == 2
    assert not any(options["is_causal"] for _, options in calls)


def whisper():
    options = {
        "vocab_size": 99,
        "num_mel_bins": 8,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_source_positions": 20,
        "max_target_positions": 30,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "decoder_start_token_id": 1,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    }
    return pair("Whisper", "ForConditionalGeneration", options, "sdpa")


def test_whisper(calls):
    """Encoder, decoder and attention across: queries and keys of different lengths."""
    features = torch.randn(2, 8, 40, dtype=torch.float64)
    compare(*whisper(), input_features=features, decoder_input_ids=tokens(2, 7))
    assert len(calls) == 6
    lengths = {(q.shape[2], k.shape[2], options["is_causal"]) for (q, k, *_), options in calls}
    assert lengths == {(20, 20, False), (7, 7, True), (7, 20, False)}


def test_whisper_generates():
    features = torch.randn(2, 8, 40, dtype=torch.float64)
    found = []
    for model in whisper():
        found.append(model.generate(features, max_new_tokens=12, do_sample=False))
    assert torch.equal(*found)
    assert len(found[0].unique()) > 3  # no model that says one word


def test_a_loaded_model_can_change():
    name, options, measure = DECODERS["llama"]
    _, theirs = pair(name, "ForCausalLM", options, measure)
    ids = tokens(2, 9)
    before = theirs(input_ids=ids).logits
    theirs.set_attn_implementation("pykernels")
    torch.testing.assert_close(theirs(input_ids=ids).logits, before, **TIGHT)


def heads(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("mask", [None, "boolean", "additive"])
def test_position_bias(mask):
    q, k, v, bias = heads(2, 4, 5, 8), heads(2, 2, 5, 8), heads(2, 2, 5, 8), heads(1, 4, 5, 5)
    hidden = torch.rand(2, 1, 5, 5) < 0.4
    hidden[..., 0] = False
    number = torch.zeros(2, 1, 5, 5, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    mask, total = {
        None: (None, bias),
        "boolean": (~hidden, bias + number),
        "additive": (number, bias + number),
    }[mask]
    out, weights = integration.attention_forward(
        torch.nn.Module(), q, k, v, mask, is_causal=False, position_bias=bias
    )
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, total, enable_gqa=True)
    torch.testing.assert_close(out, expected.transpose(1, 2), **TIGHT)
    assert weights is None


def test_a_window_without_a_mask():
    q, k, v = heads(1, 4, 9, 8), heads(1, 2, 9, 8), heads(1, 2, 9, 8)
    out, _ = integration.attention_forward(
        torch.nn.Module(), q, k, v, None, is_causal=True, sliding_window=3
    )
    i, j = torch.arange(9)[:, None], torch.arange(9)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, (j <= i) & (j > i - 3), enable_gqa=True
    )
    torch.testing.assert_close(out, expected.transpose(1, 2), **TIGHT)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cache": object()}, "pykernels: continuous batching is not served"),
        ({"output_attentions": True}, 'asks for attn_implementation="eager"'),
        ({"softcap": -1.0}, "attention: `softcap` must be at least 0 and finite, got -1.0"),
    ],
)
def test_what_is_not_served(options, words):
    q = heads(1, 2, 3, 8)
    with pytest.raises(ValueError, match=words):
        integration.attention_forward(torch.nn.Module(), q, q, q, None, **options)
