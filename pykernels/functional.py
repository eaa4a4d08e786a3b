"""The public functions in one namespace, as torch.nn.functional."""

from pykernels.ops.attention import attention, scaled_dot_product_attention
from pykernels.ops.rnn import rnn, rnn_cell

__all__ = ["attention", "rnn", "rnn_cell", "scaled_dot_product_attention"]
