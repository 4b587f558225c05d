"""Tests of personal.py against plain loops and other routes to the same numbers."""
import contextlib
import itertools
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import experiments
import fllw
from experiments import personal
from experiments.personal import Personal, layer_of

CLIENTS = personal.Settings(dim=8, depth=2, heads=2, clients=4, rounds=4, batch_size=4, lr=0.01,
                            method="e2e", device="cpu", augment="digits", alpha=0.5, classes=4,
                            optimizer="sgd")
LAYERS = ["embedding", "block 0", "block 1", "final norm", "classifier"]
PIXELS = torch.randint(0, 256, (96, 1, 14, 14), dtype=torch.uint8,
                       generator=torch.Generator().manual_seed(0))
DATASET = data.Dataset(PIXELS, torch.arange(96) % 4, PIXELS[:8], torch.arange(8) % 4)
PARTS, HELD = personal.divide(CLIENTS, DATASET.train_labels)
TRAIN = partial(personal.train_client, DATASET.train_labels.numpy(), [p.numpy() for p in PARTS])
ASK = fllw.in_turn(CLIENTS, PIXELS, PARTS, TRAIN)

def rounds_until(last, state=None, layers=(), trained=()):
    """(the Personal, the State) after round `last`; the arguments stay as they are."""
    state = state or fllw.State(fllw.initial(CLIENTS, DATASET.shape), [])
    state, ask = fllw.State(dict(state.server), list(state.history)), Personal(ASK, layers, trained)
    fllw.federate(replace(CLIENTS, rounds=last), DATASET, state, ask=ask)
    return ask, state

def same(one, other, names=None):
    return all(torch.equal(one[name], other[name]) for name in names or one.keys() | other.keys())

def test_shared_layers_come_from_the_server_and_personal_ones_stay():
    ask, state = rounds_until(2)
    mine = {"encoder.norm.weight", "encoder.norm.bias", "head.weight", "head.bias"}
    shared, before, trained = state.server.keys() - mine, state, ask.trained
    for number in (3, 4):
        ask, after = rounds_until(number, before, ("final norm", "classifier"), trained)
        for client, received in ask.received.items():
            assert same(received, before.server, shared) and same(received, trained[client], mine)
            assert not any(same(received, state.server, [name]) for name in mine)
        assert not any(same(after.server, before.server, [name]) for name in shared)
        assert same(after.server, state.server, mine)  # nobody sent them
        before, trained = after, ask.trained

def test_no_personal_layer_is_fedavg_and_all_of_them_are_local_training():
    (first, state), plain = rounds_until(2), fllw.State({}, [])
    fllw.federate(CLIENTS, DATASET, plain, ask=ASK)
    assert same(rounds_until(4, state, (), first.trained)[1].server, plain.server)
    ask, _ = rounds_until(4, state, LAYERS, first.trained)
    for client, tensors in first.trained.items():
        for number in (3, 4):
            tensors, _ = TRAIN(CLIENTS, fllw.stages(CLIENTS)[0], tensors, PIXELS[PARTS[client]],
                               number, client)
        assert same(tensors, ask.trained[client])

def test_conflicts_against_a_loop_over_pairs_in_any_order_of_clients():
    ask, _ = rounds_until(2)
    received, trained, expected = ask.received, ask.trained, dict.fromkeys(LAYERS, 0)
    for layer, pair in itertools.product(LAYERS, itertools.combinations(received, 2)):
        updates = [torch.cat([(received[c][n] - trained[c][n]).flatten()
                              for n in trained[c] if layer_of(n) == layer]) for c in pair]
        expected[layer] += bool(F.cosine_similarity(*updates, dim=0) < 0)
    assert ask.conflicts[-1] == expected and len(set(expected.values())) > 1
    for order in itertools.permutations(received):
        mixed = {client: received[client] for client in order}
        assert personal.count_conflicts(mixed, trained) == expected

def test_held_back_images_have_the_label_mix_and_weigh_alike():
    labels, (ask, _), each = DATASET.train_labels, rounds_until(2), []
    for alpha in (0.0, 0.5):
        for part, held in zip(*personal.divide(replace(CLIENTS, alpha=alpha), labels)):
            whole = torch.cat([part, held])
            assert len(whole.unique()) == len(whole) and (alpha or len(labels[whole].unique()) <= 2)
            quarter, tested = (labels[i].bincount(minlength=4) for i in (whole, held))
            assert ((tested - quarter / 4).abs() < 1).all()
    for client, tensors in ask.trained.items():
        learner = fllw.assemble(CLIENTS, tensors, DATASET.shape)
        guesses = learner.head(learner.encoder(data.normalise(PIXELS[HELD[client]]))).argmax(1)
        hit = 100 * (guesses == labels[HELD[client]]).double().mean().item()
        each += [hit] * len(HELD[client])  # once for each of the client's images
    columns = personal.judge(CLIENTS, DATASET, HELD, ask)
    assert (columns["after"], columns["after_std"]) == pytest.approx((np.mean(each), np.std(each)))

def test_the_command_saves_and_reads_back(tmp_path, monkeypatch):
    @contextlib.contextmanager
    def here(config, images, parts, workers, train_client=fllw.local_train):
        yield fllw.in_turn(config, images, parts, train_client)
    monkeypatch.setattr(fllw, "in_processes", here)
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    monkeypatch.setattr(personal, "STARTS", {"FLL": "fll"})
    monkeypatch.setitem(personal.PRETRAINING, "rounds", 2)
    flags = ("--images 80 --clients 5 --dim 8 --depth 2 --heads 2 --rounds 4 --seeds 0 --split "
             f"two-classes --out {tmp_path}/run --save").split()
    personal.main([*flags, "first"])
    monkeypatch.setattr(personal, "fine_tune", None)  # not called again
    personal.main([*flags, "second"])
    rows, again = (json.loads((tmp_path / f"{name}.json").read_text())["rows"]
                   for name in ("first", "second"))
    assert rows == again and {"FLL: FedAvg", "FLL: FedPer", "FLL: FedLAG, top 3"} < rows.keys()
    block = rows["FLL: block 0"]
    assert block["conflicts"][0] == pytest.approx((block["round 1"][0] + block["round 2"][0]) / 2)
