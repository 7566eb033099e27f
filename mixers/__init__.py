"""Token mixers: the registry and what it registers. May import kernels; blocks come next."""
