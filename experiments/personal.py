"""Personal layers (FedLAG): which layers should each client of a federation keep to itself?

    python -m experiments.personal --split dirichlet

FedLAG's choice is not clearly better than the classifier (FedPer), and FLL's encoder helps little.
Clients with different label mixes fine-tune an encoder and a linear classifier. FedLAG (Nguyen et
al. 2024, arXiv 2410.02845; the score is Recon's, 2302.11289) averages all layers in the first half
of the rounds. Then those stay with the clients in which most pairs conflict: their updates have a
negative cosine. As in the paper, not as in its code (khanhkhanhlele/FedLAG), clients still receive
the others. Unlike both, an update is what a round changed, no gradient, and a layer is a block, the
embedding, the final norm or the classifier."""
import copy
from dataclasses import replace
from itertools import product

import torch
from torch import nn

import data
import experiments
import fllw

ROWS = {  # name: (share of the rounds in which all is averaged; which layers are then personal, of
          # all layers: those with most conflicts first, or else from embedding to classifier)
    "FedAvg": (1, slice(0)), "local only": (0, slice(None)), "FedPer": (0, slice(-1, None)),
    "FedAvg, then local only": (0.5, slice(None)), "FedLAG, top 1": (0.5, slice(1)),
    "FedLAG, top 3": (0.5, slice(3)), "the 3 with fewest conflicts": (0.5, slice(-3, None))}
COLUMNS = {c: (f"{c} %", 1, 1) for c in "before before_sd after after_sd conflicts".split()}

def divide(config, labels):
    """The images that each client trains on, and a quarter of each class, held back: indices."""
    parts = data.partition(labels, config.clients, config.alpha, config.seed)
    if config.alpha == 0:  # two shards of the images sorted by label (McMahan et al. 2017)
        shards = labels.argsort(stable=True).tensor_split(2 * config.clients)
        dealt = fllw.rng(config, 0).permutation(len(shards)).reshape(-1, 2)
        parts = [torch.cat([shards[one], shards[two]]) for one, two in dealt]
    parts = [part[labels[part].argsort(stable=True)] for part in parts]
    return [part[torch.arange(len(part)) % 4 > 0] for part in parts], [part[::4] for part in parts]

def begin(config, dataset, training, start):
    """The model that all rows start from: an encoder and a random classifier."""
    server = fllw.initial(config, dataset.shape)
    if start == "FLL":
        one = replace(config, method="fll", rounds=18, local_epochs=2, lr=4e-3)
        server = fllw.federate(one, [dataset.train_images[own] for own in training]).server
    model = fllw.learner_of(config, server, dataset.shape)
    model.head = nn.Linear(config.dim, 1 + int(dataset.train_labels.max()), bias=False)
    nn.init.xavier_uniform_(model.head.weight, generator=torch.Generator().manual_seed(config.seed))
    return model

def layer_of(name):
    """The layer that a model's tensor of this name belongs to."""
    kinds, block = {"head": "classifier", "encoder.norm": "final norm"}, fllw.block_of(name)
    return kinds.get(name.rpartition(".")[0], "embedding") if block is None else f"block {block}"

def conflicts(updates, layer):
    """How many pairs of clients conflict in a layer, in %. updates: of each, {name: tensor}."""
    rows = torch.stack([torch.cat([tensor.flatten() for name, tensor in update.items()
                                   if layer_of(name) == layer]) for update in updates])
    return 100 * (rows @ rows.T < 0).sum().item() / (len(rows) * (len(rows) - 1))

def run(config, model, dataset, training, held, share, chosen):
    """Average all layers in the first `share` of the rounds; then those chosen stay with clients.
    Returns accuracies {column: number}, and {layer: {round: its conflicts}} of those rounds."""
    models, N = [copy.deepcopy(model) for _ in training], len(training)
    updates, right = [None] * N, [None] * N  # of each client's last round
    shared, scores = share * config.rounds, {layer_of(name): {} for name in model.state_dict()}

    def correct(mine, client):  # of the images that it holds back
        z = mine.head(mine.encoder(data.normalise(dataset.train_images[held[client]])))
        return 100 * (z.argmax(1) == dataset.train_labels[held[client]]).double()

    def train_client(config, stage, message, images, round_number, client):
        ranked = sorted(scores, key=lambda layer: -sum(scores[layer].values()))
        personal = ranked[chosen] if round_number > shared else []
        mine, labels = models[client], dataset.train_labels[training[client]]
        message = {name: t for name, t in message.items() if layer_of(name) not in personal}
        mine.load_state_dict(message, strict=False)  # what is personal stays
        before = correct(mine, client)
        adam = torch.optim.AdamW(mine.parameters(), config.lr, weight_decay=config.weight_decay)
        draws = fllw.rng(config, fllw.TRAINING, round_number, client)
        for batch in torch.from_numpy(draws.permutation(len(images))).split(config.batch_size):
            z = mine.head(mine.encoder(data.normalise(images[batch])))
            loss = nn.functional.cross_entropy(z, labels[batch])
            adam.zero_grad()
            loss.backward()
            adam.step()
        right[client] = before, correct(mine, client)
        upload = {name: p.detach() for name, p in mine.named_parameters() if name in message}
        updates[client] = {name: (upload[name] - message[name]).double() for name in message}
        return upload, loss.detach(), len(images)

    def count(state):
        for layer in scores if len(state.history) <= shared else ():
            scores[layer][f"round {len(state.history)}"] = conflicts(updates, layer)

    clients = [dataset.train_images[own] for own in training]
    fllw.federate(config, clients, fllw.State(model.state_dict()), None, train_client, count)
    columns = {}
    for when, each in zip(("before", "after"), zip(*right)):
        columns[when] = torch.cat(each).mean().item()  # clients weighted by images
        columns[f"{when}_sd"] = torch.stack([one.mean() for one in each]).std().item()
    return columns, scores

def main(arguments=None):
    parser, table = experiments.make_parser("personal", __doc__), {}
    parser.add_argument("--split", choices=("dirichlet", "two-classes"), default="dirichlet")
    with data.sentences(parser):
        defaults = fllw.Config(images=1000, dim=32, depth=3, clients=20, rounds=12, batch_size=16,
                               lr=0.01, depth_dropout=0.0, method="e2e")
        fixed = ("method", "clients_per_round", "alpha", "local_epochs", "amp", "out")
        config, flags = experiments.settings(defaults, vars(parser.parse_args(arguments)), fixed)
        config = replace(config, alpha=0.1 if flags["split"] == "dirichlet" else 0.0)
        dataset = data.load(config.data, config.cache, config.images)
        if dataset.train_labels.min() < 0:
            raise data.InputError("every training image needs a label")
        for seed, start in product(flags["seeds"], ("FLL", "scratch")):
            one = replace(config, seed=seed)
            training, held = divide(one, dataset.train_labels)
            model = begin(one, dataset, training, start)
            for name in ROWS:
                columns, scores = run(one, model, dataset, training, held, *ROWS[name])
                experiments.add(table, f"{start}: {name}", columns)
                for layer, shares in scores.items() if name == "FedAvg" else ():
                    columns = shares | {"conflicts": sum(shares.values()) / len(shares)}
                    experiments.add(table, f"{start}: {layer}", columns)
        experiments.show("personal", table, flags["save"], COLUMNS)

if __name__ == "__main__":
    main()
