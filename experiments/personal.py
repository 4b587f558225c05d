"""Personal layers (FedLAG): which layers should each client of a federation keep to itself?

    python -m experiments.personal --split dirichlet

Clients with different label mixes fine-tune an encoder and a linear classifier. Two conflict in a
layer if the cosine of their updates is negative. FedLAG (Nguyen et al. 2024, arXiv 2410.02845; the
score is Recon's, 2302.11289) averages all layers for M rounds; then the top_k layers with most
conflicts stay with the clients. As in the paper, not as in its code (khanhkhanhlele/FedLAG), they
still receive the others. Unlike both, an update is what a round changed, no gradient; a layer is a
block, the embedding, the final norm or the classifier. An interrupted start begins anew."""
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

import data
import fllw
from experiments import add, once, settings, show

STARTS = {"FLL": "fll", "scratch": None, "end-to-end": "e2e"}  # pre-training; of e2e only FedAvg
PRETRAINING = {"rounds": 18, "local_epochs": 2, "batch_size": 16, "lr": 4e-3, "classes": 0}
COLUMNS = {c: (f"{c} %", 1, 1) for c in "before before_sd after after_sd conflicts".split()}

@dataclass(frozen=True)
class Settings(fllw.Config):
    classes: int = 0  # of a linear classifier; 0: a projection head

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

def train_client(labels, config, stage, message, images, round_number, client, progress=0.0):
    """fllw.local_train() with labels[client]: cross entropy, no views, a constant rate."""
    own = torch.from_numpy(labels[client]).to(images.device)
    draws = fllw.generator(config, images.device, fllw.TRAINING, round_number, client)
    batches = fllw.local_batches(config, images, draws)  # those of local_train()
    return fllw.local_train(
        config, replace(stage, rounds=10**9), message, images, round_number, client,  # no decay
        make_views=lambda images, recipe, draws: data.normalise(images),
        criterion=lambda config, z, _: nn.functional.cross_entropy(z, own[next(batches)[1]]))

def layer_of(name):
    """The layer that a learner's tensor of this name belongs to."""
    kinds, block = {"head": "classifier", "encoder.norm": "final norm"}, fllw.block_of(name)
    return kinds.get(name.rpartition(".")[0], "embedding") if block is None else f"block {block}"

def conflicts(received, trained, layer):
    """Which pairs of clients conflict in a layer, in %; both: client -> {name: tensor}."""
    updates = torch.stack([torch.cat([(old[name] - trained[client][name]).double().flatten()
                                      for name in old if layer_of(name) == layer])
                           for client, old in received.items()])
    negative = updates @ updates.T < 0  # like the cosines
    return 100 * negative.sum().item() / (len(updates) * (len(updates) - 1))

def keep(layers, received, trained, ask, stage, round_number, progress, messages):
    """An `ask` around another: these layers stay with each client. They go on from what it trained
    last, if anything. received, trained: client -> {name: tensor}, which this brings up to date."""
    for client, message in messages:
        own = trained.get(client, {}).items()
        received[client] = message | {name: t for name, t in own if layer_of(name) in layers}
    for client, answer in ask(stage, round_number, progress, received.items()):
        trained[client] = answer.upload
        shared = {name: t for name, t in answer.upload.items() if layer_of(name) not in layers}
        yield client, answer._replace(upload=shared)

@torch.no_grad()
def accuracies(config, dataset, held, received, trained):
    """Accuracy in % of clients on their own held-back images (held: client -> indices), before and
    after the last round: the mean over clients, weighted by images, and its deviation."""
    columns = {}
    for when, models in (("before", received), ("after", trained)):
        right = []
        for client, mine in enumerate(held):
            learner = fllw.assemble(config, models[client], dataset.shape)
            z = learner.head(learner.encoder(data.normalise(dataset.train_images[mine])))
            right.append((z.argmax(1) == dataset.train_labels[mine]).double())
        columns[when] = 100 * torch.cat(right).mean().item()
        columns[f"{when}_sd"] = 100 * torch.stack([x.mean() for x in right if len(x)]).std().item()
    return columns

def rows_of(config, dataset, held, pretrain, ask, method, *_):
    """The rows of one seed and start: {row: {column: number}}. pretrain, ask: two of federate()."""
    server = fllw.initial(config, dataset.shape)
    if method:
        one = replace(config, **PRETRAINING, method=method)
        encoder, _ = fllw.federate(one, dataset, ask=pretrain)
        server |= {f"encoder.{name}": t for name, t in encoder.state_dict().items()}
    R, M, tuning = config.rounds, max(config.rounds // 2, 1), max(config.rounds // 4, 1)
    layers = list(dict.fromkeys(map(layer_of, server)))
    state, received, trained = fllw.State(dict(server), []), {}, {}
    fedavg, begin = partial(keep, (), received, trained, ask), [(server, {})]
    scores = {layer: {} for layer in layers}
    for number in range(1, R + 1):
        fllw.federate(replace(config, rounds=number), dataset, state, ask=fedavg)
        begin.append((dict(state.server), dict(trained)))  # for rows that begin as FedAvg
        for layer in layers:
            scores[layer][f"round {number}"] = conflicts(received, trained, layer)
    for columns in scores.values():
        columns["conflicts"] = sum(list(columns.values())[:M]) / M
    ranked = sorted(layers, key=lambda layer: -scores[layer]["conflicts"])  # or else by height
    rows = {"FedAvg": accuracies(config, dataset, held, received, trained), **scores}
    plan = {"local only": (0, layers), "FedAvg, then fine-tuning": (R - tuning, layers),
            "FedAvg, then local only": (M, layers), "FedPer": (0, ["classifier"]),
            "FedLAG, top 1": (M, ranked[:1]), "FedLAG, top 3": (M, ranked[:3]),
            "the 3 with fewest conflicts": (M, ranked[-3:])}
    for name, (rounds, personal) in plan.items() if method != "e2e" else ():
        server, before = begin[rounds]
        trained = dict(before) if rounds == M else {}  # or from the server's
        fllw.federate(config, dataset, fllw.State(dict(server), state.history[:rounds]),
                      ask=partial(keep, personal, received, trained, ask))
        rows[name] = accuracies(config, dataset, held, received, trained)
    return rows

def main(arguments=None):
    parser = fllw.Parser(__doc__.split("\n\n")[0], prog="python -m experiments.personal")
    defaults = Settings(images=1000, dim=32, depth=3, clients=20, rounds=12, batch_size=16, lr=0.01,
                        depth_dropout=0.0, out="runs/personal")
    fixed = {"method", "seed", "clients_per_round", "server_momentum"}
    config, flags = settings(parser, arguments, defaults, fixed,
                             splits=("dirichlet", "two-classes"))
    dataset, rows = data.load(config.data, config.cache, config.images), {}
    for seed in flags["seeds"]:
        one = replace(config, seed=seed, method="e2e", classes=dataset.classes)
        training, held = divide(one, dataset.train_labels)
        client = partial(train_client, [dataset.train_labels[part].numpy() for part in training])
        pool = partial(fllw.reach_clients, dataset=dataset, parts=training)
        with pool(replace(one, **PRETRAINING)) as pretrain, pool(one, train_client=client) as ask:
            for start, method in STARTS.items():
                work = partial(rows_of, one, dataset, held, pretrain, ask, method)
                one = replace(one, out=f"{config.out}/{start}-seed{seed}")
                for row, columns in once(one, dataset, f"personal {start}", work).items():
                    add(rows, f"{start}: {row}", columns)
    show(rows, flags["save"], "personal", COLUMNS)

if __name__ == "__main__":
    fllw.command(main)
