"""The command line."""

from tokenmill.cli.main import main as main
