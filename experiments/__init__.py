"""One file per question: run it as `python -m experiments.NAME`; README.md here has the answers.

Here is what they share: flags, tables over seeds, and where results are kept.
"""
import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

import data
import fllw
from ssl_loss import COLUMNS

RESULTS = Path(__file__).parent / "results"
SHOWN = {name: COLUMNS[name] for name in ("knn", "moved_knn", "ten_labels", "peak_memory_bytes")}
SHOWN |= {"macs": ("GMAC", 1e9, 2), "bytes": ("MB", 1e6, 0)}  # down and up; the file has the rest

def plain_name(text):
    """For --save: the name of a file without its folder and ending."""
    if not text or not all(letter.isalnum() or letter in "-_" for letter in text):
        raise argparse.ArgumentTypeError(f"{text!r} must be letters, digits, - and _ alone")
    return text

def make_parser(name, doc, seeds=(0, 1, 2)):
    """The flags of every setting, --seeds and --save, for `python -m experiments.NAME`."""
    parser = fllw.make_parser((doc or "").split("\n\n")[0], f"python -m experiments.{name}")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(seeds),
                        help="instead of --seed (default: %(default)s)")
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's stream has no such method
        sys.stdout.reconfigure(errors="replace")  # some terminals do not know the plus-minus sign
    parser.add_argument("--save", metavar="NAME", type=plain_name, default=None,
                        help="also keep the table as experiments/results/NAME.json")
    return parser

def settings(defaults, given, fixed=()):
    """(a Config, the flags that are no settings), from the defaults and the flags given, a dict.

    fixed: settings that the experiment sets itself; InputError if one of them was given. A file may
    set the number of clients: the caller validates again when it is known."""
    for name in {"seed", *fixed} & given.keys():
        flag = name.replace("_", "-")
        raise data.InputError(f"--{flag} is fixed here, or differs from row to row: leave it out")
    if len(set(given["seeds"])) < len(given["seeds"]):
        raise data.InputError("--seeds names a seed twice: their spread would be wrong")
    own = {name: value for name, value in given.items() if name in asdict(defaults)}
    config = replace(defaults, **own)
    for seed in given["seeds"]:
        fllw.validate(replace(config, seed=seed, clients_per_round=0))
    return config, {name: value for name, value in given.items() if name not in own}

def add(rows, name, columns):
    """Add one seed's columns {name: number} to a row of a table {name: {column: numbers}}."""
    if "upload_bytes" in columns:
        columns = columns | {"bytes": columns["download_bytes"] + columns["upload_bytes"]}
    for column, number in columns.items():
        rows.setdefault(name, {}).setdefault(column, []).append(number)

def command(name, doc, defaults, fixed, rows_of, arguments=None, columns=SHOWN):
    """The command of an experiment whose rows_of(config, dataset) yields the rows of its table with
    one seed: (name, {column: number}). --clients and --alpha say how the images are split."""
    parser, rows = make_parser(name, doc), {}
    with data.sentences(parser):
        config, flags = settings(defaults, vars(parser.parse_args(arguments)), fixed)
        fllw.validate(config)
        dataset = data.load(config.data, config.cache, config.images)._replace(train_clients=None)
        for seed in flags["seeds"]:
            for row, found in rows_of(replace(config, seed=seed), dataset):
                add(rows, row, found)
        show(name, rows, flags["save"], columns)

def macs(config, image_shape):
    """Multiply-accumulates of a whole run for one image: the mean over at most ten clients."""
    clients = range(min(config.clients_per_round or config.clients, 10))
    kept = fllw.sample_kept_blocks
    return sum(config.macs(stage, kept(config, stage, number, client), image_shape)
               for stage in fllw.stages(config) for number in stage.rounds
               for client in clients) * config.local_epochs / len(clients)

def show(experiment, rows, save=None, columns=SHOWN, **more):
    """Print a table of rows, mean and standard deviation over seeds. Before that keep its numbers
    in results/SAVE.json, with the command and what more there is."""
    if save:
        where = torch.cuda.get_device_name() if torch.cuda.is_available() else "one thread a client"
        command = " ".join([f"python -m experiments.{experiment}", *sys.argv[1:]])
        RESULTS.mkdir(exist_ok=True)
        fllw.write(RESULTS / f"{save}.json", {
            "command": command, "where": f"torch {torch.__version__}, {where}", "rows": rows,
            **more})
    print(f"\n{fllw.table(rows, columns)}", flush=True)
