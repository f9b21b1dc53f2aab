"""The CPU backend's part of ``marlin-cy doctor``: instruction sets, threads, memory bandwidth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape

from marlin_cy.command_line import DoctorReport
from marlin_cy.commands.output import mark, table
from marlin_cy.cpu._dispatch import choose_isa, isas, openmp_report
from marlin_cy.threads import cpu_quota, default_num_threads

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["report"]


def report() -> DoctorReport:
    """The keys ``isa``, ``threads``, ``openmp`` and ``memory``.

    The backend does not work if ``MARLIN_CY_ISA`` names an instruction set that cannot run.
    """
    # Imported here, so that a test can replace the function in its module.
    from marlin_cy.cpu.measure._bandwidth import read_bandwidth

    try:
        chosen, reason = choose_isa()
    except ValueError as error:
        chosen, reason = None, str(error)
    isa = {"chosen": chosen, "reason": reason, "isas": isas()}
    threads = default_num_threads()
    one_thread = read_bandwidth(1)
    document = {
        "isa": isa,
        "threads": {"default": threads, "cpu_quota": cpu_quota()},
        "openmp": openmp_report(),
        "memory": {
            "bandwidth_one_thread": one_thread,
            "bandwidth_all_threads": read_bandwidth(threads) if threads > 1 else one_thread,
        },
    }
    return DoctorReport(document, chosen is not None, lambda screen: print_isas(screen, isa))


def print_isas(screen: Console, isa: dict[str, Any]) -> None:
    """Print the table of instruction sets, and the chosen one."""
    rows = table("instruction set", "here", "why")
    for row in isa["isas"]:
        name = f"[bold]{row['name']}[/bold] (chosen)" if row["name"] == isa["chosen"] else row["name"]
        rows.add_row(name, mark(row["available"]), escape(row["reason"]))
    screen.print(rows)
    screen.print(escape(f"Chosen: {isa['chosen'] or 'none'}, {isa['reason']}."))
