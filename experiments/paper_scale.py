"""What do the methods reach at the papers' size? ViT-Tiny on CIFAR-10, in 8 minutes on one GPU.

    python -m experiments.paper_scale --data CIFAR10.npz --save paper_scale
    python -m experiments.paper_scale --rehearse      # toy size, any machine, under a minute

It has not been run at full size. Settings are those of Tun et al. 2024 (arXiv 2401.11647), who
pre-train on COCO shrunk to 32 x 32, for 180 rounds, and fine-tune for 40 epochs. Here both use
CIFAR-10, and all rows get as many rounds as a first timing says that fit, at least two a stage.
Peak MiB: the most that PyTorch had allocated. A run that is cut short keeps its rows."""
from dataclasses import replace

import torch

import data
import experiments
import fllw
from experiments.finetune import finetune
from ssl_loss import COLUMNS, evaluate

ROWS = {"FLL": {}, "one block": {"method": "e2e", "depth": 1},
        "progressive": {"method": "progressive"}, "end-to-end": {"method": "e2e"},
        "FLL + FDD 0.5": {"depth_dropout": 0.5}}
PAPER = fllw.Config(augment="natural", dim=192, depth=12, heads=3, patch_size=4, head_hidden=512,
                    head_dim=256, clients=10, rounds=180, local_epochs=3, batch_size=512, lr=3e-4,
                    weight_decay=1e-5, amp=True, depth_dropout=0.0)
TOY = replace(PAPER, images=200, dim=16, depth=2, heads=2, patch_size=7, head_hidden=24, head_dim=8,
              clients=2, rounds=6, batch_size=32)
FIXED = ("method", "depth_dropout", "clients_per_round", "out")
SHOWN = {**COLUMNS, "finetuned": ("fine-tuned %", 1, 1)}

def choose_rounds(config, dataset, epochs, seconds):
    """How many rounds fit beside fine-tuning: at least two a stage, at most config.rounds."""
    images, epoch = data.split(dataset, config.clients)[0], {}  # row -> seconds, with all images
    for name, changes in ROWS.items():
        row = replace(config, clients=1, local_epochs=1, **changes)
        stage = fllw.stages(row)[len(fllw.stages(row)) // 2]  # the middle one costs the mean
        state = fllw.federate(row, [images], plan=[replace(stage, rounds=range(1, 3))])
        epoch[name] = config.clients * state.history[1]["seconds"]  # the first has things to start
    tuning = epochs * (len(ROWS) + 1) * epoch["end-to-end"]  # roughly: it has one view of an image
    rounds = int((seconds - tuning) / config.local_epochs / sum(epoch.values()))
    return min(max(rounds, 2 * config.depth), config.rounds)

def measure(config, dataset, epochs, trains):
    """The columns {name: number} of a row; if it does not train, of an encoder from scratch."""
    device, server, columns = fllw.pick_device(config), fllw.initial(config, dataset.shape), {}
    gpu = device if device.type == "cuda" else None
    if gpu:
        torch.cuda.reset_peak_memory_stats(gpu)
    if trains:
        clients = data.split(dataset, config.clients, config.alpha, config.seed)
        state = fllw.federate(config, clients)
        server, seconds = state.server, sum(row["seconds"] for row in state.history)
        columns = {"peak_memory_bytes": torch.cuda.max_memory_allocated(gpu), "seconds": seconds}
    encoder = fllw.encoder_of(config, server, dataset.shape).to(device)
    columns |= evaluate(encoder, dataset, data.recipe_name(config), device)
    return columns | {"finetuned": finetune(config, encoder, dataset, epochs)}

def main(arguments=None):
    parser, rows = experiments.make_parser("paper_scale", __doc__, seeds=[0]), {}
    parser.add_argument("--minutes", type=int, default=8, help="two are for start and evaluation")
    parser.add_argument("--epochs", type=int, default=10, help="of fine-tuning, on all labels")
    parser.add_argument("--rehearse", action="store_true", default=False, help="toy size")
    given = vars(parser.parse_args(arguments))
    with data.sentences(parser):
        config, flags = experiments.settings(TOY if given["rehearse"] else PAPER, given, FIXED)
        if not (flags["rehearse"] or "data" in given and fllw.pick_device(config).type != "cpu"):
            raise data.InputError("this needs a GPU and --data FILE.npz; --rehearse needs neither")
        dataset = data.load(config.data, config.cache, config.images)._replace(train_clients=None)
        if flags["epochs"] < 1 or dataset.train_labels.max() < 0:
            raise data.InputError("fine-tuning needs --epochs of 1 or more, and labels")
        seconds = 60 * (flags["minutes"] - 2) / len(flags["seeds"])
        rounds = choose_rounds(config, dataset, flags["epochs"], seconds)
        for seed in flags["seeds"]:
            for name, changes in (ROWS | {"from scratch": {}}).items():
                row = replace(config, rounds=rounds, seed=seed, **changes)
                experiments.add(rows, name, measure(row, dataset, flags["epochs"], name in ROWS))
                experiments.show("paper_scale", rows, flags["save"], SHOWN, rounds=rounds)

if __name__ == "__main__":
    main()
