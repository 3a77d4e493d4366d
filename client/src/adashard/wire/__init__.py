"""What both ends agree on: messages, frames, placement, errors, element formats.

May import torch, numpy and the generated stubs in `v1`; nothing else of adashard.
"""
