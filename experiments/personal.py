"""Personal layers (FedLAG): which layers should each client of a federation keep to itself?

    python -m experiments.personal --split dirichlet --save personal-dirichlet

Clients with different label mixes fine-tune a pre-trained encoder and a linear classifier. A layer
conflicts where the updates of two clients have a negative cosine. FedLAG averages all layers for M
rounds and counts such pairs; then the top_k layers with most of them stay with the clients (Nguyen
et al. 2024, arXiv 2410.02845; the score is that of Recon, arXiv 2302.11289). As in the paper, not
as in its code (khanhkhanhlele/FedLAG), clients still receive the others. Unlike both, an update is
what a round of local training changed (received minus trained weights), not a gradient, and a layer
is a block, the embedding, the final norm or the classifier. Resuming: pre-training goes on from its
last round; personal layers live in memory, so a fine-tuning (of one seed and start) that was
interrupted begins anew.
"""
import copy
import os
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
import fllw
from data import InputError
from experiments import once, parse, show

STARTS = {"FLL": "fll", "scratch": None, "end-to-end": "e2e"}  # pre-training; of e2e only FedAvg
PRETRAINING = {"rounds": 24, "local_epochs": 2, "batch_size": 16, "lr": 4e-3, "classes": 0,
               "optimizer": ""}
DEFAULTS = {"images": 2000, "dim": 32, "depth": 3, "clients": 20, "rounds": 20, "batch_size": 16,
            "lr": 0.01, "depth_dropout": 0.0, "method": "e2e", "alpha": 0.1}
COLUMNS = {"before": ("before %", 1, 1), "before_std": ("of clients", 1, 1),
           "after": ("after %", 1, 1), "after_std": ("of clients", 1, 1),
           "conflicts": ("conflicts %", 1, 1)}

OPTIMIZERS = {"adamw": partial(torch.optim.AdamW, fused=True),
              "sgd": partial(torch.optim.SGD, momentum=0.9)}

@dataclass(frozen=True)
class Settings(fllw.Config):
    classes: int = 0  # 0: a projection head
    optimizer: str = ""

    def learner(self, image_shape):
        learner = super().learner(image_shape)
        if self.classes:
            learner.head = nn.Linear(self.dim, self.classes)
        return learner

def divide(config, labels):
    """Each client's images for training, and a quarter of each class held back: lists of indices.
    alpha 0: two shards of the images sorted by label, about two classes (McMahan et al. 2017)."""
    parts = data.partition(labels, config.clients, config.alpha, config.seed)
    if config.alpha == 0:
        shards = labels.argsort(stable=True).tensor_split(2 * config.clients)
        dealt = fllw.rng(config, 0).permutation(len(shards)).reshape(-1, 2)
        parts = [torch.cat([shards[one], shards[two]]) for one, two in dealt]
    parts = [part[labels[part].argsort(stable=True)] for part in parts]
    return [part[torch.arange(len(part)) % 4 < 3] for part in parts], [p[3::4] for p in parts]

