"""The commands of ``marlin-cy``, one module each."""
