"""Personal layers (FedLAG): which layers should each client of a federation keep to itself?

    python -m experiments.personal --split dirichlet --save personal-dirichlet

Clients with different label mixes fine-tune a pre-trained encoder and a linear classifier. A layer
conflicts where the updates of two clients have a negative cosine. FedLAG averages all layers for M
rounds and counts such pairs; then the top_k layers with most of them stay with the clients (Nguyen
et al. 2024, arXiv 2410.02845; the score is that of Recon, arXiv 2302.11289). As in the paper, not
as in its code (khanhkhanhlele/FedLAG), clients still receive the others. Unlike both, an update is
what a round of local SGD changed (received minus trained), and a layer is a block, the embedding,
the final norm or the classifier. Resuming: pre-training goes on from its last round; the personal
layers live in memory, so fine-tuning begins anew, for each seed and start that is not finished.
"""
import functools
import json
import os
import sys
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
import fllw
from experiments.compare import save, table

STARTS = {"FLL": "fll", "end to end": "e2e", "scratch": None}  # methods of pre-training
PRETRAINING = {"rounds": 32, "local_epochs": 2, "batch_size": 32, "lr": 2e-3}
DEFAULTS = {"images": 1000, "dim": 32, "rounds": 20, "batch_size": 16, "lr": 0.1, "clients": 20}
COLUMNS = {"before": ("before %", 1, 1), "before_std": ("± clients", 1, 1),
           "after": ("after %", 1, 1), "after_std": ("± clients", 1, 1)}

@dataclass(frozen=True)
class Supervised(fllw.Config):
    classes: int = 10
    def learner(self, image_shape):
        learner = super().learner(image_shape)
        learner.head = nn.Linear(self.dim, self.classes)
        return learner

