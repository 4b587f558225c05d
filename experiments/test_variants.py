"""Tests of server_momentum.py and dropping_rates.py, against sums and plain depth dropout."""
from dataclasses import replace
from functools import partial

import pytest
import torch

import data
import fllw
from experiments import dropping_rates, server_momentum
from experiments.test_experiments import SHAPE, SMALL, images, same_tensors, server_of

LONG = replace(SMALL, rounds=9)

def plus_one(stage, round_number, progress, messages):
    """An `ask` whose clients add 1 to all that trains."""
    for client, message in messages:
        upload = {name: t + 1 for name, t in message.items() if stage.trains(name)}
        yield client, fllw.Answer(upload, 0.0, 1)

def moved(rule, anew=False):
    """By how much each tensor moved in three stages of three rounds: its lowest and highest value
    after the run, of a server that started from 0."""
    state = fllw.State({name: torch.zeros_like(t)
                        for name, t in server_of(LONG, fllw.stages(LONG)[0]).items()})
    server = server_momentum.Server(LONG, SHAPE, rule, anew)
    server.received = dict(state.server)
    fllw.federate(LONG, images(), state, ask=plus_one, on_round=server)
    return {name: (t.min().item(), t.max().item()) for name, t in state.server.items()}

@pytest.mark.parametrize("anew", [False, True])
def test_momentum_against_a_sum_of_powers(anew):
    """Every round changes by 1, so after n rounds the k-th from the end counts 1 + b + .. + b^k."""
    def walk(rounds):
        return sum(0.5**power for last in range(rounds) for power in range(last + 1))

    ends = moved(partial(server_momentum.momentum, 0.5), anew)
    head = 3 * walk(3) if anew else walk(9)  # it trains in all three stages
    assert ends["head.0.weight"] == pytest.approx((head, head))
    for block in range(3):  # a new block starts where the one below ended, and without moments
        expected = pytest.approx(((block + 1) * walk(3),) * 2)
        assert ends[f"encoder.blocks.{block}.mlp.fc1.weight"] == expected

def test_momentum_of_0_is_fedavg_and_fedadam_follows_its_formula():
    assert moved(partial(server_momentum.momentum, 0.0))["head.0.weight"] == (9, 9)
    first, second, expected = 0.0, 0.0, 0.0
    for _ in range(9):
        first, second = 0.9 * first + 0.1, 0.99 * second + 0.01
        expected += 0.1 * first / (second**0.5 + 1e-3)
    low, high = moved(partial(server_momentum.fedadam, 0.1))["head.0.weight"]
    assert low == high == pytest.approx(expected)

def test_a_client_downloads_no_more_than_without_momentum():
    server = server_momentum.Server(LONG, SHAPE, partial(server_momentum.momentum, 0.5))
    _, history = fllw.federate(LONG, images(), ask=plus_one, on_round=server)
    ledger = fllw.Ledger(LONG, SHAPE)
    down = sum(ledger.add(row)["download_bytes"] for row in history)
    assert down == fllw.cost(LONG, SHAPE)["download_bytes"]

def test_the_setting_of_the_method_is_the_same_momentum():
    config = replace(LONG, server_momentum=0.5)
    server = server_momentum.Server(LONG, SHAPE, partial(server_momentum.momentum, 0.5))
    own, _ = fllw.federate(config, images())
    expected, _ = fllw.federate(LONG, images(), on_round=server)
    assert same_tensors(own.state_dict(), expected.state_dict())

@pytest.mark.parametrize("depth", [2, 4, 12])
def test_all_rules_drop_as_many_blocks_on_average(depth):
    config = replace(SMALL, depth=depth, depth_dropout=0.3)
    for rule in dropping_rates.RULES[1:]:
        dropped = frozen = 0
        for stage in range(depth):
            for progress in (0, 0.25, 0.5, 0.75):
                rates = dropping_rates.rates(rule, config, progress)
                dropped, frozen = dropped + sum(rates[:stage]), frozen + stage
        assert dropped / frozen == pytest.approx(0.3), rule
    up, down = (dropping_rates.rates(rule, config, 0) for rule in ("rising", "falling"))
    assert up == pytest.approx([(b + 1) * up[0] for b in range(depth - 1)])
    assert all(lower > upper for lower, upper in zip(down, down[1:]))

def test_the_uniform_rule_is_depth_dropout_and_is_accounted_for(tmp_path, monkeypatch):
    config = replace(LONG, depth_dropout=0.5, out=str(tmp_path / "uniform"))
    monkeypatch.setattr(dropping_rates, "evaluate", lambda *given: {})
    rows = dropping_rates.measure("uniform", config, images())
    trained = fllw.read(tmp_path / "uniform" / "encoder.pt")
    encoder, history = fllw.federate(config, images())
    ledger = fllw.Ledger(config, SHAPE)
    assert same_tensors(trained, encoder.state_dict())
    assert rows["uniform"]["macs"] == sum(ledger.add(row)["macs"] for row in history)
    assert rows["uniform"]["macs"] < fllw.cost(replace(config, depth_dropout=0.0), SHAPE)["macs"]

def test_a_scaled_block_adds_a_share():
    block = fllw.Block(16, 2)
    x = data.normalise(torch.full((2, 3, 16), 9, dtype=torch.uint8))
    for share in (0.0, 0.25, 1.0):
        torch.testing.assert_close(dropping_rates.Scaled(block, share)(x),
                                   x + share * (block(x) - x))
