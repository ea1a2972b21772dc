"""How many CPUs a process may use, by its mask and its control group."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner import ConfigError
from captioner.threads import THREADS_LIMIT, available_cpus, checked_threads


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of so many CPUs, with the files of a control group."""

    def make(cpus, *, share=None, **files):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if share is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", share)
        monkeypatch.setattr("captioner.threads._CGROUP", tmp_path)
        monkeypatch.setattr("captioner.threads.os.sched_getaffinity", lambda pid: set(range(cpus)), raising=False)
        for name, content in files.items():
            path = tmp_path / NAMES[name]
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return available_cpus()

    return make


NAMES = {"v2": "cpu.max", "quota": "cpu/cpu.cfs_quota_us", "period": "cpu/cpu.cfs_period_us"}


def test_without_a_control_group_it_is_the_mask(machine):
    assert machine(5) == 5


@pytest.mark.parametrize(("share", "cpus"), [("3", 3), ("64", 8), ("2,4", 2), ("0", 8), ("", 8), ("many", 8)])
def test_what_started_the_process_says_its_share(machine, share, cpus):
    assert machine(8, share=share) == cpus


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("100000 100000\n", 1),
        ("1000 100000\n", 1),
        ("50000 25000\n", 2),
        ("1600000 100000\n", 8),
        ("max 100000\n", 8),
    ],
)
def test_a_quota_of_version_2_is_minded(machine, text, cpus):
    assert machine(8, v2=text) == cpus


@pytest.mark.parametrize(
    ("quota", "period", "cpus"),
    [
        ("200000\n", "100000\n", 2),
        ("250000\n", "100000\n", 3),
        ("10000\n", "100000\n", 1),
        ("9900000\n", "100000\n", 8),
        ("-1\n", "100000\n", 8),
    ],
)
def test_a_quota_of_version_1_is_minded(machine, quota, period, cpus):
    assert machine(8, quota=quota, period=period) == cpus


def test_version_2_goes_before_version_1(machine):
    assert machine(8, v2="300000 100000\n", quota="100000", period="100000") == 3


DAMAGED = ["", "\n", "max", "max max", "x y", "100000", "1 2 3", "0 100000", "-5 100000", "100000 0", "² 1", "1.5 1"]


@pytest.mark.parametrize("text", [*DAMAGED, b"\xff\xfe 1", b"\x00 \x00"])
def test_a_damaged_file_of_version_2_grants_all(machine, text):
    assert machine(4, v2=text) == 4


@pytest.mark.parametrize(
    ("quota", "period"),
    [
        ("", "100000"),
        ("100000", ""),
        ("x", "100000"),
        ("100000", "0"),
        ("0", "100000"),
        ("²", "1"),
        (b"\xff", "1"),
        ("1", b"\xff"),
        ("1 2", "1"),
    ],
)
def test_a_damaged_file_of_version_1_grants_all(machine, quota, period):
    assert machine(4, quota=quota, period=period) == 4


def test_half_of_version_1_grants_all(machine):
    assert machine(4, quota="100000") == 4


def test_a_folder_in_the_place_of_a_file_grants_all(machine, tmp_path):
    (tmp_path / "cpu.max").mkdir()
    assert machine(4) == 4


@given(text=st.binary(max_size=20))
def test_no_content_is_an_error(tmp_path_factory, text):
    root = tmp_path_factory.mktemp("cgroup")
    (root / "cpu").mkdir()
    for name in NAMES.values():
        (root / name).write_bytes(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("captioner.threads._CGROUP", root)
        assert 1 <= available_cpus() <= (os.cpu_count() or 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity")
def test_the_mask_of_the_process_is_minded(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("captioner.threads._CGROUP", tmp_path)
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert available_cpus() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert available_cpus() == len(before)


@pytest.mark.parametrize(("count", "cpus"), [(6, 6), (None, 1)])
def test_where_there_are_no_masks_it_is_the_cpus_of_the_machine(tmp_path, monkeypatch, count, cpus):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("captioner.threads._CGROUP", tmp_path)
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: count)
    assert available_cpus() == cpus


def test_by_default_all_that_are_available_compute(machine):
    assert checked_threads(None) == available_cpus()
    machine(8, v2="300000 100000\n")
    assert checked_threads(None) == 3


@given(st.integers(1, THREADS_LIMIT))
def test_a_number_in_range_is_taken_as_it_is(threads):
    assert checked_threads(threads) == threads


@pytest.mark.parametrize("threads", [0, -3, THREADS_LIMIT + 1, 2.0, True, False, "2", [2], float("nan")], ids=str)
def test_what_is_no_number_of_threads_is_refused(threads):
    with pytest.raises(ConfigError, match=f"a whole number from 1 to {THREADS_LIMIT}, got"):
        checked_threads(threads)
