"""The Triton backend of `gated_delta_rule`: kernels (tile, forward, backward), what launches them (launch, with the
choices of config and the memory of room), which calls it takes (support), and the operator (op). Only launch.py and the
kernels import triton, and op.py imports them when it first runs.
"""
