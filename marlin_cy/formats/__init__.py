"""Checkpoint formats: how tools store quantised linear layers, and how these become canonical weights.

::

    registry.py      finds a folder's quantisation configs and the format that reads them
    scheme.py        Scheme, the interface of a format
    gptq.py awq.py marlin.py mxfp4.py compressed_tensors.py auto_round.py    one format each
    overrides.py     settings of single modules
    json_fields.py   JSON files and typed fields      fields.py   fields that several tools use
    arrays.py        conversions that several formats share

A format depends on :mod:`marlin_cy.weights` and on nothing above. ``docs/adding-a-format.md`` says how to add one.
"""
