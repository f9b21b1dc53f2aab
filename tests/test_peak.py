"""The measurement of the integer peak."""

import pytest

from marlin_cy.cpu._dispatch import isas
from marlin_cy.cpu.measure._peak import int8_peak

AVAILABLE = [isa["name"] for isa in isas() if isa["available"]]


@pytest.mark.parametrize("isa", AVAILABLE)
def test_is_a_plausible_figure_or_none(isa):
    peak = int8_peak(isa, 2, repeats=3)
    if peak is None:
        assert isa not in ("avx2", "avxvnni", "avx512vnni")
    else:
        assert 1e8 < peak < 1e15


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"isa": "mmx", "num_threads": 1}, "isa: got 'mmx'"),
        ({"isa": "generic", "num_threads": 0}, "num_threads: got 0"),
        ({"isa": "generic", "num_threads": 1, "repeats": 0}, "repeats: got 0"),
    ],
)
def test_refuses(arguments, named):
    with pytest.raises(ValueError, match=named):
        int8_peak(**arguments)