def divide(config, labels):
    """(training, held-back) indices of each client's images: with --alpha from data.partition(),
    else two pieces of a class each (McMahan et al. 2017). A quarter is held back, class by class."""
    parts, classes = data.partition(labels, config.clients, config.alpha, config.seed), labels.unique()
    if config.alpha == 0:
        pieces = [piece for label in classes for piece in
                  (labels == label).nonzero()[:, 0].tensor_split(2 * config.clients // len(classes))]
        dealt = fllw.rng(config, 0).permutation(2 * config.clients).reshape(-1, 2)
        parts = [torch.cat([pieces[one], pieces[two]]) for one, two in dealt]
    ordered = [part[labels[part].argsort(stable=True)] for part in parts]
    held = [part[3::4] for part in ordered]
    return [part[torch.arange(len(part)) % 4 < 3] for part in ordered], held

def train_client(labels, parts, config, stage, message, images, round_number, client, progress=0.0):
    """A client's round with its labels[parts[client]]: cross entropy, SGD at a constant rate."""
    learner = fllw.receive(config, message, images.shape[1:], stage)
    optimizer = torch.optim.SGD(learner.parameters(), config.lr, momentum=0.9)
    draws = fllw.generator(config, images.device, fllw.TRAINING, round_number, client)
    own, losses = torch.from_numpy(labels[parts[client]]).to(images.device), []
    for _, chosen in fllw.local_batches(config, images, draws):
        logits = learner.head(learner.encoder(data.normalise(images[chosen])))
        losses.append(F.cross_entropy(logits, own[chosen]))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    return {name: p.detach() for name, p in learner.named_parameters()}, torch.stack(losses).detach()

def layer_of(name):
    """The layer that a learner's tensor of this name belongs to."""
    kinds = {"head": "classifier", "encoder.norm": "final norm"}
    block = fllw.block_of(name)
    return kinds.get(name.rpartition(".")[0], "embedding") if block is None else f"block {block}"

def count_conflicts(received, trained):
    """{layer: pairs of clients whose updates conflict}; both: client -> {name: tensor}."""
    counts = {}
    for layer in dict.fromkeys(map(layer_of, next(iter(trained.values())))):
        updates = torch.stack([torch.cat([(received[client][name] - new).double().flatten()
                                          for name, new in trained[client].items()
                                          if layer_of(name) == layer]) for client in received])
        products = updates @ updates.T  # [clients, clients], of the same signs as the cosines
        counts[layer] = int((products < 0).triu(1).sum())
    return counts

class Personal:
    """An `ask` around another: these layers stay with each client and are not uploaded.

    trained: client -> all that it trained last; its personal layers start from there, or else from
    what the server sends. All clients take part in every round."""
    def __init__(self, ask, layers=(), trained=()):
        self.ask, self.layers, self.trained = ask, layers, dict(trained)
        self.received, self.conflicts = {}, []  # by client, in this round; a count for every round

    def __call__(self, stage, round_number, progress, messages):
        for client, message in messages:
            own = {name: t for name, t in self.trained.get(client, {}).items()
                   if layer_of(name) in self.layers}
            self.received[client] = message | own
        for client, answer in self.ask(stage, round_number, progress, self.received.items()):
            self.trained[client] = answer.upload
            shared = {n: t for n, t in answer.upload.items() if layer_of(n) not in self.layers}
            yield client, answer._replace(upload=shared)
        self.conflicts.append(count_conflicts(self.received, self.trained))

@torch.no_grad()
def judge(config, dataset, held, personal):
    """Accuracy in % of each client on its own held-back images, before and after its last round:
    mean and standard deviation over clients, weighted by images. held: client -> indices."""
    row, sizes = {}, np.array([len(held[client]) for client in personal.received])
    for when, models in (("before", personal.received), ("after", personal.trained)):
        right = []
        for client in personal.received:
            learner = fllw.assemble(config, models[client], dataset.shape)
            images, labels = dataset.train_images[held[client]], dataset.train_labels[held[client]]
            guesses = learner.head(learner.encoder(data.normalise(images))).argmax(1)
            right.append((guesses == labels).sum().item())
        each, row[when] = 100 * np.array(right) / np.maximum(sizes, 1), 100 * sum(right) / sizes.sum()
        row[f"{when}_std"] = np.average((each - row[when])**2, weights=sizes)**0.5
    return row

def fine_tune(config, dataset, held, ask, server):
    """All rows of one seed and start, each of config.rounds rounds: {row: columns}."""
    R, M, tuned = config.rounds, min(config.rounds // 2, 30), config.rounds - config.rounds // 4
    every, fedavg = list(dict.fromkeys(map(layer_of, server))), Personal(ask)
    state, begin = fllw.State(server, []), {}
    for rounds in (0, M, tuned, R):  # rows that begin as FedAvg share its rounds, bit for bit
        fllw.federate(replace(config, rounds=rounds), dataset, state, ask=fedavg)
        begin[rounds] = dict(state.server), list(state.history), dict(fedavg.trained)
    rows = {"FedAvg": judge(config, dataset, held, fedavg)}
    rows["conflicts"] = {layer: [n[layer] for n in fedavg.conflicts] for layer in every}
    ranked = sorted(every, key=lambda layer: -sum(rows["conflicts"][layer][:M]))
    plan = {"local only": (0, every), "FedAvg, then fine-tuning": (tuned, every),
            "FedAvg, then local only": (M, every), "FedPer": (0, ["classifier"]),
            "FedLAG, top 1": (M, ranked[:1]), "FedLAG, top 3": (M, ranked[:3]),
            "the 3 with fewest conflicts": (M, ranked[-3:])}
    for name, (rounds, layers) in plan.items():
        server, history, trained = begin[rounds]
        personal = Personal(ask, layers, trained if rounds == M else {})  # else the server's
        fllw.federate(config, dataset, fllw.State(dict(server), list(history)), ask=personal)
        rows[name] = judge(config, dataset, held, personal) | {"personal": layers}
    return rows
