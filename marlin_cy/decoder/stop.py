"""Stop strings: the end of a text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopStrings"]


class StopStrings:
    """Finds the first of several texts in a stream, wherever the stream is cut.

    What may be the beginning of a stop string is held back. Of stop strings that are complete at the same character,
    the longest counts.

    Each stop string has an automaton: its state is the number of characters that match so far. Source: Knuth, Morris
    and Pratt, "Fast pattern matching in strings" (1977).

    Parameters
    ----------
    stops : sequence of str
        Each has at least one character.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._automata = [_Automaton(stop) for stop in stops]
        self._held = ""

    def put(self, text: str) -> tuple[str, bool]:
        """The text that can be passed on, and whether a stop string is complete: then the text ends before it."""
        if not self._automata:
            return text, False
        held = self._held + text
        for read, character in enumerate(text, len(self._held) + 1):
            found = 0
            for automaton in self._automata:
                automaton.step(character)
                if automaton.state == len(automaton.stop):
                    found = max(found, automaton.state)
            if found:
                self._held = ""
                return held[: read - found], True
        passed = len(held) - max(automaton.state for automaton in self._automata)
        self._held = held[passed:]
        return held[:passed], False

    def finish(self) -> str:
        """The text that was held back, as the stream has ended."""
        held, self._held = self._held, ""
        return held


class _Automaton:
    """One stop string, and how many of its characters the end of the stream matches."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.state = 0
        # borders[n]: the longest shorter state that matches too, where n characters match.
        self._borders = [0] * (len(stop) + 1)
        for n in range(2, len(stop) + 1):
            self.state = self._borders[n - 1]
            self.step(stop[n - 1])
            self._borders[n] = self.state
        self.state = 0

    def step(self, character: str) -> None:
        """Read a character. A state that is complete must not be left."""
        while self.state and self.stop[self.state] != character:
            self.state = self._borders[self.state]
        self.state += self.stop[self.state] == character
