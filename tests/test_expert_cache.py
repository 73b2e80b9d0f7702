"""Experts that are not all in memory: what is read, what is kept, and that no output changes."""

from __future__ import annotations

import gc
import os
import pickle
import shutil
import signal
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, pipeline

import hlwq
from hlwq import packed_experts
from hlwq.containers import Reader
from hlwq.demo import bundled_model
from hlwq.expert_cache import AHEAD, ExpertCache
from hlwq.expert_policies import POLICIES, LayerCache
from hlwq.expert_store import ExpertStore
from hlwq.linear import HLWQExperts

CPU = torch.device("cpu")
LAYERS, EXPERTS, EACH = 4, 16, 4
CHUNK = 48
"""Tokens that are walked through together in these tests, so that prompts have several chunks."""


@pytest.fixture(scope="module")
def packed(experts_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "q4"
    hlwq.quantize(experts_model, out, "hlwq", bits=4)
    return out


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_experts, "CHUNK", CHUNK)


def load(path: Path, **options: Any) -> Any:
    given = {"quantization_config": hlwq.HLWQConfig(**options)} if options else {}
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, **given)


def stacks(path: Path) -> dict[str, Tensor]:
    stored = load_file(path / "model.safetensors")
    return {name.removesuffix(".packed"): tensor for name, tensor in stored.items() if name.endswith("experts.packed")}


@pytest.mark.parametrize("source", ["disk", "memory"])
def test_an_expert_is_its_row_of_the_file(packed: Path, source: str) -> None:
    store, expected = ExpertStore(Reader(packed), source), stacks(packed)
    assert store.counts == dict.fromkeys(expected, EXPERTS)
    row = torch.empty(store.nbytes, dtype=torch.uint8)
    for layer, tensor in expected.items():
        for expert in (3, 0, EXPERTS - 1):
            store.read(layer, expert, row)
            assert torch.equal(row, tensor[expert])


def calls(layer: int) -> Iterator[list[list[int]]]:
    """Prompts of several lengths and single tokens, whose experts are chosen unevenly."""
    generator = torch.Generator().manual_seed(layer)
    favourites = 1 / torch.arange(1.0, EXPERTS + 1)
    for tokens in (40, *[1] * 60, 7, *[1] * 20):
        yield torch.multinomial(favourites.expand(tokens, -1), EACH, generator=generator).tolist()


def rows_alive(store: ExpertStore) -> int:
    """Tensors of the size of an expert, whoever holds them."""
    gc.collect()
    found = (each for each in gc.get_objects() if type(each) is Tensor)
    return sum(each.dtype == torch.uint8 and each.shape == (store.nbytes,) for each in found)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("capacity", [1, 3, EACH, 9, EXPERTS])
def test_what_is_given_is_what_is_stored(packed: Path, capacity: int, policy: str) -> None:
    store, expected = ExpertStore(Reader(packed)), stacks(packed)
    cache = ExpertCache(store, capacity, policy)
    replays = [LayerCache(capacity, POLICIES[policy]()) for _ in expected]
    for call in zip(*map(calls, range(len(expected))), strict=True):
        for (layer, tensor), replay, tokens in zip(expected.items(), replays, call, strict=True):
            given = []
            for expert, row in cache.rows(layer, tokens, CPU):
                assert torch.equal(row, tensor[expert])
                given.append(expert)
            replay.use(tokens)
            assert sorted(given) == sorted({expert for experts in tokens for expert in experts})
    del row
    assert rows_alive(store) <= capacity * LAYERS + AHEAD
    assert cache.counters.hits == sum(replay.hits for replay in replays)
    assert cache.counters.misses == sum(replay.misses for replay in replays)
    assert cache.counters.nbytes == cache.counters.misses * store.nbytes


def test_a_walk_that_was_broken_off_is_forgotten(packed: Path) -> None:
    store, expected = ExpertStore(Reader(packed)), stacks(packed)
    cache, layer = ExpertCache(store, 6), next(iter(expected))
    for broken in ([[0, 1, 2, 3], [4, 5, 6, 7]], [[8, 9, 10, 11]], [[0, 4, 9, 12]]):
        for _ in cache.rows(layer, broken, CPU):
            break
        for _ in zip(cache.rows(layer, broken[::-1], CPU), range(2), strict=False):
            pass
    for tokens in calls(0):
        for expert, row in cache.rows(layer, tokens, CPU):
            assert torch.equal(row, expected[layer][expert])
    assert rows_alive(store) <= 6 * LAYERS + AHEAD


