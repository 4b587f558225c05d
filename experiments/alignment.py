"""Does it help to hold a client near the model that it received? Representation alignment.

    python -m experiments.alignment --weight 1 --rounds 24

After Tun et al. 2024 (arXiv 2401.11647, its earlier versions). On the client, a second NT-Xent
pulls the local model's projection of a view towards the received model's projection of the other
view. This is fllw.local_train() with another criterion. What counts the compute does not know of
the received model's forward pass: add it, 1x for what the client trains.
"""
if not __package__:  # as a script, it would not find fllw.py
    raise SystemExit("run this from the repository's folder: python -m experiments.alignment")

from functools import partial

import torch

import data
import fllw
from data import InputError
from experiments import once, parse, show
from fllw import Config
from ssl_loss import nt_xent

def aligned_loss(config, weight, z, old):
    """NT-Xent of the projections z [2B, D], and alignment with the received model's, old [2B, D].

    Rows i and B + i are the two views of image i, as in ssl_loss.contrastive_loss()."""
    (z1, z2), (old1, old2) = z.chunk(2), old.chunk(2)
    pull = nt_xent(z1, old2, config.temperature) + nt_xent(z2, old1, config.temperature)
    return nt_xent(z1, z2, config.temperature) + weight * pull / 2

def aligned_train(weight, config, stage, message, images, round_number, client, progress=0.0):
    """fllw.local_train() whose loss also holds the client near what it received."""
    first = min(stage.active)
    # The frozen blocks are the same in both models and have run already: leave them out here.
    upper_part = fllw.broadcast(message, [b for b in stage.present if b >= first])
    received = fllw.assemble(config, upper_part, images.shape[1:]).requires_grad_(False)
    autocast = torch.autocast(images.device.type, torch.bfloat16, enabled=config.amp)

    def criterion(config, z, chunks):  # chunks: tokens, or images where the embedding trains
        with torch.no_grad(), autocast:
            features = [received.encoder.upper(chunk, first) if first else received.encoder(chunk)
                        for chunk in chunks]
            old = received.head(torch.cat(features))
        return aligned_loss(config, weight, z, old)

    return fllw.local_train(config, stage, message, images, round_number, client, progress,
                            criterion=criterion)

def main(arguments=None):
    parser = fllw.Parser(__doc__.split("\n\n")[0], prog="python -m experiments.alignment")
    parser.add_argument_group("alignment").add_argument(
        "--weight", type=float, default=1.0, help="of the alignment term (default: 1.0)")
    given = parse(parser, arguments, seeds="")
    weight, name = given.pop("weight"), given.pop("save")
    if not 0 <= weight <= 1e6:
        raise InputError(f"--weight must be from 0 to 1000000, it is {weight}")
    config = Config(**given)
    fllw.validate(config)
    dataset = data.load(config.data, config.cache, config.images)
    train_client = partial(aligned_train, weight)

    def work(folder, state):
        encoder, history = fllw.train(config, dataset, folder, state, train_client)
        return fllw.result(config, dataset, encoder, history, train_client)

    columns = once(config, dataset, f"alignment {weight:g}", work)
    rows = {f"{fllw.label(config)} + alignment {weight:g}": columns}
    show(rows, name, "alignment")

if __name__ == "__main__":
    fllw.command(main)
