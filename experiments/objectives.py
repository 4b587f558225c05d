"""Other objectives under the same stages: BYOL, MoCo v3 and VICReg beside NT-Xent.

Tun et al. 2024 (LW-FedSSL, arXiv 2401.11647) train layer by layer with SimCLR, MoCo v3 (Chen et
al. 2021, 2104.02057) and BYOL (Grill et al. 2020, 2006.07733); VICReg (Bardes et al. 2022,
2105.04906) needs no negatives, predictor or momentum encoder. That encoder copies the active part
alone; the frozen part is shared and runs once. What differs from the papers: it starts each round
from what the client received, its momentum is constant, and head, batch norm and learning rate are
those of fllw.py throughout. Exact resume holds as in fllw.py.
"""
import functools
import json
import math
import sys
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

import data
import fllw
from experiments.compare import save, table
from ssl_loss import contrastive_step

MOMENTUM = 0.99  # where MoCo v3 starts; BYOL starts from 0.996, over far more steps

@dataclass(frozen=True)
class Settings(fllw.Config):
    objective: str = "nt_xent"

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
        return fllw.macs(replace(self, micro_batch=1), stage, kept, image_shape) + 2 * more

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

def vicreg(z):
    """25 invariance + 25 variance + 1 covariance, as in the paper's algorithm 1. z: [2B, D]."""
    first, second = z.float().chunk(2)
    loss = 25 * F.mse_loss(first, second)
    for view in (first - first.mean(0), second - second.mean(0)):  # [B, D]
        covariance = view.T @ view / (len(view) - 1)  # [D, D]
        variance = covariance.diagonal()
        loss = loss + 25 * F.relu(1 - (variance + 1e-4).sqrt()).mean()
        loss = loss + (covariance.square().sum() - variance.square().sum()) / len(variance)
    return loss

def vicreg_step(frozen, active, head, views, criterion, micro_batch):
    return contrastive_step(frozen, active, head, views, vicreg, micro_batch)

def momentum_train(config, stage, message, images, number, client, progress=0.0):
    """A client's work with BYOL or MoCo v3; arguments, batches and result of fllw.local_train."""
    learner = fllw.receive(config, message, images.shape[1:], stage)
    trained = {name: p for name, p in learner.named_parameters() if p.requires_grad}
    shared = {name: p for name, p in learner.named_parameters() if not p.requires_grad}
    target = fllw.assemble(config, message, images.shape[1:]).requires_grad_(False)
    target.load_state_dict(shared, strict=False, assign=True)
    del target.head.predictor
    averages = {name: p for name, p in target.named_parameters() if name in trained}
    optimizer = torch.optim.AdamW(trained.values(), config.lr, weight_decay=config.weight_decay,
                                  fused=True)
    frozen, active, head = fllw.in_three(config, learner, stage)
    _, target_active, target_head = fllw.in_three(config, target, stage)
    draws = fllw.generator(config, images.device, fllw.TRAINING, number, client)
    batch = min(config.batch_size, len(images))
    steps, losses = len(images) // batch, []
    for epoch in range(config.local_epochs):
        order = torch.randperm(len(images), device=images.device, generator=draws)
        for chosen in order[:steps * batch].view(steps, batch):
            done = progress + len(losses) / (config.local_epochs * steps) / stage.rounds
            optimizer.param_groups[0]["lr"] = config.lr * (1 + math.cos(math.pi * done)) / 2
            optimizer.zero_grad()
            x = frozen(data.two_views(images[chosen], data.RECIPES[fllw.recipe(config)], draws))
            with torch.no_grad():
                targets = target_head(target_active(x)).float()
            loss = LOSSES[config.objective](head(active(x)).float(), targets, config.temperature)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            with torch.no_grad():
                for name, average in averages.items():
                    average.lerp_(trained[name], 1 - MOMENTUM)
    return {name: p.detach() for name, p in trained.items()}, torch.stack(losses)

LOSSES = {"byol": byol, "moco_v3": moco_v3}  # those with a momentum encoder and a predictor
CLIENTS = {"nt_xent": fllw.local_train, "moco_v3": momentum_train, "byol": momentum_train,
           "vicreg": functools.partial(fllw.local_train, step=vicreg_step)}

def run(config, dataset):
    client = CLIENTS[config.objective]
    with fllw.run_folder(config, dataset, "objectives") as (folder, state):
        if (folder / "summary.json").exists():
            return json.loads((folder / "summary.json").read_text())
        encoder, history = fllw.train(config, dataset, folder, state, client=client)
        row = fllw.result(config, dataset, encoder, history, client)
        fllw.write(folder / "summary.json", row)
        return row

def main(arguments=None):
    parser = fllw.Parser(__doc__.split("\n\n")[0], prog="python -m experiments.objectives")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help="instead of --seed;"
                        " none: costs alone, without training")
    given = vars(parser.parse_args(arguments))
    for fixed in {"method", "micro_batch", "seed"} & given.keys():
        raise data.InputError(f"--{fixed.replace('_', '-')} differs from row to row or is fixed")
    seeds, rows, out = given.pop("seeds"), {}, given.pop("out", "runs/objectives")
    config = Settings(**{"images": 1000, "rounds": 16, "depth_dropout": 0.0, **given})
    dataset = data.load(config.data, config.cache, config.images)
    for objective in CLIENTS:
        for method, depth in (("e2e", config.depth), ("e2e", 1), ("fll", config.depth)):
            one = replace(config, objective=objective, method=method, depth=depth)
            fllw.check(replace(one, seed=min(seeds, default=0)))
            done = [run(replace(one, seed=seed, out=f"{out}/{objective}-{method}-{depth}-{seed}"),
                        dataset) for seed in seeds]
            done = done or [fllw.cost(one, dataset.shape, client=CLIENTS[objective])]
            name = f"{objective} {fllw.label(one)}" + ", one block" * (depth == 1)
            rows[name] = {column: [row[column] for row in done] for column in done[0]}
    print(table(rows))
    if seeds:
        save("objectives", "python -m experiments.objectives " + " ".join(sys.argv[1:]), rows)

if __name__ == "__main__":
    fllw.command(main)
