"""Do other objectives train layer by layer as well? BYOL, MoCo v3 and VICReg beside NT-Xent.

    python -m experiments.objectives
    python -m experiments.objectives --seeds           # no seed: what they cost, without training

Tun et al. 2024 (LW-FedSSL, arXiv 2401.11647) use SimCLR, MoCo v3 (Chen et al. 2021, 2104.02057) and
BYOL (Grill et al. 2020, 2006.07733). VICReg (Bardes et al. 2022, 2105.04906) needs no negatives, no
predictor and no momentum encoder. The momentum encoder copies the active part alone; the frozen
part is shared and runs once. What differs from the papers: it starts each round from what the
client received, its momentum is constant, and head, batch norm and learning rate are those of
fllw.py throughout. Rerun the command to resume.
"""
if not __package__:  # as a script, it would not find fllw.py
    raise SystemExit("run this from the repository's folder: python -m experiments.objectives")

import functools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

import data
import fllw
from experiments import once, parse, show

MOMENTUM = 0.99  # where MoCo v3 starts; BYOL starts from 0.996, over far more steps

@dataclass(frozen=True)
class Settings(fllw.Config):
    objective: str = "nt_xent"  # a key of CLIENTS

    def learner(self, image_shape):  # with a momentum encoder its head ends in a predictor
        learner = super().learner(image_shape)
        if self.objective in LOSSES:
            learner.head.predictor = nn.Sequential(
                nn.Linear(self.head_dim, self.head_hidden, bias=False),
                nn.BatchNorm1d(self.head_hidden, track_running_stats=False), nn.ReLU(),
                nn.Linear(self.head_hidden, self.head_dim, bias=False))
        return learner

    def macs(self, stage, kept, image_shape):
        """Also the predictor, 3x, and the target's forward pass: what micro-batches add."""
        if self.objective not in LOSSES:
            return super().macs(stage, kept, image_shape)
        head = self.head_hidden * (self.dim + self.head_hidden + self.head_dim)
        more = head + 3 * 2 * self.head_hidden * self.head_dim
        return fllw.count_macs(replace(self, micro_batch=1), stage, kept, image_shape) + 2 * more

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

def vicreg(config, z, chunks=None):
    """25 invariance + 25 variance + 1 covariance, as in the paper's algorithm 1. z: [2B, D]."""
    first, second = z.float().chunk(2)
    loss = 25 * F.mse_loss(first, second)
    for view in (first - first.mean(0), second - second.mean(0)):  # [B, D]
        covariance = view.T @ view / (len(view) - 1)  # [D, D]
        variance = covariance.diagonal()
        loss = loss + 25 * F.relu(1 - (variance + 1e-4).sqrt()).mean()
        loss = loss + (covariance.square().sum() - variance.square().sum()) / len(variance)
    return loss

def momentum_train(config, stage, message, images, round_number, client, progress=0.0):
    """A client's work with BYOL or MoCo v3. Arguments and result are those of fllw.local_train."""
    first, shape = min(stage.active), images.shape[1:]
    learner = fllw.assemble(config, message, shape, stage.trains)
    trained = {name: p for name, p in learner.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), weight_decay=config.weight_decay, fused=True)

    # The target has no predictor, and none of the frozen blocks: it reads the learner's tokens.
    upper_part = fllw.broadcast(message, [b for b in stage.present if b >= first])
    target = fllw.assemble(config, upper_part, shape).requires_grad_(False)
    del target.head.predictor
    averages = {name: p for name, p in target.named_parameters() if name in trained}

    def project(model, x):  # tokens, or images where the embedding trains -> float32 [2B, D]
        features = model.encoder.upper(x, first) if first else model.encoder(x)
        return model.head(features).float()

    draws = fllw.generator(config, images.device, fllw.TRAINING, round_number, client)
    autocast = torch.autocast(images.device.type, torch.bfloat16, enabled=config.amp)
    recipe, losses = data.RECIPES[fllw.recipe_name(config)], []
    for share, chosen in fllw.local_batches(config, images, draws):
        share_of_stage = progress + share / stage.rounds
        optimizer.param_groups[0]["lr"] = fllw.learning_rate(config, share_of_stage)
        optimizer.zero_grad()
        x = data.two_views(images[chosen], recipe, draws)
        with autocast:
            with torch.no_grad():
                x = learner.encoder.lower(x, first) if first else x
                targets = project(target, x)
            predictions = project(learner, x)
        loss = LOSSES[config.objective](predictions, targets, config.temperature)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        with torch.no_grad():
            for name, average in averages.items():
                average.lerp_(trained[name], 1 - MOMENTUM)
    return {name: p.detach() for name, p in trained.items()}, torch.stack(losses)

LOSSES = {"byol": byol, "moco_v3": moco_v3}  # those with a momentum encoder and a predictor
CLIENTS = {"nt_xent": fllw.local_train, "moco_v3": momentum_train, "byol": momentum_train,
           "vicreg": functools.partial(fllw.local_train, criterion=vicreg)}

def run(config, dataset):
    """The columns of a row with one seed."""
    train_client = CLIENTS[config.objective]

    def work(folder, state):
        encoder, history = fllw.train(config, dataset, folder, state, train_client)
        return fllw.result(config, dataset, encoder, history, train_client)
    return once(config, dataset, "objectives", work)

def main(arguments=None):
    parser = fllw.Parser(__doc__.split("\n\n")[0], prog="python -m experiments.objectives")
    given = parse(parser, arguments, {"method", "micro_batch", "seed"}, seeds="*")
    seeds, name, out = given.pop("seeds"), given.pop("save"), given.pop("out", "runs/objectives")
    config = Settings(**{"images": 1000, "rounds": 16, "depth_dropout": 0.0, **given})
    for seed in seeds or [0]:
        fllw.validate(replace(config, seed=seed))
    dataset, rows = data.load(config.data, config.cache, config.images), {}
    for objective in CLIENTS:
        for method, depth in (("e2e", config.depth), ("e2e", 1), ("fll", config.depth)):
            one = replace(config, objective=objective, method=method, depth=depth)
            folder = f"{out}/{objective}-{method}-{depth}"
            done = [run(replace(one, seed=seed, out=f"{folder}-{seed}"), dataset) for seed in seeds]
            done = done or [fllw.cost(one, dataset.shape, train_client=CLIENTS[objective])]
            key = f"{objective} {fllw.label(one)}" + ", one block" * (depth == 1)
            rows[key] = {column: [row[column] for row in done] for column in done[0]}
    show(rows, name, "objectives")

if __name__ == "__main__":
    fllw.command(main)
