"""Checkpoints of other DINO implementations and of bare backbones."""
