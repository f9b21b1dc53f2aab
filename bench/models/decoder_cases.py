"""What ``python -m bench decoder`` measures: runs of whole models in turns, and figures that stand alone."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.common.processes import Child, module_command, module_environment, run_module
from bench.common.timing import Spread, alternate, exact, ratios, spread
from bench.models.head import write_head
from bench.models.llama import LlamaBatchedBench, LlamaBench
from bench.models.start_up import first_token_seconds, memory_share, write_tokenizer

__all__ = ["Measurement", "Settings", "Side", "pack", "start_ours", "start_transformers"]

SEQUENCE_DEPTH = 16  # tokens of each of several sequences before they are decoded together
PAGES = 2 * 16  # more positions of a sequence's cache: the copy of a shared page, and the rest of the last one
FORCED_ISA = "avx2"
LEAST_WEIGHTS, MOST_WEIGHTS = 0.97, 1.03  # of a GGUF file over those of the checkpoint

Seconds = Callable[[], float]


@dataclass(frozen=True)
class Settings:
    """What is measured, and how often.

    Attributes
    ----------
    folder : Path
        The checkpoint.
    num_weights : int
        Of the checkpoint, as :func:`~bench.models.synthetic.num_weights` counts them.
    threads, rounds : int
    pause_seconds : float
    compute_dtypes : tuple of str
    tokens : int
        Tokens that a run decodes.
    depths, prompts, sequences : tuple of int
        Tokens in the cache of a decoding run; tokens of a prompt; numbers of sequences.
    head : tuple of int
        Vocabulary and width of the head.
    quick : bool
    """

    folder: Path
    num_weights: int
    threads: int
    rounds: int
    pause_seconds: float
    compute_dtypes: tuple[str, ...]
    tokens: int
    depths: tuple[int, ...]
    prompts: tuple[int, ...]
    sequences: tuple[int, ...]
    head: tuple[int, int]
    quick: bool

    @property
    def cache_tokens(self) -> int:
        """Positions that the deepest run needs."""
        one = max([*(depth + self.tokens for depth in self.depths), *self.prompts, self.tokens])
        many = SEQUENCE_DEPTH + self.tokens
        return max([one + PAGES, *(count * (many + PAGES) for count in self.sequences)])


@dataclass
class Side:
    """A side of a case that may be unable to run it: then its figures are NaN, and the reason is kept."""

    run: Seconds
    reason: str | None = None

    def __call__(self) -> float:
        if self.reason is None:
            try:
                return self.run()
            except ValueError as error:
                self.reason = str(error)
        return float("nan")


@dataclass
class Measurement:
    """All parts, with the processes that they use.

    Attributes
    ----------
    settings : Settings
    ours : Child
    transformers : Child or None
    llama : LlamaBench or None
    batched : LlamaBatchedBench or None
    missing : dict
        By name of the last three attributes: the reason for each that is None.
    layers : int
    cases : list of dict
        Runs of whole models.
    figures : dict
        What else was measured: spreads, or a reason for having none.
    """

    settings: Settings
    ours: Child
    transformers: Child | None
    llama: LlamaBench | None
    batched: LlamaBatchedBench | None
    missing: dict[str, str]
    layers: int = 0
    cases: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def load(self) -> None:
        """Load the checkpoint in this library's process."""
        loaded = self._load(str(self.settings.folder), self.settings.compute_dtypes)
        self.layers = loaded["layers"]
        deepest = max([*(depth + self.settings.tokens for depth in self.settings.depths), *self.settings.prompts])
        if loaded["context_length"] < deepest:
            raise ValueError(
                f"--folder: the model has a context of {loaded['context_length']} tokens, but a run needs {deepest}"
            )

    def _load(self, folder: str | None, compute_dtypes: Sequence[str]) -> dict[str, Any]:
        request = {"do": "load", "folder": folder, "compute_dtypes": compute_dtypes, "threads": self.settings.threads}
        return self.ours.ask({**request, "cache_tokens": self.settings.cache_tokens})

    # Runs of whole models ----------------------------------------------------------------------

    def decode(self) -> None:
        """Decode one sequence, at each depth. At depth 0 also the products alone."""
        for depth in self.settings.depths:
            self._case("decode", depth, 1, self.settings.tokens, *self._llama("decode", self.settings.tokens, depth))

    def prefill(self) -> None:
        """Read a prompt, of each length."""
        for tokens in self.settings.prompts:
            self._case("prefill", 0, 1, tokens, *self._llama("prefill", tokens, 0))

    def sequences(self) -> None:
        """Decode several sequences together."""
        tokens, batched = self.settings.tokens, self.batched
        for count in self.settings.sequences:
            sides: dict[str, Seconds] = {}
            if batched is not None:
                sides["llama.cpp"] = partial(batched.seconds, count, tokens, SEQUENCE_DEPTH)
            self._case("decode", SEQUENCE_DEPTH, count, tokens, sides, self.missing.get("batched"))

    def _llama(self, phase: str, tokens: int, depth: int) -> tuple[dict[str, Seconds], str | None]:
        """llama-bench without and with flash attention, or the reason for having none."""
        llama = self.llama
        if llama is None:
            return {}, self.missing.get("llama")

        def seconds(flash: bool) -> float:
            return self._checked(llama.seconds(phase, tokens, depth, flash), llama.described)

        return {f"llama.cpp, -fa {int(flash)}": partial(seconds, flash) for flash in (False, True)}, None

    def _checked(self, seconds: float, described: Mapping[str, Any]) -> float:
        """``seconds``, unless the GGUF file is another model."""
        share = described["weights"] / self.settings.num_weights
        if not LEAST_WEIGHTS <= share <= MOST_WEIGHTS:
            raise ValueError(f"--gguf: the file has {share:.2f} times the weights of the checkpoint")
        return seconds

    def _case(
        self, phase: str, depth: int, sequences: int, tokens: int, llama: Mapping[str, Seconds], no_llama: str | None
    ) -> None:
        """Measure all sides in turns, and add a case. ``no_llama`` is the reason if there is no side of llama.cpp."""
        work = {"depth": depth, "sequences": sequences, "tokens": tokens}
        print(f"{phase}: {', '.join(f'{name} {value}' for name, value in work.items())}", file=sys.stderr)
        sides: dict[str, Seconds] = {}
        dtypes = self.settings.compute_dtypes
        for dtype in dtypes:
            sides[dtype] = self._asking(self.ours, do=phase, compute_dtype=dtype, **work)
            if phase == "decode" and sequences == 1 and depth == 0:
                kernels = self._asking(self.ours, do="kernels", compute_dtype=dtype, tokens=tokens)
                sides[f"kernels, {dtype}"] = Side(kernels)
        sides |= {name: Side(run) for name, run in llama.items()}
        if self.transformers is not None:
            sides["transformers"] = Side(self._asking(self.transformers, do=phase, **work))
        seconds = alternate(sides, self.settings.rounds, self.settings.pause_seconds)
        skipped = {name: side.reason for name, side in sides.items() if isinstance(side, Side) and side.reason}
        seconds = {name: figures for name, figures in seconds.items() if name not in skipped}
        if no_llama is not None:
            skipped["llama.cpp"] = no_llama
        if self.transformers is None:
            skipped["transformers"] = self.missing["transformers"]
        more: dict[str, Any] = {}
        llamas = [name for name in seconds if name.startswith("llama.cpp, ")]
        if llamas:
            fastest = min(llamas, key=lambda name: np.median(seconds[name]))
            more["llama_options"] = fastest.removeprefix("llama.cpp, ")
            seconds["llama.cpp"] = seconds[fastest]
        self.cases.append({"part": phase, **work, **more, "skipped": skipped, **self._figures(seconds, work)})

    def _figures(self, seconds: Mapping[str, Sequence[float]], work: Mapping[str, int]) -> dict[str, Any]:
        """The spreads of a case; a ratio is that of the other side's time to this library's."""
        count = work["sequences"] * work["tokens"]
        steps = work["tokens"] * self.layers
        return {
            "tokens_per_second": {name: spread(np.divide(count, each))._asdict() for name, each in seconds.items()},
            "us_a_layer": {name: spread(np.divide(each, steps * 1e-6))._asdict() for name, each in seconds.items()},
            "ratio": {
                dtype: {
                    name: ratios(each, seconds[dtype])._asdict()
                    for name, each in seconds.items()
                    if name not in self.settings.compute_dtypes and name not in self._kernels_but(dtype)
                }
                for dtype in self.settings.compute_dtypes
            },
        }

    def _kernels_but(self, dtype: str) -> list[str]:
        """The sides of the products alone with other compute dtypes."""
        return [f"kernels, {other}" for other in self.settings.compute_dtypes if other != dtype]

    @staticmethod
    def _asking(child: Child, **request: Any) -> Seconds:
        return lambda: float(child.ask(request)["seconds"])

    # Figures that stand alone ------------------------------------------------------------------

    def head(self, isas: Mapping[str, str | None]) -> None:
        """The head's share of the read bandwidth; ``isas`` has the reason for each ISA that this machine lacks."""
        vocab_size, hidden_size = self.settings.head
        threads = self.settings.threads
        request = {"do": "head", "vocab_size": vocab_size, "hidden_size": hidden_size, "threads": threads}
        with tempfile.TemporaryDirectory(dir=self.settings.folder.parent) as folder:
            file = Path(folder) / "head"
            write_head(file, vocab_size, hidden_size)

            def read() -> float:
                reply = self.ours.ask({"do": "read", "threads": threads, "quick": self.settings.quick})
                return float(reply["bytes_per_second"])

            sides = {"read": read, "head": self._asking(self.ours, **request, file=str(file), isa=None)}
            absent = isas.get(FORCED_ISA, "not an ISA of this architecture")
            if absent is None:
                sides["forced"] = self._asking(self.ours, **request, file=str(file), isa=FORCED_ISA)
            figures = alternate(sides, self.settings.rounds, self.settings.pause_seconds)
        nbytes = 2 * vocab_size * hidden_size
        self._keep("read, GB/s", spread(np.divide(figures["read"], 1e9)))
        for name, key in (("head", "head"), (f"head, {FORCED_ISA}", "forced")):
            if key in figures:
                self._keep(name, ratios(np.divide(nbytes, figures[key]), figures["read"]))
        if absent is not None:
            self.figures[f"head, {FORCED_ISA}"] = absent

    def built_in(self) -> None:
        """Decode with the built-in model. The checkpoint is not loaded any more."""
        dtype, tokens = self.settings.compute_dtypes[0], self.settings.tokens
        self._load(None, [dtype])
        run = self._asking(self.ours, do="decode", compute_dtype=dtype, depth=0, sequences=1, tokens=tokens)
        seconds = alternate({"run": run}, self.settings.rounds, self.settings.pause_seconds)["run"]
        self._keep("built-in decode, tokens/s", spread(np.divide(tokens, seconds)))

    def start(self, packed: Path, vocab_size: int) -> None:
        """From the start of the command to the first token: the built-in model, a packed folder, and a GGUF file."""
        write_tokenizer(packed, vocab_size)
        threads, file = self.settings.threads, self.settings.folder
        gguf = {"start, GGUF": lambda: first_token_seconds(file, threads)} if file.is_file() else {}
        sides = gguf | {
            "start, built-in": lambda: first_token_seconds(None, threads),
            "start, packed": lambda: first_token_seconds(packed, threads),
        }
        for name, seconds in alternate(sides, self.settings.rounds, self.settings.pause_seconds).items():
            self._keep(name, spread(seconds))

    def memory(self, packed: Path) -> None:
        """Resident memory of the checkpoint, and of the packed folder."""
        prompt = self.settings.prompts[0]
        for name, folder in (("memory, checkpoint", self.settings.folder), ("memory, packed", packed)):
            found = memory_share(folder, self.settings.threads, prompt)
            self._keep(name, exact(found.pop("share")))
            self.figures[f"{name}, bytes"] = found

    def _keep(self, name: str, figure: Spread) -> None:
        self.figures[name] = figure._asdict()


def start_ours() -> Child:
    """This library's process."""
    return Child("marlin_cy", module_command("bench.models.decoder_worker"), module_environment())


def start_transformers(folder: Path, threads: int) -> Child:
    """The process of transformers, with the checkpoint loaded."""
    child = Child("transformers", module_command("bench.models.transformers_worker"), module_environment())
    try:
        child.ask({"do": "load", "folder": str(folder), "threads": threads})
    except ValueError:
        child.close()
        raise
    return child


def pack(source: Path, packed: Path) -> None:
    """Write the checkpoint as a packed folder."""
    with tempfile.TemporaryDirectory() as empty:
        done = run_module("marlin_cy", "pack", source.resolve(), packed.resolve(), folder=empty)
    if done.returncode:
        raise ValueError(f"marlin-cy pack: ended with {done.returncode}: {done.stderr.strip()}")
