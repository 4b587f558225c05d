"""The size of the papers on one GPU, by one command, in about --minutes.

    python -m experiments.paper_scale                     # CIFAR-10, ViT-Tiny, needs a GPU
    python -m experiments.paper_scale --rehearse          # toy size, any machine, a minute

ViT-Tiny with patches of 4 pixels, 10 clients, three local epochs, batches of 512, bf16; learning
rate, weight decay and solarisation as in Tun et al. 2024 (arXiv 2401.11647), who pre-train on COCO
shrunk to 32 x 32, which is not the same experiment. The step of every row is timed first, and as
many rounds are run, at most 180, as the time allows. Rows run side by side, a process each, since
one alone does not fill the GPU; the same command goes on where it was cut off.
"""
import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

import data
import fllw
from experiments import compare
from fllw import Config, InputError

ROWS = ("raw", "random", "scratch", "one-block", "two-blocks", "fll", "fdd-half", "lasting-fdd",
        "progressive", "e2e")
PAPER = Config(data="cifar10", augment="solarised", dim=192, depth=12, heads=3, patch_size=4,
               head_hidden=512, head_dim=256, clients=10, rounds=180, local_epochs=3,
               batch_size=512, lr=3e-4, weight_decay=1e-5, amp=True, depth_dropout=0.0)
TOY = Config(data="mnist5k", images=200, dim=16, depth=3, heads=2, patch_size=7, head_hidden=24,
             head_dim=8, clients=2, rounds=4, batch_size=32, depth_dropout=0.0)
TUNE = 40  # epochs of fine-tuning, on all labels
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

def choose_rounds(config, dataset, minutes):
    """As many rounds as the time allows, fine-tuning set aside; a multiple of the stages."""
    rows, total = compare.variants(config), 0.0
    for key in [key for key in ROWS if key in rows]:
        seconds = seconds_a_round(rows[key], dataset)
        images = len(dataset.train_images) * config.local_epochs
        print(f"{key:<14} {images / seconds:>8.0f} images/s", flush=True)
        total += seconds
    tuning = TUNE / config.local_epochs * seconds_a_round(rows["e2e"], dataset) / 2  # one view
    left = 60 * minutes - tuning * (len(ROWS) - 2)
    rounds = min(config.rounds, max(config.depth, left / total))
    return int(rounds) // config.depth * config.depth

def one_row(key, out):
    """What a child process does: train, judge and fine-tune one row of the settings in `out`."""
    torch.set_float32_matmul_precision("high")
    settings = json.loads((out / "settings.json").read_text())
    tune, config = settings.pop("finetune"), Config(**settings)
    dataset = data.load(config.data, config.cache, config.images)
    plan = compare.variants(config) | dict.fromkeys(compare.BASELINES, config)
    compare.measure(key, plan[key], dataset, out, tune, 0)

def side_by_side(commands, at_once):
    """Run the commands, some at a time, each with its output in a file; which of them failed."""
    waiting, running, failed = list(commands.items()), {}, []
    while waiting or running:
        while waiting and len(running) < max(1, at_once):
            log, line = waiting.pop(0)
            running[log] = subprocess.Popen(line, stdout=log.open("a"), stderr=subprocess.STDOUT)
        time.sleep(0.2)
        for log in [log for log, process in running.items() if process.poll() is not None]:
            if running.pop(log).returncode:
                failed.append(log)
    return failed

def report(config, out):
    """name -> columns of all rows, with what the step reached and how many clients fit."""
    plan, rows = compare.variants(config), {}
    for key in ROWS:
        folder = out / f"{key}-seed{config.seed}"
        row = json.loads((folder / "summary.json").read_text())
        if key in plan:  # on a GPU, the history has the allocator's peak
            history = json.loads((folder / "history.json").read_text())
            peak = max(one["peak_memory_bytes"] for one in history)
            row |= {"peak_memory_bytes": peak,
                    "tflops": 2e-12 * row["macs"] * config.images / row["seconds"]}
            if torch.cuda.is_available():
                row["fit"] = torch.cuda.get_device_properties(0).total_memory // peak
        rows[compare.name_of(key, plan.get(key, config), config)] = row
    return rows

def settings_of(given, base, minutes, out):
    """The settings of a run in `out`: those saved there, or new ones with rounds that fit."""
    config = replace(base, **given)
    fllw.check(config)
    path = out / "settings.json"
    if path.exists():
        saved = {k: v for k, v in json.loads(path.read_text()).items() if k != "finetune"}
        for name in given:
            if name not in ("device", "out", "cache") and saved[name] != given[name]:
                raise InputError(f"{out} belongs to a run with {name} {saved[name]}, not "
                                 f"{given[name]}: choose another --out")
        return Config(**saved)
    dataset = data.load(config.data, config.cache, config.images)  # before the children do
    if "rounds" not in given:
        config = replace(config, rounds=choose_rounds(config, dataset, minutes))
    config = replace(config, images=len(dataset.train_images))
    out.mkdir(parents=True, exist_ok=True)
    fllw.write(path, {**asdict(config), "finetune": TUNE if base is PAPER else 2})
    return config

def main():
    parser = fllw.Parser(__doc__.split("\n\n")[0], prog="python -m experiments.paper_scale")
    add = parser.add_argument_group("paper scale").add_argument
    add("--minutes", type=float, default=25.0, help="time to choose the rounds for")
    add("--at-once", type=int, default=4, help="rows that run side by side")
    add("--rehearse", action="store_true", help="toy size")
    add("--save", default="", help="also keep the table in experiments/results/")
    add("--row", help="what its own child processes are given")
    given = vars(parser.parse_args())
    minutes, at_once, name = (given.pop(key) for key in ("minutes", "at_once", "save"))
    base, row = TOY if given.pop("rehearse", False) else PAPER, given.pop("row", None)
    out = Path(given.get("out") or f"runs/paper-scale-{base.data}")
    if row:
        return one_row(row, out)
    config = settings_of(given, base, minutes, out)
    child = [sys.executable, "-m", "experiments.paper_scale", "--out", str(out), "--row"]
    commands = {out / f"{key}.log": [*child, key] for key in ROWS}
    began = time.perf_counter()
    for log in side_by_side(commands, at_once):
        raise OSError(f"a row failed, see {log}")
    rows = report(config, out)
    columns = fllw.COLUMNS | {"tflops": ("TFLOP/s", 1, 2), "fit": ("clients fit", 1, 0)}
    where = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    print(f"{config.rounds} rounds on {where}, {time.perf_counter() - began:.0f} s of this call\n"
          f"{fllw.table(rows, columns)}")
    if name:
        compare.save(name, f"python -m experiments.paper_scale, on {where}", rows)

if __name__ == "__main__":
    fllw.command(main)
