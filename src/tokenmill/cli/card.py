"""The command that describes a data set for the hub: card."""

from __future__ import annotations

from pathlib import Path

import click

from tokenmill.cli.console import print_result
from tokenmill.cli.options import data_root_argument, json_option


@click.command(short_help="Write a README.md and a Croissant file for the hub.")
@data_root_argument
@click.option("--name", metavar="NAME", help="Name of the data set.  [default: that of the directory]")
@click.option("--license", metavar="ID", help="License of the data, as the hub and SPDX have it, such as cc-by-4.0.")
@click.option("--url", metavar="URL", help="Page of the data set.")
@click.option("--overwrite", is_flag=True, help="Replace a README.md that this command did not write.")
@json_option
def card(
    data_root: Path, *, name: str | None, license: str | None, url: str | None, overwrite: bool, as_json: bool
) -> None:
    """Write README.md, croissant.json and a preview into DATA_ROOT, for the Hugging Face hub.

    They say what the records and sidecars of the data root say: the sources with their sizes, hosts where a
    column url was kept, what became of every row, and the SHA-256 of each file. Read the card before you
    publish it: what the data may be used for, only you can say.

    \b
    Example:
      tokenmill card data/ --license cc-by-4.0
      tokenmill upload data/ hf://datasets/OWNER/NAME --license cc-by-4.0
    """
    from tokenmill.publishing.card import write_card

    found = write_card(data_root, name=name, license=license, url=url, overwrite=overwrite)
    lines = [*(f"{found.root}/{path}" for path in found.files), *(f"note: {note}" for note in found.notes)]
    print_result(found, lines, as_json=as_json)