def train_client(labels, parts, config, stage, message, images, round_number, client, progress=0.0):
    """A client's round with its labels[parts[client]]: cross entropy, a constant rate."""
    learner = fllw.receive(config, message, images.shape[1:], stage)
    optimizer = OPTIMIZERS[config.optimizer](learner.parameters(), lr=config.lr,
                                             weight_decay=config.weight_decay)
    draws = fllw.generator(config, images.device, fllw.TRAINING, round_number, client)
    own, losses = torch.from_numpy(labels[parts[client]]).to(images.device), []
    for _, chosen in fllw.local_batches(config, images, draws):
        logits = learner.head(learner.encoder(data.normalise(images[chosen])))
        loss = F.cross_entropy(logits, own[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {name: p.detach() for name, p in learner.named_parameters()}, torch.stack(losses)

def layer_of(name):
    """The layer that a learner's tensor of this name belongs to."""
    kinds, block = {"head": "classifier", "encoder.norm": "final norm"}, fllw.block_of(name)
    return kinds.get(name.rpartition(".")[0], "embedding") if block is None else f"block {block}"

def count_conflicts(received, trained):
    """{layer: pairs of clients whose updates conflict}; both: client -> {name: tensor}."""
    counts = {}
    for layer in dict.fromkeys(map(layer_of, next(iter(trained.values())))):
        updates = [torch.cat([(received[client][name] - new).double().flatten()
                              for name, new in trained[client].items() if layer_of(name) == layer])
                   for client in received]
        products = torch.stack(updates) @ torch.stack(updates).T  # of the signs of the cosines
        counts[layer] = int((products < 0).triu(1).sum())
    return counts

class Personal:
    """An `ask` around another: these layers stay with each client and are not uploaded. They start
    from what it trained last (client -> {name: tensor}), if it is given, or from the server's."""
    def __init__(self, ask, layers=(), trained=()):
        self.ask, self.layers, self.trained = ask, layers, dict(trained)
        self.received, self.conflicts = {}, []  # by client, in the last round; of every round

    def __call__(self, stage, round_number, progress, messages):
        for client, message in messages:
            own = self.trained.get(client, {}).items()
            own = {name: tensor for name, tensor in own if layer_of(name) in self.layers}
            self.received[client] = message | own
        for client, answer in self.ask(stage, round_number, progress, self.received.items()):
            self.trained[client] = answer.upload
            shared = {n: t for n, t in answer.upload.items() if layer_of(n) not in self.layers}
            yield client, answer._replace(upload=shared)
        self.conflicts.append(count_conflicts(self.received, self.trained))

@torch.no_grad()
def judge(config, dataset, held, personal):
    """Accuracy in % of each client on its own held-back images, before and after its last round:
    mean and deviation over clients, weighted by images. held: client -> indices."""
    columns, sizes = {}, np.array([len(held[client]) for client in personal.received])
    for when, models in (("before", personal.received), ("after", personal.trained)):
        right = []
        for client in personal.received:
            learner = fllw.assemble(config, models[client], dataset.shape)
            z = learner.head(learner.encoder(data.normalise(dataset.train_images[held[client]])))
            right.append((z.argmax(1) == dataset.train_labels[held[client]]).sum().item())
        accuracies = 100 * np.array(right) / np.maximum(sizes, 1)
        columns[when] = mean = np.average(accuracies, weights=sizes)
        columns[f"{when}_std"] = np.average((accuracies - mean)**2, weights=sizes)**0.5
    return columns

def fine_tune(config, dataset, held, ask, server, every_row=True):
    """The rows of one seed and start, each of config.rounds rounds: {row: {column: number}}."""
    R, M, tuned = config.rounds, min(config.rounds // 2, 30), config.rounds - config.rounds // 4
    layers, fedavg = list(dict.fromkeys(map(layer_of, server))), Personal(ask)
    state, begin = fllw.State(server, []), {}
    for rounds in (0, M, tuned, R):  # rows that begin as FedAvg share its rounds, bit for bit
        fllw.federate(replace(config, rounds=rounds), dataset, state, ask=fedavg)
        begin[rounds] = copy.deepcopy((state, fedavg.trained))
    rows = {"FedAvg": judge(config, dataset, held, fedavg)}
    pairs = config.clients * (config.clients - 1) / 2
    for layer in layers:  # in % of the pairs
        shares = [100 * counts[layer] / pairs for counts in fedavg.conflicts]
        rows[layer] = {f"round {number}": share for number, share in enumerate(shares, 1)}
        rows[layer]["conflicts"] = np.mean(shares[:M])
    ranked = sorted(layers, key=lambda layer: -rows[layer]["conflicts"])  # or else by height
    plan = {"local only": (0, layers), "FedAvg, then fine-tuning": (tuned, layers),
            "FedAvg, then local only": (M, layers), "FedPer": (0, ["classifier"]),
            "FedLAG, top 1": (M, ranked[:1]), "FedLAG, top 3": (M, ranked[:3]),
            "the 3 with fewest conflicts": (M, ranked[-3:])}
    for name, (rounds, chosen) in plan.items() if every_row else ():
        state, trained = copy.deepcopy(begin[rounds])
        personal = Personal(ask, chosen, trained if rounds == M else ())  # or from the server's
        fllw.federate(config, dataset, state, ask=personal)
        rows[name] = judge(config, dataset, held, personal)
    return rows

def measure(config, dataset, start, out):
    """The rows of one seed and start, flat: {"row|column": number}."""
    training, held = divide(config, dataset.train_labels)
    server, folder = fllw.initial(config, dataset.shape), f"{out}/{start}-seed{config.seed}"
    reach = partial(fllw.in_processes, images=dataset.train_images, parts=training,
                    workers=config.workers or os.cpu_count())
    if STARTS[start]:
        one = replace(config, **PRETRAINING, method=STARTS[start], out=f"{folder}-encoder")
        with fllw.run_folder(one, dataset, "personal") as (path, state), reach(one) as ask:
            encoder, _ = fllw.train(one, dataset, path, state, ask=ask)
        server |= {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}

    def work(path, state):
        labels, parts = dataset.train_labels.numpy(), [part.numpy() for part in training]
        with reach(config, train_client=partial(train_client, labels, parts)) as ask:
            rows = fine_tune(config, dataset, held, ask, server, STARTS[start] != "e2e")
        return {f"{row}|{column}": float(x) for row in rows for column, x in rows[row].items()}
    return once(replace(config, out=folder), dataset, f"personal {start}", work)

def main(arguments=None):
    parser = fllw.Parser(__doc__.split("\n\n")[0], prog="python -m experiments.personal")
    parser.add_argument("--split", choices=("dirichlet", "two-classes"), default="dirichlet",
                        help="of the labels; dirichlet: --alpha, here 0.1 by default")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw",
                        help="of fine-tuning; for sgd try --lr 0.1 --local-epochs 4 --rounds 12")
    given = parse(parser, arguments, {"method", "seed", "clients_per_round"})
    seeds, split, name = given.pop("seeds"), given.pop("split"), given.pop("save")
    config = Settings(**DEFAULTS | given)
    if split == "two-classes":
        config = replace(config, alpha=0.0)
    out = config.out or f"runs/personal-{split}"
    for seed in seeds:
        fllw.validate(replace(config, seed=seed, method="fll"))
    dataset, rows = data.load(config.data, config.cache, config.images), {}
    if config.rounds < 4 or len(dataset.train_images) < 8 * config.clients:
        raise InputError("--rounds must be 4 or more, and there must be 8 images for each client")
    config = replace(config, classes=dataset.classes)
    for start in STARTS:
        for seed in seeds:
            for key, value in measure(replace(config, seed=seed), dataset, start, out).items():
                row, column = key.split("|")
                rows.setdefault(f"{start}: {row}", {}).setdefault(column, []).append(value)
    show(rows, name, "personal", COLUMNS)

if __name__ == "__main__":
    fllw.command(main)
