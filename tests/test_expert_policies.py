"""Caches of experts: what each policy gives up, Belady's bound, and the uses that are recorded of a model."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import hlwq
from hlwq.cli import app
from hlwq.demo import bundled_model, held_out_text
from hlwq.evaluate.experts import ExpertUse, expert_use
from hlwq.evaluate.model import load_for_evaluation
from hlwq.expert_policies import HALF_LIFE, POLICIES, Belady, LayerCache, Lfru, Lfu, Lru, Policy, Walk, hit_rate


def trace(tokens: int, experts: int, each: int, seed: int = 0) -> list[list[int]]:
    """Tokens whose experts are chosen unevenly, and whose favourites change."""
    generator = random.Random(seed)
    uses = []
    for token in range(tokens):
        shift = token // 50
        weights = [1 / (1 + (expert + shift) % experts) for expert in range(experts)]
        chosen: set[int] = set()
        while len(chosen) < each:
            chosen |= set(generator.choices(range(experts), weights))
        uses.append(sorted(chosen))
    return uses


def given_up(policy: Policy, capacity: int, uses: Sequence[Sequence[int]]) -> list[list[int]]:
    cache = LayerCache(capacity, policy)
    return [cache.use([experts]).leaving for experts in uses]


def test_policies_give_up_what_they_say() -> None:
    uses = [[0], [0], [0], [1], [1], [2], [3]]
    assert given_up(Lru(), 2, uses) == [[], [], [], [], [], [0], [1]]
    assert given_up(Lfu(), 2, uses) == [[], [], [], [], [], [1], [2]]
    # What was used much is given up once its uses lie far enough back.
    often = [[0]] * 200 + [[1], [2]] * int(4 * HALF_LIFE) + [[3]]
    assert given_up(Lfu(), 3, often)[-1] == [1]
    assert given_up(Lfru(), 3, often)[-1] == [0]


def test_what_a_token_needs_is_not_given_up_for_it() -> None:
    cache = LayerCache(3, Lru())
    cache.use([[0, 1, 2]])
    assert cache.use([[3, 0]]) == Walk(hits=[0], loads=[3], leaving=[2])  # of equals, the one of the highest number
    assert cache.resident == {0, 1, 3}
    assert cache.use([[4, 5]]) == Walk(hits=[], loads=[4, 5], leaving=[1, 3])
    assert (cache.hits, cache.misses) == (1, 6)


def test_a_call_uses_an_expert_once_and_the_last_token_decides() -> None:
    cache = LayerCache(3, Lfu())
    assert cache.use([[0, 1], [0, 2], [0, 3], [4, 5]]) == Walk(hits=[], loads=[0, 1, 2, 3, 4, 5], leaving=[])
    assert cache.resident == {0, 4, 5}
    assert cache.use([[6, 7, 8, 9]]).leaving == [0, 4, 5]
    assert cache.resident == {6, 7, 8}  # of those of a token as many as fit
    assert (cache.hits, cache.misses) == (0, 10)


@pytest.mark.parametrize("capacity", [2, 4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_no_policy_beats_belady(capacity: int, seed: int) -> None:
    uses = trace(400, 16, 2, seed)
    bound = hit_rate(uses, Belady(uses), capacity)
    assert all(hit_rate(uses, policy(), capacity) <= bound for policy in POLICIES.values())
    assert bound < 1


@pytest.mark.parametrize(("each", "capacity"), [(1, 2), (2, 2), (2, 3), (3, 4)])
@pytest.mark.parametrize("seed", range(4))
def test_belady_is_the_best_there_is(each: int, capacity: int, seed: int) -> None:
    """Against every choice of what stays beside a token's experts."""
    uses = trace(12, 6, each, seed)
    reached = {frozenset[int](): 0}
    for experts in map(frozenset, uses):
        after: dict[frozenset[int], int] = {}
        for resident, hits in reached.items():
            others = resident - experts
            for stay in combinations(others, min(len(others), capacity - each)):
                state = experts | frozenset(stay)
                after[state] = max(after.get(state, 0), hits + len(experts & resident))
        reached = after
    assert hit_rate(uses, Belady(uses), capacity) == pytest.approx(max(reached.values()) / (12 * each))


def test_where_favourites_change_recent_frequency_is_worth_most() -> None:
    uses = trace(2000, 32, 2)
    rates = {name: hit_rate(uses, policy(), 8) for name, policy in POLICIES.items()}
    assert rates["lfru"] > rates["lru"] + 0.02
    assert rates["lfru"] > rates["lfu"] + 0.02


