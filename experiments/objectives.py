"""Do other objectives train layer by layer as well? BYOL and MoCo v3 beside NT-Xent.

    python -m experiments.objectives

Not in so short a training: in k-NN FLL is 12 points behind one block under MoCo v3, 4 behind it
under NT-Xent. BYOL learns little in so few rounds, with one block or with FLL.

Tun et al. 2024 (LW-FedSSL, arXiv 2401.11647) use SimCLR, MoCo v3 (Chen et al. 2021, 2104.02057) and
BYOL (Grill et al. 2020, 2006.07733). What differs: a momentum encoder copies only what trains (the
frozen part is shared and runs once), starts each round from what the client received, with a
constant momentum; head and rate are those of fllw.py."""
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

LOSSES = {"moco_v3": moco_v3, "byol": byol}

class Learner(fllw.Learner):  # its head ends in a predictor
    def __init__(self, config, image_shape, blocks):
        super().__init__(config, image_shape, blocks)
        self.head.predictor = nn.Sequential(
            nn.Linear(config.head_dim, config.head_hidden, bias=False),
            nn.BatchNorm1d(config.head_hidden, track_running_stats=False), nn.ReLU(),
            nn.Linear(config.head_hidden, config.head_dim, bias=False))

@dataclass(frozen=True)
class Settings(fllw.Config):
    objective: str = "byol"  # a key of LOSSES
    learner = Learner

    def macs(self, stage, kept, image_shape):
        """Also the predictor, 3x, and the target's forward pass: what micro-batches add."""
        head = self.head_hidden * (self.dim + self.head_hidden + self.head_dim)
        predictor = 2 * self.head_hidden * self.head_dim
        twice = fllw.count_macs(replace(self, micro_batch=1), stage, kept, image_shape)
        return twice + 2 * (head + 3 * predictor)

def step_with_targets(loss_of, momentum):
    """A local step of one client in one round: fllw.local_step() with a loss of projections and
    targets, both [2B, D]. Targets are projections by another model: a copy of the one received, of
    what trains, without predictor. Before each step it follows: momentum 1 leaves it as it was."""
    target = None

    def step(config, learner, stage, views):
        nonlocal target
        first = stage.first

        def project(model, x):  # tokens, or images where the embedding trains -> [2B, D]
            return model.head(model.encoder.upper(x, first) if first else model.encoder(x))

        with torch.no_grad():
            if target is None:
                upper = fllw.broadcast(learner.state_dict(), range(first, stage.stop))
                copies = {name: tensor.clone() for name, tensor in upper.items()}
                target = fllw.learner_of(config, copies, views.shape[1:])
                target.head.predictor = nn.Identity()
            for name, average in target.named_parameters():  # follow what the last step did
                average.lerp_(learner.get_parameter(name), 1 - momentum)
            x = learner.encoder.lower(views, first) if first else views
            targets = project(target, x)
        loss = loss_of(project(learner, x), targets, config.temperature)
        loss.backward()
        return loss.detach()
    return step

def train_client(config, stage, message, images, round_number, client):
    """A client's work: fllw.local_train() with the objective's loss."""
    step = step_with_targets(LOSSES[config.objective], MOMENTUM)
    return fllw.local_train(config, stage, message, images, round_number, client, step)

def rows_of(config, dataset):
    """The rows of the table with one seed: yields (name, columns)."""
    clients = data.split(dataset, config.clients, config.alpha, config.seed)
    for objective in ("nt_xent", *LOSSES):
        for name, depth in (("one block", 1), ("FLL", config.depth)):
            row, train = replace(config, depth=depth), fllw.local_train
            if objective in LOSSES:
                row, train = Settings(**vars(row), objective=objective), train_client
            state = fllw.federate(row, clients, train_client=train)
            columns = fllw.result(row, dataset, state, train_client=train)
            yield f"{objective}, {name}", columns

def main(arguments=None):
    defaults = fllw.Config(images=1000, rounds=16, depth_dropout=0.0)
    experiments.command("objectives", __doc__, defaults, FIXED, rows_of, arguments)

if __name__ == "__main__":
    main()
