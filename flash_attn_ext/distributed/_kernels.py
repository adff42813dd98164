"""The operators below autograd, for a part of the queries and a part of the keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import dispatch, ops
from .._errors import translate
from .._options import Options
from .._problem import LAYOUTS
from .._run import own_arguments
from ..config import AttentionConfig

# With a log-sum-exp beyond this the kernels take what their weights add up to from the keys that they are
# given, which would have to be all of a row: see csrc/cpu/kernel/log_sum.h.
_FAR = {torch.float16: 2048.0, torch.bfloat16: 2048.0, torch.float32: 2.0**28, torch.float64: 64.0}


class Kernels(NamedTuple):
    """Tensors are (batch, heads, seq, dim) views, LSEs (batch, heads, seq) of `kernel_lse_dtype`."""

    backend: str
    own: tuple  # what the backend wants to be told beyond the options
    operators: ops.Operators

    @classmethod
    def of(cls, q: Tensor, v: Tensor, backend: str, deterministic: bool | None, extended: bool) -> Kernels:
        name = dispatch.resolve(backend, "auto", dispatch.Request.of(q, v, False))
        if name == "standard":
            raise NotImplementedError("backend 'standard' has no operators for a part of the keys")
        own = own_arguments(name, AttentionConfig(), False, deterministic, q.dtype)
        return cls(name, own, (ops.EXTENDED_BY_BACKEND if extended else ops.BY_BACKEND)[name])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
        try:
            return self.operators.forward(q, k, v, *self._taken(options), True, *self.own)
        except RuntimeError as error:
            raise translate(error) from None

    def for_backward(self, dout: Tensor, lse: Tensor) -> tuple[Kernels, Tensor]:
        """Those that can serve rows of this log-sum-exp, and dout. On a device, which is not waited for, rows
        that its kernels cannot serve get gradients that are NaN rather than wrong."""
        if self.backend == "portable":
            return self, dout
        far = (lse.abs() > _FAR[dout.dtype]) & lse.isfinite()
        if lse.device.type != "cpu":
            return self, dout.masked_fill(far[..., None], torch.nan)
        if not far.any():
            return self, dout
        by_backend = ops.EXTENDED_BY_BACKEND if self.is_extended else ops.BY_BACKEND
        return Kernels("portable", (0, 0), by_backend["portable"]), dout

    def backward(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        options: Options,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) as far as they come from these keys; out, lse and their gradients are of all keys."""
        options = options._replace(layout=LAYOUTS["bhsd"])
        try:
            return self.operators.backward_of_part((dout, dlse, q, k, v, out, lse), options, self.own)
        except RuntimeError as error:
            raise translate(error) from None

    @property
    def is_extended(self) -> bool:
        return self.operators.family is ops.EXTENDED_FAMILY

    def _taken(self, options: Options) -> tuple:
        options = options._replace(layout=LAYOUTS["bhsd"])
        return tuple(options) if self.is_extended else options.plain()
