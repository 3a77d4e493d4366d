"""Shapes of models that are measured with."""

from __future__ import annotations

_WIDTH, _VOCABULARY, _CONTEXT, _LAYERS = 768, 50257, 1024, 12

_NORM = [(_WIDTH,), (_WIDTH,)]
_ATTENTION = [(_WIDTH, 3 * _WIDTH), (3 * _WIDTH,), (_WIDTH, _WIDTH), (_WIDTH,)]
_FEED_FORWARD = [(_WIDTH, 4 * _WIDTH), (4 * _WIDTH,), (4 * _WIDTH, _WIDTH), (_WIDTH,)]

GPT2_SMALL: list[tuple[int, ...]] = [
    (_VOCABULARY, _WIDTH),
    (_CONTEXT, _WIDTH),
    *(_NORM + _ATTENTION + _NORM + _FEED_FORWARD) * _LAYERS,
    *_NORM,
]
"""148 tensors, 124.4 million parameters; the head shares the embedding of tokens."""
