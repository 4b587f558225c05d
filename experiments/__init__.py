"""One file per question: run it as `python -m experiments.NAME`; README.md here has the answers.

Here is what they share: flags, tables over seeds, and where results are kept.
"""
import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

import fllw
from data import InputError
from ssl_loss import COLUMNS

RESULTS = Path(__file__).parent / "results"

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
    parser.add_argument("--save", metavar="NAME", type=plain_name, default=None,
                        help="also keep the table as experiments/results/NAME.json")
    return parser

def settings(defaults, given, fixed=()):
    """(a Config, the flags that are no settings), from the defaults and the flags given, a dict.

    fixed: settings that the experiment sets itself; InputError if one of them was given."""
    for name in {"seed", *fixed} & given.keys():
        raise InputError(f"--{name.replace('_', '-')} differs from row to row or is fixed here: "
                         "leave it out")
    if len(set(given["seeds"])) < len(given["seeds"]):
        raise InputError("--seeds names a seed twice: their spread would be wrong")
    own = {name: value for name, value in given.items() if name in asdict(defaults)}
    config = replace(defaults, **own)
    for seed in given["seeds"]:
        fllw.validate(replace(config, seed=seed))
    return config, {name: value for name, value in given.items() if name not in own}

def add(rows, name, columns):
    """Add one seed's columns {name: number} to a row of a table {name: {column: numbers}}."""
    for column, number in columns.items():
        rows.setdefault(name, {}).setdefault(column, []).append(number)

def show(experiment, rows, save=None, columns=COLUMNS, **more):
    """Print a table of rows, mean and standard deviation over seeds. Before that keep its numbers
    in results/SAVE.json, with the command and what more there is."""
    if save:
        where = torch.cuda.get_device_name() if torch.cuda.is_available() else "one thread a client"
        command = " ".join([f"python -m experiments.{experiment}", *sys.argv[1:]])
        RESULTS.mkdir(exist_ok=True)
        fllw.write(RESULTS / f"{save}.json", {
            "command": command, "where": f"torch {torch.__version__}, {where}", "rows": rows, **more})
    print(f"\n{fllw.table(rows, columns)}")
