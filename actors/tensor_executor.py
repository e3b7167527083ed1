"""How one process of a tensor-parallel engine finds the others; see actors/tensor_parallel.py. Named to vLLM by its path."""

from __future__ import annotations

import os

from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher


class TcpExecutor(ExecutorWithExternalLauncher):
    """vLLM's executor for processes that were started by others, which meet at an address of their own.

    On CPUs vLLM names the memory that they share by the port of that address. With the original's `env://` there is none: two
    engines of a node would take the same memory.
    """

    def _distributed_args(self) -> tuple[str, int, int]:
        """Address, rank, and number of the device: Ray shows each process no GPU but its own."""
        return f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", int(os.environ["RANK"]), 0
