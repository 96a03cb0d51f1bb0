from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import hflow_fast
from hflow_fast import _allocator, cli

# In a process of its own, whose setting does not outlive it: page faults of 40 tensors of 64 MiB, filled and freed.
COUNT_FAULTS = """
import resource, torch
from hflow_fast import keep_freed_memory

torch.set_num_threads(1)
{setting}
for _ in range(40):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""
PAGES = 2**26 // 4096


def faults(setting: str) -> float:
    """Of how many of the tensors the pages were new; a few hundred MiB of the imports come on top."""
    run = subprocess.run([sys.executable, "-c", COUNT_FAULTS.format(setting=setting)], capture_output=True, text=True,
                         check=True, env={"PATH": ""})
    return int(run.stdout) / PAGES


@pytest.mark.skipif(not _allocator.keep_freed_memory(False), reason="another C library, or settings from outside")
def test_freed_memory_is_kept_and_returned() -> None:
    """A page that the system gives is a fault; one that is at hand is none.

    glibc finds a tensor's place for the next one of its size only when there is a little more room than it needs, so
    the first few take new pages all the same.
    """
    assert faults("keep_freed_memory()") < 20
    assert faults("") > 40
    assert faults("keep_freed_memory(); keep_freed_memory(False)") > 40


@pytest.mark.parametrize("name, value", [("MALLOC_TRIM_THRESHOLD_", "1000"), ("GLIBC_TUNABLES", "glibc.malloc.check=0")])
def test_settings_from_outside_stay(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert not hflow_fast.keep_freed_memory()


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_allocator.ctypes, "CDLL", lambda name: object())
    assert not hflow_fast.keep_freed_memory()


@pytest.mark.parametrize("command, expected", [("info", [()]), ("bench", [])])
def test_commands_keep_memory(command: str, expected: list, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list = []
    monkeypatch.setattr(cli, "keep_freed_memory", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(cli.main.commands[command], "invoke", lambda context: None)
    assert CliRunner().invoke(cli.main, [command]).exit_code == 0
    assert calls == expected


@pytest.mark.parametrize("memory_max, processes, expected", [
    ("8000000000", "1", 8_000_000_000 - 5_000_000_000 + 1_000_000_000),  # the cgroup's limit
    ("9000000000000", "1", 6_000_000 * 1024), ("max", "1", 6_000_000 * 1024),  # what the system has
    ("max", "4", 6_000_000 * 1024 // 4),
])  # fmt: skip
def test_free_bytes_of_a_processor(
    memory_max: str, processes: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable:    6000000 kB\n")
    (tmp_path / "memory.max").write_text(f"{memory_max}\n")
    (tmp_path / "memory.current").write_text("5000000000\n")
    (tmp_path / "memory.stat").write_text("anon 3000000000\ninactive_file 1000000000\n")
    monkeypatch.setattr(_allocator, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(_allocator, "_CGROUP", tmp_path)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert _allocator.free_bytes(torch.device("cpu")) == expected


def test_free_bytes_where_nobody_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_allocator, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(_allocator, "_CGROUP", tmp_path)
    assert _allocator.free_bytes(torch.device("cpu")) is None
    assert _allocator.free_bytes(torch.device("meta")) is None
