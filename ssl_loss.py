"""Self-supervision: the loss, the local step and a meter of its memory, and what judges features afterwards.

NT-Xent is SimCLR's loss (Chen et al. 2020, equation 1). `contrastive_step` is the local step of every method; with a
micro-batch it caches gradients (GradCache, Gao et al. 2021): the same loss and gradients in almost constant memory.
"""
import copy
import math
import weakref

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data


def nt_xent(z1, z2, temperature=0.1):
    """Normalised temperature-scaled cross entropy over the 2B views of B images.

    z1, z2: [B, D], row i of both from image i. Returns the mean over all 2B anchors of
    -log( exp(sim(i, j) / t) / sum over k != i of exp(sim(i, k) / t) ), with j the other view of i and sim the cosine.
    Raises ValueError unless both are [B, D] of one shape with B >= 1 and temperature > 0.

    >>> nt_xent(torch.eye(4), torch.eye(4), 0.5)  # perfect pairs, everything else orthogonal
    tensor(0.5944)
    """
    if z1.ndim != 2 or z1.shape != z2.shape or len(z1) == 0:
        raise ValueError(f"nt_xent needs two tensors [B, D] of one shape with B >= 1, got {list(z1.shape)} and {list(z2.shape)}")
    if not temperature > 0:
        raise ValueError(f"the temperature must be above 0, it is {temperature}")
    z = F.normalize(torch.cat([z1, z2]).float(), dim=1)  # [2B, D]
    similarity = z @ z.T / temperature                   # [2B, 2B]
    similarity.fill_diagonal_(float("-inf"))             # a view is not its own negative
    positive = torch.arange(2 * len(z1), device=z.device).roll(len(z1))  # i -> i + B, mod 2B
    return F.cross_entropy(similarity, positive)


class ProjectionHead(nn.Sequential):
    """Three linear layers, dim -> hidden -> hidden -> out, from pooled features to the space of the loss.

    Batch norm always uses the batch at hand: the head is thrown away after pre-training, so there are no
    running statistics to send or to average."""

    def __init__(self, dim, hidden, out):
        norm = lambda: nn.BatchNorm1d(hidden, track_running_stats=False)
        super().__init__(nn.Linear(dim, hidden, bias=False), norm(), nn.ReLU(inplace=True),
                         nn.Linear(hidden, hidden, bias=False), norm(), nn.ReLU(inplace=True),
                         nn.Linear(hidden, out, bias=False))


def contrastive_step(frozen, active, head, views, criterion, micro_batch=0):
    """Forward and backward of one local step; gradients land in the parameters of `active` and `head`.

    frozen: views [2B, C, H, W] -> what enters the active blocks, without a graph; active: that -> features [2B, dim];
    head: features -> z [2B, D]; criterion: z -> loss. micro_batch = M > 0 keeps the graph of M images at a time.
    Returns the loss, detached."""
    if not micro_batch:
        loss = criterion(head(active(frozen(views))))
        loss.backward()
        return loss.detach()
    chunks = [frozen(chunk) for chunk in views.split(2 * micro_batch)]  # 1. frozen blocks once, kept
    del views
    with torch.no_grad():
        features = torch.cat([active(chunk) for chunk in chunks])       # 2. all features [2B, dim], no graph
    features.requires_grad_()
    loss = criterion(head(features))                                    # 3. head and loss once, on all of them
    loss.backward()
    for chunk, gradient in zip(chunks, features.grad.split(2 * micro_batch)):
        active(chunk).backward(gradient)                                # 4. each chunk again, now with its graph
    return loss.detach()


