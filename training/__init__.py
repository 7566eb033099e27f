"""Data, optimiser and training loop. May import architectures; studies come next."""
