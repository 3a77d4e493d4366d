"""What the demo trains: a decoder-only Transformer that reads bytes and says the next one.

Pre-norm blocks of causal attention and a two-layer perceptron, rotary positions, no biases.

Adafactor's step is relative: no tensor moves by more than about 1 % of its own size in a step, so
the size a weight begins with is also its learning rate. That is why embeddings begin at 1 and
matrices at 1 / sqrt(inputs), as in T5, rather than at the 0.02 that is usual with Adam, and why
nothing begins at zero.

Shapes: B windows of T bytes; D features of a byte; H heads of E = D / H features each.

References:
    Vaswani et al., Attention Is All You Need, 2017. Su et al., RoFormer, 2021 (rotary positions).
    So et al., Primer, 2021 (squared ReLU). Raffel et al., T5, 2020 (scales for Adafactor).
    Peng et al., RWKV, 2023 (features of the byte before).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BYTES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How large a model is.

    Attributes:
        width: features of a byte (D).
        depth: blocks.
        heads: attention heads (H); `width / heads` is even.
        context: bytes that it looks back on at most.
    """

    width: int = 160
    depth: int = 3
    heads: int = 4
    context: int = 128


class Transformer(nn.Module):
    """Logits of the next byte, at every position of a window."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.embedding = nn.Embedding(BYTES, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.depth))
        self.norm = _norm(size.width)
        self.head = _linear(size.width, BYTES, scale=1 / 3)  # small: a new model guesses evenly

    def forward(self, window_BT: Tensor) -> Tensor:
        """Reads int64 (B, T), T at most `size.context`; returns float32 logits (B, T, 256)."""
        x_BTD = self.embedding(window_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits: Tensor = self.head(self.norm(x_BTD))
        return logits

    def loss(self, window_BT: Tensor) -> Tensor:
        """Mean cross-entropy, in nats, of each byte of a window given those before it."""
        logits = self(window_BT[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), window_BT[:, 1:].flatten())

    @torch.no_grad()
    def bits_per_byte(self, windows_BT: Tensor, *, batch: int = 16) -> float:
        """The same over many windows, in bits, `batch` windows at a time; 8 is guessing."""
        nats = sum(float(self.loss(part)) * len(part) for part in windows_BT.split(batch))
        return nats / len(windows_BT) / math.log(2)


class Block(nn.Module):
    """Attention, then a perceptron: each reads the stream through a norm, and adds to it."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.attention_norm = _norm(size.width)
        self.attention = Attention(size)
        self.perceptron_norm = _norm(size.width)
        self.perceptron = Perceptron(size.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The stream with what both have added; a new tensor."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        x_BTD = x_BTD + self.perceptron(self.perceptron_norm(x_BTD))
        return x_BTD


class Attention(nn.Module):
    """Every byte asks those before it, in H heads."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.query_key_value = _linear(size.width, 3 * size.width)
        self.output = _linear(size.width, size.width)
        self.rotation = Rotation(size.width // size.heads, size.context)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """What each byte hears from those before it, and itself."""
        qkv = self.query_key_value(_half_from_before(x_BTD)).unflatten(-1, (3, self.heads, -1))
        query_BHTE, key_BHTE, value_BHTE = qkv.permute(2, 0, 3, 1, 4)
        mixed_BHTE = F.scaled_dot_product_attention(
            self.rotation(query_BHTE), self.rotation(key_BHTE), value_BHTE, is_causal=True
        )
        heard_BTD: Tensor = self.output(mixed_BHTE.transpose(1, 2).flatten(-2))
        return heard_BTD


def _half_from_before(x_BTD: Tensor) -> Tensor:
    """Half of each byte's features replaced by those of the byte before it, or by zeros.

    So a head can find "after an e" in its first step, where it would have to learn to look back
    by one: it saves a fifth of the steps to a given loss, and costs nothing.
    """
    half = x_BTD.shape[-1] // 2
    before = F.pad(x_BTD[:, :-1, :half], (0, 0, 1, 0))
    return torch.cat((before, x_BTD[:, :, half:]), dim=-1)


class Rotation(nn.Module):
    """Turns pairs of features by angles that grow with position: scores see distances only."""

    cos: Tensor
    sin: Tensor

    def __init__(self, features: int, context: int) -> None:
        super().__init__()
        frequencies = 10_000.0 ** -(torch.arange(0, features, 2) / features)
        angles = torch.outer(torch.arange(context), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x_BHTE: Tensor) -> Tensor:
        """The same queries or keys, turned; positions count from the window's start."""
        length = x_BHTE.shape[-2]
        cos, sin = self.cos[:length], self.sin[:length]
        left, right = x_BHTE.chunk(2, dim=-1)
        return torch.cat((left * cos - right * sin, left * sin + right * cos), dim=-1)


class Perceptron(nn.Module):
    """Two layers with a squared ReLU between: cheap on a CPU, and better here than GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = _linear(width, 4 * width)
        self.down = _linear(4 * width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The same function of every position alone."""
        y_BTD: Tensor = self.down(F.relu(self.up(x_BTD)).square())
        return y_BTD


def _norm(width: int) -> nn.Module:
    return nn.LayerNorm(width, bias=False)


def _linear(inputs: int, outputs: int, *, scale: float = 1.0) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=scale / math.sqrt(inputs))
    return layer
