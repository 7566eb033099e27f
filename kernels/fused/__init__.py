"""The Triton backend of `gated_delta_rule`: kernels (tile, forward, backward), what launches them (launch), and the
operator (op). Only launch.py and the kernels import triton, and op.py imports them when it first runs.
"""
