"""Code that several benchmarks share: timing, shapes, options, facts about the machine, saved results."""
