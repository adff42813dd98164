"""Processes that form a gloo group and wait for jobs, so that torch is loaded once and not for every test."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

needs_gloo = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch has no gloo",
)
GROUP_TIMEOUT = timedelta(seconds=60)  # a collective that waits longer raises in the ranks that wait
JOB_TIMEOUT = 90.0  # and if even that does not happen, the test fails


class Raised(Exception):
    """What a rank raised, by name and text."""

    def __init__(self, kind: str, text: str, trace: str) -> None:
        super().__init__(f"{kind}: {text}\n{trace}")
        self.kind, self.text = kind, text


class RankPool:
    """`size` processes. A job is a function of a module that they can import; its results must be picklable."""

    def __init__(self, size: int) -> None:
        # A server that has imported torch once forks the processes.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "flash_attn_ext"])
        self.size = size
        self.folder = tempfile.TemporaryDirectory()
        store = os.path.join(self.folder.name, "store")
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, size, store), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def outcomes(self, job: Callable, arguments: list[tuple]) -> list:
        """job(*arguments[rank]) of each rank: its result, or a `Raised`."""
        for pipe, given in zip(self.pipes, arguments, strict=True):
            pipe.send_bytes(pickle.dumps((job, given)))
        found = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(JOB_TIMEOUT):
                self.close()
                pytest.fail(f"rank {rank} of {self.size} does not answer", pytrace=False)
            ok, result = pickle.loads(pipe.recv_bytes())
            found.append(result if ok else Raised(*result))
        return found

    def run(self, job: Callable, *arguments) -> list:
        """The results of all ranks; the same arguments go to each."""
        return self.run_each(job, [arguments] * self.size)

    def run_each(self, job: Callable, arguments: list[tuple]) -> list:
        found = self.outcomes(job, arguments)
        for rank, result in enumerate(found):
            if isinstance(result, Raised):
                raise AssertionError(f"rank {rank} raised {result}")
        return found

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.join(10)
        self.folder.cleanup()


def _serve(pipe, rank: int, size: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=GROUP_TIMEOUT
    )
    while True:
        try:
            job, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:  # the tests are over
            return
        try:
            answer = (True, job(*arguments))
        except Exception as error:
            answer = (False, (type(error).__name__, str(error), traceback.format_exc()))
        pipe.send_bytes(pickle.dumps(answer))
