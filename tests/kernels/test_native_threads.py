"""Whose threads run native code: torch's OpenMP runtime, a host's runner through the C ABI, the library's own."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from splice_model import same_bits
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mc_kernels import context_attention, extension, native
from mc_kernels.context_attention.cases import Case
from mc_kernels.decoder_layers import CacheSlots, DecoderLayers, LayerWeights

pytestmark = pytest.mark.skipif(native.available() is not None, reason=f"no native library: {native.available()}")
OF_TORCH = native.available() is None and native.threads().startswith("torch's OpenMP")
of_torch = pytest.mark.skipif(not OF_TORCH, reason="torch runs on no OpenMP runtime that was found")
ROOT = Path(__file__).resolve().parents[2]
TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
RUNNER = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, TASK, ctypes.c_void_p)
# Large enough for several threads.
CASE = Case("threads", 6, 3, 64, 9000, 2, theta=1e5)


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)
    native.use_torch_threads()


def run(args: dict[str, Any]) -> Tensor:
    out = context_attention(**args, backend="cpu")
    assert isinstance(out, Tensor)
    return out


@pytest.mark.skipif(torch.__config__.parallel_info().find("backend: OpenMP") < 0, reason="torch without OpenMP")
@pytest.mark.skipif(sys.platform != "linux", reason="where the runtime is found depends on the loader")
def test_torch_threads_are_the_default() -> None:
    """Otherwise the tests below would skip and nobody would notice."""
    assert OF_TORCH, native.threads()
    assert "omp" in native.threads()


def test_the_result_is_the_same_on_any_threads() -> None:
    args = CASE.make(torch.bfloat16)
    on_torch = run(args)
    native.use_torch_threads(False)
    assert native.threads() == "the library's own"
    assert same_bits(run(args), on_torch)
    native.use_torch_threads()
    assert same_bits(run(args), on_torch)


COUNT = f"""
import os, torch
from mc_kernels import context_attention, extension, native
from mc_kernels.context_attention.cases import Case
torch.set_num_threads(3)
args = {CASE!r}.make(torch.bfloat16)
x = torch.ones(1 << 22)
def count():
    x.add(x)
    context_attention(**args, backend="cpu")
    return len(os.listdir("/proc/self/task"))
