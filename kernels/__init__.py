"""Functions of tensors: the gated delta rule and the small ops around it. Imports torch only; modules live in mixers."""
