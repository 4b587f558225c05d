"""Tests of stragglers.py, against enumeration, sampling and arithmetic by hand."""
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

import data
import fllw
from experiments.stragglers import SLOWEST, Devices
from experiments.test_experiments import SHAPE, TINY, images

CONFIG = fllw.Config(**TINY | {"method": "e2e", "clients": 4})
STAGE, CLIENTS = fllw.stages(CONFIG)[0], data.split(images(), 4)  # three blocks, which all train
SECONDS = [15 * fllw.count_macs(CONFIG, replace(STAGE, first=first), range(3), SHAPE) / SLOWEST
           for first in (2, 1, 0)]  # of 15 images on the slowest device, for 1, 2, 3 blocks

def one_round(monkeypatch, rule, depths, p, sizes):
    """The server before and after: client u, of sizes[u] images, adds u + 1 to depths[u] blocks."""
    def add(config, stage, message, images, round_number, client):
        upload = {name: t + client + 1 for name, t in message.items() if stage.trains(name)}
        return upload, torch.zeros(1), len(images)
    monkeypatch.setattr(fllw, "local_train", add)
    config, clients = replace(CONFIG, clients=len(sizes), rounds=1), [CLIENTS[0][:n] for n in sizes]
    devices = Devices(config, clients, 1.0, rule)
    devices.race = lambda stage, round_number: (dict(enumerate(depths)), p, 0.0)
    state = fllw.federate(config, clients, train_client=devices.train_client)
    return fllw.initial(config, SHAPE), state.server

def test_the_expected_step_is_the_mean_of_all_steps(monkeypatch):
    """Over all depths of three clients; from 1 to 3 each is as likely, as in the paper."""
    p, expected = {depth: ((depth - 1) / 3)**3 for depth in (1, 2, 3)}, {}
    for depths in itertools.product((1, 2, 3), repeat=3):
        before, after = one_round(monkeypatch, "salf", depths, p, [1, 1, 1])
        expected = {name: expected.get(name, 0) + t.double() / 27 for name, t in after.items()}
    for name, tensor in before.items():  # the steps are 1, 2 and 3
        torch.testing.assert_close(expected[name], tensor.double() + 2, rtol=0, atol=1e-5)

@pytest.mark.parametrize("rule, top, low", [("salf", 7 / 4, 1), ("salf code", 7 / 4, 1 / 4),
                                            ("drop", 1, 1)])
def test_each_rule_by_hand(rule, top, low, monkeypatch):
    """Client 0 (1 image) trains all blocks; client 1 (3 images) the last one, or it is lost."""
    depths, p = (3, int(rule != "drop")), dict.fromkeys((1, 2, 3), 0)
    before, after = one_round(monkeypatch, rule, depths, p, [1, 3])
    for name, tensor in before.items():
        last = fllw.block_of(name) == 2 or name.startswith(("head", "encoder.norm"))
        torch.testing.assert_close(after[name], tensor + (top if last else low))

@pytest.mark.parametrize("rule, redraw, found", [("salf", 0, {0, 1}), ("salf", 1, {0, 1, 2, 3}),
                                                 ("drop", 1, {0, 3}), ("wait", 0, {3})])
def test_who_is_in_time_against_a_loop_and_p_against_how_often_nobody_is(rule, redraw, found):
    """A client trains the most blocks that fit; without SALF all or none."""
    deadline, every = SECONDS[2] / 4, []
    devices = Devices(CONFIG, CLIENTS, deadline, rule, redraw)
    limit = np.inf if rule == "wait" else deadline
    for number in range(1, 2000):
        depths, p, lasted = devices.race(STAGE, number)
        speeds = 16 ** np.random.default_rng([0, 300, number * redraw]).random(4)
        for client, speed in enumerate(speeds):
            fit = sum(seconds / speed <= limit for seconds in SECONDS)
            assert depths[client] == (fit if rule == "salf" or fit == 3 else 0)
        assert lasted == pytest.approx(min(limit, SECONDS[2] / min(speeds)))
        every.append([*depths.values()])
    assert set(np.ravel(every)) == found
    if rule == "salf" and redraw:
        assert 0.001 < p[1] < p[2] < p[3] < 0.95
        assert p == pytest.approx({d: np.mean(np.max(every, 1) < d) for d in p}, abs=0.02)
