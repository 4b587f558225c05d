"""What do the methods reach at the papers' size? ViT-Tiny on one GPU, in about --minutes.

    python -m experiments.paper_scale                     # CIFAR-10, needs a GPU
    python -m experiments.paper_scale --rehearse          # toy size, any machine, minutes

Patches of 4 pixels, 10 clients, three local epochs, batches of 512, bf16; learning rate, weight
decay and solarisation as in Tun et al. 2024 (arXiv 2401.11647), who pre-train on COCO shrunk to
32 x 32, which is not the same experiment. The step of every row is timed first, and as many rounds
are run, at most 180, as the time allows. A row is a command of experiments.compare or .finetune;
some run side by side. Rerun the command to resume.
"""
if not __package__:  # as a script, it would not find fllw.py
    raise SystemExit("run this from the repository's folder: python -m experiments.paper_scale")

import json
import math
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import data
import fllw
from data import InputError, friendly_errors
from experiments import compare, parse, show
from fllw import Config

ROWS = ("raw", "random", "scratch", "one-block", "two-blocks", "fll", "fdd-half", "lasting-fdd",
        "progressive", "e2e")
VARIES = ("method", "depth_dropout", "blocks_per_stage")  # from row to row
TUNE = 40     # epochs of fine-tuning, on all labels
AT_ONCE = 4   # rows that run side by side: one alone does not fill the GPU
PAPER = Config(data="cifar10", augment="solarised", dim=192, depth=12, heads=3, patch_size=4,
               head_hidden=512, head_dim=256, clients=10, rounds=180, local_epochs=3,
               batch_size=512, lr=3e-4, weight_decay=1e-5, amp=True, depth_dropout=0.0)
TOY = Config(data="mnist5k", images=200, dim=16, depth=3, heads=2, patch_size=7, head_hidden=24,
             head_dim=8, clients=2, rounds=4, batch_size=32, depth_dropout=0.0)

def seconds_a_round(config, dataset, steps=4):
    """Seconds of a round, timed at the middle stage with a few steps of one client."""
    device, plan = fllw.pick_device(config), fllw.stages(config)
    stage = plan[len(plan) // 2]
    server = {name: t.to(device) for name, t in fllw.initial(config, dataset.shape).items()}
    message = fllw.broadcast(server, stage.present)
    one, times = replace(config, local_epochs=1), []
    for n in (2, 2, 2 + steps):  # warm up; what comes before the first step is paid in both others
        images = dataset.train_images[:n * config.batch_size].to(device)
        began = time.perf_counter()
        _, losses = fllw.local_train(one, stage, message, images, 1, 0)
        losses.sum().item()  # waits for the device
        times.append(time.perf_counter() - began)
    step = max(times[2] - times[1], 1e-4) / steps
    return step * config.local_epochs * len(dataset.train_images) / config.batch_size

def choose_rounds(config, dataset, minutes, path):
    """As many rounds as the time allows, fine-tuning set aside: a multiple of the stages. They are
    kept in a file, for the next call."""
    if path.exists():
        with friendly_errors(f"{path} is damaged", "delete it and rerun the command"):
            return int(json.loads(path.read_text()))
    rows = compare.variants(config)
    total = sum(seconds_a_round(rows[key], dataset) for key in ROWS if key in rows)
    tuning = TUNE / config.local_epochs * seconds_a_round(rows["e2e"], dataset) / 2  # one view
    left = 60 * minutes - tuning * (len(ROWS) - 2)
    rounds = int(min(config.rounds, max(config.depth, left / total))) // config.depth * config.depth
    fllw.write(path, rounds)
    return rounds

def command_of(key, config, epochs):
    """The command that trains and evaluates a row, and fine-tunes it where there is a network."""
    line = [sys.executable, "-m", "experiments.compare", "--rows", key]
    if key not in ("raw", "random"):
        line[2:] = ["experiments.finetune", "--epochs", str(epochs), "--rows", key]
    for name, value in asdict(config).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            line.append(f"--{flag}" if value else f"--no-{flag}")
        elif name == "seed":
            line += ["--seeds", str(value)]
        elif name not in VARIES and value != "":
            line += [f"--{flag}", str(value)]
    return line

def side_by_side(commands):
    """Run commands {log file: command}, AT_ONCE of them; yields the logs of those that failed."""
    waiting, running = list(commands.items()), {}
    try:
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                log, line = waiting.pop(0)
                running[log] = subprocess.Popen(line, stdout=log.open("a"),
                                                stderr=subprocess.STDOUT)
            time.sleep(0.2)
            for log in [log for log, process in running.items() if process.poll() is not None]:
                if running.pop(log).returncode:
                    yield log
    finally:  # after Ctrl-C, leave nothing behind
        for process in running.values():
            process.terminate()

def report(config, out, epochs):
    """The table, from what the commands have left in `out`: name -> columns."""
    variants, rows = compare.variants(config), {}
    for key in ROWS:
        run, row = f"{key}-seed{config.seed}", {}
        if key != "scratch":
            row = json.loads((out / run / "summary.json").read_text())
        if key not in ("raw", "random"):
            tuned = json.loads((out / f"{run}-finetuned.json").read_text())
            row["finetuned"] = tuned[f"all labels a class, {epochs} epochs of 256, draw 0"]
        name = compare.name_of(key, variants[key], config) if key in variants else key
        rows[{"scratch": "from scratch", **compare.BASELINES}.get(key, name)] = row
    return rows

def main(arguments=None):
    parser = fllw.Parser(__doc__.split("\n\n")[0], prog="python -m experiments.paper_scale")
    add = parser.add_argument_group("paper scale").add_argument
    add("--minutes", type=float, default=25.0, help="time to choose the rounds for (default: 25)")
    add("--rehearse", action="store_true", default=False, help="toy size")
    given = parse(parser, arguments, set(VARIES), seeds="")
    minutes, name, rehearse = (given.pop(flag) for flag in ("minutes", "save", "rehearse"))
    if not 0 < minutes < math.inf:
        raise InputError(f"--minutes must be above 0, it is {minutes:g}")
    base, epochs = (TOY, 2) if rehearse else (PAPER, TUNE)
    config = replace(base, **given)
    fllw.validate(config)
    for key in set(ROWS) - {"raw", "random", "scratch"} - compare.variants(config).keys():
        raise InputError(f"the row {key} cannot be trained with --depth {config.depth}")
    out = Path(config.out or f"runs/paper-scale-{Path(config.data).stem}").expanduser()
    dataset = data.load(config.data, config.cache, config.images)
    with friendly_errors(f"{out} cannot be a run folder", "choose another --out"):
        out.mkdir(parents=True, exist_ok=True)
    if "rounds" not in given:
        rounds = choose_rounds(config, dataset, minutes, out / "rounds.json")
        config = replace(config, rounds=rounds)
    config = replace(config, out=str(out), images=len(dataset.train_images))

    commands = {out / f"{key}.log": command_of(key, config, epochs) for key in ROWS}
    began = time.perf_counter()
    for log in side_by_side(commands):
        reason = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise InputError(f"the row {log.stem} failed, {log} ends: {''.join(reason)}")
    rows = report(config, out, epochs)
    print(f"{config.rounds} rounds; {time.perf_counter() - began:.0f} s of this call")
    show(rows, name, "paper_scale")

if __name__ == "__main__":
    fllw.command(main)
