"""How fast is it? A local step beside a bare loop and the predicted cost; its memory; workers.

    python -m experiments.benchmark --dim 192 --depth 12 --heads 3 --patch-size 4 --batch-size 128
    python -m experiments.benchmark --workers-only      # seconds of the default command's training

Images are random 3 x 32 x 32, whatever --data says, but for --workers-only. Steps: first, middle
and last stage of every method, medians of turns taken one after the other.
"""
if not __package__:  # as a script, it would not find fllw.py
    raise SystemExit("run this from the repository's folder: python -m experiments.benchmark")

import contextlib
import subprocess
import sys
import time
from dataclasses import replace
from unittest import mock

import numpy as np
import torch

import data
import fllw
from experiments import parse, show
from ssl_loss import nt_xent

SHAPE, TURNS, STEPS = (3, 32, 32), 3, 3

def bare_loop(config, stage, learner, views, steps):
    """What a local step has to compute, and nothing else: no client, no augmentation, no meter."""
    first = min(stage.active)
    optimizer = torch.optim.AdamW([p for p in learner.parameters() if p.requires_grad], fused=True)
    for _ in range(steps):
        with torch.autocast(views.device.type, torch.bfloat16, enabled=config.amp):
            with torch.set_grad_enabled(first == 0):
                tokens = learner.encoder.lower(views, first)
            z = learner.head(learner.encoder.upper(tokens, first))
        optimizer.zero_grad()
        nt_xent(*z.chunk(2), config.temperature).backward()
        optimizer.step()

def clock(device, function, *arguments):
    """Seconds that a call takes on this device."""
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    function(*arguments)
    wait()
    return time.perf_counter() - began

def cases_of(config):
    """(name, settings, stage, kept blocks): first, middle and last stage of every method."""
    cases = []
    methods = [("e2e", 0.0), ("progressive", 0.0), ("fll", 0.0), ("fll", 0.5), ("lasting", 0.0)]
    for method, dropout in methods:
        one = replace(config, method=method, depth_dropout=dropout, local_epochs=1)
        plan = fllw.stages(one)
        for stage in dict.fromkeys(plan[:1] + plan[len(plan) // 2:][:1] + plan[-1:]):
            frozen = round((1 - dropout) * len(stage.frozen))  # as many as on average
            cases.append((fllw.label(one), one, stage, stage.frozen[:frozen] + stage.active))
    return cases

def measure(config, stage, kept, images):
    """(seconds of a local step, seconds of a bare one)."""
    server = {name: t.to(images.device) for name, t in fllw.initial(config, SHAPE).items()}
    message = fllw.broadcast(server, kept)
    learner = fllw.assemble(config, message, SHAPE, stage.trains)
    views = data.normalise(images[:config.batch_size].repeat(2, 1, 1, 1))
    seconds = []
    for steps in (2, 2 + STEPS):  # what comes before the first step is paid in both
        part = images[:steps * config.batch_size]
        seconds.append((clock(images.device, fllw.local_train, config, stage, message, part, 1, 0),
                        clock(images.device, bare_loop, config, stage, learner, views, steps)))
    return (np.array(seconds[1]) - seconds[0]) / STEPS

def memory_table(config, cases):
    """Peak MiB of a step at the last stage, plain and with micro-batches of 16 images."""
    rows = {}
    for batch in (64, 256, 512):
        for name, settings, stage, kept in {case[0]: case for case in cases}.values():
            peaks = []
            for micro in (0, 16):
                changed = replace(settings, batch_size=batch, micro_batch=micro)
                peaks.append(fllw.peak_memory(changed, stage, SHAPE, kept) / 2**20)
            if settings.method == "e2e":
                whole = peaks[0]
            rows[f"{name}, batch {batch}"] = {
                "plain": peaks[0], "micro": peaks[1], "ratio": f"{whole / peaks[0]:.1f}x",
                "micro_ratio": f"{whole / peaks[1]:.1f}x"}
    columns = {"plain": ("peak MiB", 1, 0), "ratio": ("less", 1, 0),
               "micro": ("micro-batch 16", 1, 0), "micro_ratio": ("less", 1, 0)}
    return fllw.table(rows, columns)

def time_workers(config):
    """Rows: seconds that the default command's training takes, the start of its workers included.
    "2 threads": one process whose steps use two of torch's threads."""
    config = replace(config, data="mnist5k", patch_size=7, rounds=24)
    dataset, rows = data.load("mnist5k"), {}
    for name, workers, others in (("one process, 2 threads", 0, 0), ("1 worker", 1, 0),
                                  ("2 workers", 2, 0), ("2 workers and 2 other processes", 2, 2)):
        with contextlib.ExitStack() as stack:
            for _ in range(others):
                busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
                stack.callback(busy.kill)
            began = time.perf_counter()
            if workers:
                reach = fllw.reach_clients(replace(config, workers=workers), dataset)
                fllw.federate(config, dataset, ask=stack.enter_context(reach))
            else:
                torch.set_num_threads(2)
                stack.enter_context(mock.patch.object(fllw, "one_thread", contextlib.nullcontext))
                fllw.federate(config, dataset)
            rows[name] = {"seconds": time.perf_counter() - began}
    for row in rows.values():
        row["faster"] = rows["one process, 2 threads"]["seconds"] / row["seconds"]
    return rows

def main():
    parser = fllw.Parser(__doc__.split("\n\n")[0], prog="python -m experiments.benchmark")
    parser.add_argument("--workers-only", action="store_true", help="time worker processes alone")
    given = parse(parser, None, seeds="")
    workers_only, name = given.pop("workers_only", False), given.pop("save")
    config = fllw.Config(**{"patch_size": 4, **given})  # of 32 x 32 pixels
    fllw.validate(config)
    if workers_only:
        columns = {"seconds": ("seconds, 24 rounds", 1, 1), "faster": ("times as fast", 1, 2)}
        show(time_workers(config), name, "benchmark", columns)
        return
    device, cases = fllw.pick_device(config), cases_of(config)
    images = torch.randint(0, 256, ((2 + STEPS) * config.batch_size, *SHAPE), dtype=torch.uint8)
    images = images.to(device)
    turns = [[measure(one, stage, kept, images) for _, one, stage, kept in cases]
             for _ in range(TURNS)]
    seconds = np.median(turns, 0)  # [cases, 2]
    work = [fllw.count_macs(one, stage, kept, SHAPE) for _, one, stage, kept in cases]
    rows = {}
    for (name, one, stage, kept), (step, bare), mac in zip(cases, seconds, work):
        rows[f"{name}, stage {stage.number}"] = {
            "step": step, "tflops": 2e-12 * mac * one.batch_size / step, "bare": step / bare,
            "share": step / seconds[0, 0], "predicted": mac / work[0]}
    columns = {"step": ("s/step", 1, 4), "tflops": ("TFLOP/s", 1, 2), "bare": ("step/bare", 1, 2),
               "share": ("of end-to-end", 1, 2), "predicted": ("predicted", 1, 2)}
    where = (torch.cuda.get_device_name(device) if device.type == "cuda"
             else f"{torch.get_num_threads()} CPU threads")
    print(f"{config.batch_size} images a step, width {config.dim}, {config.depth} blocks, on "
          f"{where}\n\n{memory_table(config, cases)}")
    show(rows, name, "benchmark", columns)

if __name__ == "__main__":
    fllw.command(main)
