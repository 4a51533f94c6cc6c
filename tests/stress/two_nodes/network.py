"""Simulates two machines: connected network namespaces, each with its own address, host name and processes."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

INTERFACE = "net0"
"""Name of the interface on both nodes."""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def why_impossible() -> str:
    """The reason why namespaces can't be created here; empty if they can."""
    name = f"fastdiff-probe-{os.getpid()}"
    try:
        ip("netns", "add", name)
    except FileNotFoundError:
        return "two nodes need the command ip (package iproute2)"
    except subprocess.CalledProcessError as error:
        return f"two nodes need network namespaces, which can't be made here ({error.stderr.strip()}); run as root"
    try:
        started = ["ip", "netns", "exec", name, "unshare", "--uts", "--pid", "--fork", "--mount-proc", "hostname", "x"]
        tried = subprocess.run(started, capture_output=True, text=True)
    except FileNotFoundError:
        return "two nodes need the command unshare (package util-linux)"
    finally:
        ip("netns", "del", name)
    return f"two nodes need process namespaces ({tried.stderr.strip()})" if tried.returncode else ""


class Node:
    """A namespace in which commands run, with its own address, host name and process ids."""

    def __init__(self, number: int) -> None:
        self.number, self.name = number, f"node{number}"
        self.namespace = f"fastdiff-{os.getpid()}-{number}"
        self.address = f"10.213.77.{number + 1}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, command: Sequence[str], log: Path, env: Mapping[str, str]) -> None:
        """Run a command in the node, with its output in a file."""
        inside = f"hostname {self.name}; exec {shlex.join(command)}"
        apart = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", inside]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *apart], stdout=file, stderr=file, env={**os.environ, **env}
            )

    def cut(self) -> None:
        """Disconnect the node from the network."""
        ip("-n", self.namespace, "link", "set", INTERFACE, "down")

    def mend(self) -> None:
        ip("-n", self.namespace, "link", "set", INTERFACE, "up")

    def kill(self) -> None:
        """Send SIGKILL to every process in the node."""
        if self.process:
            self.process.send_signal(signal.SIGKILL)  # its child, the first process of the node, dies with it
            self.process.wait()

    def terminate_ranks(self) -> None:
        """Send SIGTERM to the training processes, but not to their launcher."""
        assert self.process
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == self.process.pid:
                continue
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
                first = (entry / "status").read_text().split("NSpid:")[1].splitlines()[0].split()[-1] == "1"
            except (OSError, IndexError):
                continue
            mine = f"FASTDIFF_NODE={self.namespace}".encode() in environment
            if mine and not first and any(word.startswith(b"RANK=") for word in environment):
                os.kill(int(entry.name), signal.SIGTERM)


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Two connected nodes, whose processes and namespaces are always removed afterwards."""
    nodes = Node(0), Node(1)
    try:
        for node in nodes:
            ip("netns", "add", node.namespace)
        ends = [f"fd{os.getpid()}{node.number}"[-15:] for node in nodes]
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for node, end in zip(nodes, ends, strict=True):
            ip("link", "set", end, "netns", node.namespace, "name", INTERFACE)
            ip("-n", node.namespace, "addr", "add", f"{node.address}/24", "dev", INTERFACE)
            ip("-n", node.namespace, "link", "set", "lo", "up")
            ip("-n", node.namespace, "link", "set", INTERFACE, "up")
        yield nodes
    finally:
        for node in nodes:
            node.kill()
            subprocess.run(["ip", "netns", "del", node.namespace], capture_output=True)
