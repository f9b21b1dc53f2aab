"""How many threads are used by default, and which numbers of threads are accepted."""

import math
import os

import numpy as np
import pytest

from marlin_cy import threads
from marlin_cy.checkpoints.checkpoint import open_checkpoint
from marlin_cy.threads import MAX_THREADS, checked_num_threads, cpu_quota, default_num_threads

V2 = "30 23 0:26 {top} /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "36 25 0:31 {top} /sys/fs/cgroup/cpu,cpuacct rw shared:15 - cgroup cgroup rw,cpu,cpuacct\n"
ROOT_MOUNT = "22 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n"
OTHER = ROOT_MOUNT + "35 25 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"


def files(root, **contents):
    """Write files below ``root``, by their relative names."""
    for name, text in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())


def v2(root, limits, *, cgroup="/", top="/"):
    """A root with cgroup v2; ``limits`` are the contents of ``cpu.max`` by folder."""
    files(
        root,
        **{"proc/self/mountinfo": OTHER + V2.format(top=top), "proc/self/cgroup": f"0::{cgroup}\n"},
        **{f"sys/fs/cgroup/{folder}/cpu.max": text for folder, text in limits.items()},
    )
    return root


def v1(root, limits, *, cgroup="/", top="/"):
    """A root with cgroup v1; ``limits`` are quota and period by folder."""
    files(root, **{"proc/self/mountinfo": OTHER + V1.format(top=top)})
    files(root, **{"proc/self/cgroup": f"4:memory:/elsewhere\n3:cpu,cpuacct:{cgroup}\n1:name=systemd:/init\n0::/\n"})
    for folder, (quota, period) in limits.items():
        place = f"sys/fs/cgroup/cpu,cpuacct/{folder}"
        files(root, **{f"{place}/cpu.cfs_quota_us": quota, f"{place}/cpu.cfs_period_us": period})
    return root


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("200000 100000\n", 2),
        ("150000 100000\n", 1.5),
        ("1000 100000\n", 0.01),
        ("max 100000\n", None),
        ("max\n", None),
        ("", None),
        ("0 100000\n", None),
        ("100000 0\n", None),
        ("100000\n", None),
        ("-1 100000\n", None),
        ("1e5 100000\n", None),
        ("100000 100000 100000\n", None),
        ("9" * 5000 + " 100000\n", None),
        ("٣ ١\n", None),
        (b"\xff\xfe\x00 100000", None),
    ],
)
def test_quota_v2(tmp_path, text, expected):
    assert cpu_quota(v2(tmp_path, {".": text})) == expected


@pytest.mark.parametrize(
    ("quota", "period", "expected"),
    [
        ("250000\n", "100000\n", 2.5),
        ("-1\n", "100000\n", None),
        ("0\n", "100000\n", None),
        ("100000\n", "0\n", None),
        ("", "100000\n", None),
        ("many\n", "100000\n", None),
    ],
)
def test_quota_v1(tmp_path, quota, period, expected):
    assert cpu_quota(v1(tmp_path, {".": (quota, period)})) == expected


def test_the_lowest_of_nested_cgroups_v2(tmp_path):
    limits = {"a/b/c": "400000 100000", "a/b": "max 100000", "a": "150000 50000", ".": "800000 100000"}
    assert cpu_quota(v2(tmp_path, limits, cgroup="/a/b/c")) == 3


def test_the_lowest_of_nested_cgroups_v1(tmp_path):
    limits = {"pod/box": ("400000", "100000"), "pod": ("100000", "100000"), ".": ("-1", "100000")}
    assert cpu_quota(v1(tmp_path, limits, cgroup="/pod/box")) == 1


def test_cgroups_of_others_do_not_count(tmp_path):
    assert cpu_quota(v2(tmp_path, {"a/b": "100000 100000", "x": "100000 100000"}, cgroup="/a")) is None


@pytest.mark.parametrize("make", [v1, v2])
def test_a_container_that_sees_only_its_own_cgroup(tmp_path, make):
    """``/proc`` names the cgroup as the host does, and the mount shows that cgroup, or a part of it."""
    limit = {v1: ("300000", "100000"), v2: "300000 100000"}[make]
    assert cpu_quota(make(tmp_path / "same", {".": limit}, cgroup="/docker/abc", top="/docker/abc")) == 3
    assert cpu_quota(make(tmp_path / "below", {"x": limit}, cgroup="/docker/abc/x", top="/docker/abc")) == 3
    assert cpu_quota(make(tmp_path / "other", {".": limit}, cgroup="/docker/abc", top="/")) == 3
    assert cpu_quota(make(tmp_path / "outside", {".": limit}, cgroup="/../../other", top="/docker/abc")) == 3


