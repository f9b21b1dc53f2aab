"""The memory that is left to a process, from files of a system that the tests make up."""

import pytest

from marlin_cy.memory import available_memory

MEMINFO = "MemTotal:       16000000 kB\nMemFree:  100 kB\nMemAvailable:    8000000 kB\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/meminfo": MEMINFO}, 8000000 * 1024),
        ({"proc/meminfo": MEMINFO, "sys/fs/cgroup/memory.max": "max", "sys/fs/cgroup/memory.current": "5"}, 8192000000),
        ({"proc/meminfo": MEMINFO, "sys/fs/cgroup/memory.max": "5000", "sys/fs/cgroup/memory.current": "2000"}, 3000),
        ({"proc/meminfo": MEMINFO, "sys/fs/cgroup/memory.max": "5000", "sys/fs/cgroup/memory.current": "6000"}, 0),
        (
            {
                "proc/meminfo": MEMINFO,
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "7000",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "1000",
            },
            6000,
        ),
        (
            {"proc/meminfo": MEMINFO, "sys/fs/cgroup/memory.max": "much", "sys/fs/cgroup/memory.current": "6000"},
            8192000000,
        ),
    ],
)
def test_available_memory(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_memory(tmp_path) == expected


def test_no_files(tmp_path):
    found = available_memory(tmp_path)
    assert found is None or found > 1 << 20


def test_this_machine():
    assert available_memory() > 1 << 20
