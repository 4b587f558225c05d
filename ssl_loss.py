"""Self-supervision: the contrastive loss, the projection head, micro-batches, and evaluation.

NT-Xent is the loss of SimCLR (Chen et al. 2020, equation 1). An encoder is evaluated by classifying
test images, and random views of them, from its features: by nearest neighbours and linearly.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data

def nt_xent(z1, z2, temperature):
    """Normalised temperature-scaled cross entropy over the 2B views of B images.

    z1, z2: [B, D], row i of both from image i. Returns the scalar mean, over all 2B views i, of
    -log( exp(sim(i, j) / t) / sum over k != i of exp(sim(i, k) / t) ): j is the other view of i, t
    the temperature, sim the cosine.

    >>> nt_xent(torch.eye(4), torch.eye(4), 0.5)  # perfect pairs, everything else orthogonal
    tensor(0.5944)
    """
    z = F.normalize(torch.cat([z1, z2]).float(), dim=1)  # [2B, D]
    similarity = z @ z.T / temperature                   # [2B, 2B]
    similarity.fill_diagonal_(float("-inf"))             # a view is not its own negative
    positive = torch.arange(2 * len(z1), device=z.device).roll(len(z1))  # i -> i + B, mod 2B
    return F.cross_entropy(similarity, positive)

class ProjectionHead(nn.Sequential):
    """Three linear layers, dim -> hidden -> hidden -> out, into the space of the loss.
    Batch norm always uses the batch at hand: the head is thrown away after pre-training, so there
    are no running statistics to send or to average."""
    def __init__(self, dim, hidden, out):
        super().__init__(
            nn.Linear(dim, hidden, bias=False),
            nn.BatchNorm1d(hidden, track_running_stats=False), nn.ReLU(inplace=True),
            nn.Linear(hidden, hidden, bias=False),
            nn.BatchNorm1d(hidden, track_running_stats=False), nn.ReLU(inplace=True),
            nn.Linear(hidden, out, bias=False))

def micro_batched_step(config, learner, stage, views):
    """fllw.local_step() with the graph of config.micro_batch images at a time (GradCache, Gao et
    al. 2021): the same gradients in less memory, at the price of a second forward pass."""
    encoder, first, size = learner.encoder, stage.first, 2 * config.micro_batch  # in views
    autocast = torch.autocast(views.device.type, torch.bfloat16, enabled=config.amp)

    def run_trained(x):  # tokens, or images where the embedding trains -> features [size, D]
        with autocast:
            return encoder.upper(x, first) if first else encoder(x)

    with torch.no_grad():
        with autocast:
            chunks = [encoder.lower(chunk, first) if first else chunk  # 1. frozen blocks, once
                      for chunk in views.split(size)]
        del views
        h = torch.cat([run_trained(chunk) for chunk in chunks])         # 2. all features, no graph
    h.requires_grad_()
    with autocast:
        z = learner.head(h)                                            # 3. head and loss, once
    loss = nt_xent(*z.chunk(2), config.temperature)
    del z
    loss.backward()
    for chunk, gradient in zip(chunks, h.grad.split(size)):
        run_trained(chunk).backward(gradient)                           # 4. each with its graph
    return loss.detach()

# ----------------------------------------------------------------------------------- evaluation
def knn(train, train_labels, test, test_labels, k=20, temperature=0.07):
    """Accuracy in % of a vote among the k nearest neighbours by cosine similarity, with weights
    exp(similarity / temperature) (Wu et al. 2018). train: [N, D], test: [M, D], labels: int64."""
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    k = min(k, len(train))
    correct = 0
    for part, labels in zip(test.split(500), test_labels.split(500)):
        similarity, neighbours = (part @ train.T).topk(k)
        votes = torch.zeros(len(part), int(train_labels.max()) + 1, device=train.device)
        votes.scatter_add_(1, train_labels[neighbours], torch.exp(similarity / temperature))
        correct += (votes.argmax(1) == labels).sum().item()
    return 100 * correct / len(test)

def linear_probe(train, train_labels, *tests, penalties=(1e-4, 1e-3, 1e-2, 1e-1), seed=0):
    """Accuracies in % of one logistic regression on frozen, standardised features: a list, one for
    each pair (features [M, D], labels [M]) in tests. train: [N, D]. The L2 penalty is chosen on a
    held-out fifth of the *training* features; then the regression is fitted on all of them."""
    mean, std = train.mean(0), train.std(0).nan_to_num().clamp(min=1e-6)
    train = (train - mean) / std
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    order = order.to(train.device)
    held, fit = order[:len(train) // 5], order[len(train) // 5:]

    def accuracy(weights, features, labels):
        guesses = torch.addmm(weights[1], features, weights[0]).argmax(1)
        return 100 * ((guesses == labels).sum().item() / len(labels))

    def held_out(penalty):
        weights = logistic(train[fit], train_labels[fit], penalty)
        return accuracy(weights, train[held], train_labels[held])

    best = max(penalties, key=held_out) if len(held) and len(penalties) > 1 else penalties[0]
    weights = logistic(train, train_labels, best)
    return [accuracy(weights, (test - mean) / std, labels) for test, labels in tests]

def few_labels(train, train_labels, test, test_labels, per_class=10, draws=5):
    """Accuracy in % of logistic regression on `per_class` labels per class, mean over `draws`."""
    results = []
    for seed in range(draws):
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        chosen = first_of_each_class(train_labels.cpu(), order, per_class).to(train.device)
        results += linear_probe(train[chosen], train_labels[chosen], (test, test_labels),
                                penalties=(1e-2,))
    return sum(results) / draws

def first_of_each_class(labels, order, per_class):
    """Of the images `order`, the first `per_class` of every class."""
    return torch.cat([order[labels[order] == label][:per_class] for label in labels.unique()])

def logistic(x, y, penalty):
    """Weights [D, classes], bias [classes] of a logistic regression with an L2 penalty, L-BFGS."""
    classes = int(y.max()) + 1
    weights = [torch.zeros(x.shape[1], classes, device=x.device, requires_grad=True),
               torch.zeros(classes, device=x.device, requires_grad=True)]
    optimizer = torch.optim.LBFGS(weights, max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(torch.addmm(weights[1], x, weights[0]), y)
        loss = loss + penalty / 2 * weights[0].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return [w.detach() for w in weights]

def pixels(images):
    """Raw pixels as features: uint8 [N, C, H, W] -> float32 [N, ...] in 0..1. Sides above 64 pixels
    are averaged down to 64, which bounds the memory that k-NN and the linear probe need."""
    size = [min(side, 64) for side in images.shape[2:]]
    return F.interpolate(images.float(), size, mode="area").flatten(1) / 255

@torch.no_grad()
def features(encoder, images, recipe_name="", device="cpu", batch=500):
    """uint8 images [N, C, H, W] -> features float32 [N, dim], or raw pixels if the encoder is None;
    with a recipe, of one random view each. Raises FloatingPointError if one is not finite."""
    draws, result = torch.Generator().manual_seed(0), []
    for part in images.split(batch):
        part = (data.moved(part, recipe_name, draws) if recipe_name else part).to(device)
        result.append(encoder(data.normalise(part)) if encoder else pixels(part))
    if not all(part.isfinite().all() for part in result):
        raise FloatingPointError("the encoder's features are not finite: take a smaller --lr")
    return torch.cat(result)

def evaluate(encoder, dataset, recipe_name, device="cpu"):
    """Accuracies in % of an encoder on the device, or of raw pixels if it is None: knn and
    linear_probe on test images, moved_knn and moved_probe on one random view of each, ten_labels of
    a probe on ten labels per class. Test labels choose nothing. {} without training labels."""
    labelled = dataset.train_labels >= 0
    if not labelled.any():
        return {}
    labels, truth = dataset.train_labels[labelled].to(device), dataset.test_labels.to(device)
    train = features(encoder, dataset.train_images[labelled], device=device)
    test = features(encoder, dataset.test_images, device=device)
    moved = features(encoder, dataset.test_images, recipe_name, device)
    probe, moved_probe = linear_probe(train, labels, (test, truth), (moved, truth))
    return {"knn": knn(train, labels, test, truth), "linear_probe": probe,
            "moved_knn": knn(train, labels, moved, truth), "moved_probe": moved_probe,
            "ten_labels": few_labels(train, labels, test, truth)}

COLUMNS = {  # of a table: (heading, divisor, digits)
    "knn": ("k-NN %", 1, 1), "linear_probe": ("probe %", 1, 1), "moved_knn": ("moved k-NN", 1, 1),
    "moved_probe": ("moved probe", 1, 1), "ten_labels": ("10 labels", 1, 1),
    "peak_memory_bytes": ("peak MiB", 2**20, 1), "macs": ("GMAC/image", 1e9, 2),
    "download_bytes": ("down MB", 1e6, 1), "upload_bytes": ("up MB", 1e6, 1),
    "stateless_download_bytes": ("stateless MB", 1e6, 1), "seconds": ("seconds", 1, 0)}

def cell(value, unit, digits):
    """A number as text, or mean and deviation of several; small positive ones get more digits."""
    if isinstance(value, str):
        return value
    numbers = np.atleast_1d(value) / unit
    if np.mean(numbers) > 0:
        digits = max(digits, 1 - math.floor(math.log10(np.mean(numbers))))
    spread = f" ±{np.std(numbers, ddof=1):.{digits}f}" if np.ptp(numbers) > 0 else ""
    return f"{np.mean(numbers):.{digits}f}{spread}"

def table(rows, columns=COLUMNS):
    """A table as text. rows: {name: {column: number, text, or numbers for mean ± deviation}}."""
    used = [c for c in columns if any(c in row for row in rows.values())]
    lines = [["", *(columns[c][0] for c in used)]]
    for name, row in rows.items():
        lines.append([name, *(cell(row.get(c, "-"), *columns[c][1:]) for c in used)])
    widths = [max(map(len, cells)) + 2 for cells in zip(*lines)]
    return "\n".join(name.ljust(widths[0]) + "".join(map(str.rjust, cells, widths[1:]))
                     for name, *cells in lines)
