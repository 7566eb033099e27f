"""The Triton backend of `gated_delta_rule`, in two ways: staged (prepare, scan, scan_back, value_gradients,
key_gradients) and in a single pass (forward, backward); and one token at a time (step, which step_op launches).

staged.py and single_pass.py launch them, with the choices of way, config and room; support says which calls are taken,
op is the operator. The kernels and those two import triton, and op.py imports them when it first runs.
"""
