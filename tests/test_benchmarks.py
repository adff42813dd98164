"""The benchmark suite's own arithmetic, without timing anything."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks is not an installed package

from benchmarks import memory, report, shapes, suite  # noqa: E402
from benchmarks.backends import TOLERANCE, TORCH_TOLERANCE, Problem, band_mask  # noqa: E402
from benchmarks.shapes import Case  # noqa: E402

SMALL = [
    Case("forward", 2, 4, 32, 16),
    Case("forward", 2, 4, 32, 16, "bfloat16", causal=True),
    Case("forward", 2, 4, 32, 16, causal=True, window=(7, 0)),
    Case("forward", 2, 4, 32, 16, window=(3, 4)),
    Case("forward", 2, 4, 32, 16, mask=True),
    Case("forward", 2, 4, 32, 16, bias=(1, 4)),
    Case("forward", 2, 4, 32, 16, padded=True),
    Case("forward", 2, 4, 32, 16, dim_v=24),
    Case("forward", 2, 4, 32, 16, heads_kv=2, causal=True),
    Case("backward", 2, 4, 32, 16, backward=True),
    Case("backward", 2, 4, 32, 16, "float16", causal=True, backward=True),
]


def test_names_are_unique():
    names = [(case.group, case.name) for case in shapes.all_cases()]
    assert len(names) == len(set(names))
    assert {case.group for case in shapes.quick_cases()} == {group for group, _ in names}


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_every_formulation_computes_the_same(case):
    problem = Problem(case)
    problem.verify(problem.ours(), TOLERANCE)
    for formulation in problem.theirs():
        problem.verify(formulation, TORCH_TOLERANCE)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_visible_pairs_are_counted(case):
    keep = band_mask(case).expand(case.batch, case.seq, case.seq)
    lengths = torch.tensor(case.kv_lengths() or [case.seq] * case.batch)
    keep = keep & (torch.arange(case.seq) < lengths[:, None, None])
    assert case.visible_pairs() == int(keep.sum())


def test_a_wrong_result_is_refused():
    problem = Problem(SMALL[0])
    wrong = problem.ours()
    correct = wrong.forward
    wrong.forward = lambda q, k, v: correct(q, k, v) * 1.001
    with pytest.raises(ValueError, match="out of 'ours' is off"):
        problem.verify(wrong, TOLERANCE)


def _results(ratio: float, read_s: float = 0.0) -> dict:
    row = {"class": "forward", "name": "a case", "limit": "float32", "read_s": read_s, "goal_ratio": 1.5, "goal_share": 0.8,
           "ours_s": 1e-3, "torch_s": 1e-3 * ratio, "ratio": ratio, "plain_ratio": ratio,
           "ours_gflops": 90.0, "torch_gflops": 90.0 / ratio, "torch_formulation": "bhsd"}  # fmt: skip
    environment = dict.fromkeys(("cpu", "cpu_family", "isa", "threads", "torch", "date"), "x")
    limits = {"gemm_gflops": {"float32": 100.0, "bfloat16": 200.0}, "read_gbytes": 30.0}
    results = {"environment": environment, "limits": limits, "rows": [row]}
    return suite.finish({**results, **{name: [] for name in suite.EXTRA_CLASSES}})


def test_goals_are_judged():
    assert report.meets_goals(_results(2.0)["rows"][0])
    assert not report.meets_goals(_results(1.4)["rows"][0])
    assert "90 %" in report.case_table(_results(2.0))
    assert "1 of 1" in report.class_table(_results(2.0))


def test_the_limit_is_the_longer_of_products_and_reading():
    assert _results(2.0)["rows"][0]["share"] == pytest.approx(0.9)
    assert _results(2.0, read_s=0.5e-3)["rows"][0]["share"] == pytest.approx(0.9)
    row = _results(2.0, read_s=0.95e-3)["rows"][0]
    assert row["share"] == pytest.approx(0.95)
    assert row["torch_share"] == pytest.approx(0.475)


def test_two_runs_are_compared():
    assert "+50 %" in report.compare_table(_results(2.0), _results(3.0))


def test_the_readme_is_rewritten_between_its_marks(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.README_BEGIN}\nold\n{report.README_END}\nafter\n")
    report.update_readme(_results(2.0), readme)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "**2.00**" in text
    with pytest.raises(ValueError, match="marks"):
        report.update_readme(_results(2.0), ROOT / "LICENSE")


def test_the_projects_readme_has_the_marks():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count(report.README_BEGIN) == 1
    assert text.count(report.README_END) == 1


@pytest.mark.skipif(not memory.can_measure(), reason="the system does not tell a process its memory")
def test_peak_growth_sees_a_temporary():
    growth, _ = memory.peak_growth(lambda: torch.ones(8 << 20).sum())  # 32 MiB, freed before the end
    assert 28 << 20 <= growth <= 64 << 20
