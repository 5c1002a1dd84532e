from pathlib import Path

from model.memory import free_memory

GIB = 2**30


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def test_limits_of_control_groups_count(tmp_path):
    assert free_memory() > 0
    write(tmp_path, "proc/meminfo", f"MemTotal: 1 kB\nMemAvailable: {8 * 2**20} kB\n")
    assert free_memory(tmp_path) == 8 * GIB
    write(tmp_path, "proc/self/cgroup", "0::/a/b\n")
    write(tmp_path, "sys/fs/cgroup/a/b/memory.max", "max\n")
    write(tmp_path, "sys/fs/cgroup/a/memory.max", f"{4 * GIB}\n")
    write(tmp_path, "sys/fs/cgroup/a/memory.current", f"{3 * GIB}\n")
    write(tmp_path, "sys/fs/cgroup/a/memory.stat", f"anon 5\ninactive_file {GIB}\n")
    assert free_memory(tmp_path) == 2 * GIB
    write(tmp_path, "proc/self/cgroup", "3:cpu:/\n9:memory:/c\n")
    write(tmp_path, "sys/fs/cgroup/memory/c/memory.limit_in_bytes", f"{GIB}\n")
    write(tmp_path, "sys/fs/cgroup/memory/c/memory.usage_in_bytes", f"{2 * GIB}\n")
    assert free_memory(tmp_path) == 0