class MemoryMeter(TorchDispatchMode):
    """Peak bytes of memory taken while it is active: `with meter: ...`, as often as needed, then `meter.peak`.

    On a GPU the allocator's own statistics. On the CPU every storage that an operation returns is counted until
    it is freed: parameters, gradients, optimizer state, activations and temporaries, exact and machine-independent."""

    def __init__(self, device):
        super().__init__()
        self.cuda = device if torch.device(device).type == "cuda" else None
        self.live = self.peak = 0
        self.seen = {}  # id of a storage -> what tells when it is freed
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.cuda)
            self.before = torch.cuda.memory_allocated(self.cuda)

    def __enter__(self):
        return self if self.cuda else super().__enter__()

    def __exit__(self, *error):
        if not self.cuda:
            return super().__exit__(*error)
        self.peak = torch.cuda.max_memory_allocated(self.cuda) - self.before

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        storages = lambda tree: {storage_id(t): t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for key, tensor in storages(result).items():  # new memory: not a view, not in place, not without data
            if tensor.device.type != "meta" and key not in self.seen and key not in storages((args, kwargs)):
                storage = tensor.untyped_storage()
                self.seen[key] = weakref.finalize(storage, self.freed, key, storage.nbytes())
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
        return result

    def freed(self, key, nbytes):
        del self.seen[key]
        self.live -= nbytes


def storage_id(tensor):
    """Identity of the memory behind a tensor; also defined for tensors without data."""
    return tensor.untyped_storage()._cdata


def knn(train, train_labels, test, test_labels, k=20, temperature=0.07):
    """Accuracy in % of k nearest neighbours: cosine similarity, votes weighted exp(similarity / temperature).

    train: [N, D], test: [M, D], labels: int64. After Wu et al. 2018, as usual for self-supervised features."""
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    k = min(k, len(train))
    correct = 0
    for part, labels in zip(test.split(500), test_labels.split(500)):
        similarity, neighbours = (part @ train.T).topk(k)
        votes = torch.zeros(len(part), int(train_labels.max()) + 1, device=train.device)
        votes.scatter_add_(1, train_labels[neighbours], torch.exp(similarity / temperature))
        correct += (votes.argmax(1) == labels).sum().item()
    return 100 * correct / len(test)


def linear_probe(train, train_labels, test, test_labels, penalties=(1e-4, 1e-3, 1e-2, 1e-1), seed=0):
    """Accuracy in % of a logistic regression on frozen, standardised features, fitted by L-BFGS.

    The L2 penalty is chosen on a fifth of the *training* features, then all of them are used. train: [N, D]."""
    mean, std = train.mean(0), train.std(0).clamp(min=1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).to(train.device)
    held, fit = order[:len(train) // 5], order[len(train) // 5:]
    accuracy = lambda w, x, y: 100 * (torch.addmm(w[1], x, w[0]).argmax(1) == y).float().mean().item()
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    best = max(penalties, key=lambda p: accuracy(logistic(train[fit], train_labels[fit], classes, p),
                                                 train[held], train_labels[held]))
    return accuracy(logistic(train, train_labels, classes, best), test, test_labels)


def logistic(x, y, classes, penalty):
    """Weights [D, classes] and bias [classes] of a multinomial logistic regression with an L2 penalty."""
    weights = [torch.zeros(x.shape[1], classes, device=x.device, requires_grad=True),
               torch.zeros(classes, device=x.device, requires_grad=True)]
    optimizer = torch.optim.LBFGS(weights, max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(torch.addmm(weights[1], x, weights[0]), y) + penalty / 2 * weights[0].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return [w.detach() for w in weights]


def finetune(encoder, dataset, recipe, generator, epochs=40, warmup=10, batch_size=256, lr=1e-3, weight_decay=1e-5,
             labels_per_class=0, amp=False):
    """Accuracy in % on the test images after supervised training of a copy of `encoder` with a linear classifier on top.

    The protocol of Tun et al. 2024: AdamW, linear warm-up, then one cosine to 0. dataset: a data.Dataset;
    recipe: a data.Recipe for light augmentation; generator: all randomness, on the encoder's device;
    labels_per_class: how many labelled training images of each class to use, drawn at random; 0 means all."""
    device = generator.device
    order = torch.randperm(len(dataset.train_labels), device=device, generator=generator).cpu()
    if labels_per_class:
        order = torch.cat([order[dataset.train_labels[order] == label][:labels_per_class] for label in range(dataset.classes)])
    images, labels = dataset.train_images[order].to(device), dataset.train_labels[order].to(device)
    encoder = copy.deepcopy(encoder).requires_grad_().train()
    classifier = nn.Linear(encoder(data.normalise(images[:1])).shape[1], dataset.classes, device=device)
    nn.init.zeros_(classifier.weight), nn.init.zeros_(classifier.bias)
    model = nn.Sequential(encoder, classifier)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay, fused=True)
    steps, warmup = math.ceil(len(images) / batch_size), min(warmup, epochs / 4)
    for step in range(epochs * steps):
        if step % steps == 0:
            batches = torch.randperm(len(images), device=device, generator=generator).split(batch_size)
        epoch, chosen = (step + 1) / steps, batches[step % steps]
        share = max(0, epoch - warmup) / (epochs - warmup)
        optimizer.param_groups[0]["lr"] = lr * min(epoch / warmup, (1 + math.cos(math.pi * share)) / 2)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits = model(data.view(images[chosen], recipe, generator))
        optimizer.zero_grad()
        F.cross_entropy(logits.float(), labels[chosen]).backward()
        optimizer.step()
    with torch.no_grad():
        guesses = torch.cat([model.eval()(data.normalise(part.to(device))).argmax(1) for part in dataset.test_images.split(500)])
    return 100 * (guesses == dataset.test_labels.to(device)).double().mean().item()
