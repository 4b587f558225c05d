"""Do other objectives train layer by layer as well? BYOL, MoCo v3 and VICReg beside NT-Xent.

    python -m experiments.objectives

Stages work with all but BYOL, which learns little in so few rounds. Under each of them one block is
ahead of FLL, in so short a training.

Tun et al. 2024 (LW-FedSSL, arXiv 2401.11647) use SimCLR, MoCo v3 (Chen et al. 2021, 2104.02057) and
BYOL (Grill et al. 2020, 2006.07733); VICReg is by Bardes et al. 2022 (2105.04906). What differs: a
momentum encoder copies only what trains (the frozen part is shared and runs once), starts each
round from what the client received, with a constant momentum; head and rate are those of fllw.py.
"""
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

import data
import experiments
import fllw

FIXED = ("method", "micro_batch", "amp", "out")
MOMENTUM = 0.99  # where MoCo v3 starts; BYOL starts from 0.996, over far more steps

def byol(predictions, targets, temperature):
    """2 - 2 cos(prediction, target of the other view), mean over the 2B views. Both [2B, D]."""
    other = targets.roll(len(targets) // 2, 0)  # i -> i + B, mod 2B
    return (2 - 2 * F.cosine_similarity(predictions, other)).mean()

def moco_v3(predictions, targets, temperature):
    """2t times InfoNCE of each view's predictions among the B targets of the other, summed."""
    q1, q2 = F.normalize(predictions, dim=1).chunk(2)
    k1, k2 = F.normalize(targets, dim=1).chunk(2)
    own = torch.arange(len(q1), device=q1.device)
    loss = F.cross_entropy(q1 @ k2.T / temperature, own)
    return 2 * temperature * (loss + F.cross_entropy(q2 @ k1.T / temperature, own))

def vicreg(z, targets, temperature):
    """25 invariance + 25 variance + 1 covariance of z [2B, D] alone: the paper's algorithm 1."""
    first, second = z.chunk(2)
    loss = 25 * F.mse_loss(first, second)
    for view in (first - first.mean(0), second - second.mean(0)):  # [B, D]
        covariance = view.T @ view / (len(view) - 1)  # [D, D]
        variance = covariance.diagonal()
        loss = loss + 25 * F.relu(1 - (variance + 1e-4).sqrt()).mean()
        loss = loss + (covariance.square().sum() - variance.square().sum()) / len(variance)
    return loss

LOSSES = {"vicreg": vicreg, "moco_v3": moco_v3, "byol": byol}  # beside NT-Xent
FOLLOWED = ("moco_v3", "byol")  # those with a momentum encoder and a predictor

class Learner(fllw.Learner):  # with a momentum encoder its head ends in a predictor
    def __init__(self, config, image_shape, blocks):
        super().__init__(config, image_shape, blocks)
        if config.objective in FOLLOWED:
            self.head.predictor = nn.Sequential(
                nn.Linear(config.head_dim, config.head_hidden, bias=False),
                nn.BatchNorm1d(config.head_hidden, track_running_stats=False), nn.ReLU(),
                nn.Linear(config.head_hidden, config.head_dim, bias=False))

@dataclass(frozen=True)
class Settings(fllw.Config):
    objective: str = "nt_xent"  # "nt_xent", or a key of LOSSES
    learner = Learner

    def macs(self, stage, kept, image_shape):
        """Also the predictor, 3x, and the target's forward pass: what micro-batches add."""
        if self.objective not in FOLLOWED:
            return super().macs(stage, kept, image_shape)
        head = self.head_hidden * (self.dim + self.head_hidden + self.head_dim)
        predictor = 2 * self.head_hidden * self.head_dim
        twice = fllw.count_macs(replace(self, micro_batch=1), stage, kept, image_shape)
        return twice + 2 * (head + 3 * predictor)

def momentum_encoder(config, learner, stage, image_shape):
    """A copy of a learner, as the targets' model starts: no predictor, and no frozen block."""
    upper = fllw.broadcast(learner.state_dict(), range(stage.first, stage.stop))
    copies = {name: tensor.clone() for name, tensor in upper.items()}
    target = fllw.learner_of(config, copies, image_shape).requires_grad_(False)
    del target.head.predictor
    return target

def new_step(objective):
    """A local step of one client in one round: fllw.local_step() with another loss."""
    target = None

    def step(config, learner, stage, views):
        nonlocal target
        first, targets = stage.first, None

        def project(model, x):  # tokens, or images where the embedding trains -> [2B, D]
            return model.head(model.encoder.upper(x, first) if first else model.encoder(x))

        with torch.no_grad():
            x = learner.encoder.lower(views, first) if first else views
            if objective in FOLLOWED:
                target = target or momentum_encoder(config, learner, stage, views.shape[1:])
                for name, average in target.named_parameters():  # follow what the last step did
                    average.lerp_(learner.get_parameter(name), 1 - MOMENTUM)
                targets = project(target, x)
        loss = LOSSES[objective](project(learner, x), targets, config.temperature)
        loss.backward()
        return loss.detach()
    return step

def train_client(config, stage, message, images, round_number, client):
    """A client's work: fllw.local_train() with the objective's loss."""
    step = None if config.objective == "nt_xent" else new_step(config.objective)
    return fllw.local_train(config, stage, message, images, round_number, client, step)

def main(arguments=None):
    parser = experiments.make_parser("objectives", __doc__)
    with data.sentences(parser):
        given = vars(parser.parse_args(arguments))
        config = Settings(images=1000, rounds=16, depth_dropout=0.0)
        config, flags = experiments.settings(config, given, FIXED)
        dataset, rows = data.load(config.data, config.cache, config.images), {}
        for objective in ("nt_xent", *LOSSES):
            for name, depth in (("one block", 1), ("FLL", config.depth)):
                for seed in flags["seeds"]:
                    row = replace(config, objective=objective, depth=depth, seed=seed)
                    clients = data.split(dataset, row.clients, row.alpha, seed)
                    state = fllw.federate(row, clients, train_client=train_client)
                    columns = fllw.result(row, dataset, state, train_client=train_client)
                    experiments.add(rows, f"{objective}, {name}", columns)
        experiments.show("objectives", rows, flags["save"])

if __name__ == "__main__":
    main()
