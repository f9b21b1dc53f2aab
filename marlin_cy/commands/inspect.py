"""Show the contents of a checkpoint's folder and the part that would be loaded; loads nothing.

The object that ``--json`` prints has the keys ``version``, ``checkpoint`` (its path), ``format``, ``settings`` (of the
format), ``family``, ``moe`` (the fields of `marlin_cy.checkpoints.families.MoeSpec`), ``layers``, ``moe_layers``,
``dense_moe_layers`` (numbers of layers), ``quantized_linears``, ``widths`` (layers by the bits of a code, for
``gate and up``, ``down`` and ``other linears``), ``bytes`` (``total``, ``experts``, ``linears``, ``others``: of the
files' tensors), ``unusual`` (sentences), ``refused`` (why loading the whole model would fail, as far as that shows
without reading weights; with ``--transformers`` also what concerns the model's class there), ``decoder`` (why the
library's own decoder does not run the model; null if it does), ``verified``.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from marlin_cy import __version__, open_checkpoint
from marlin_cy.checkpoints.gguf.source import GgufSource
from marlin_cy.commands.output import console, escape, print_json, runs, table
from marlin_cy.decoder.check import check_decoder
from marlin_cy.errors import CheckpointError, MarlinError, UnsupportedError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from marlin_cy.checkpoints.checkpoint import Checkpoint

__all__ = ["HELP", "add_arguments", "execute"]

ACTIVATION_SCALES = (".input_scale", ".activation_scale", ".input_zero_point", ".input_global_scale")
"""The ends of the names of tensors that quantise activations with fixed scales."""

HELP = "show a checkpoint's format, layers, sizes, and anything unusual"


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Declare the command's arguments."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint's folder, or a GGUF file")
    parser.add_argument(
        "--verify", action="store_true", help="compare the checksums of all of a packed folder's tensors"
    )
    parser.add_argument(
        "--transformers", action="store_true", help="also compare the tensors with the model's class in transformers"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def execute(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    with open_checkpoint(arguments.checkpoint, verify=arguments.verify) as checkpoint:
        report = describe(checkpoint)
        if arguments.transformers:
            from marlin_cy.integrations.problems import transformers_problems

            report["refused"] += [str(problem) for problem in transformers_problems(checkpoint)]
    report["verified"] = bool(arguments.verify and report["format"] == "packed")
    if arguments.json:
        print_json(report)
    else:
        print_report(report)
    return 0


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """The object that ``--json`` prints, without ``verified``."""
    names = checkpoint.tensor_names
    size = {name: checkpoint.tensor_info(name).nbytes for name in names}
    quantized = set(checkpoint.quantized_tensors)
    experts = sum(checkpoint.expert_bytes(layer) for layer in checkpoint.moe_layers)
    in_quantized = sum(size[name] for name in quantized)
    return {
        "version": __version__,
        "checkpoint": str(checkpoint.path),
        "format": checkpoint.format,
        "settings": settings(checkpoint),
        "family": checkpoint.family.name,
        "moe": dataclasses.asdict(checkpoint.moe_spec),
        "layers": checkpoint.num_layers,
        "moe_layers": checkpoint.moe_layers,
        "dense_moe_layers": checkpoint.dense_moe_layers,
        "quantized_linears": len(checkpoint.linears),
        "widths": widths(checkpoint),
        "bytes": {
            "total": sum(size.values()),
            "experts": experts,
            "linears": max(in_quantized - experts, 0),
            "others": sum(size.values()) - max(in_quantized, experts),
        },
        "unusual": unusual(checkpoint),
        "refused": [str(problem) for problem in checkpoint.problems(layers=True)],
        "decoder": reason_not_decoded(checkpoint),
    }


def reason_not_decoded(checkpoint: Checkpoint) -> str | None:
    """Why the library's own decoder does not run the model, as far as headers show it; None if it does."""
    try:
        check_decoder(checkpoint)
    except MarlinError as error:
        return str(error)
    return None


