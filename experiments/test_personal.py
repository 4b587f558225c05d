"""Tests of personal.py, against plain loops."""
import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import fllw
from experiments import personal
from experiments.test_experiments import TINY, images

CONFIG = fllw.Config(**TINY | dict(method="e2e", clients=4, rounds=6, alpha=0.5, lr=0.01))
PIXELS, LABELS = images(96)[:2]
TRAINING, HELD = personal.divide(CONFIG, LABELS)
MODEL = personal.begin(CONFIG, images(96), TRAINING, "scratch")
LAYERS = ["embedding", "block 0", "block 1", "block 2", "final norm", "classifier"]

def bare_fedlag(shared, chosen):
    """By the paper: models before and after the last round, and pairs of clients in conflict."""
    server, score, model = dict(MODEL.state_dict()), dict.fromkeys(LAYERS, 0), copy.deepcopy(MODEL)
    after = [dict(server) for _ in TRAINING]
    for number in range(1, 7):
        keep = sorted(LAYERS, key=score.get, reverse=True)[chosen] if number > shared else []
        before = [{n: own[n] if personal.layer_of(n) in keep else server[n] for n in server}
                  for own in after]
        for client, part in enumerate(TRAINING):
            model.load_state_dict(before[client])
            optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=1e-4)
            order = fllw.rng(CONFIG, fllw.TRAINING, number, client).permutation(len(part))
            for start in range(0, len(part), 8):
                batch = part[torch.from_numpy(order[start:start + 8])]
                optimizer.zero_grad()
                z = model.head(model.encoder(data.normalise(PIXELS[batch])))
                F.cross_entropy(z, LABELS[batch]).backward()
                optimizer.step()
            after[client] = {n: tensor.clone() for n, tensor in model.state_dict().items()}
        for layer, pair in itertools.product(LAYERS, itertools.combinations(after, 2)):
            moves = [torch.cat([(own[n] - server[n]).flatten() for n in server
                                if personal.layer_of(n) == layer]) for own in pair]
            score[layer] += number <= shared and F.cosine_similarity(*moves, dim=0).item() < 0
        for n in [n for n in server if personal.layer_of(n) not in keep]:
            total = sum(len(part) * own[n].double() for part, own in zip(TRAINING, after))
            server[n] = (total / sum(map(len, TRAINING))).float()
    return before, after, score

@pytest.mark.parametrize("share, chosen", personal.ROWS.values())
def test_a_run_against_plain_loops(share, chosen, monkeypatch):
    before, after, score = bare_fedlag(share * 6, chosen)
    models, clone = [], copy.deepcopy
    monkeypatch.setattr(personal.copy, "deepcopy", lambda m: models.append(clone(m)) or models[-1])
    columns, scores = personal.run(CONFIG, MODEL, images(96), TRAINING, HELD, share, chosen)
    torch.testing.assert_close([dict(model.state_dict()) for model in models], after)
    assert {layer: round(found * 6 / 100) for layer, found in scores.items()} == score
    for when, tensors in (("before", before), ("after", after)):
        right = []
        for part, own in zip(HELD, tensors):
            models[0].load_state_dict(own)
            guesses = models[0].head(models[0].encoder(data.normalise(PIXELS[part]))).argmax(1)
            right.append(100 * (guesses == LABELS[part]).double().numpy())
        assert columns[when] == pytest.approx(np.concatenate(right).mean())

def test_a_quarter_of_each_class_is_held_back():
    assert len(TRAINING) == 4 and sorted(torch.cat(TRAINING + HELD).tolist()) == list(range(96))
    for part, back in zip(TRAINING, HELD):
        tested, whole = (LABELS[i].bincount(minlength=5) for i in (back, torch.cat([part, back])))
        assert ((tested - whole / 4).abs() < 1).all()
