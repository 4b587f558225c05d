"""Representation alignment (Tun et al. 2024, arXiv 2401.11647, earlier versions).

    python -m experiments.alignment --weight 1 --rounds 24

On the client, a second NT-Xent pulls the local model's projection of a view towards the received
global model's projection of the other view. It is a client function: local_train() with another
step. The received model's forward pass is not in macs(): add it, 1x for what the client holds.
"""
from functools import partial

import torch

import data
import fllw
from fllw import Config
from ssl_loss import contrastive_step, nt_xent

def criterion(config, weight, z, old):
    """NT-Xent of z [2B, D] plus the alignment with the received model's projections `old`."""
    (z1, z2), (old1, old2) = z.chunk(2), old.chunk(2)
    pull = nt_xent(z1, old2, config.temperature) + nt_xent(z2, old1, config.temperature)
    return nt_xent(z1, z2, config.temperature) + weight * pull / 2

def aligned_train(weight, config, stage, message, images, number, client, progress=0.0):
    """local_train() whose loss also holds the client near what it received."""
    active_part = fllw.broadcast(message, stage.active)  # frozen blocks are the same in both
    received = fllw.receive(config, active_part, images.shape[1:], stage)
    _, old_active, old_head = fllw.in_three(config, received, stage)

    def step(frozen, active, head, views, plain, micro_batch):
        with torch.no_grad():
            chunks = views.split(2 * micro_batch or len(views))
            old = old_head(torch.cat([old_active(frozen(chunk)) for chunk in chunks]))
        return contrastive_step(frozen, active, head, views,
                                partial(criterion, config, weight, old=old), micro_batch)

    return fllw.local_train(config, stage, message, images, number, client, progress, step)

def main():
    parser = fllw.Parser(__doc__.split("\n\n")[0], prog="python -m experiments.alignment")
    parser.add_argument("--weight", type=float, default=1.0, help="of the alignment term")
    given = vars(parser.parse_args())
    weight = given.pop("weight")
    config = Config(**given)
    fllw.check(config)
    dataset = data.load(config.data, config.cache, config.images)
    client = partial(aligned_train, weight)
    with fllw.run_folder(config, dataset, f"alignment {weight:g}") as (folder, state):
        encoder, history = fllw.train(config, dataset, folder, state, client=client)
        row = fllw.result(config, dataset, encoder, history, client)
        print(fllw.table({f"{fllw.label(config)} + alignment {weight:g}": row}))

if __name__ == "__main__":
    fllw.command(main)
