"""What processes listen on, as /proc tells."""

from __future__ import annotations

import ipaddress
from pathlib import Path

_LISTEN = "0A"


def descendants(*pids: int) -> set[int]:
    """These processes and all that come from them."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
    found = set(pids)
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def listening(pids: set[int]) -> dict[tuple[str, int], str]:
    """Address and port of every TCP socket that one of the processes listens on -> how the process was started."""
    owners = {}
    for pid in pids:
        try:
            name = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
            owners |= {inode: name for link in Path(f"/proc/{pid}/fd").iterdir() if (inode := _inode(link))}
        except OSError:
            continue
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN and fields[9] in owners:
                address, port = fields[1].split(":")
                found[_readable(address), int(port, 16)] = owners[fields[9]]
    return found


def _inode(link: Path) -> str:
    try:
        target = str(link.readlink())
    except OSError:
        return ""
    return target[len("socket:[") : -1] if target.startswith("socket:[") else ""


def _readable(address: str) -> str:
    """The kernel writes words of 32 bits in the machine's own order."""
    words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
    ip = ipaddress.ip_address(b"".join(words))
    mapped = getattr(ip, "ipv4_mapped", None)
    return str(mapped or ip)
