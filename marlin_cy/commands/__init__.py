"""The commands of ``marlin-cy``, a module each."""