def widths(checkpoint: Checkpoint) -> dict[str, dict[int, int]]:
    """How many quantised layers have codes of each width, in bits: of experts, by stack, and of other linear layers.

    Empty for packed folders.
    """
    scheme = checkpoint.scheme
    found: dict[str, Counter[int]] = {"gate and up": Counter(), "down": Counter(), "other linears": Counter()}
    for name in checkpoint.tensor_names if scheme is not None else ():
        assert scheme is not None
        if not scheme.marks(name, checkpoint.tensor_info(name).dtype):
            continue
        module = name.removesuffix(scheme.marker)
        try:
            bits = scheme.for_module(module).bits
        except UnsupportedError:
            continue
        is_down = module.endswith(f".{checkpoint.family.down}")
        kind = "other linears" if ".experts." not in module else "down" if is_down else "gate and up"
        found[kind][bits] += 1
    return {kind: dict(sorted(counts.items())) for kind, counts in found.items() if counts}


def settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """The settings of the format, in types that JSON has; of GGUF, the number of tensors of each type."""
    if checkpoint.format == GgufSource.format:
        return dict(Counter(checkpoint.tensor_info(name).dtype for name in checkpoint.tensor_names).most_common())
    if checkpoint.scheme is None:
        stored: dict[str, Any] = checkpoint.config["quantization_config"]
        return stored
    scheme = cast("DataclassInstance", checkpoint.scheme)  # as every format's is
    return {
        name: value if isinstance(value, str | int | float | bool | None) else str(value) if value else None
        for name, value in dataclasses.asdict(scheme).items()
    }


def unusual(checkpoint: Checkpoint) -> list[str]:
    """Sentences about unusual properties of the checkpoint."""
    found = []
    if checkpoint.dense_moe_layers:
        found.append(f"MoE layers whose experts are not quantised, and not loaded: {runs(checkpoint.dense_moe_layers)}")
    if not checkpoint.moe_layers:
        found.append("no MoE layer has quantised experts")
    alone = [layer for layer in checkpoint.moe_layers if not checkpoint.has_packed_shared_expert(layer)]
    if alone:
        found.append(f"shared experts that are not quantised, which `run` leaves out: layers {runs(alone)}")
    if beyond := checkpoint.prediction_layers:
        found.append(f"layers that only predict further tokens, not loaded: {runs(beyond)}")
    if checkpoint.skipped_tensors:
        found.append(f"tensors of layers that predict several tokens, not loaded: {len(checkpoint.skipped_tensors)}")
    if checkpoint.act_order:
        found.append("rows of K are permuted (desc_act): activations are gathered, which costs time")
    found += expert_words(checkpoint)
    found += scaled_words(checkpoint)
    found += activation_words(checkpoint)
    quantized = set(checkpoint.quantized_tensors) if checkpoint.format == GgufSource.format else set()
    stored = {checkpoint.tensor_info(name).dtype for name in checkpoint.tensor_names if name not in quantized}
    strange = sorted(stored - {"I32", "F16", "BF16", "F32", "U8", "I64", "I8", "F8_E4M3", "F8_E8M0"})
    if strange:
        found.append(f"tensors of dtype {', '.join(strange)}")
    return found


def expert_words(checkpoint: Checkpoint) -> list[str]:
    """Sentences about experts that are held in another form than the files have; layers that agree share one."""
    layers: dict[str, list[int]] = {}
    for layer in checkpoint.moe_layers:
        try:
            notes = checkpoint.expert_notes(layer)
        except MarlinError:  # reported as a problem
            continue
        for note in notes:
            layers.setdefault(note, []).append(layer)
    return [f"layers {runs(numbers)}: {note}" for note, numbers in layers.items()]


def scaled_words(checkpoint: Checkpoint) -> list[str]:
    """A sentence about the linear layers in FP8, and one about those in int8, if there are any."""
    kinds: dict[str, Counter[str]] = {}
    for module in checkpoint.scaled.scales:
        dtype = checkpoint.tensor_info(f"{module}.weight").dtype
        try:
            kind = checkpoint.scaled.kind(module)
        except CheckpointError:  # reported as a problem
            kind = "unknown"
        kinds.setdefault({"F8_E4M3": "FP8", "I8": "int8"}[dtype], Counter())[kind] += 1
    return [
        f"{counts.total()} linear layers in {name}: scales by "
        + ", ".join(f"{kind} {number}" for kind, number in sorted(counts.items()))
        for name, counts in kinds.items()
    ]


