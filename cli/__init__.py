"""The hybridzoo command. May import everything; app.py names the subcommands, each of which has a module here."""

from hybridzoo.cli.app import app

__all__ = ["app"]
