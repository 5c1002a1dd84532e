"""The free memory of this machine, or of the container that the process runs in."""

import os
from contextlib import suppress
from pathlib import Path


def free_memory(root: Path = Path("/")) -> int:
    """Return the bytes that the process may still use, with reclaimable caches where the kernel reports them.

    The least of the machine's free memory and what the limits of the process's control groups leave. root: holds proc/
    and sys/.
    """
    return min([_of_machine(root), *_of_groups(root)])


def _of_machine(root: Path) -> int:
    with suppress(OSError):
        for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_groups(root: Path) -> list[int]:
    """Return what each group from the process's own up to the root leaves, for both versions of control groups."""
    free = []
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers == "":
                mount, limit, used, cache = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
            elif "memory" in controllers.split(","):
                mount, limit, used = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
                cache = "total_inactive_file"
            else:
                continue
            folder = mount / group.lstrip("/")
            for place in (folder, *folder.parents):
                with suppress(OSError, ValueError):  # a group without a limit says "max"
                    most, taken = (int((place / name).read_text(encoding="ascii")) for name in (limit, used))
                    free.append(max(0, most - taken + _reclaimable(place / "memory.stat", cache)))
                if place == mount:
                    break
    return free


def _reclaimable(statistics: Path, name: str) -> int:
    with suppress(OSError):
        for line in statistics.read_text(encoding="ascii").splitlines():
            if line.startswith(f"{name} "):
                return int(line.split()[1])
    return 0
