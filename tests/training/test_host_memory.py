"""What a process may use is what its host and its control groups leave it."""

import pytest

from dpojax.training import host_memory

GIB = 2**30


@pytest.fixture
def host(tmp_path, monkeypatch):
    """Writes files of a system of its own: 10 GiB available, nothing else said."""
    monkeypatch.setattr(host_memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(host_memory, "CGROUPS", tmp_path / "groups")

    def write(**files):
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/").replace("memory_", "memory.")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    write(proc__meminfo=f"MemTotal: 1 kB\nMemAvailable: {10 * 2**20} kB\nHugePages_Total: 0\n")
    return write


def test_a_host_without_control_groups_gives_what_is_available(host):
    assert host_memory.available() == 10 * GIB


def test_the_tightest_control_group_counts_without_cached_files(host):
    host(proc__self__cgroup="1:cpu:/elsewhere\n0::/job/step\n")
    host(groups__job__step__memory_max="max\n", groups__job__step__memory_current=f"{GIB}\n")
    assert host_memory.available() == 10 * GIB
    host(groups__job__memory_max=f"{6 * GIB}\n", groups__job__memory_current=f"{3 * GIB}\n")
    assert host_memory.available() == 3 * GIB
    host(groups__job__memory_stat=f"active_file {GIB // 2}\ninactive_file {GIB // 2}\n")
    assert host_memory.available() == 4 * GIB
    host(groups__memory_max=f"{2 * GIB}\n", groups__memory_current="0\n")
    assert host_memory.available() == 2 * GIB


def test_a_container_of_the_first_version_sees_its_limit_at_the_root(host):
    host(proc__self__cgroup="4:memory,hugetlb:/docker/1a2b\n0::/\n")
    host(groups__memory__memory_limit_in_bytes=f"{5 * GIB}\n")
    host(groups__memory__memory_usage_in_bytes=f"{2 * GIB}\n")
    host(groups__memory__memory_stat=f"inactive_file 7\ntotal_inactive_file {GIB}\n")
    assert host_memory.available() == 4 * GIB


def test_a_system_that_says_nothing_sets_no_limit(host, tmp_path):
    (tmp_path / "proc" / "meminfo").unlink()
    assert host_memory.available() == float("inf")
