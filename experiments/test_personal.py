"""Tests of personal.py against plain loops and other routes to the same numbers."""
import itertools
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import data
import experiments
import fllw
from experiments import personal
from experiments.personal import keep, layer_of

CLIENTS = personal.Settings(dim=8, depth=2, heads=2, clients=4, rounds=4, batch_size=4, lr=0.01,
                            method="e2e", device="cpu", augment="digits", alpha=0.5, classes=4)
LAYERS = ["embedding", "block 0", "block 1", "final norm", "classifier"]
PIXELS = torch.randint(0, 256, (96, 1, 14, 14), dtype=torch.uint8,
                       generator=torch.Generator().manual_seed(0))
DATASET = data.Dataset(PIXELS, torch.arange(96) % 4, PIXELS[:8], torch.arange(8) % 4)
PARTS, HELD = personal.divide(CLIENTS, DATASET.train_labels)
TRAIN = partial(personal.train_client, [DATASET.train_labels[part].numpy() for part in PARTS])
ASK = fllw.in_turn(CLIENTS, PIXELS, PARTS, TRAIN)

def rounds_until(last, state=None, layers=(), trained=()):
    """(what clients received, trained, the State) after round `last`; the arguments stay."""
    state = state or fllw.State(fllw.initial(CLIENTS, DATASET.shape), [])
    state = fllw.State(dict(state.server), list(state.history))
    received, trained = {}, dict(trained)
    fllw.federate(replace(CLIENTS, rounds=last), DATASET, state,
                  ask=partial(keep, layers, received, trained, ASK))
    return received, trained, state

def same(one, other, names=None):
    return all(torch.equal(one[name], other[name]) for name in names or one.keys() | other.keys())

def test_a_round_against_a_plain_loop():
    """Cross entropy with AdamW at a constant rate, images as they are."""
    stage, start = fllw.stages(CLIENTS)[0], fllw.initial(CLIENTS, DATASET.shape)
    upload, _ = TRAIN(CLIENTS, stage, start, PIXELS[PARTS[1]], 3, 1)
    learner, labels = fllw.assemble(CLIENTS, start, DATASET.shape), DATASET.train_labels[PARTS[1]]
    optimizer = torch.optim.AdamW(learner.parameters(), 0.01, weight_decay=CLIENTS.weight_decay)
    draws = fllw.generator(CLIENTS, "cpu", fllw.TRAINING, 3, 1)
    for chosen in torch.randperm(len(labels), generator=draws)[:len(labels) // 4 * 4].view(-1, 4):
        z = learner.head(learner.encoder(data.normalise(PIXELS[PARTS[1][chosen]])))
        optimizer.zero_grad()
        F.cross_entropy(z, labels[chosen]).backward()
        optimizer.step()
    for name, parameter in learner.named_parameters():
        if not name.endswith("qkv.bias"):  # the keys' bias moves no softmax: its gradient is 0
            torch.testing.assert_close(upload[name], parameter.detach(), rtol=1e-3, atol=2e-5)

def test_shared_layers_come_from_the_server_and_personal_ones_stay():
    _, trained, before = rounds_until(2)
    mine = {"encoder.norm.weight", "encoder.norm.bias", "head.weight", "head.bias"}
    shared, server = before.server.keys() - mine, before.server
    for number in (3, 4):
        received, later, after = rounds_until(number, before, ("final norm", "classifier"), trained)
        for client, message in received.items():
            assert same(message, before.server, shared) and same(message, trained[client], mine)
            assert not any(same(message, server, [name]) for name in mine)
        assert not any(same(after.server, before.server, [name]) for name in shared)
        assert same(after.server, server, mine)  # nobody sent them
        before, trained = after, later

def test_no_personal_layer_is_fedavg_and_all_of_them_are_local_training():
    (_, first, state), plain = rounds_until(2), fllw.State()
    fllw.federate(CLIENTS, DATASET, plain, ask=ASK)
    assert same(rounds_until(4, state, (), first)[2].server, plain.server)
    _, last, _ = rounds_until(4, state, LAYERS, first)
    for client, tensors in first.items():
        for number in (3, 4):
            tensors, _ = TRAIN(CLIENTS, fllw.stages(CLIENTS)[0], tensors, PIXELS[PARTS[client]],
                               number, client)
        assert same(tensors, last[client])

def test_conflicts_against_a_loop_over_pairs_in_any_order_of_clients():
    received, trained, _ = rounds_until(2)
    pairs, seen = list(itertools.combinations(received, 2)), set()
    for layer in LAYERS:
        expected = 0
        for pair in pairs:
            updates = [torch.cat([(received[c][n] - trained[c][n]).flatten()
                                  for n in trained[c] if layer_of(n) == layer]) for c in pair]
            expected += 100 * bool(F.cosine_similarity(*updates, dim=0) < 0) / len(pairs)
        for order in itertools.permutations(received):
            mixed = {client: received[client] for client in order}
            assert personal.conflicts(mixed, trained, layer) == pytest.approx(expected)
        seen.add(round(expected))
    assert len(seen) > 1

def test_held_back_images_have_the_label_mix_and_weigh_alike():
    labels, (received, trained, _), right = DATASET.train_labels, rounds_until(2), 0
    for alpha in (0.0, 0.5):
        for part, held in zip(*personal.divide(replace(CLIENTS, alpha=alpha), labels)):
            whole = torch.cat([part, held])
            assert len(whole.unique()) == len(whole) and (alpha or len(labels[whole].unique()) <= 2)
            quarter, tested = (labels[i].bincount(minlength=4) for i in (whole, held))
            assert ((tested - quarter / 4).abs() < 1).all()
    for client, tensors in trained.items():
        learner = fllw.assemble(CLIENTS, tensors, DATASET.shape)
        guesses = learner.head(learner.encoder(data.normalise(PIXELS[HELD[client]]))).argmax(1)
        right += (guesses == labels[HELD[client]]).sum().item()
    columns = personal.accuracies(CLIENTS, DATASET, HELD, received, trained)
    assert columns["after"] == pytest.approx(100 * right / sum(map(len, HELD)))

def test_the_command_saves_and_reads_back(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    monkeypatch.setattr(personal, "STARTS", {"FLL": "fll"})
    monkeypatch.setitem(personal.PRETRAINING, "rounds", 2)
    flags = ("--images 80 --clients 5 --dim 8 --depth 2 --heads 2 --rounds 4 --seeds 0 --workers 1 "
             f"--split two-classes --out {tmp_path}/run --save").split()
    personal.main([*flags, "first"])
    monkeypatch.setattr(fllw, "federate", None)  # not called again
    personal.main([*flags, "second"])
    rows, again = (json.loads((tmp_path / f"{name}.json").read_text())["rows"]
                   for name in ("first", "second"))
    assert rows == again and {"FLL: FedAvg", "FLL: FedPer", "FLL: FedLAG, top 3"} < rows.keys()
    block = rows["FLL: block 0"]
    assert block["conflicts"][0] == pytest.approx((block["round 1"][0] + block["round 2"][0]) / 2)
