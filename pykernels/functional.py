"""The public functions in one namespace, as torch.nn.functional."""

from pykernels.ops._packed import PackedWeights
from pykernels.ops._recurrent import recurrent_group as recurrent_group  # for pykernels.nn
from pykernels.ops.attention import attention, scaled_dot_product_attention
from pykernels.ops.attention_backward import AttentionGradients, attention_backward
from pykernels.ops.attention_varlen import attention_varlen
from pykernels.ops.gru import gru, gru_cell
from pykernels.ops.linear_cross_entropy import linear_cross_entropy
from pykernels.ops.lstm import lstm, lstm_cell
from pykernels.ops.rnn import rnn, rnn_cell

__all__ = [
    "AttentionGradients",
    "PackedWeights",
    "attention",
    "attention_backward",
    "attention_varlen",
    "gru",
    "gru_cell",
    "linear_cross_entropy",
    "lstm",
    "lstm_cell",
    "rnn",
    "rnn_cell",
    "scaled_dot_product_attention",
]
