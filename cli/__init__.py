"""The hybridzoo command. May import everything."""
