"""The processes that take part in a call: who they are, what they agree on, and what they send each other."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """A process group as one of its processes sees it; peers are named by their rank in the group."""

    group: dist.ProcessGroup
    rank: int
    size: int

    @classmethod
    def of(cls, group: object) -> Ranks:
        """None is the default group.

        Raises:
            RuntimeError: torch.distributed is not there, or not initialised.
            TypeError, ValueError: `group` is no process group, or one without this process.
        """
        if not dist.is_available():
            raise RuntimeError("this build of torch has no torch.distributed")
        if not dist.is_initialized():
            raise RuntimeError(
                "torch.distributed is not initialised: call torch.distributed.init_process_group first"
            )
        # What torch.distributed.new_group gives to processes that are not in the group.
        if group is not None and group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group must hold this process, got one without it")
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"group must be a ProcessGroup or None, got {type(group).__name__}")
        return cls(
            dist.group.WORLD if group is None else group, dist.get_rank(group), dist.get_world_size(group)
        )

    def _device_to_compare(self, device: torch.device, always: bool) -> torch.device | None:
        """Where numbers can be compared: on the CPU if the group serves it, for a device would have to be
        waited for; None: nowhere without that."""
        if "cpu:" in dist.get_backend_config(self.group):
            return torch.device("cpu")
        return device if always else None

    def agree(
        self, facts: dict[str, object], lengths: tuple[int, ...], device: torch.device, check: bool | None
    ) -> list[tuple[int, ...]]:
        """`lengths` of every rank, after it was made sure, by one small collective, that all have the same
        `facts`. Without a check, everybody is taken to be like this rank.

        Raises:
            ValueError: on every rank, when one is told something else.
        """
        where = None if check is False else self._device_to_compare(device, check is True)
        if where is None:
            return [lengths] * self.size
        own = torch.tensor([*map(_number, facts.values()), *lengths], device=where)
        table = own.new_empty(self.size, len(own))
        dist.all_gather_into_tensor(table.view(-1), own, group=self.group)
        rows = table.tolist()
        for place, (name, value) in enumerate(facts.items()):
            mine = rows[self.rank][place]
            others = [rank for rank, row in enumerate(rows) if row[place] != mine]
            if others:
                raise ValueError(
                    f"{name} must be the same on all ranks of the group, got {value} on rank {self.rank} and "
                    f"another on rank {others[0]}"
                )
        return [tuple(row[len(facts) :]) for row in rows]

    def start_shift(self, sent: list[Tensor], received: list[Tensor], by: int) -> list[dist.Work]:
        """Begins to send to the rank `by` places on, and to receive from the one as far behind."""
        to, source = (self.rank + by) % self.size, (self.rank - by) % self.size
        return dist.batch_isend_irecv(
            [
                *(dist.P2POp(dist.isend, t, group=self.group, group_peer=to) for t in sent),
                *(dist.P2POp(dist.irecv, t, group=self.group, group_peer=source) for t in received),
            ]
        )

    def circulate(self, tensors: list[Tensor], axis: int, lengths: list[int], steps: int) -> Iterator:
        """(source, tensors) of this rank and then of those behind it, `steps` of them. The next ones are on
        their way while the caller works, and what it was given before is written over.

        tensors: contiguous, lengths[rank] long on `axis`.
        """
        current, spare = tensors, None
        for step in range(steps + 1):
            source = (self.rank - step) % self.size
            if step == steps:
                yield source, current
                return
            length = lengths[(source - 1) % self.size]
            if spare is None or spare[0].shape[axis] != length:
                spare = [like(t, axis, length) for t in tensors]
            works = self.start_shift(current, spare, 1)
            yield source, current
            wait(works)
            current, spare = spare, current if step > 0 else None

    def exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Rows for each rank, one rank's behind the other's, for those that each has for this one."""
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=self.group)
        return out

    def gather(self, t: Tensor) -> Tensor:
        """(size, ...) of tensors of one shape."""
        out = t.new_empty(self.size, *t.shape)
        dist.all_gather_into_tensor(out.view(-1), t.contiguous().view(-1), group=self.group)
        return out

    def sum(self, t: Tensor) -> Tensor:
        """In place."""
        dist.all_reduce(t, group=self.group)
        return t


def wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


def check_first_order(name: str) -> None:
    """For the start of a backward pass. Without this a gradient would be taken to be constant."""
    if torch.is_grad_enabled():
        raise NotImplementedError(
            f"{name} has no gradients of gradients (create_graph=True); ulysses_attention has them"
        )


def like(t: Tensor, axis: int, length: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised contiguous tensor of t's shape, but for one axis."""
    shape = list(t.shape)
    shape[axis] = length
    return t.new_empty(shape, dtype=dtype)


def _number(value: object) -> int:
    """An int64 that two different values hardly share."""
    if isinstance(value, float):
        return struct.unpack("<q", struct.pack("<d", value))[0]
    if isinstance(value, int) and abs(value) < 1 << 62:
        return int(value)
    return zlib.crc32(repr(value).encode())
