"""Specs, the model builder and its accounting. May import blocks; training comes next."""
