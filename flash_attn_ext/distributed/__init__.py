"""Attention over sequences or heads that are spread over the processes of a `torch.distributed` group.

| function | a process holds | what travels |
|---|---|---|
| `ring_attention` | a part of the sequence | keys and values, from each process to the next |
| `ulysses_attention` | a part of the sequence | everything, once before and once after |
| `head_parallel_attention` | everything | the outputs |

`shard_sequence` and `gather_sequence` go from whole tensors to parts and back. Backends: gloo for tensors on
the CPU, NCCL for those on CUDA.
"""

from .head_parallel import head_parallel_attention
from .ring import ring_attention
from .sequence import gather_sequence, shard_sequence
from .ulysses import ulysses_attention

__all__ = [
    "gather_sequence",
    "head_parallel_attention",
    "ring_attention",
    "shard_sequence",
    "ulysses_attention",
]
