"""`python -m hybridzoo`: the command, where its script is not on the path."""

from hybridzoo.cli import app

if __name__ == "__main__":
    app(prog_name="hybridzoo")
