"""How little memory does a client need? FLL beside activation checkpointing and small models.

    python -m experiments.memory --save memory      # some minutes; nothing is trained

ViT-Tiny at the setting of Tun et al. 2024 (arXiv 2401.11647), a local step of 128 images, by the
size of its micro-batches. Checkpointing (Chen et al. 2016, 1604.06174) keeps the input of a block
and runs it again in the backward pass. Floor: weights, gradients, AdamW's moments: 16 bytes for a
parameter that trains, 4 for a frozen one. GMAC: 10^9 for one image over 180 rounds."""
import argparse
from dataclasses import replace
from functools import partial

from torch.utils.checkpoint import checkpoint

import experiments
import fllw

SHAPE = (3, 32, 32)
PHONE = dict(dim=192, depth=12, heads=3, patch_size=4, head_hidden=512, head_dim=256, clients=10,
             rounds=180, local_epochs=3, batch_size=128, depth_dropout=0.0, augment="natural")

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

WHOLE = {"method": "e2e"}
ROWS = {"end-to-end": fllw.Config(**PHONE | WHOLE),
        "end-to-end, checkpointed": Checkpointed(**PHONE | WHOLE),
        "progressive": fllw.Config(**PHONE, method="progressive"), "FLL": fllw.Config(**PHONE),
        "FLL + FDD 0.5": fllw.Config(**PHONE | {"depth_dropout": 0.5}),
        "one block": fllw.Config(**PHONE | WHOLE | {"depth": 1}),
        "two blocks": fllw.Config(**PHONE | WHOLE | {"depth": 2})}

def main():
    parser = argparse.ArgumentParser("python -m experiments.memory", description=__doc__)
    parser.add_argument("--save", help="also keep the table as experiments/results/SAVE.json")
    save, rows, sizes = parser.parse_args().save, {}, {"1": 1, "4": 4, "16": 16, "whole": 0}
    for name, config in ROWS.items():
        last = fllw.stages(config)[-1]  # no stage needs more
        row = {size: fllw.peak_memory(replace(config, micro_batch=micro), last, SHAPE)
               for size, micro in sizes.items()}
        row["floor"] = sum(tensor.nbytes * (4 if last.trains(part) else 1)
                           for part, tensor in fllw.initial(config, SHAPE).items())
        row["macs"] = experiments.macs(config, SHAPE)
        row["micro_macs"] = experiments.macs(replace(config, micro_batch=1), SHAPE)
        rows[name] = row
    columns = {size: (f"{size}, MiB", 2**20, 0) for size in (*sizes, "floor")}
    columns |= {"macs": ("GMAC", 1e9, 0), "micro_macs": ("in micro", 1e9, 0)}
    experiments.show("memory", rows, save, columns)

if __name__ == "__main__":
    main()
