"""Drop-in layers: constructor, parameters and state_dict of torch.nn's, our kernels inside."""

from pykernels.nn.attention import MultiheadAttention
from pykernels.nn.gru import GRU, GRUCell
from pykernels.nn.linear_cross_entropy import LinearCrossEntropyLoss
from pykernels.nn.lstm import LSTM, LSTMCell
from pykernels.nn.rnn import RNN, RNNCell

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "LinearCrossEntropyLoss",
    "MultiheadAttention",
    "RNNCell",
]
