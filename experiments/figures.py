"""The pictures of the README, one function each, and what the notebook's pictures share with them.

    python -m experiments.figures

draws them into assets/. Colours are those of Okabe and Ito (2008) for colour-blind readers; dashes
and hatches are for grey print."""
import argparse
import io
import json
import re

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import fllw
from experiments import RESULTS, memory
from ssl_loss import COLUMNS

MIB = 2**20
ASSETS = RESULTS.parent.parent / "assets"
ORANGE, BLUE, GREEN, NAVY, PINK = "#D55E00", "#56B4E9", "#009E73", "#0072B2", "#CC79A7"
STYLES = {  # of the methods: the first of these names that is a part of a row's name
    "FDD": (ORANGE, "-"), "FLL": ("#E69F00", "-"), "progressive": (GREEN, "-"),
    "one block": (PINK, "-."), "two blocks": (BLUE, "-."), "checkpointed": ("#555555", ":"),
    "end-to-end": (NAVY, "--")}
BUDGETS = {  # (title, accuracy) of a panel -> names of results
    ("digits, 4 blocks", "moved_knn"): ("digits-192", "digits-192-controls"),
    ("CIFAR-10, 10,000 images, 6 blocks", "knn"): ("cifar10-48",)}
ROOM = {"left": 0.1, "bottom": 0.15, "right": 0.76, "top": 0.92, "wspace": 0.7}  # for names
plt.rcParams.update({"figure.constrained_layout.use": True, "grid.alpha": 0.3,
                     "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
                     "axes.titlesize": 10, "axes.titlelocation": "left", "legend.frameon": False})

def panels(width, height, titles=("",), rows=1, **more):
    """Axes, a column for each title, in a figure (inches); closed, or a notebook shows it twice."""
    figure, axes = plt.subplots(rows, len(titles), figsize=(width, height), squeeze=False, **more)
    plt.close(figure)
    for ax, title in zip(axes[0], titles):
        ax.set_title(title)
    return axes.ravel()

def legend_below(figure, columns=4):
    """One legend for all axes of a figure, each name once, and lines to read heights by."""
    named = {}
    for ax in figure.axes:
        ax.grid(axis="y")
        named |= dict(zip(*reversed(ax.get_legend_handles_labels())))
    figure.legend(named.values(), named, ncol=columns, loc="outside lower center")
    return figure

def style_of(name):
    """Colour and dashes of a method."""
    colour, dashes = STYLES[next(part for part in STYLES if part in name)]
    return {"color": colour, "linestyle": dashes}

def label_ends(ax, curves, apart=0.06):
    """Write each curve's name beside its last point, in its colour; curves: name -> (x, y). Names
    that would overlap are moved apart, by a share of the axes' height."""
    ax.autoscale_view()  # before places are read
    to_axes = ax.transData + ax.transAxes.inverted()
    ends = {name: to_axes.transform((x[-1], y[-1])) for name, (x, y) in curves.items()}
    height = -1.0
    for name, (across, up) in sorted(ends.items(), key=lambda end: end[1][1]):
        height = max(up, height + apart)
        ax.annotate(name, (across, up), (1.03, height), "axes fraction", "axes fraction",
                    color=style_of(name)["color"], fontsize=8, va="center", annotation_clip=False,
                    arrowprops={"arrowstyle": "-", "lw": 0.5, "color": style_of(name)["color"]}
                    ).set_in_layout(False)

def read_rows(name):
    """The rows of experiments/results/NAME.json."""
    return json.loads((RESULTS / f"{name}.json").read_text())["rows"]

def memory_frontier():
    """Peak memory of a local step against the size of its micro-batches, of experiments.memory."""
    (ax,) = panels(7, 3.6, layout="none", gridspec_kw=ROOM)
    curves = {name: ((1, 4, 16, 128), [row[size] / MIB for size in ("1", "4", "16", "whole")])
              for name, row in read_rows("memory").items()
              if name not in ("progressive", "FLL + FDD 0.5")}  # as end-to-end, as FLL
    for name, (x, y) in curves.items():
        ax.plot(x, y, marker="o", markersize=4, **style_of(name))
    ax.set(xscale="log", yscale="log", xlabel="images of a micro-batch (128: the whole batch)",
           ylabel="peak memory (MiB)", xticks=(1, 4, 16, 128), xticklabels=(1, 4, 16, 128))
    ax.set_yticks((20, 50, 100, 200, 500, 1000, 2000), labels=(20, 50, 100, 200, 500, 1000, 2000))
    ax.minorticks_off()
    ax.grid(axis="y")
    label_ends(ax, curves)
    return ax.figure

