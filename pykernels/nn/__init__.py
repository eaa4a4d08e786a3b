"""Drop-in layers: constructor, parameters and state_dict of torch.nn's, our kernels inside."""

from pykernels.nn.attention import MultiheadAttention
from pykernels.nn.rnn import RNN, RNNCell

__all__ = ["RNN", "MultiheadAttention", "RNNCell"]
