"""Personal layers (FedLAG): which layers should each client of a federation keep to itself?

    python -m experiments.personal

FedLAG's three layers lead the three with fewest conflicts, but not after one more local round. They
are level with the classifier alone (FedPer). FLL's encoder brings FedAvg 7 points, others -1 to 5.
Clients with different label mixes fine-tune an encoder and a linear classifier. FedLAG (Nguyen et
al. 2024, arXiv 2410.02845; the score is Recon's, 2302.11289) averages all layers in the first half
of the rounds. Then those stay with the clients in which most pairs conflict: their updates have a
negative cosine. As in the paper, not as in its code (khanhkhanhlele/FedLAG), clients still receive
the others. Unlike both, an update is what a round changed, no gradient, and a layer is a block, the
embedding, the final norm or the classifier."""
import copy
from dataclasses import replace

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
FIXED = ("method", "clients_per_round", "local_epochs", "amp", "out")
COLUMNS = {name: (f"{name} %", 1, 1) for name in ("before", "after", "conflicts")}

def divide(config, labels):
    """The images that each client trains on, and a quarter of each class, held back: indices."""
    parts = data.partition(labels, config.clients, config.alpha, config.seed)
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
    Returns accuracies {column: number}, and {layer: sum of its conflicts in those rounds}."""
    models, N = [copy.deepcopy(model) for _ in training], len(training)
    updates, right = [None] * N, [None] * N  # of each client's last round
    shared, scores = share * config.rounds, {layer_of(name): 0 for name in model.state_dict()}

    def correct(mine, client):  # of the images that it holds back
        z = mine.head(mine.encoder(data.normalise(dataset.train_images[held[client]])))
        return 100 * (z.argmax(1) == dataset.train_labels[held[client]]).double()

    def train_client(config, stage, message, images, round_number, client):
        ranked = sorted(scores, key=scores.get, reverse=True)  # of equal ones the lower layer first
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
            scores[layer] += conflicts(updates, layer)

    clients = [dataset.train_images[own] for own in training]
    fllw.federate(config, clients, fllw.State(model.state_dict()), None, train_client, count)
    before, after = (torch.cat(each).mean().item() for each in zip(*right))  # weighted by images
    return {"before": before, "after": after}, scores

def rows_of(config, dataset):
    """The rows of the table with one seed: yields (name, columns)."""
    if config.clients < 2 or dataset.train_labels.min() < 0:
        raise data.InputError("this needs two clients or more, and a label for every image")
    training, held = divide(config, dataset.train_labels)
    for start in ("FLL", "scratch"):
        model = begin(config, dataset, training, start)
        for name in ROWS:
            columns, scores = run(config, model, dataset, training, held, *ROWS[name])
            yield f"{start}: {name}", columns
            for layer, score in scores.items() if name == "FedAvg" else ():
                yield f"{start}: {layer}", {"conflicts": score / config.rounds}

def main(arguments=None):
    defaults = fllw.Config(images=1000, dim=32, depth=3, clients=20, alpha=0.1, rounds=12,
                           batch_size=16, lr=0.01, depth_dropout=0.0, method="e2e")
    experiments.command("personal", __doc__, defaults, FIXED, rows_of, arguments, COLUMNS)

if __name__ == "__main__":
    main()
