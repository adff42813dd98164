"""`F.multi_head_attention_forward` that does not offer itself to function modes.

A mode is off while it handles a function, so what that function calls passes the mode by.
Offered only its inner calls, `use_flash_attention` sees the attention inside. This is
torch's own code over a copy of its globals; torch itself stays as it is.
"""

import types

from torch.nn import functional as F

globals().update({name: value for name, value in vars(F).items() if not name.startswith("__")})


def has_torch_function(_tensors) -> bool:
    return False


_original = F.multi_head_attention_forward
multi_head_attention_forward = types.FunctionType(
    _original.__code__, globals(), _original.__name__, _original.__defaults__
)
multi_head_attention_forward.__kwdefaults__ = _original.__kwdefaults__
