"""The Triton backend of `gated_delta_rule`: prepare, scan, scan_back and gradients, window after window of blocks of
tokens; and one token at a time (step, which step_op launches).

forward and backward launch them, with the choices of config and the memory of room and scratch; support says which
calls are taken, op is the operator. The kernels and those two import triton, and op imports them when it first runs.
"""
