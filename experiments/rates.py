"""Learning rates a stage: does it help if the stages after the first train at a multiple of --lr?

    python -m experiments.rates --method lasting --rounds 192 --seeds 0 1 2

On the joint `client`: a client that trains with another rate from stage 2 on. Costs do not change.
Each seed and factor has a run folder in --out: the same command goes on where it stopped.
"""
import sys
from dataclasses import replace
from pathlib import Path

import data
import fllw
from experiments.compare import save
from fllw import Config, InputError, local_train, table

def later_at(factor):
    """A client like local_train, with `factor` times the learning rate from stage 2 on."""
    def client(config, stage, *work):
        if stage.number > 1:
            config = replace(config, lr=factor * config.lr)
        return local_train(config, stage, *work)

    return client

def main():
    parser = fllw.Parser(__doc__.split("\n\n")[0], prog="python -m experiments.rates")
    mine = parser.add_argument_group("comparison")
    mine.add_argument("--factors", nargs="+", type=float, default=[1, 2], metavar="FACTOR")
    mine.add_argument("--seeds", nargs="+", type=int, default=[0], help="instead of --seed")
    mine.add_argument("--save", default="", help="also keep the table in experiments/results/")
    given = vars(parser.parse_args())
    factors, seeds, name = given.pop("factors"), given.pop("seeds"), given.pop("save")
    if "seed" in given or min(factors) <= 0:
        raise InputError("--factors must be above 0, and --seeds takes the place of --seed")
    config = Config(**{"depth_dropout": 0.0} | given)
    fllw.check(replace(config, seed=min(seeds)))
    dataset, rows = data.load(config.data, config.cache, config.images), {}
    out = Path(config.out or f"runs/rates-{Path(config.data).stem}")
    for seed in seeds:
        for factor in factors:
            client, slug = later_at(factor), f"{config.method}-{factor:g}-seed{seed}"
            one = replace(config, seed=seed, out=str(out / slug))
            with fllw.run_folder(one, dataset, f"rates {factor:g}") as (folder, state):
                encoder, history = fllw.train(one, dataset, folder, state, client=client)
                row = fllw.result(one, dataset, encoder, history, client)
            columns = rows.setdefault(f"{fllw.label(one)}, later stages x {factor:g}", {})
            for column, value in row.items():
                columns.setdefault(column, []).append(value)
    print(f"\n{len(dataset.test_images):,} test images, seeds {seeds}\n{table(rows)}")
    if name:
        save(name, "python -m experiments.rates " + " ".join(sys.argv[1:]), rows)

if __name__ == "__main__":
    fllw.command(main)