def test_both_versions_at_once(tmp_path):
    root = v1(tmp_path, {".": ("300000", "100000")})
    files(root, **{"proc/self/mountinfo": V1.format(top="/") + V2.format(top="/")})
    files(root, **{"sys/fs/cgroup/cpu.max": "200000 100000"})
    assert cpu_quota(root) == 2


def test_a_mount_point_with_a_space(tmp_path):
    files(
        tmp_path,
        **{
            "proc/self/mountinfo": V2.format(top="/").replace("/sys/fs/cgroup", "/my\\040groups"),
            "proc/self/cgroup": "0::/\n",
            "my groups/cpu.max": "500000 100000\n",
        },
    )
    assert cpu_quota(tmp_path) == 5


@pytest.mark.parametrize(
    ("mountinfo", "cgroup"),
    [
        (None, None),
        ("", ""),
        (None, "0::/\n"),
        (V2.format(top="/"), None),
        ("nonsense\n - \n1 2 3 - cgroup2\n", "nonsense\n:\n0:\n::\n"),
        (b"\xff\x00\xfe - \xff", b"\x00::\xff"),
        (V2.format(top="/"), b"0::/\x00\n"),
    ],
)
def test_without_readable_cgroups_there_is_no_quota(tmp_path, mountinfo, cgroup):
    for name, text in {"proc/self/mountinfo": mountinfo, "proc/self/cgroup": cgroup}.items():
        if text is not None:
            files(tmp_path, **{name: text})
    assert cpu_quota(tmp_path) is None


def test_a_folder_in_place_of_a_file(tmp_path):
    root = v2(tmp_path, {})
    (root / "sys/fs/cgroup/cpu.max").mkdir(parents=True)
    assert cpu_quota(root) is None


def test_quota_of_this_machine():
    quota = cpu_quota()
    assert quota is None or quota > 0


@pytest.fixture
def sixteen_cpus(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("marlin_cy.cpu._workspace.available_cpus", lambda: 16)
    monkeypatch.setattr(threads, "cpu_quota", lambda: None)


@pytest.mark.parametrize(("quota", "expected"), [(None, 16), (100.0, 16), (4.0, 4), (2.01, 3), (0.01, 1)])
def test_default_is_the_quota_rounded_up(sixteen_cpus, monkeypatch, cpu_backend, quota, expected):
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    assert default_num_threads() == checked_num_threads(None) == expected
    assert cpu_backend.new_context().num_threads == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [("3", 3), ("3,2", 3), (" 5 ", 5), ("32", 32), ("99999", MAX_THREADS), ("0", 4), ("-1", 4), ("x", 4), ("", 4)],
)
def test_omp_num_threads_overrides_the_quota(sixteen_cpus, monkeypatch, value, expected):
    monkeypatch.setattr(threads, "cpu_quota", lambda: 4.0)
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert default_num_threads() == expected


def test_default_here(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    limits = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()]
    if cpu_quota() is not None:
        limits.append(max(1, math.ceil(cpu_quota())))
    assert default_num_threads() == min(limits)


@pytest.mark.parametrize("value", [1, 4, MAX_THREADS, np.int64(4), np.int32(4), np.uint8(4)])
def test_integers_are_accepted(value):
    checked = checked_num_threads(value)
    assert type(checked) is int
    assert checked == value


REFUSED = [
    (True, TypeError, "num_threads: got True, expected an int"),
    (np.bool_(True), TypeError, "num_threads: got .*True.*, expected an int"),
    (2.0, TypeError, "num_threads: got 2.0, expected an int"),
    (np.float32(2), TypeError, "num_threads: got .*2.0.*, expected an int"),
    ("2", TypeError, "num_threads: got '2', expected an int"),
    (0, ValueError, "num_threads: got 0, expected 1 to 4096"),
    (np.int64(-1), ValueError, "num_threads: got -1, expected 1 to 4096"),
    (MAX_THREADS + 1, ValueError, "num_threads: got 4097, expected 1 to 4096"),
    (2**70, ValueError, "num_threads: got a number of 71 bits"),
]


@pytest.mark.parametrize(("value", "exception", "message"), REFUSED, ids=repr)
def test_others_are_refused_wherever_threads_are_given(cpu_backend, tmp_path, value, exception, message):
    with pytest.raises(exception, match=message):
        checked_num_threads(value)
    with pytest.raises(exception, match=message):
        cpu_backend.new_context(num_threads=value)
    with pytest.raises(exception, match=message):
        open_checkpoint(tmp_path, num_threads=value)


def test_a_context_takes_a_numpy_integer(cpu_backend):
    assert cpu_backend.new_context(num_threads=np.int64(3)).num_threads == 3
