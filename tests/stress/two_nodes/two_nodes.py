"""Trains on two nodes, kills one, cuts the network, stops by a signal, continues with one: nothing may be lost.

    python tests/stress/two_nodes/two_nodes.py [--all]

It needs root for network namespaces. It uses torchrun and the deepspeed launcher in turn; --all tests each kind of
failure with both. The last line is the verdict; the exit code is 0 only if nothing was lost.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).resolve()
ROOT = HERE.parents[3]
sys.path[:0] = [str(HERE.parent), str(HERE.parents[2]), str(ROOT)]

from helpers.pictures_folder import make_pictures  # noqa: E402
from network import INTERFACE, Node, two_nodes, why_impossible  # noqa: E402

from fastdiff.training.checkpoints.folder import list_checkpoints, step_of  # noqa: E402

STEPS, EVERY = 240, 4
"""Steps of a whole run, enough that it can't finish while it is disturbed, and steps between checkpoints."""
ALONE = 20
"""Steps for which one node continues alone."""
SILENCE = 18
"""Seconds without a heartbeat after which a rank counts as lost, set by --stall_minutes."""
LIMIT = 60.0
"""Seconds within which every process must have ended after a failure."""
PORT = "29400"
TOLERANCE = 0.01
"""Largest norm of a difference caused by another number of processes, relative to the norm of what training changed.

They sum float32 gradients in another order. AdamW makes whole updates of gradients that are nothing but rounding
errors, so a few weights differ by as much as they move, but all together by a thousandth. A lost moment, image or
random number changes nearly all weights.
"""
MODEL = (
    "--image_size 8 --num_channels 32 --channel_mult 1,2 --num_res_blocks 1 --attention_resolutions 4 "
    "--diffusion_steps 100 --noise_schedule cosine --learn_sigma True --batch_size 4 --lr 1e-3 --loader pillow "
    f"--compile False --log_interval 10 --save_interval {EVERY} --stall_minutes {SILENCE / 60}"
).split()


class Lost(Exception):
    """A check has failed."""


