"""Tests of early_stopping.py, against a plain loop and arithmetic by hand."""
import pytest
import torch

import data
import fllw
from experiments import early_stopping
from experiments.test_experiments import SHAPE, TINY, images
from ssl_loss import nt_xent

CONFIGS = {"cnn": early_stopping.CNNConfig(**TINY | {"rounds": 15, "lr": 0.05}),
           "vit": fllw.Config(**TINY | {"rounds": 15, "lr": 0.05})}

def bare_client(config, stage, message, own, number, client):
    """(what a client trains on nine tenths of its images, its loss on the other tenth)."""
    learner = fllw.learner_of(config, {n: t.clone() for n, t in message.items()}, SHAPE)
    (held, own), recipe = own.tensor_split([len(own) // 10]), data.RECIPES["digits"]
    views = data.two_views(held, recipe, torch.Generator().manual_seed(config.seed))
    loss = nt_xent(*learner.head(learner.encoder(views)).chunk(2), config.temperature).item()
    trained = {n: p for n, p in learner.named_parameters() if stage.trains(n)}
    optimizer = torch.optim.AdamW(trained.values(), 0.05, weight_decay=1e-4, fused=True)
    seed = fllw.rng(config, fllw.TRAINING, number, client).integers(2**63)
    draws = torch.Generator().manual_seed(int(seed))
    for chosen in torch.randperm(len(own), generator=draws)[:len(own) // 8 * 8].split(8):
        optimizer.zero_grad()
        fllw.local_step(config, learner, stage, data.two_views(own[chosen], recipe, draws))
        optimizer.step()
    return {n: p.detach() for n, p in trained.items()}, loss

@pytest.mark.parametrize("encoder", CONFIGS)
def test_a_run_against_a_plain_loop(encoder, monkeypatch):
    monkeypatch.setattr(early_stopping, "TOLERANCE", 0.05)
    monkeypatch.setattr(fllw, "result", lambda config, dataset, state: vars(state))
    config, clients, rounds, uploaded = CONFIGS[encoder], data.split(images(80), 2), [], 0
    fresh = range(3) if encoder == "cnn" else [0]  # the other blocks start as copies
    server = fllw.broadcast(fllw.initial(config, SHAPE), fresh)
    for stage in fllw.stages(config):
        fllw.grow(server, stage)
        best, failed = 99, 0
        while failed < 2 and rounds.count(stage.number) < 5:
            rounds.append(stage.number)
            message = fllw.broadcast(server, range(stage.stop))
            (a, first), (b, second) = [
                bare_client(config, stage, message, own, len(rounds), client)
                for client, own in enumerate(clients)]
            server |= {n: (a[n].double() + b[n].double()).float() / 2 for n in a}
            uploaded += sum(tensor.nbytes for tensor in a.values())
            better = (first + second) / 2 < best - 0.05
            best, failed = ((first + second) / 2, 0) if better else (best, failed + 1)
    found = early_stopping.measure(config, images(80), early_stopping.early_train, early=True)
    assert [row["stage"] for row in found["history"]] == rounds and 3 < len(rounds) < 15
    assert (found["rounds"], found["upload_bytes"]) == (len(rounds), uploaded)
    torch.testing.assert_close(found["server"], server)

def test_compute_of_the_cnn_by_hand():
    """14 x 14 pixels become 7 x 7, 4 x 4 and 2 x 2; 1 channel becomes 4, 8 and 16."""
    blocks, head = [49 * 9 * 1 * 4, 16 * 9 * 4 * 8, 4 * 9 * 8 * 16], 24 * (16 + 24 + 8)
    for stage in fllw.stages(CONFIGS["cnn"]):
        frozen, active = sum(blocks[:stage.first]), blocks[stage.first]
        macs = CONFIGS["cnn"].macs(stage, range(stage.stop), SHAPE)
        assert macs == 2 * (frozen + 3 * active + 3 * head)
