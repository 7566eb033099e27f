"""Residual blocks and channel mixers. May import mixers; architectures come next."""
