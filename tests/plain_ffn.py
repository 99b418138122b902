"""A neuron-major feed-forward with a residual, by plain autograd."""

import torch
from torch import nn


class FFN(nn.Module):
    def __init__(self, size, hidden_size):
        super().__init__()
        self.up_weight = nn.Parameter(torch.randn(size, hidden_size) * 0.3)
        self.up_bias = nn.Parameter(torch.randn(size) * 0.1)
        self.down_weight = nn.Parameter(torch.randn(size, hidden_size) * 0.3)
        self.down_bias = nn.Parameter(torch.randn(hidden_size) * 0.1)

    def forward(self, x):
        hidden = nn.functional.gelu(x @ self.up_weight.t() + self.up_bias)
        return x + hidden @ self.down_weight + self.down_bias
