"""``python -m bench list``: the commands, the models whose shapes are used, and the peers."""

from __future__ import annotations

import argparse
import json

from bench.commands import COMMANDS
from bench.common.shapes import MODELS
from bench.peers import PEERS
from marlin_cy.commands.output import console, table

__all__ = ["add_options", "run"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(arguments: argparse.Namespace) -> int:
    """Print the lists; returns the exit code."""
    commands = {name: command.help for name, command in COMMANDS.items()}
    peers = []
    for adapter in PEERS:
        peer = adapter(1)
        reason = peer.available()
        version = peer.version if reason is None else None
        peers.append({"name": peer.name, "activations": peer.accuracy, "version": version, "missing": reason})
    if arguments.json:
        print(json.dumps({"commands": commands, "models": list(MODELS), "peers": peers}, indent=1))
        return 0
    screen = console()
    result = table("command", "")
    for name, words in commands.items():
        result.add_row(name, words)
    screen.print(result)
    result = table("\nmodel", ">\nexperts", ">\ntop k", ">\nhidden", ">\nintermediate")
    for name, model in MODELS.items():
        sizes = (model.num_experts, model.top_k, model.hidden, model.intermediate)
        result.add_row(name, *map(str, sizes))
    screen.print(result)
    result = table("\npeer", "\nactivations", "\nversion, or why it cannot run here")
    for one in peers:
        result.add_row(one["name"], one["activations"], one["version"] or one["missing"])
    screen.print(result)
    return 0