@pytest.mark.parametrize("how", ["shorter", "as long"])
def test_a_file_that_has_changed_is_an_error_and_not_a_wrong_answer(how: str, packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "q4")
    cache, layer = ExpertCache(ExpertStore(Reader(tmp_path / "q4")), 2), next(iter(stacks(packed)))
    file = tmp_path / "q4" / "model.safetensors"
    with file.open("r+b") as stream:
        if how == "shorter":
            stream.truncate(file.stat().st_size // 50)
        else:
            stream.seek(-100, os.SEEK_END)
            stream.write(bytes(100))
    os.utime(file, (1, 1))
    for _ in range(2):
        with pytest.raises(hlwq.CheckpointError, match="has changed since it was opened"):
            list(cache.rows(layer, [[0, 5], [9, 11]], CPU))


def test_an_error_in_what_was_only_expected_is_none(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, expected = ExpertStore(Reader(packed)), stacks(packed)
    cache, layer, read = ExpertCache(store, 4), next(iter(expected)), store.read

    def broken(of: str, expert: int, into: Tensor) -> None:
        if expert == 7:
            raise hlwq.CheckpointError("broken")
        read(of, expert, into)

    monkeypatch.setattr(store, "read", broken)
    cache.expect(layer, [7, 3], CPU)
    for tokens in ([[3, 4]], [[0, 1, 2, 3]]):
        for expert, row in cache.rows(layer, tokens, CPU):
            assert torch.equal(row, expected[layer][expert])
    cache.expect(layer, [7], CPU)
    with pytest.raises(hlwq.CheckpointError, match="broken"):
        list(cache.rows(layer, [[7]], CPU))
    assert {expert for expert, _ in cache.rows(layer, [[0, 3, 9]], CPU)} == {0, 3, 9}
    assert rows_alive(store) <= 4 * LAYERS + AHEAD


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("used", [False, True])
def test_forked_processes_read_what_is_stored(packed: Path, used: bool) -> None:
    expected = {layer: tensor.numpy() for layer, tensor in stacks(packed).items()}
    cache = ExpertCache(ExpertStore(Reader(packed)), 3)
    if used:
        cache.expect(next(iter(expected)), [1, 2], CPU)
        for _ in cache.rows(next(iter(expected)), [[1, 5]], CPU):
            pass
    children = []
    for _ in range(2):
        child = os.fork()
        if not child:
            status = 1
            with suppress(BaseException):
                signal.alarm(60)
                for _ in range(20):
                    for layer, stored in expected.items():
                        for call in calls(0):
                            right = (
                                bytes(row.numpy()) == bytes(stored[expert])
                                for expert, row in cache.rows(layer, call, CPU)
                            )
                            assert all(right)
                status = 0
            os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


def test_a_model_that_moves_takes_no_more_memory(packed: Path) -> None:
    store, layer = ExpertStore(Reader(packed)), next(iter(stacks(packed)))
    cache = ExpertCache(store, 4)
    for device in (CPU, torch.device("meta")):  # `meta` stands for a GPU here
        for tokens in calls(0):
            for _, row in cache.rows(layer, tokens, device):
                assert row.device == device
        del row
        staged = 1
        assert rows_alive(store) <= 4 + AHEAD + staged


def test_memory_that_is_reserved_is_all_there_is(packed: Path) -> None:
    store, expected = ExpertStore(Reader(packed)), stacks(packed)
    cache = ExpertCache(store, 4)
    for _ in range(2):
        cache.reserve(CPU)
        assert rows_alive(store) == 4 * LAYERS + AHEAD
        for layer, tensor in expected.items():
            for tokens in calls(0):
                for expert, row in cache.rows(layer, tokens, CPU):
                    assert torch.equal(row, tensor[expert])
        del row
        assert rows_alive(store) == 4 * LAYERS + AHEAD


@pytest.mark.parametrize("family", ["lfm2_moe", "minimax_m2", "phimoe", "mixtral"])
def test_other_mixtures_are_read_ahead_too(family: str, tmp_path: Path) -> None:
    hlwq.quantize(save_model(tmp_path / "model", family), tmp_path / "q4", "hlwq", bits=4)
    whole, ahead = load(tmp_path / "q4"), load(tmp_path / "q4", expert_cache=1, expert_prefetch=True)
    said: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    tokens = torch.arange(3, 12)[None]
    assert torch.equal(whole.generate(tokens, **said), ahead.generate(tokens, **said))
    nbytes = ExpertStore(Reader(tmp_path / "q4")).nbytes
    assert ahead.expert_cache.counters.nbytes // nbytes > ahead.expert_cache.counters.misses  # some are not needed


@pytest.fixture(scope="module")
def prompt() -> Tensor:
    return torch.randint(6, 2000, (1, 130), generator=torch.Generator().manual_seed(0))


def outputs(model: Any, prompt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a prompt, and what follows greedily and at random."""
    with torch.inference_mode():
        logits = model(prompt).logits
        greedy = model.generate(prompt[:, :20], max_new_tokens=12, do_sample=False, eos_token_id=None)
        torch.manual_seed(0)
        sampled = model.generate(prompt[:, :20], max_new_tokens=12, do_sample=True, temperature=2.0, eos_token_id=None)
    return logits, greedy, sampled


@pytest.fixture(scope="module")
def expected(packed: Path, prompt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_experts, "CHUNK", CHUNK)
        return outputs(load(packed), prompt)


@pytest.mark.parametrize(
    "options",
    [
        *({"expert_cache": capacity} for capacity in range(1, EXPERTS + 1)),
        *({"expert_cache": 6, "expert_policy": policy} for policy in POLICIES),
        {"expert_cache": 3, "expert_source": "memory"},
        {"expert_cache": "1MB"},
        *({"expert_cache": capacity, "expert_prefetch": True} for capacity in (1, 6, 12)),
    ],
    ids=str,
)
def test_outputs_are_those_of_the_whole_model(
    options: dict[str, Any], packed: Path, prompt: Tensor, expected: tuple[Tensor, Tensor, Tensor]
) -> None:
    model = load(packed, **options)
    used: list[tuple[str, list[list[int]]]] = []
    for module in model.modules():
        if isinstance(module, HLWQExperts):
            assert module.cache is not None
            name = module.cache[1]
            module.register_forward_pre_hook(lambda _, given, name=name: used.append((name, given[1].tolist())))
    for found, right in zip(outputs(model, prompt), expected, strict=True):
        assert torch.equal(found, right)

    cache: ExpertCache = model.expert_cache
    policy = POLICIES[options.get("expert_policy", "lfru")]
    replays = {name: LayerCache(cache.capacity, policy()) for name in stacks(packed)}
    for name, tokens in used:
        for start in range(0, len(tokens), CHUNK):
            replays[name].use(tokens[start : start + CHUNK])
    assert cache.counters.hits == sum(replay.hits for replay in replays.values())
    assert cache.counters.misses == sum(replay.misses for replay in replays.values())
    assert cache.counters.misses > 0
    wrongly_expected = cache.counters.nbytes // ExpertStore(Reader(packed)).nbytes - cache.counters.misses
    assert (wrongly_expected > 0) == options.get("expert_prefetch", False)


def test_bytes_are_for_all_layers(packed: Path) -> None:
    nbytes = ExpertStore(Reader(packed)).nbytes
    for size, capacity in (("1MB", 10**6 // (LAYERS * nbytes)), (f"{LAYERS * nbytes / 1000}KB", 1)):
        assert load(packed, expert_cache=size).expert_cache.capacity == capacity


def test_policies_keep_different_experts(packed: Path) -> None:
    seen = set()
    for policy in POLICIES:
        cache = ExpertCache(ExpertStore(Reader(packed)), 6, policy)
        given = [[expert for expert, _ in cache.rows(next(iter(stacks(packed))), call, CPU)] for call in calls(0)]
        seen.add(str(given))  # those that are there come first
    assert len(seen) == len(POLICIES)


def test_what_was_expected_is_not_read_again(packed: Path) -> None:
    store, expected = ExpertStore(Reader(packed)), stacks(packed)
    cache, (first, second, *_) = ExpertCache(store, 4), expected
    for _ in cache.rows(first, [[0, 1]], CPU):
        pass
    cache.expect(first, [1, 5, 2, 7], CPU)  # of which 1 is there, and 7 finds no memory
    given = dict(cache.rows(first, [[2, 3, 5, 6]], CPU))
    assert list(given)[:2] == [5, 2]
    assert cache.counters.nbytes == 6 * store.nbytes
    cache.expect(first, [9, 10], CPU)
    for _ in cache.rows(second, [[0]], CPU):  # of another layer: what was expected is forgotten
        assert rows_alive(store) <= 4 * LAYERS + AHEAD
    cache.expect(first, [9, 10], CPU)
    cache.expect(second, [9, 10], CPU)
    assert {expert: row.tolist() for expert, row in cache.rows(second, [[10, 4, 9]], CPU)} == {
        expert: expected[second][expert].tolist() for expert in (10, 4, 9)
    }


def test_copies_of_a_model_share_the_cache(packed: Path, prompt: Tensor) -> None:
    model = load(packed, expert_cache=3)
    again = deepcopy(model)
    with torch.inference_mode():
        assert torch.equal(model(prompt).logits, again(prompt).logits)
    assert again.expert_cache is model.expert_cache


def test_a_pipeline_runs(packed: Path) -> None:
    options = {"quantization_config": hlwq.HLWQConfig(expert_cache="1MB")}
    ordinary, small = (pipeline("text-generation", str(packed), model_kwargs=each) for each in ({}, options))
    said = {"max_new_tokens": 8, "do_sample": False}
    assert small("def main():", **said) == ordinary("def main():", **said)


def test_what_is_not_in_memory_is_neither_saved_nor_decoded(packed: Path, tmp_path: Path) -> None:
    model = load(packed, expert_cache=2)
    with pytest.raises(hlwq.UnsupportedError, match=r"cannot be saved. Leave `expert_cache` out"):
        model.save_pretrained(tmp_path / "again")
    with pytest.raises(hlwq.UnsupportedError, match=r"cannot be pickled. Leave `expert_cache` out"):
        pickle.dumps(model)
    with pytest.raises(hlwq.UnsupportedError, match=r"cannot be decoded. Leave `expert_cache` out"):
        model.dequantize()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"expert_cache": 0}, "`expert_cache` 0 must hold an expert of each layer: 0.1 MB at least"),
        ({"expert_cache": "50KB"}, "`expert_cache` 50KB must hold an expert of each layer: 0.1 MB at least"),
        ({"expert_cache": True}, "`expert_cache` True is not a size"),
        ({"expert_cache": 8_000_000_000}, "`expert_cache` 8000000000 counts experts of a layer, which has 16"),
        ({"expert_cache": 0.5}, "`expert_cache` 0.5 is not a size"),
        ({"expert_cache": "much"}, "`expert_cache` much is not a size"),
        ({"expert_cache": 4, "expert_policy": "fifo"}, "`expert_policy` fifo is unknown. Use one of lru, lfu, lfru"),
        ({"expert_cache": 4, "expert_source": "cloud"}, "`expert_source` cloud is unknown. Use disk or memory"),
        ({"expert_policy": "lru"}, "`expert_policy` changes nothing without `expert_cache`"),
        ({"expert_prefetch": True}, "`expert_prefetch` changes nothing without `expert_cache`"),
        ({"expert_source": "memory"}, "`expert_source` changes nothing without `expert_cache`"),
        ({"expert_cache": 4, "dequantize": True}, "decodes all experts. Leave `expert_cache` out"),
    ],
    ids=str,
)
def test_mistakes_are_named(options: dict[str, Any], said: str, packed: Path) -> None:
    with pytest.raises(hlwq.RequestError, match=said):
        load(packed, **options)


def test_a_cache_is_for_packed_experts(packed: Path, experts_model: Path, tmp_path: Path) -> None:
    with pytest.raises(hlwq.RequestError, match="`expert_cache` is for HLWQ checkpoints, and this one is not"):
        load(experts_model, expert_cache=4)
    hlwq.quantize(bundled_model(), tmp_path / "dense", "hlwq")
    with pytest.raises(hlwq.RequestError, match=r"`expert_cache` changes nothing: .* has no packed experts"):
        load(tmp_path / "dense", expert_cache=4)
