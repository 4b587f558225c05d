"""One file per question: run it as `python -m experiments.NAME`; README.md here has the answers.

What follows is what several experiments share beside compare.py.
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

def once(config, dataset, experiment, work):
    """The columns {name: number} of a run, or of its rows {name: columns}: read back if its folder
    has them, else work(folder, state), which are then kept there. experiment: "NAME" or "NAME and
    what else sets it apart"."""
    with fllw.run_folder(config, dataset, experiment) as (folder, state):
        summary = folder / "summary.json"
        if summary.exists():
            columns = fllw.read(summary)
        else:
            columns = work(folder, state)
            fllw.write(summary, columns)
        return columns

def plain_name(text):
    """For --save: the name of a file without its folder and ending."""
    if not text or any(not (letter.isalnum() or letter in "-_") for letter in text):
        raise argparse.ArgumentTypeError(f"{text!r} must be letters, digits, - and _ alone")
    return text

def parse(parser, arguments, fixed=(), seeds="+"):
    """Add --save (and --seeds), then parse: a dict of the flags given.

    fixed: flags that the experiment sets itself; seeds: how many, for argparse, "" for none."""
    group = parser.add_argument_group("table")
    group.add_argument("--save", metavar="NAME", type=plain_name, default=None,
                       help="also keep the table as experiments/results/NAME.json")
    if seeds:
        group.add_argument("--seeds", nargs=seeds, type=int, default=[0, 1, 2],
                           help="instead of --seed (default: 0 1 2)")
    given = vars(parser.parse_args(arguments))
    for name in sorted(fixed & given.keys()):
        raise InputError(f"--{name.replace('_', '-')} differs from row to row or is fixed here: "
                         "leave it out")
    if len(set(given.get("seeds", ()))) < len(given.get("seeds", ())):
        raise InputError("--seeds names a seed twice: their spread would be wrong")
    return given

def settings(parser, arguments, defaults, fixed=(), splits=()):
    """Parse as parse() does, and validate with every seed: (the settings, a dict of the flags that
    are no settings). defaults: a Config with what the experiment has by default; splits: choices of
    --split, of which dirichlet stands for --alpha 0.1 and the other one for 0."""
    if splits:
        parser.add_argument("--split", choices=splits, default=splits[0], help="of the labels")
        fixed = {"alpha", *fixed}
    given = parse(parser, arguments, fixed)
    flags = {name: given.pop(name) for name in given.keys() - asdict(defaults).keys()}
    config = replace(defaults, **given)
    if splits:
        config = replace(config, alpha=0.1 if flags["split"] == "dirichlet" else 0.0,
                         out=given.get("out", f"{defaults.out}-{flags['split']}"))
    for seed in flags["seeds"]:
        fllw.validate(replace(config, seed=seed))
    return config, flags

def add(rows, name, columns):
    """Add one seed's columns {name: number} to a row of a table {name: {column: numbers}}."""
    for column, number in columns.items():
        rows.setdefault(name, {}).setdefault(column, []).append(number)

def save(name, command, rows, **more):
    """Keep the numbers behind a table, and what more there is: experiments/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "one thread per client"
    where = f"torch {torch.__version__}, {gpu}"
    fllw.write(RESULTS / f"{name}.json", {"command": command, "where": where, "rows": rows, **more})

def show(rows, name, experiment, columns=COLUMNS, **more):
    """Print a table of rows as for fllw.table(); before that, keep it under a name, if one is given
    with --save: a terminal that cannot print must not lose it. more: is kept with it."""
    if name:
        save(name, " ".join([f"python -m experiments.{experiment}", *sys.argv[1:]]), rows,
             **more)
    print(f"\n{fllw.table(rows, columns)}")
