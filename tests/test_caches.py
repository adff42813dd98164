"""`KVCache` and `PagedKVCache` under any sequence of operations, against lists of keys and values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import flash_attn_ext as fae

HEADS, DIM, DIM_V, CAPACITY = 2, 4, 3, 12
FEW = settings(max_examples=40, stateful_step_count=25, deadline=None, derandomize=True,
               suppress_health_check=list(HealthCheck))  # fmt: skip


def fresh(batch: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """New keys and values, each unlike any other."""
    return torch.randn(batch, count, HEADS, DIM), torch.randn(batch, count, HEADS, DIM_V)


def plain_attention(q: torch.Tensor, keys: list, values: list) -> torch.Tensor:
    """Causal attention of one sequence, q (seq, heads, dim), in fp64."""
    if not keys:
        return torch.zeros(*q.shape[:-1], DIM_V, dtype=torch.float64)
    k, v = (torch.stack(t)[None].double() for t in (keys, values))
    return fae.flash_attention(q[None].double(), k, v, causal=True, backend="standard")[0]


class ContiguousMachine(RuleBasedStateMachine):
    @initialize(batch=st.integers(1, 3))
    def start(self, batch):
        torch.manual_seed(0)
        self.cache = fae.KVCache(batch, CAPACITY, HEADS, DIM, DIM_V)
        self.model = [[] for _ in range(batch)]  # of (key, value)

    @rule(count=st.integers(0, 5), attends=st.booleans())
    def append(self, count, attends):
        k, v = fresh(len(self.model), count)
        if max(map(len, self.model)) + count > CAPACITY:
            with pytest.raises(ValueError, match="cache_lengths"):
                self.cache.append(k, v)
            return
        for b, own in enumerate(self.model):
            own += zip(k[b], v[b], strict=True)
        if not attends:
            self.cache.append(k, v)
            return
        q = torch.randn(len(self.model), 2, 2 * HEADS, DIM)
        out = self.cache.attend(q, k, v)
        for b, own in enumerate(self.model):
            want = plain_attention(q[b], [k for k, _ in own], [v for _, v in own])
            torch.testing.assert_close(out[b].double(), want, rtol=1e-4, atol=1e-5)

    @rule(data=st.data())
    def truncate(self, data):
        lengths = [data.draw(st.integers(0, len(own))) for own in self.model]
        self.cache.truncate(lengths)
        self.model = [own[:n] for own, n in zip(self.model, lengths, strict=True)]

    @rule()
    def truncate_to_more(self):
        with pytest.raises(ValueError, match="lengths are"):
            self.cache.truncate([len(own) + 1 for own in self.model])

    @rule(data=st.data())
    def reorder(self, data):
        sources = [data.draw(st.integers(0, len(self.model) - 1)) for _ in self.model]
        self.cache.reorder(sources)
        self.model = [list(self.model[s]) for s in sources]

    @rule()
    def fork(self):
        other = self.cache.fork()
        self.cache.k.fill_(float("nan"))
        self.cache = other

    @invariant()
    def same(self):
        assert self.cache.lengths.tolist() == [len(own) for own in self.model]
        for b, own in enumerate(self.model):
            for i, (k, v) in enumerate(own):
                assert torch.equal(self.cache.k[b, i], k) and torch.equal(self.cache.v[b, i], v)


class PagedMachine(RuleBasedStateMachine):
    @initialize(pages=st.integers(0, 9), page_size=st.integers(1, 4))
    def start(self, pages, page_size):
        torch.manual_seed(0)
        self.cache = fae.PagedKVCache(pages, page_size, HEADS, DIM, DIM_V)
        self.cache.k.fill_(float("nan"))
        self.model = {}

    def chosen(self, data, least=0):
        names = sorted(self.model)
        return data.draw(st.lists(st.sampled_from(names), unique=True, min_size=least))

    @rule()
    def add(self):
        name = self.cache.add()
        assert name not in self.model
        self.model[name] = []

    @precondition(lambda self: self.model)
    @rule(data=st.data(), count=st.integers(0, 5), attends=st.booleans())
    def append(self, data, count, attends):
        names = self.chosen(data, 1)
        k, v = fresh(len(names), count)
        before = self.cache.free_pages, self.cache.block_table(names).tolist()
        q = torch.randn(len(names), 2, 2 * HEADS, DIM)
        try:
            out = self.cache.attend(names, q, k, v) if attends else self.cache.append(names, k, v)
        except RuntimeError as error:
            assert "free pages" in str(error)
            assert before == (self.cache.free_pages, self.cache.block_table(names).tolist())
            return
        for b, name in enumerate(names):
            self.model[name] = [*self.model[name], *zip(k[b], v[b], strict=True)]
            if attends:
                own = self.model[name]
                want = plain_attention(q[b], [k for k, _ in own], [v for _, v in own])
                torch.testing.assert_close(out[b].double(), want, rtol=1e-4, atol=1e-5)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def a_call_that_fails_changes_nothing(self, data):
        names = self.chosen(data, 1)
        before = self.cache.free_pages, self.cache.block_table(names).tolist()
        k, v = fresh(len(names), 1)
        with pytest.raises((ValueError, RuntimeError), match="v has shape|free pages"):
            self.cache.append(names, k, v[..., :1])
        assert before == (self.cache.free_pages, self.cache.block_table(names).tolist())

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def fork(self, data):
        source = data.draw(st.sampled_from(sorted(self.model)))
        free = self.cache.free_pages
        self.model[self.cache.fork(source)] = list(self.model[source])
        assert self.cache.free_pages == free

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def free(self, data):
        name = data.draw(st.sampled_from(sorted(self.model)))
        self.cache.free(name)
        del self.model[name]
        with pytest.raises(KeyError):
            self.cache.length(name)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def truncate(self, data):
        name = data.draw(st.sampled_from(sorted(self.model)))
        length = data.draw(st.integers(0, len(self.model[name])))
        self.cache.truncate(name, length)
        self.model[name] = self.model[name][:length]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def reorder(self, data):
        names = self.chosen(data)
        sources = [data.draw(st.sampled_from(sorted(self.model))) for _ in names]
        self.cache.reorder(names, sources)
        copies = [list(self.model[s]) for s in sources]
        self.model |= dict(zip(names, copies, strict=True))

    @invariant()
    def one_table_of_all(self):
        if hasattr(self, "cache"):
            names = list(self.model)
            table = self.cache.block_table(names)
            rows = [self.cache.block_table([name])[0].tolist() for name in names]
            most = max(map(len, rows), default=0)
            assert table.shape == (len(names), most) and table.dtype == torch.int32
            assert table.tolist() == [row + [-1] * (most - len(row)) for row in rows]

    @invariant()
    def same(self):
        if not hasattr(self, "cache"):
            return
        assert set(self.cache.sequences) == set(self.model)
        size, used = self.cache.k.shape[1], set()
        for name, own in self.model.items():
            table = self.cache.block_table([name])[0].tolist()
            assert self.cache.length(name) == len(own) and len(table) == -(-len(own) // size)
            used |= set(table)
            for i, (k, v) in enumerate(own):
                page, row = table[i // size], i % size
                assert torch.equal(self.cache.k[page, row], k) and torch.equal(self.cache.v[page, row], v)
        assert self.cache.free_pages == len(self.cache.k) - len(used)


TestKVCache = ContiguousMachine.TestCase
TestKVCache.settings = FEW
TestPagedKVCache = PagedMachine.TestCase
TestPagedKVCache.settings = FEW


def test_beams_share_pages():
    cache = fae.PagedKVCache(8, 4, HEADS, DIM)
    first = cache.add()
    cache.append([first], *torch.randn(2, 1, 6, HEADS, DIM))
    beams = [first, *(cache.fork(first) for _ in range(3))]
    assert cache.free_pages == 6
    cache.append(beams, *torch.randn(2, 4, 1, HEADS, DIM))
    # The full page stays shared; of the other one three get a copy.
    assert cache.free_pages == 3 and cache.block_table(beams)[:, 0].unique().numel() == 1


@pytest.fixture
def blind():
    """A cache of 2 sequences on a device whose lengths an operator cannot see, 9 of 12 keys full."""
    cache = fae.KVCache(2, CAPACITY, HEADS, DIM, DIM_V, device="meta")
    cache.append(*(t.to("meta") for t in fresh(2, 9)))
    return cache


def test_room_is_known_where_lengths_are_not(blind):
    k, v = (t.to("meta") for t in fresh(2, 4))
    for cache in (blind, blind.fork()):
        with pytest.raises(ValueError, match="cache_lengths is 9 for a sequence and 4 to append"):
            cache.append(k, v)
        cache.append(k[:, :3], v[:, :3])
        with pytest.raises(ValueError, match="cache_lengths is 12"):
            cache.attend(torch.empty(2, 1, HEADS, DIM, device="meta"), k[:, :1], v[:, :1])


def test_lengths_that_somebody_else_writes_are_not_known(blind):
    more = [t.to("meta") for t in fresh(2, 4)]
    other = blind.fork()
    blind.lengths.zero_()
    other.lengths = torch.zeros_like(other.lengths)
    for cache in (blind, other):
        cache.append(*more)
    with torch.inference_mode():  # whose tensors count no writes
        cache = fae.KVCache(2, CAPACITY, HEADS, DIM, DIM_V, device="meta")
        for _ in range(4):
            cache.append(*more)


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: fae.KVCache(-1, 4, 2, 8), ValueError, "batch must be at least 0"),
        (lambda: fae.KVCache(1, 4.0, 2, 8), TypeError, "capacity must be an int"),
        (lambda: fae.PagedKVCache(4, 0, 2, 8), ValueError, "page_size must be at least 1"),
        (lambda: fae.KVCache(2, 4, 2, 8).reorder([0]), ValueError, "sources has shape"),
        (lambda: fae.KVCache(2, 4, 2, 8).reorder([0, 2]), IndexError, "sources are"),
        (lambda: fae.PagedKVCache(2, 4, 2, 8).truncate(0, 1), KeyError, "no sequence 0"),
        (lambda: fae.PagedKVCache(2, 4, 2, 8).fork(3), KeyError, "no sequence 3"),
    ],
)
def test_wrong_calls(call, kind, text):
    with pytest.raises(kind, match=text):
        call()


@pytest.mark.parametrize(
    ("method", "value", "kind", "text"),
    [
        ("truncate", 1.7, TypeError, "lengths must be an int, got float"),
        ("truncate", None, TypeError, "lengths must be an int, got NoneType"),
        ("truncate", True, TypeError, "lengths must be an int, got bool"),
        (
            "truncate",
            torch.tensor([1.0, 2.0]),
            TypeError,
            "lengths must hold ints, got a Tensor of torch.float32",
        ),
        ("truncate", [1, 2, 3], ValueError, r"lengths has shape \(3,\), but must be \(\) or \(2,\)"),
        ("truncate", torch.tensor([[1], [2]]), ValueError, r"lengths has shape \(2, 1\)"),
        ("truncate", 2**40, ValueError, "lengths are .1099511627776"),
        ("truncate", 2**70, ValueError, "lengths must fit int64"),
        ("reorder", [0, 1.0], TypeError, r"sources\[1\] must be an int, got float"),
        (
            "reorder",
            torch.tensor([0.9, 1.2]),
            TypeError,
            "sources must hold ints, got a Tensor of torch.float32",
        ),
        ("reorder", 1, ValueError, r"sources has shape \(\), but must be \(2,\)"),
        ("reorder", [0, 2**40], IndexError, "sources are .0, 1099511627776"),
    ],
)
def test_what_counts_is_whole(method, value, kind, text):
    cache = fae.KVCache(2, 8, HEADS, DIM)
    cache.append(*torch.randn(2, 2, 3, HEADS, DIM))
    keys = cache.k.clone()
    with pytest.raises(kind, match=text):
        getattr(cache, method)(value)
    assert cache.lengths.tolist() == [3, 3] and torch.equal(cache.k, keys)


def test_lengths_are_changed_in_place():
    """Whoever holds them sees what there is; under inference_mode nothing new may take their place."""
    cache = fae.KVCache(2, 8, HEADS, DIM)
    held = cache.lengths
    cache.append(*torch.randn(2, 2, 3, HEADS, DIM))
    with torch.inference_mode():
        cache.truncate(torch.tensor([2, 1]))
        cache.reorder([1, 0])
    assert held is cache.lengths and held.tolist() == [1, 2] and not held.is_inference()
    cache.append(*torch.randn(2, 2, 1, HEADS, DIM))
    assert held.tolist() == [2, 3]


def test_tables_that_grow_under_inference_mode():
    """And are written outside of it, too."""
    cache = fae.PagedKVCache(40, 1, HEADS, DIM)
    names = [cache.add() for _ in range(3)]
    for count in (1, 4, 5):
        with torch.inference_mode(count == 4):
            cache.append(names, *torch.randn(2, 3, count, HEADS, DIM))
    assert sorted(cache.block_table(names).flatten().tolist()) == list(range(30))
    assert not cache.block_table(names).is_inference()


def test_a_length_is_not_kept_as_a_tensor():
    cache = fae.PagedKVCache(8, 4, HEADS, DIM)
    name = cache.add()
    cache.append([name], *torch.randn(2, 1, 6, HEADS, DIM))
    length = torch.tensor(5)
    cache.truncate(name, length)
    fork = cache.fork(name)
    cache.append([fork], *torch.randn(2, 1, 2, HEADS, DIM))
    assert (cache.length(name), cache.length(fork), length.item()) == (5, 7, 5)
    for wrong in (4.5, torch.tensor(4.5), None, True):
        with pytest.raises(TypeError, match="length must be an int, got"):
            cache.truncate(name, wrong)
    assert cache.length(name) == 5


def test_where_tensors_are_made_by_default():
    """What lives on the host does so, wherever that is."""
    k, v = torch.randn(2, 1, 3, HEADS, DIM)
    caches = fae.PagedKVCache(8, 4, HEADS, DIM), fae.PagedKVCache(8, 4, HEADS, DIM)
    results = []
    for cache, device in zip(caches, ("cpu", "meta"), strict=True):
        with torch.device(device):
            name = cache.add()
            cache.append([name], k, v)
            results.append(cache.attend([name], k, k, v))
    assert torch.equal(*results)


def test_a_sequence_appends_once_at_a_time():
    cache = fae.PagedKVCache(2, 4, 2, 8)
    name = cache.add()
    with pytest.raises(ValueError, match="sequences must differ"):
        cache.append([name, name], *torch.randn(2, 2, 1, 2, 8))
    with pytest.raises(ValueError, match="length is 1"):
        cache.truncate(name, 1)
