"""kill -9 at every low-level call and at random times: what was acknowledged is there bit for bit, and no tree breaks.

Run as a program, this file is the driver of the processes that die: it imports torch once and forks.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

import mc_runtime
from mc_runtime.tree import NodeFlag, Tree, TreeSpec, storage

K = 4
SPEC = TreeSpec(K, 3, 2, 1, 2, "bfloat16", 100, "m", "t", "g")
STEPS = 4
SITES = ("create", "pwrite", "truncate", "sync_file", "sync_directory", "commit")
ALL = NodeFlag.KV | NodeFlag.CONTEXTUAL | NodeFlag.HIDDEN


def values(seed, n):
    """summary, hidden, k, v of n nodes."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, *shape, generator=g).bfloat16() for shape in ((3,), (3,), (2, 1, 2), (2, 1, 2))]


class Model:
    """What the tree must hold after a number of steps."""

    def __init__(self):
        self.tokens = []
        self.nodes = {1: [], 2: []}
        self.documents = []
        self.state = None

    def step(self, i, t=None):
        """Step i, in memory and, if a transaction is given, in the tree. All kinds of change, fast and contextual."""
        ids = [(7 * i + j) % 100 for j in range(10 + i)]
        self.tokens += ids
        if t:
            t.append_tokens(ids)
        for level, below in ((1, self.tokens), (2, self.nodes[1])):
            n = len(below) // K - len(self.nodes[level])
            contextual = (i + level) % 2 == 0
            s, h, k, v = values(100 * i + level, n)
            flags = ALL if contextual else NodeFlag.KV
            self.nodes[level] += [[flags, s[j], h[j] if contextual else None, k[j], v[j]] for j in range(n)]
            if t:
                t.append_nodes(level, s, hidden=h if contextual else None, k=k, v=v, contextual=contextual)
        if i % 2 == 0:
            fast = [j for j, node in enumerate(self.nodes[1]) if node[0] == NodeFlag.KV]
            for j in fast[-2:]:
                _, h, k, v = values(1000 * i + j, 1)
                self.nodes[1][j] = [ALL, self.nodes[1][j][1], h[0], k[0], v[0]]
                if t:
                    t.upgrade_nodes(1, j, hidden=h, k=k, v=v)
        if i % 3 == 0:
            self.documents.append([len(self.tokens) - 5, len(self.tokens)])
            if t:
                t.add_document(
                    kind="user", title=str(i), source=None, start=t.length - 5, stop=t.length, ingest="contextual"
                )
        else:
            self.documents[-1][1] = len(self.tokens)
            if t:
                t.extend_document(len(self.documents), t.length)
        self.state = i
        if t:
            t.set_state("step", str(i).encode())

    @classmethod
    def after(cls, steps):
        model = cls()
        for i in range(steps):
            model.step(i)
        return model

    def check(self, tree):
        tree.verify()
        assert tree.tokens().tolist() == self.tokens
        assert [[d.start, d.stop] for d in tree.documents()] == self.documents
        for level, nodes in self.nodes.items():
            assert tree.count(level) == len(nodes)
            assert tree.flags(level).tolist() == [node[0] for node in nodes]
            if nodes:
                k, v = tree.kv(level, np.arange(len(nodes)))
                assert torch.equal(tree.summaries(level), torch.stack([node[1] for node in nodes]))
                assert torch.equal(k, torch.stack([node[3] for node in nodes]))
                assert torch.equal(v, torch.stack([node[4] for node in nodes]))
            for j, node in enumerate(nodes):
                if node[2] is not None:
                    assert torch.equal(tree.hidden(level, j, j + 1)[0], node[2])


def write(path, steps, acknowledge, sync):
    """Write the steps; the last act of each is to say so."""
    with Tree.open(path, SPEC, sync=sync) as tree:
        model = Model()
        for i in range(steps):
            with tree.begin() as t:
                model.step(i, t)
            os.write(acknowledge, b".")


def die_at(n, late):
    """Kill this process at the n-th call that changes the tree: before it, or (`late`) in mid-write or just after."""
    calls = 0

    def wrap(site, original):
        def call(*args):
            nonlocal calls
            calls += 1
            if calls == n:
                if late and site == "pwrite":
                    original(args[0], args[1][: len(args[1]) // 2], args[2])
                elif late:
                    original(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)

        return call

    for site in SITES:
        # The kernel outlives a killed process: syncing the files would only make the test slow.
        original = (lambda _: None) if site.startswith("sync") else getattr(storage, site)
        setattr(storage, site, wrap(site, original))


def run_child(path, prepare, steps, sync, kill_after=None):
    """Fork a writer; returns (killed, number of acknowledged steps)."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            prepare()
            write(path, steps, write_end, sync)
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    os.close(write_end)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    acknowledged = 0
    while data := os.read(read_end, 4096):
        acknowledged += len(data)
    os.close(read_end)
    assert status in (0, -signal.SIGKILL), status
    return status != 0, acknowledged


def drive(root):
    """Kill writers in all ways; print one JSON line (name, acknowledged) per dead one."""
    torch.set_num_threads(1)
    for late in (False, True):
        n = 1
        while True:
            name = f"call{n}{'late' if late else ''}"
            killed, acknowledged = run_child(root / name, lambda n=n, late=late: die_at(n, late), STEPS, not late)
            if not killed:
                break
            print(json.dumps([name, acknowledged]), flush=True)
            n += 1
    chance = random.Random(1)
    for i in range(10):
        name = f"random{i}"
        wait = chance.uniform(0.01, 0.2)
        killed, acknowledged = run_child(root / name, lambda: None, 10_000, i % 2 == 0, wait)
        assert killed
        print(json.dumps([name, acknowledged]), flush=True)


def test_kill_9(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(mc_runtime.__file__).parents[1])}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    # Every step writes, syncs and commits; fewer kills than this would mean that the injection missed them.
    assert len(runs) > 2 * STEPS * 10 + 10
    seen, unacknowledged = set(), 0
    for name, acknowledged in runs:
        path = tmp_path / name
        steps = 0
        if acknowledged:
            # A reader that comes before the next writer's repairs.
            with Tree.open(path, SPEC, mode="r") as tree:
                steps = int(tree.state("step")) + 1
                Model.after(steps).check(tree)
        with Tree.open(path, SPEC, sync=False) as tree:
            state = tree.state("step")
            steps = int(state) + 1 if state else 0
            # The one step more was committed, but its writer died before it could say so.
            assert steps in (acknowledged, acknowledged + 1), name
            model = Model.after(steps)
            model.check(tree)
            with tree.begin() as t:
                model.step(steps, t)
            model.check(tree)
        with Tree.open(path, SPEC, mode="r") as tree:
            model.check(tree)
        unacknowledged += steps - acknowledged
        if name.startswith("call"):
            seen.add(steps)
        else:
            assert acknowledged or name.startswith("random"), name
    assert seen == set(range(STEPS + 1))
    assert unacknowledged


if __name__ == "__main__":
    drive(Path(sys.argv[1]))
