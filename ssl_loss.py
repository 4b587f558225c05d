"""The contrastive side: NT-Xent (SimCLR, Chen et al. 2020, equation 1), the projection head, and one exact step.

`contrastive_step` is the local step of every method. With a micro-batch it caches gradients (GradCache,
Gao et al. 2021): the same loss and gradients in almost constant memory."""
import torch
import torch.nn.functional as F
from torch import nn


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
    with torch.no_grad():
        features = torch.cat([active(chunk) for chunk in chunks])       # 2. all features [2B, dim], no graph
    features.requires_grad_()
    loss = criterion(head(features))                                    # 3. head and loss once, on all of them
    loss.backward()
    for chunk, gradient in zip(chunks, features.grad.split(2 * micro_batch)):
        active(chunk).backward(gradient)                                # 4. each chunk again, now with its graph
    return loss.detach()
