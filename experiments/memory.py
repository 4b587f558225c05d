"""How little memory does a client need? FLL beside activation checkpointing and small models.

    python -m experiments.memory --save memory      # some minutes; nothing is trained

FLL takes the least to train 12 blocks: 1.6 times less than checkpointing (Chen et al. 2016, arXiv
1604.06174: the backward pass runs a block again), 1.9 times in micro-batches of 16. ViT-Tiny as in
Tun et al. 2024 (2401.11647), a local step of 128 images. Floor: weights, gradients, moments."""
import argparse
from dataclasses import replace
from functools import partial

from torch.utils.checkpoint import checkpoint

import experiments
import fllw

COLUMNS = {size: (f"{size}, MiB", 2**20, 0) for size in "1 4 16 whole floor".split()}
COLUMNS |= {"macs": ("GMAC", 1e9, 0), "micro_macs": ("in micro", 1e9, 0)}
SHAPE = (3, 32, 32)
vit_tiny = partial(fllw.Config, dim=192, depth=12, heads=3, patch_size=4, head_hidden=512,
                   head_dim=256, clients=10, rounds=180, local_epochs=3, batch_size=128,
                   depth_dropout=0.0, augment="natural")

class Learner(fllw.Learner):
    """Its blocks are checkpointed where gradients are on."""
    def __init__(self, config, image_shape, blocks):
        super().__init__(config, image_shape, blocks)
        for block in self.encoder.blocks.values():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False,
                                    preserve_rng_state=False)

class Checkpointed(fllw.Config):
    learner = Learner

    def macs(self, stage, kept, image_shape):
        """One more forward pass of every block that trains."""
        forward = partial(fllw.count_macs, self, replace(stage, first=stage.stop))
        again = forward(kept, image_shape) - forward([], image_shape)
        return fllw.count_macs(self, stage, kept, image_shape) + again

ROWS = {"end-to-end": vit_tiny(method="e2e"),
        "end-to-end, checkpointed": Checkpointed(**vars(vit_tiny(method="e2e"))),
        "progressive": vit_tiny(method="progressive"),
        "FLL": vit_tiny(), "FLL + FDD 0.5": vit_tiny(depth_dropout=0.5),
        "one block": vit_tiny(method="e2e", depth=1), "two blocks": vit_tiny(method="e2e", depth=2)}

def columns_of(config):
    last = fllw.stages(config)[-1]  # no stage needs more
    row = {str(images or "whole"): fllw.peak_memory(
        replace(config, micro_batch=images), last, SHAPE) for images in (1, 4, 16, 0)}
    row["floor"] = sum(tensor.nbytes * (4 if last.trains(part) else 1)
                       for part, tensor in fllw.initial(config, SHAPE).items())
    return row | {"macs": experiments.macs(config, SHAPE),
                  "micro_macs": experiments.macs(replace(config, micro_batch=1), SHAPE)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m experiments.memory", description=__doc__)
    parser.add_argument("--save", type=experiments.plain_name)
    save, rows = parser.parse_args().save, {name: columns_of(ROWS[name]) for name in ROWS}
    experiments.show("memory", rows, save, COLUMNS)