def activation_words(checkpoint: Checkpoint) -> list[str]:
    """Sentences about the quantisation of activations by the checkpoint, which is ignored."""
    found = []
    scales = sum(name.endswith(ACTIVATION_SCALES) for name in checkpoint.tensor_names)
    if scales:
        found.append(f"scales of quantised activations in the files, ignored: {scales}")
    config: Any = checkpoint.config.get("quantization_config")
    config = config.get("source", config) if isinstance(config, dict) else {}
    groups = config.get("config_groups") if isinstance(config, dict) else None
    kinds = {str(config["activation_scheme"])} if config.get("activation_scheme") else set()
    for group in groups.values() if isinstance(groups, dict) else ():
        settings = group.get("input_activations") if isinstance(group, dict) else None
        if isinstance(settings, dict):
            kinds.add("dynamic" if settings.get("dynamic") else "static")
    if kinds:
        found.append(f"activations are quantised by the config, which is ignored: {', '.join(sorted(kinds))}")
    return found


def print_report(report: dict[str, Any]) -> None:
    """Print the table."""
    moe, size = report["moe"], report["bytes"]
    rows = table("", "")
    rows.show_header = False
    rows.add_row("checkpoint", report["checkpoint"])
    rows.add_row("format", f"{report['format']}: " + ", ".join(f"{k} {v}" for k, v in flat(report["settings"])))
    rows.add_row("family", report["family"])
    rows.add_row("layers", f"{report['layers']}; experts quantised in {runs(report['moe_layers']) or 'none'}")
    rows.add_row(
        "experts",
        f"{moe['num_experts']}, top {moe['top_k']}; {moe['hidden_size']} -> {moe['intermediate_size']} -> "
        f"{moe['hidden_size']}, {moe['activation']}"
        + (f"; shared expert of {moe['shared_intermediate_size']}" if moe["shared_intermediate_size"] else ""),
    )
    rows.add_row("routing", routing_words(moe))
    rows.add_row("other quantised linears", str(report["quantized_linears"]))
    if report["widths"]:
        rows.add_row("bits of a code", "; ".join(width_words(*item) for item in report["widths"].items()))
    rows.add_row(
        "tensors",
        f"{size['total'] / 1e6:.1f} MB: experts {size['experts'] / 1e6:.1f}, other quantised linears "
        f"{size['linears'] / 1e6:.1f}, not quantised {size['others'] / 1e6:.1f}",
    )
    if report["verified"]:
        rows.add_row("checksums", "correct for all tensors")
    for sentence in report["unusual"]:
        rows.add_row("unusual", escape(sentence))
    rows.add_row("decoder", "supported" if report["decoder"] is None else escape(report["decoder"]))
    for sentence in report["refused"]:
        rows.add_row("[red]refused[/red]", escape(sentence))
    console().print(rows)


def width_words(kind: str, counts: dict[int, int]) -> str:
    """The widths of one kind of layers: ``"down 4 (24 layers), 8 (24 layers)"``."""
    if len(counts) == 1:
        return f"{kind} {next(iter(counts))}"
    return f"{kind} " + ", ".join(f"{bits} ({number} layers)" for bits, number in counts.items())


def flat(settings: dict[str, Any]) -> list[tuple[str, Any]]:
    """``(name, value)`` of the settings that are neither nested nor empty."""
    return [(name, value) for name, value in settings.items() if not isinstance(value, dict | list) and value]


def routing_words(moe: dict[str, Any]) -> str:
    """The routing in a few words."""
    words = [moe["scoring"], "weights sum to 1" if moe["norm_topk_prob"] else "weights not normalised"]
    if moe["num_groups"] > 1:
        words.append(f"{moe['topk_groups']} of {moe['num_groups']} groups by {moe['group_score']}")
    if moe["routed_scaling_factor"] != 1:
        words.append(f"scaled by {moe['routed_scaling_factor']:g}")
    return ", ".join(words)
