"""Tests of stragglers.py against enumeration, sampling and arithmetic by hand."""
import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch

import fllw
from experiments.stragglers import Devices, counted, cut
from experiments.test_experiments import SMALL, images

E2E, DATASET = replace(SMALL, method="e2e", clients=4, rounds=4), images()
STAGE = fllw.stages(E2E)[0]  # three blocks, all active
ALL = Devices(E2E, DATASET, 1, "salf").on_slowest(STAGE, 1, 0)[3]  # seconds, for every block

def shifted(sizes, stage, round_number, progress, messages):
    """An `ask`: client u adds u + 1 to all that the stage trains, and has sizes[u] images."""
    for u, message in messages:
        upload = {name: t + u + 1 for name, t in message.items() if stage.trains(name)}
        yield u, fllw.Answer(upload, 0.0, sizes[u])

def test_the_expected_step_is_the_mean_of_all_steps():
    """Over all depths of three clients; from 1 to L, each is as likely, as in the paper."""
    w = {name: t.double() for name, t in fllw.initial(E2E, DATASET.shape).items()}
    p = {depth: (1 - layer / 3)**3 for depth, layer in zip((1, 2, 3), (3, 2, 1))}
    expected = {name: torch.zeros_like(t) for name, t in w.items()}
    for depths in itertools.product((1, 2, 3), repeat=3):
        average = fllw.Average()
        for u, depth in enumerate(depths):
            [(_, answer)] = shifted([1] * 3, cut(STAGE, depth), 1, 0, [(u, w)])
            average.add(counted("salf", answer.upload, w, STAGE, p), 1)
        expected = {name: expected[name] + t / 27 for name, t in (w | average.mean()).items()}
    for name, t in w.items():  # the steps are 1, 2 and 3
        torch.testing.assert_close(expected[name], t + 2, rtol=0, atol=1e-5)

def test_p_is_how_often_nobody_reaches_a_layer():
    devices, N = Devices(E2E, DATASET, ALL / 8, "salf", redraw=True), 2000
    deepest = [max(devices.finished(STAGE, n, range(4))[0].values()) for n in range(N)]
    p = devices.unreached(STAGE, 1, range(4))
    assert 0.02 < p[1] < p[2] < p[3] < 0.95
    assert p == pytest.approx({d: sum(x < d for x in deepest) / N for d in p}, abs=0.04)

@pytest.mark.parametrize("rule, low", [("salf", 1), ("salf code", 1 / 4), ("drop", 1)])
def test_each_rule_by_hand(rule, low, monkeypatch):
    """Client 0 (1 image) trains all three blocks; client 1 (3 images) the last one, or is lost."""
    config, last = replace(E2E, clients=2, rounds=1), 1 if rule == "drop" else (1 * 1 + 3 * 2) / 4
    devices, state = Devices(config, DATASET, 1, rule), fllw.State()
    monkeypatch.setattr(devices, "finished", lambda *asked: ({0: 3, 1: int(rule != "drop")}, 1.0))
    fllw.federate(config, DATASET, state, ask=partial(devices.ask, partial(shifted, [1, 3])))
    for name, t in fllw.initial(config, DATASET.shape).items():
        top = fllw.block_of(name) == 2 or name.startswith(("head", "encoder.norm"))
        torch.testing.assert_close(state.server[name], t + (last if top else low))

def test_a_straggler_sends_its_last_layers_and_a_run_resumes():
    seen, states = set(), [fllw.State(), fllw.State()]
    for state, rounds in ((states[0], 4), (states[1], 2), (states[1], 4)):
        devices = Devices(E2E, DATASET, ALL / 4, "salf", redraw=True)
        with fllw.reach_clients(E2E, DATASET) as reach:
            fllw.federate(E2E, DATASET, state, ask=partial(devices.ask, reach),
                          plan=lambda config, history: [STAGE] * (len(history) < rounds))
    for row in states[0].history:
        depths, _ = devices.finished(STAGE, row["round"], range(4))
        assert [answer["client"] for answer in row["answers"]] == [u for u in depths if depths[u]]
        for answer in row["answers"]:
            blocks = {fllw.block_of(name) for name in answer["missing"]} - {None}
            assert blocks == set(range(3 - depths[answer["client"]])) and answer["valid"]
        seen |= {*depths.values()}
    assert len(seen) > 2, seen
    assert all(torch.equal(t, states[1].server[name]) for name, t in states[0].server.items())
