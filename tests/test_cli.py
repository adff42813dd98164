"""The command line and the environment variables, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from flash_attn_ext import _C


def python(*arguments, code: str | None = None, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, *(("-c", code) if code else arguments)]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("FLASH_ATTN_EXT_")}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**inherited, **environment}
    )


CALL = """
import torch, flash_attn_ext as fae
q = torch.randn(1, 16, 2, 8)
out = fae.flash_attention(q, q, q)
plan = fae.explain(q, q, q)
print(plan.backend, plan.isa)
"""


def test_doctor():
    done = python("-m", "flash_attn_ext")
    assert done.returncode == 0, done.stdout + done.stderr
    text = done.stdout.lower()
    for isa in _C.cpu_isas():
        assert isa in text
    for word in ("torch", "portable", "standard", "cpu"):
        assert word in text
    assert "traceback" not in done.stderr.lower()


def test_doctor_reports_a_broken_setting():
    done = python("-m", "flash_attn_ext", FLASH_ATTN_EXT_CPU_ISA="sse9")
    assert done.returncode != 0
    assert "sse9" in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_help_and_unknown_arguments():
    assert python("-m", "flash_attn_ext", "--help").returncode == 0
    done = python("-m", "flash_attn_ext", "operate")
    assert done.returncode == 2 and "operate" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["portable", "cpu", "standard"])
def test_backend_variable(name):
    done = python(code=CALL, FLASH_ATTN_EXT_BACKEND=name)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == name


@pytest.mark.parametrize("isa", _C.cpu_isas())
def test_isa_variable(isa):
    done = python(code=CALL, FLASH_ATTN_EXT_CPU_ISA=isa)
    assert done.stdout.split() == ["cpu", isa], done.stderr


@pytest.mark.parametrize(
    ("variable", "value"),
    [("FLASH_ATTN_EXT_BACKEND", "tpu"), ("FLASH_ATTN_EXT_CPU_ISA", "sse9"), ("FLASH_ATTN_EXT_LOG", "loud")],
)
def test_wrong_values_are_named(variable, value):
    done = python(code=CALL, **{variable: value})
    text = done.stdout + done.stderr
    assert variable in text and value in text


def test_log_variable():
    quiet, loud = python(code=CALL), python(code=CALL, FLASH_ATTN_EXT_LOG="DEBUG")
    assert quiet.returncode == loud.returncode == 0
    assert quiet.stderr == "" and "cpu" in loud.stderr
    assert quiet.stdout == loud.stdout


def test_each_reason_is_logged_once():
    """However often it comes up; and a second reason gets a line of its own."""
    code = """
import torch, torch.nn.functional as F, flash_attn_ext as fae
q = torch.randn(1, 2, 16, 8)
nested = torch.nested.nested_tensor([q[0], q[0]])
class Mine(torch.Tensor):
    pass
for _ in range(3):
    fae.flash_attention(q, q, q)
    fae.flash_attention(q, q, q, backend="auto", config=fae.AttentionConfig())
    with fae.use_flash_attention():
        F.scaled_dot_product_attention(q, q, q)
        F.scaled_dot_product_attention(nested, nested, nested)
with fae.use_flash_attention():
    F.scaled_dot_product_attention(q, q, q.as_subclass(Mine))
"""
    done = python(code=code, FLASH_ATTN_EXT_LOG="debug")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("flash_attn_ext ")]
    auto = [line for line in lines if line.startswith("flash_attn_ext DEBUG: auto: cpu ")]
    fallback = [
        line for line in lines if line.startswith("flash_attn_ext WARNING: ") and "goes to torch" in line
    ]
    assert len(auto) == 1, done.stderr
    assert len([line for line in fallback if "layout nested" in line]) == 1, done.stderr
    assert len([line for line in fallback if "type Mine" in line]) == 1, done.stderr
    assert len(lines) == 3, done.stderr


def test_import_is_quiet_and_leaves_torch_alone():
    code = (
        "import sys, torch, torch.nn.functional as F, warnings; warnings.simplefilter('error')\n"
        "before = (F.scaled_dot_product_attention, torch.get_num_threads(), torch.get_default_dtype(), torch.random.get_rng_state())\n"
        "before_modules = set(sys.modules)\n"
        "import flash_attn_ext\n"
        "slow = {'torch._dynamo', 'torch._inductor', 'sympy'} & (set(sys.modules) - before_modules)\n"
        "assert not slow, f'imports {slow}: seconds for who does not compile'\n"
        "after = (F.scaled_dot_product_attention, torch.get_num_threads(), torch.get_default_dtype(), torch.random.get_rng_state())\n"
        "assert before[:3] == after[:3] and torch.equal(before[3], after[3])\n"
    )
    done = python(code=code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == ""


def test_running_out_of_memory_raises():
    """An output that cannot be had is an exception, and the process lives on."""
    code = """
import torch, flash_attn_ext as fae
q = torch.zeros(1, 1, 1, 8).expand(1 << 20, 1 << 20, 1 << 10, 8)
k = torch.zeros(1, 1, 1, 8).expand(1 << 20, 1, 1 << 10, 8)
for backend in ("cpu",):
    try:
        fae.flash_attention(q, k, k, backend=backend)
    except (RuntimeError, MemoryError) as error:
        print(type(error).__name__)
x = torch.randn(1, 4, 2, 8)
print(tuple(fae.flash_attention(x, x, x).shape))
"""
    done = python(code=code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "(1, 4, 2, 8)" and len(done.stdout.splitlines()) == 2