@dataclass
class Job:
    """A training run on some of the nodes."""

    nodes: list[Node]
    folder: Path
    data: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def start(self, launcher: str, steps: int = STEPS) -> None:
        folders = ["--data_dir", str(self.data), "--run_dir", str(self.run)]
        script = [str(ROOT / "fastdiff" / "train.py"), *MODEL, "--max_steps", str(steps), *folders]
        hosts = self.folder / "hostfile"
        hosts.write_text("".join(f"{node.address} slots=1\n" for node in self.nodes))
        first = self.nodes[0].address
        for node in self.nodes:
            where = ["--node_rank", str(node.number), "--master_addr", first, "--master_port", PORT]
            if launcher == "torchrun":
                count = ["--nnodes", str(len(self.nodes)), "--nproc_per_node", "1"]
                command = [sys.executable, "-m", "torch.distributed.run", *count, *where, *script]
            else:
                deepspeed = str(Path(sys.executable).with_name("deepspeed"))
                command = [deepspeed, "--log_level", "error", "--hostfile", str(hosts), "--no_ssh", *where, *script]
            env = {"GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
            node.start(command, self.log(node), {**env, "FASTDIFF_NODE": node.namespace})

    def log(self, node: Node) -> Path:
        return self.folder / f"{node.name}.log"

    def newest(self) -> int:
        """The step of the newest checkpoint, or 0."""
        return max((step_of(folder) for folder in list_checkpoints(self.run / "checkpoints")), default=0)

    def wait_for_newer(self, than: int) -> int:
        """Wait for a checkpoint after step `than`, and return its step. Raises Lost if the run ends before."""
        until = time.monotonic() + 120
        while (step := self.newest()) <= than:
            if time.monotonic() > until or any(node.process and node.process.poll() is not None for node in self.nodes):
                raise Lost(f"no checkpoint after step {than}\n" + self.words())
            time.sleep(0.02)
        return step

    def wait(self, limit: float) -> list[int]:
        """Wait until the processes of all nodes have ended, and return their exit codes. Lost after `limit` seconds."""
        until = time.monotonic() + limit
        while any(node.process and node.process.poll() is None for node in self.nodes):
            if time.monotonic() > until:
                raise Lost(f"processes still run after {limit:.0f} s\n" + self.words())
            time.sleep(0.05)
        return [node.process.returncode for node in self.nodes if node.process]

    def said(self, node: Node) -> str:
        """The last line that the training script itself printed on a node."""
        lines = [line for line in self.log(node).read_text().splitlines() if line.startswith("train.py: ")]
        return lines[-1] if lines else ""

    def words(self) -> str:
        return "\n".join(f"--- {node.name}\n{self.log(node).read_text()[-3000:]}" for node in self.nodes)

    def weights(self, step: int) -> list[torch.Tensor]:
        """All weights and all averages after a step, each as one vector."""
        folder = self.run / "checkpoints" / f"step_{step:06d}"
        files = [folder / f"model{step:06d}.pt", folder / f"ema_0.9999_{step:06d}.pt"]
        states = [torch.load(file, weights_only=True) for file in files]
        return [torch.cat([value.flatten() for value in state.values()]) for state in states]


def disturb(job: Job, launcher: str, what: str, act: Callable[[], None], alive: list[Node]) -> None:
    """Start or resume the job, call act() after its next checkpoint, and check that all ranks end, on `alive` nodes
    with a reason.
    """
    before = job.newest()
    job.start(launcher)
    after = job.wait_for_newer(before)
    start = time.monotonic()
    act()
    codes = job.wait(LIMIT)
    seconds = time.monotonic() - start
    print(f"{launcher}: {what} after step {after}: all ended in {seconds:.1f} s, exit codes {codes}", flush=True)
    for node in alive:
        if not job.said(node):
            raise Lost(f"{node.name} ended without a reason\n" + job.words())
        print(f"    {node.name}: {job.said(node)}", flush=True)
    if (job.run / "checkpoints" / f"step_{STEPS:06d}").exists():
        raise Lost("the run was over before it could be disturbed")


def finish(job: Job, launcher: str, steps: int = STEPS) -> None:
    job.start(launcher, steps)
    codes = job.wait(180)
    if any(codes):
        raise Lost(f"exit codes {codes}\n" + job.words())
    print(f"{launcher}: {len(job.nodes)} nodes trained to step {steps}", flush=True)


def status(job: Job) -> str:
    return str(json.loads((job.run / "status.json").read_text())["state"])


def check_same(job: Job, whole: Job, step: int) -> None:
    """Raise Lost if weights or averages of two runs differ in any bit after a step."""
    if not all(map(torch.equal, job.weights(step), whole.weights(step))):
        raise Lost(f"weights after step {step} differ from the undisturbed run's")
    print(f"step {step}: the undisturbed run's weights, bit for bit", flush=True)


def check_close(job: Job, whole: Job, start: int, step: int) -> None:
    """Raise Lost if weights or averages after a step, changed since step `start`, differ by more than TOLERANCE."""
    compared = zip(job.weights(step), whole.weights(step), whole.weights(start), strict=True)
    error = max(float((ours - theirs).norm() / (theirs - before).norm()) for ours, theirs, before in compared)
    print(f"step {step}: {error:.2g} of the changes since step {start} differ from the undisturbed run's", flush=True)
    if error > TOLERANCE:
        raise Lost(f"{error:.2g} is more than {TOLERANCE:g}")


def stop_and_shrink(job: Job, whole: Job, nodes: tuple[Node, Node], launcher: str) -> None:
    """Check that SIGTERM to one rank saves and ends all, that weights agree, and that one node can continue alone."""
    disturb(job, launcher, "SIGTERM to rank 1", nodes[1].terminate_ranks, [nodes[0]])
    if status(job) != "preempted":
        raise Lost(f"status.json says {status(job)}, not preempted")
    stopped = job.newest() // EVERY * EVERY
    check_same(job, whole, stopped)
    job.nodes = [nodes[0]]
    finish(job, launcher, stopped + ALONE)
    check_close(job, whole, stopped, stopped + ALONE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="test every kind of failure with both launchers")
    everything = parser.parse_args().all
    if why := why_impossible():
        sys.exit(f"two_nodes.py: {why}")
    with tempfile.TemporaryDirectory() as name, two_nodes() as nodes:
        folder = Path(name)
        data = make_pictures(folder / "pictures")
        jobs = []
        for number in range(3):
            (folder / str(number)).mkdir()
            jobs.append(Job(list(nodes), folder / str(number), data))
        whole, first, second = jobs
        first_node = [nodes[0]]
        try:
            finish(whole, "torchrun")
            disturb(first, "torchrun", "SIGKILL to node 1", nodes[1].kill, first_node)
            disturb(first, "deepspeed", "cable cut", nodes[1].cut, list(nodes))
            nodes[1].mend()
            stop_and_shrink(first, whole, nodes, "torchrun")
            if everything:
                disturb(second, "deepspeed", "SIGKILL to node 1", nodes[1].kill, first_node)
                disturb(second, "deepspeed", "SIGKILL to node 0", nodes[0].kill, [nodes[1]])
                disturb(second, "torchrun", "cable cut", nodes[1].cut, list(nodes))
                nodes[1].mend()
                disturb(second, "torchrun", "SIGKILL to node 0", nodes[0].kill, [nodes[1]])
                stop_and_shrink(second, whole, nodes, "deepspeed")
        except Lost as error:
            print(error)
            print("two nodes: something was lost")
            sys.exit(1)
    print("two nodes: nothing was lost")


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