def method_of(name):
    """What a row of results is called in the figure; None for what it does not show."""
    method = r"FLL \+ FDD 0.25|FLL(?!,? [+bm])|progressive(?! \+)|one block|two blocks|end-to-end"
    found = re.match(f"({method})(?!.*bytes)", name)
    return found and found[1]

def budget():
    """Accuracy against compute, of BUDGETS. A point is a method with one budget, its bar the
    standard deviation over seeds."""
    axes = panels(10, 3.8, [title for title, _ in BUDGETS], layout="none", gridspec_kw=ROOM)
    for ax, ((_, column), names) in zip(axes, BUDGETS.items()):
        points = {}  # method -> (compute, mean, deviation) of each budget
        for row_name, row in [pair for name in names for pair in read_rows(name).items()]:
            method = method_of(row_name)
            if method and "macs" in row:
                spread = np.std(row[column], ddof=1) if len(row[column]) > 1 else np.nan
                point = np.mean(row["macs"]) / 1e9, np.mean(row[column]), spread
                points.setdefault(method, []).append(point)
        curves = {}
        for method, found in points.items():
            x, y, spread = np.transpose(sorted(found))
            ax.errorbar(x, y, spread, capsize=3, marker="o", markersize=4, **style_of(method))
            curves[method] = x, y
        ax.set(xlabel="compute (10⁹ MAC for one image)", ylabel=COLUMNS[column][0])
        ax.grid(axis="y")
        label_ends(ax, curves)
    return axes[0].figure

def stages_gif(path, dropout=0.25, step=5):
    """The stages of ViT-Tiny with FLL and depth dropout as an animated GIF: the blocks of three
    clients, memory, and bytes so far; one frame every `step` rounds, and the last one stays."""
    config = memory.vit_tiny(depth_dropout=dropout)
    whole = fllw.cost(memory.ROWS["end-to-end"], memory.SHAPE)
    total = (whole["download_bytes"] + whole["upload_bytes"]) / 1e6
    plan = [(stage, number) for stage in fllw.stages(config) for number in stage.rounds]
    rows = [{"round": number, "stage": stage.number,
             "kept": {client: fllw.sample_kept_blocks(config, stage, number, client)
                      for client in range(3)}} for stage, number in plan]
    sent, frames = 0, []
    for (stage, number), row, paid in zip(plan, rows, fllw.replay(config, memory.SHAPE, rows)):
        sent += (paid["download_bytes"] + paid["upload_bytes"]) / 1e6
        if number % step:
            continue
        titles = f"round {number}: three clients", "memory (MiB)", "down + up so far (MB)"
        left, middle, right = panels(7.2, 3.4, titles, dpi=80, width_ratios=[2, 2, 2])
        for client, kept in row["kept"].items():
            draw_blocks(left, client, stage, kept)
        left.set(xticks=range(3), xlabel="client", ylabel="block", ylim=(-0.6, config.depth))
        peak = fllw.peak_memory(config, stage, memory.SHAPE) / MIB
        for ax, heights in ((middle, (peak, whole["peak_memory_bytes"] / MIB)),
                            (right, (sent, total * number / config.rounds))):
            for name, high in zip(("FLL + FDD", "end-to-end"), heights):
                ax.bar_label(ax.bar(name, high, color=style_of(name)["color"]), fmt="{:,.0f}")
        right.set(ylim=(0, 1.15 * total))
        left.figure.savefig(buffer := io.BytesIO())
        frames.append(Image.open(buffer))
    frames[0].save(path, save_all=True, append_images=frames[1:] + 6 * frames[-1:], duration=333,
                   loop=0)

def draw_blocks(ax, x, stage, kept):
    """A client's column of blocks: those that train green, frozen ones blue, dropped ones white."""
    for b in range(stage.stop):
        colour, hatch = ("white", "") if b not in kept else (BLUE, "//")
        if b >= stage.first and b in kept:
            colour, hatch = GREEN, ""
        ax.bar(x, 0.9, 0.8, b - 0.45, color=colour, hatch=hatch, edgecolor="grey")

def main():
    argparse.ArgumentParser("python -m experiments.figures", description=__doc__).parse_args()
    memory_frontier().savefig(ASSETS / "memory.png", dpi=100)
    budget().savefig(ASSETS / "budget.png", dpi=100)
    stages_gif(ASSETS / "stages.gif")

if __name__ == "__main__":
    main()