def test_uses_are_those_of_the_model(experts_model: Path, tmp_path: Path) -> None:
    use = expert_use(experts_model, held_out_text(), context=128, limit=2)
    assert use.uses.shape == (4, 256, 4)
    assert use.experts == 16
    model, tokenizer = load_for_evaluation(experts_model)
    tokens = tokenizer(held_out_text().read_text(encoding="utf-8")[:4000], return_tensors="pt").input_ids[:, :128]
    routers: list[torch.Tensor] = []
    for layer in model.get_decoder().layers:
        layer.mlp.gate.register_forward_hook(lambda _, given, output: routers.append(output[-1]))
    with torch.inference_mode():
        model.get_decoder()(input_ids=tokens)
    for found, expected in zip(use.uses, routers, strict=True):
        assert torch.equal(found[:128].long().sort(-1).values, expected.reshape(128, 4).long().sort(-1).values)

    use.save(tmp_path / "uses.safetensors")
    again = ExpertUse.read(tmp_path / "uses.safetensors")
    assert torch.equal(again.uses, use.uses)
    assert again.expert_bytes == use.expert_bytes == 3 * 256 * 64 * 2
    for row in again.balance():
        counts = torch.bincount(use.uses[row.layer].flatten().long(), minlength=16)
        assert row.busiest == pytest.approx(float(counts.max() / counts.sum()))
        assert row.unused == int((counts == 0).sum())
        assert 0 < row.entropy <= 1


def test_the_command_replays_what_it_kept(experts_model: Path, tmp_path: Path) -> None:
    kept, chart = tmp_path / "uses.safetensors", tmp_path / "chart.svg"
    run = ["eval", "experts", str(experts_model), "--text", str(held_out_text()), "--context", "128", "--limit", "2"]
    ended = CliRunner().invoke(app, [*run, "--trace", str(kept), "--chart", str(chart), "--json"])
    assert ended.exit_code == 0, ended.output
    measured = json.loads(ended.stdout)
    assert [row["capacity"] for row in measured["hit_rates"]] == [4, 8, 12]
    assert "belady" in chart.read_text()
    again = CliRunner().invoke(app, ["eval", "experts", str(kept), "--capacity", "10", "--capacity", "8", "--json"])
    assert again.exit_code == 0, again.output
    replayed = json.loads(again.stdout)["hit_rates"]
    assert replayed[0] == measured["hit_rates"][1]
    assert replayed[1]["rates"]["lru"] > replayed[0]["rates"]["lru"]
    longer = json.loads(CliRunner().invoke(app, [*run[:-1], "3", "--json"]).stdout)
    assert longer["tokens"] == 3 * 128


RUN = ["{experts}", "--text", "{text}", "--limit", "1", "--context", "64"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{dense}", "--text", "{text}"], "has no experts"),
        (["{experts}"], "--text"),
        ([*RUN, "--capacity", "16"], "--capacity 16 must hold the 4 experts of a token, and not all 16"),
        ([*RUN, "--capacity", "3"], "--capacity 3 must hold the 4 experts of a token, and not all 16"),
        ([*RUN, "--chart", "chart.pdf"], "must end in .svg or .png"),
        ([*RUN, "--trace", "uses.bin"], "must end in .safetensors"),
        ([*RUN, "--trace", "{missing}/uses.safetensors"], "is no folder"),
        ([*RUN, "--trace", "/proc/uses.safetensors"], "cannot be written"),
        (["{damaged}"], "holds no uses of experts"),
        (["{damaged}", "--text", "{text}"], "--text changes nothing"),
        (["{damaged}", "--context", "64"], "--context changes nothing"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(arguments: list[str], said: str, experts_model: Path, tmp_path: Path) -> None:
    (tmp_path / "damaged.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    places = {
        "dense": bundled_model(),
        "experts": experts_model,
        "text": held_out_text(),
        "damaged": tmp_path / "damaged.safetensors",
        "missing": tmp_path / "missing",
    }
    ended = CliRunner().invoke(app, ["eval", "experts", *(each.format(**places) for each in arguments)])
    assert ended.exit_code == 1
    assert isinstance(ended.exception, SystemExit)
    assert said in " ".join(ended.stderr.split())
    assert ended.stderr.count("error:") == 1
    assert "Traceback" not in ended.stderr


def test_bytes_of_an_expert_are_those_of_the_file(experts_model: Path, tmp_path: Path) -> None:
    hlwq.quantize(experts_model, tmp_path / "q4", "hlwq", bits=4)
    use = expert_use(tmp_path / "q4", held_out_text(), context=64, limit=1)
    stored = load_file(tmp_path / "q4" / "model.safetensors")
    packed = [tensor for name, tensor in stored.items() if name.endswith("experts.packed")]
    assert len(packed) == 4
    assert use.expert_bytes == sum(tensor.nbytes for tensor in packed) // (4 * 16)