x.add(x)
before = len(os.listdir("/proc/self/task"))
print(count() - before)
native.use_torch_threads(False)
print(count() - before)
"""


@of_torch
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no list of threads")
def test_no_thread_is_added_to_those_of_torch() -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", COUNT], env=env, text=True, capture_output=True, timeout=600)
    assert done.stdout.split() == ["0", "2"], done.stderr


def test_why_torch_threads_do_not_serve() -> None:
    with pytest.raises(RuntimeError, match=r"/nowhere/libtorch_cpu\.so is not loaded"):
        native.library().use_openmp_of("/nowhere/libtorch_cpu.so")
    with pytest.raises(RuntimeError, match="depends on no OpenMP runtime"):
        native.library().use_openmp_of(str(extension.FOLDER / "libmc_kernels.so"))


def test_without_an_openmp_runtime_the_own_threads_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    args = CASE.make(torch.bfloat16)
    want = run(args)

    class Missing:
        def use_openmp_of(self, user: str) -> None:
            native.library().use_own_threads()
            raise RuntimeError(f"{user} is not loaded")

    native._use_threads(Missing(), of_torch=True)
    assert native.threads().startswith("the library's own: ")
    assert native.threads().endswith("is not loaded")
    assert same_bits(run(args), want)


@of_torch
def test_inside_a_parallel_region() -> None:
    """Nested regions have one thread: each call of a team does its work alone, and all of it."""
    runtime = ctypes.CDLL(native.threads().partition("(")[2].rstrip(")"))
    args = CASE.make(torch.bfloat16)
    want, got = run(args), list[Tensor]()
    body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: got.append(run(args)))
    runtime.GOMP_parallel(body, None, ctypes.c_uint(2), ctypes.c_uint(0))
    assert len(got) == 2
    assert all(same_bits(x, want) for x in got)


@of_torch
def test_several_threads_between_torch_operations() -> None:
    calls = [Case("x", 6, 3, 64, 6000 + i, 1, theta=1e5).make(torch.bfloat16, seed=i) for i in range(6)]
    wants = [run(args) for args in calls]
    weight = torch.randn(512, 512).bfloat16()

    def work(i: int) -> tuple[Tensor, Tensor]:
        torch.set_num_threads(1 + i % 3)  # of this thread alone
        product = weight @ weight
        return run(calls[i % 6]), product

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, range(48)))
    for i, (got, _) in enumerate(results):
        assert same_bits(got, wants[i % 6])


class Rows(Dataset[Tensor]):
    """Each item is a call in a worker, which is forked from a process that has used its threads."""

    def __init__(self, calls: list[dict[str, Any]]) -> None:
        self.calls = calls

    def __len__(self) -> int:
        return len(self.calls)

    def __getitem__(self, i: int) -> Tensor:
        torch.set_num_threads(2)  # workers begin with one; torch's own operations on large tensors would hang now
        return run(self.calls[i])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_workers_of_a_data_loader() -> None:
    rows = Rows([CASE.make(torch.bfloat16, seed=i) for i in range(3)])
    wants = [run(args) for args in rows.calls]
    loader = DataLoader(rows, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=300)
    for got, want in zip(loader, wants, strict=True):
        assert same_bits(got, want)


Runner = Callable[[int, int, Callable[[int], None]], None]


def use_runner(runner: Runner) -> Any:
    """Sets `runner(n_tasks, n_threads, task)` through the C ABI; what is returned has to live on."""

    def entry(host: int | None, n_tasks: int, n_threads: int, task: Any, context: int | None) -> None:
        assert host == 7
        runner(n_tasks, n_threads, lambda i: task(context, i))

    function = RUNNER(entry)
    library = ctypes.CDLL(str(extension.FOLDER / f"libmc_kernels.{'dylib' if sys.platform == 'darwin' else 'so'}"))
    assert library.mc_set_parallel_runner(function, ctypes.c_void_p(7)) == 0
    return function


def backwards(n_tasks: int, n_threads: int, task: Callable[[int], None]) -> None:
    for i in reversed(range(n_tasks)):
        task(i)


def spread(n_tasks: int, n_threads: int, task: Callable[[int], None]) -> None:
    def work(first: int) -> None:
        for i in range(first, n_tasks, n_threads):
            task(i)

    team = [threading.Thread(target=work, args=(i,)) for i in range(n_threads)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()


@pytest.mark.parametrize("runner", [backwards, spread])
def test_a_runner_of_the_host(runner: Runner) -> None:
    args = CASE.make(torch.bfloat16)
    want, seen = run(args), list[tuple[int, int]]()

    def counting(n_tasks: int, n_threads: int, task: Callable[[int], None]) -> None:
        seen.append((n_tasks, n_threads))
        runner(n_tasks, n_threads, task)

    kept = use_runner(counting)
    assert same_bits(run(args), want)
    assert seen
    assert all(2 <= n_threads <= min(3, n_tasks) for n_tasks, n_threads in seen)
    torch.set_num_threads(1)
    seen.clear()
    assert same_bits(run(args), want)
    assert not seen  # one thread is the caller's
    native.use_torch_threads(False)
    torch.set_num_threads(3)
    assert same_bits(run(args), want)
    assert not seen
    del kept


def decoder_step(seed: int = 0) -> Callable[[], list[Tensor]]:
    """A step of three layers, each five jobs that are large enough for several threads: its result and the cache."""
    generator = torch.Generator().manual_seed(seed)
    embed, heads, used = 256, 4, 3000

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).bfloat16()

    def layer() -> LayerWeights:
        norms = normal(embed), normal(embed)
        qkv, out, gate_up, down = (normal(n * embed, m * embed) for n, m in ((3, 1), (1, 1), (4, 1), (1, 2)))
        return LayerWeights(norms[0], qkv, None, None, None, out, None, norms[1], gate_up, down)

    call = DecoderLayers([layer() for _ in range(3)], eps=1e-5, rope=None)
    k, v = (normal(3, 1, heads, used, embed // heads) for _ in range(2))
    x, at = normal(1, 1, embed), torch.tensor([[used - 1]])

    def run() -> list[Tensor]:
        cache = CacheSlots(k.clone(), v.clone(), at, torch.arange(used)[None])
        return [call(x, at, cache), cache.k, cache.v]

    return run


def same_step(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(same_bits(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("runner", [backwards, spread])
def test_a_step_gathers_the_threads_of_a_runner_once(runner: Runner) -> None:
    """The caller leads, or who has come where he has no task; those that come when all is over find nothing to do."""
    step, seen = decoder_step(), list[tuple[int, int]]()
    torch.set_num_threads(1)
    want = step()
    torch.set_num_threads(3)

    def counting(n_tasks: int, n_threads: int, task: Callable[[int], None]) -> None:
        seen.append((n_tasks, n_threads))
        runner(n_tasks, n_threads, task)

    kept = use_runner(counting)
    for n in range(20):
        assert same_step(step(), want)
        assert seen == [(3, 3)] * (n + 1)
    del kept


@pytest.mark.parametrize("of_torch", [pytest.param(True, marks=of_torch), False])
def test_steps_in_several_threads(of_torch: bool) -> None:
    """Each has a team of its own, or is alone where the threads are taken."""
    steps = [decoder_step(i) for i in range(3)]
    wants = [step() for step in steps]
    native.use_torch_threads(of_torch)

    def work(i: int) -> bool:
        torch.set_num_threads(1 + i % 4)  # of this thread alone
        return all(same_step(steps[j % 3](), wants[j % 3]) for j in range(i, i + 6))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(16)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_leaves_the_runner_alone() -> None:
    """The host's threads are not there any more."""
    args = CASE.make(torch.bfloat16)
    want = run(args)
    kept = use_runner(lambda n_tasks, n_threads, task: os._exit(9))
    child = os.fork()
    if child == 0:
        got = run(args)
        os._exit(0 if (got.view(torch.int16).numpy() == want.view(torch.int16).numpy()).all() else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    del kept
