"""hybridzoo: composable blocks for hybrid language models.

The subpackages are layers, and each may import only those before it: kernels, mixers, blocks, architectures, training,
studies, cli. Start with `hybridzoo.mixers` for one token mixer and `hybridzoo.architectures` for a whole stack.
"""

__version__ = "0.1.0"
