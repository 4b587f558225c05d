"""The notebook's figures, one function each, and the pictures of the README.

    python -m experiments.figures                 # stages.gif and memory.png into assets/

A figure gets numbers and returns a matplotlib figure. Colours are those that Okabe and Ito (2008)
chose for colour-blind readers; each method and each state of a block keeps one throughout, and a
marker or a letter for those who print in grey.
"""
import argparse
from dataclasses import replace
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch, Rectangle

import fllw

MIB = 2**20
METHODS = {  # how its name begins -> colour, marker, line
    "raw pixels": ("#000000", "x", ":"), "random": ("#555555", "v", ":"),
    "first": ("#CC79A7", "^", "-."), "FLL, micro": ("#000000", "", "-"),
    "FLL": ("#E69F00", "o", "-"), "progressive": ("#999999", "D", "-"),
    "end-to-end": ("#0072B2", "s", "--")}
FDD = ("#D55E00", "o", "-")  # layer-wise with depth dropout
ABSENT, DROPPED, FROZEN, ACTIVE = range(4)
STATES = {"absent": "#FFFFFF", "dropped": "#F0E442", "frozen": "#56B4E9", "active": "#009E73"}
LETTERS = " .+A"

plt.rcParams.update({"figure.dpi": 90, "axes.grid": True, "grid.alpha": 0.3, "font.size": 10,
                     "axes.axisbelow": True, "image.cmap": "gray", "lines.markersize": 5,
                     "axes.spines.top": False, "axes.spines.right": False})

def look(name):
    """Colour, marker and line of a method, for plot()."""
    chosen = FDD if "FDD" in name else next(v for k, v in METHODS.items() if name.startswith(k))
    return {"color": chosen[0], "marker": chosen[1], "linestyle": chosen[2], "label": name}

def done(figure):
    """Close the figure, so that a notebook shows what a cell returns and nothing twice."""
    plt.close(figure)
    return figure

def replay(config, shape):
    """The rounds of a client that takes part in all, without training: (stage, kept, costs).

    costs: bytes down and up of the round, and the peak bytes of a local step."""
    state, number = fllw.start(config, shape, device="meta"), 0
    for stage in fllw.stages(config):
        fllw.grow(config, state, stage)
        for _ in range(stage.rounds):
            number += 1
            kept = fllw.draw_blocks(config, stage, number, 0)
            trained = {n: t for n, t in state.server.items() if stage.trains(n)}
            yield stage, kept, {
                "down": fllw.download_bytes(state, {0: kept})[0],
                "up": sum(t.nbytes for t in trained.values()) + fllw.REPORT_BYTES,
                "peak": fllw.step_memory(config, stage, state.server, kept, shape)}
            state.update(trained)

def live_bytes(config, shape):
    """Live bytes at every allocation and release of two local steps in the last stage."""
    form = tuple((name, tuple(tensor.shape))
                 for name, tensor in fllw.initial(config, shape, "meta").items())
    return fllw.metered_step(config, fllw.stages(config)[-1], form, shape).live_bytes

# -------------------------------------------------------------------------- cost, without training

def bill(rows):
    """Bars of what a client pays; rows: method -> fllw.cost()."""
    panels = {"peak memory of a step (MiB)": [c["peak_memory_bytes"] / MIB for c in rows.values()],
              "compute (10⁹ MAC for one image)": [c["macs"] / 1e9 for c in rows.values()],
              "down + up (GB)": [(c["download_bytes"] + c["upload_bytes"]) / 1e9
                                 for c in rows.values()]}
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    for ax, (title, heights) in zip(axes, panels.items()):
        bars = ax.bar(list(rows), heights, color=[look(name)["color"] for name in rows])
        ax.bar_label(bars, [f"{h:,.0f}" if h > 20 else f"{h:.2f}" for h in heights])
        ax.set(title=title)
        ax.margins(y=0.15)
    return done(figure)

def memory_over_time(lives):
    """Memory of a local step over its allocations and releases; lives: method -> live_bytes().

    The second of two steps is drawn: from then on the optimizer has its state."""
    figure, ax = plt.subplots(figsize=(9, 3.6), layout="constrained")
    for name, live in lives.items():
        second = np.array(live[len(live) // 2:]) / MIB
        x, colour = np.linspace(0, 1, len(second)), look(name)["color"]
        ax.plot(x, second, color=colour, linewidth=1.4,
                label=f"{name}: peak {second.max():,.0f} MiB")
        ax.fill_between(x, second, color=colour, alpha=0.3, linewidth=0)
    ax.set(xlabel="one local step, from its first allocation to its last release", xticks=[],
           ylabel="live memory (MiB)", xlim=(0, 1), ylim=(0, None))
    ax.legend(frameon=False, loc="upper right")
    return done(figure)

def memory_against_depth(depths, peaks):
    """peaks: method -> peak bytes of a local step for every depth."""
    figure, ax = plt.subplots(figsize=(7, 3.4), layout="constrained")
    for name, values in peaks.items():
        ax.plot(depths, np.array(values) / MIB, **look(name))
    ax.set(xlabel="blocks of the model", ylabel="peak memory of a step (MiB)", ylim=(0, None),
           xticks=depths)
    ax.legend(frameon=False)
    return done(figure)

# ---------------------------------------------------------------------------------- images, loss

def pictures(rows, names, size=0.75, titles=(), wrong=()):
    """Rows of images [C, H, W]; names: one a row; titles: (column, text); wrong: framed ones."""
    columns = max(map(len, rows))
    figure, axes = plt.subplots(len(rows), columns, figsize=(size * columns + 1, size * len(rows)),
                                squeeze=False, gridspec_kw={"wspace": 0.08, "hspace": 0.08})
    for row, images, name in zip(axes, rows, names):
        for ax, image in zip(row, images):
            if image.is_floating_point():
                image = ((image + 1) / 2).clamp(0, 1)
            ax.imshow(image.permute(1, 2, 0) if len(image) == 3 else image[0])
        row[0].set_ylabel(name, fontsize=9, rotation=0, ha="right", va="center")
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    for y, x in wrong:
        axes[y, x].spines[:].set(visible=True, color=FDD[0], linewidth=3)
    for x, text in titles:
        axes[0, x].set_title(text, loc="left", fontsize=9)
    return done(figure)

def label_counts(counts):
    """How many images of each class each client has; counts: title -> int [clients, classes]."""
    figure, axes = plt.subplots(1, len(counts), figsize=(4 * len(counts), 2.6), squeeze=False,
                                layout="constrained")
    most = max(int(table.max()) for table in counts.values())
    for ax, (title, table) in zip(axes[0], counts.items()):
        ax.imshow(table, cmap="cividis", aspect="auto", vmin=0, vmax=most)
        if table.size <= 80:
            for (client, label), n in np.ndenumerate(table):
                colour = "black" if n > most / 2 else "white"
                ax.text(label, client, n, ha="center", va="center", fontsize=7, color=colour)
        ax.set(title=title, xlabel="class", ylabel="client", yticks=range(len(table)))
        ax.grid(False)
    return done(figure)

def similarities(matrix):
    """Cosines [2B, 2B] of the views of B images; positives are outlined."""
    figure, ax = plt.subplots(figsize=(5.4, 4.4), layout="constrained")
    shown, half = ax.imshow(matrix, cmap="PuOr_r", vmin=-1, vmax=1), len(matrix) // 2
    for i in range(2 * half):
        twin = ((i + half) % (2 * half) - 0.5, i - 0.5)
        ax.add_patch(Rectangle(twin, 1, 1, fill=False, linewidth=1.5))
    ticks = range(0, 2 * half, 5)
    ax.set(xlabel="view k", ylabel="view i", xticks=ticks, yticks=ticks)
    ax.grid(False)
    figure.colorbar(shown, label="cosine similarity")
    return done(figure)

def cosines(panels):
    """Histograms; panels: title -> (cosines of positives, cosines of all other pairs)."""
    figure, axes = plt.subplots(1, len(panels), figsize=(10, 3), sharey=True, layout="constrained")
    for ax, (title, (positives, others)) in zip(axes, panels.items()):
        for values, colour, hatch, name in ((others, "#56B4E9", None, "other pairs"),
                                            (positives, "#D55E00", "//", "positives")):
            ax.hist(values, np.linspace(-1, 1, 41), weights=np.full(len(values), 100 / len(values)),
                    color=colour, alpha=0.7, hatch=hatch, edgecolor="white", label=name)
        ax.set(title=title, xlabel="cosine similarity")
    axes[0].set(ylabel="share (%)")
    axes[0].legend(frameon=False, loc="upper left")
    return done(figure)

# ------------------------------------------------------------------------------ stages and blocks

def squares(ax, grid, legend=True):
    """Blocks as coloured squares with letters; grid: int [blocks, columns] of states."""
    ax.imshow(grid, cmap=ListedColormap(STATES.values()), vmin=0, vmax=3, aspect="auto",
              origin="lower")
    ax.hlines(np.arange(1, len(grid)) - 0.5, -0.5, grid.shape[1] - 0.5, "white", linewidth=1)
    ax.set(yticks=range(len(grid)), yticklabels=range(1, len(grid) + 1), ylabel="block")
    for (b, column), state in np.ndenumerate(grid[:, :40]):
        ax.text(column, b, LETTERS[state], ha="center", va="center",
                color="white" if state == ACTIVE else "black")
    ax.grid(False)
    if legend:
        ax.legend(handles=patches(), ncol=4, frameon=False, fontsize=8, loc="lower left",
                  bbox_to_anchor=(0, 1.0), borderaxespad=0.2)

def patches():
    """What the colours of blocks mean, for a legend."""
    return [Patch(facecolor=colour, edgecolor="black", label=f"{name} {letter}".strip())
            for (name, colour), letter in zip(STATES.items(), LETTERS)][::-1]

def column(depth, stage, kept):
    """States of blocks 1 to depth on a client, int [depth]."""
    states = np.full(depth, ABSENT)
    states[list(stage.present)] = DROPPED
    states[list(kept)] = FROZEN
    states[list(stage.active)] = ACTIVE
    return states

def stage_strip(depth, rounds):
    """The stages and what travels in each; rounds: those of replay()."""
    plan = list(dict.fromkeys(stage for stage, _, _ in rounds))
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 4), sharex=True, layout="constrained")
    squares(top, np.stack([column(depth, stage, stage.present) for stage in plan], 1))
    for side, key, grey in ((-0.2, "down", "#555555"), (0.2, "up", "#AAAAAA")):
        sums = [sum(c[key] for s, _, c in rounds if s == stage) / 1e6 for stage in plan]
        bars = bottom.bar(np.arange(len(plan)) + side, sums, 0.38, color=grey, label=key)
        bottom.bar_label(bars, [f"{s:.2f}" for s in sums], fontsize=8)
    names = [f"stage {stage.number}\nrounds: {stage.rounds}" for stage in plan]
    bottom.set(xticks=range(len(plan)), xticklabels=names, ylabel="MB a client")
    bottom.margins(y=0.3)
    bottom.legend(frameon=False, fontsize=8, loc="upper right", ncol=2)
    return done(figure)

def dropout_strip(depth, stage, draws):
    """Depth dropout; draws: a list of rounds, each a list of the blocks that clients keep."""
    grid = np.stack([column(depth, stage, kept) for each in draws for kept in each], 1)
    figure, ax = plt.subplots(figsize=(10, 0.4 * depth + 0.9), layout="constrained")
    squares(ax, grid)
    clients = len(draws[0])
    for edge in range(clients, grid.shape[1], clients):
        ax.axvline(edge - 0.5, color="black")
    ax.set(xticks=np.arange(len(draws)) * clients + (clients - 1) / 2,
           xticklabels=[f"round {r}" for r in range(1, len(draws) + 1)])
    return done(figure)

def moved(losses, changes):
    """Losses of a client's local steps; changes: part of the model -> relative change in %."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 2.8), layout="constrained")
    left.plot(range(1, len(losses) + 1), losses, color=look("FLL")["color"], marker=".")
    left.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    left.set(xlabel="local step", ylabel="NT-Xent (nats)", title="the loss of every local step")
    colours = [STATES["active" if change else "frozen"] for change in changes.values()]
    bars = right.bar(list(changes), list(changes.values()), color=colours)
    right.bar_label(bars, [f"{c:.1f} %" if c else "frozen: 0" for c in changes.values()])
    right.set(title="what moved (%)")
    right.margins(y=0.15)
    right.grid(axis="x", visible=False)
    return done(figure)

# ---------------------------------------------------------------------------- training and results

def spread(ax, x, seeds, name, **more):
    """The mean over seeds and, shaded, from the lowest to the highest; seeds: [seeds, points]."""
    kind = {**look(name), **more}
    ax.plot(x, np.mean(seeds, 0), **kind)
    ax.fill_between(x, np.min(seeds, 0), np.max(seeds, 0), color=kind["color"], alpha=0.2, lw=0)

def over_seeds(points, key):
    """points: for every seed a list of dicts, one a point -> [seeds, points]."""
    return np.array([[point[key] for point in one] for one in points])

def curves(depth, history, runs, raw):
    """Blocks, losses and moved k-NN over the rounds; runs: method -> for every seed its points.

    history: rows of the layer-wise run of the first seed; raw: the moved k-NN of raw pixels."""
    figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(10, 7), sharex=True,
                                                 layout="constrained", height_ratios=[1, 1.3, 2])
    stages = [fllw.Stage(0, tuple(r["present_blocks"]), tuple(r["active_blocks"]), 1)
              for r in history]
    kept = [row["kept_blocks"][0] for row in history]
    squares(top, np.stack([column(depth, *both) for both in zip(stages, kept)], 1))
    top.set(xlim=(-0.5, len(history) - 0.5))
    for name, points in runs.items():
        x = over_seeds(points, "round")[0] - 1
        spread(middle, x, over_seeds(points, "full_loss"), name)
        spread(bottom, x, over_seeds(points, "moved_knn"), name)
        if name.startswith("FLL"):
            spread(middle, x, over_seeds(points, "loss"), name, linestyle=":", marker="",
                   label=f"{name}, training loss\n(blocks dropped)")
    bottom.axhline(raw, **{**look("raw pixels"), "marker": ""})
    middle.set(ylabel="NT-Xent (nats)")
    ticks = range(0, len(history), max(1, len(history) // 12))
    bottom.set(ylabel="moved k-NN (%)", xlabel="round", xticks=ticks,
               xticklabels=[tick + 1 for tick in ticks])
    for ax in (middle, bottom):
        ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        for i in range(1, len(history)):
            if history[i]["stage"] != history[i - 1]["stage"]:
                ax.axvline(i - 0.5, color="#BBBBBB", linewidth=1)
    return done(figure)

def accuracies(rows, columns):
    """Dots for every seed (or draw), a line at the mean; rows: method -> {key: numbers}."""
    figure, axes = plt.subplots(1, len(columns), figsize=(11, 0.42 * len(rows) + 1.1), sharey=True,
                                layout="constrained")
    for ax, (key, title) in zip(axes, columns.items()):
        for y, (name, row) in enumerate(rows.items()):
            values, kind = np.array(row[key]), look(name)
            ax.scatter(values, np.full(len(values), y), color=kind["color"], marker=kind["marker"],
                       s=45, alpha=0.6)
            ax.plot([values.mean()] * 2, [y - 0.3, y + 0.3], color=kind["color"], linewidth=2.5)
            ax.text(values.max(), y, f"   {values.mean():.1f}", va="center", fontsize=9)
        ax.set(title=title, yticks=range(len(rows)), yticklabels=list(rows))
        ax.margins(x=0.3, y=0.1)
        ax.grid(axis="y", visible=False)
    axes[0].invert_yaxis()  # they share it
    return done(figure)

def after_each_block(depths, ylabel):
    """Accuracy of features cut after block n; depths: method -> [seeds, blocks]."""
    figure, ax = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
    for name, values in depths.items():
        spread(ax, np.arange(1, np.shape(values)[1] + 1), values, name)
    ax.set(xlabel="features cut after block", ylabel=ylabel)
    ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return done(figure)

def against_cost(runs, raw):
    """Moved k-NN against what a client had paid by then; runs: method -> for every seed points."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), sharey=True, layout="constrained")
    for name, points in runs.items():
        accuracy, kind = over_seeds(points, "moved_knn"), look(name)
        spread(axes[0], over_seeds(points, "megabytes").mean(0), accuracy, name)
        spread(axes[1], over_seeds(points, "gigamacs").mean(0), accuracy, name)
        peak = over_seeds(points, "peak_mib").max()
        axes[2].plot(np.full(len(accuracy), peak), accuracy[:, -1], linestyle="",
                     color=kind["color"], marker=kind["marker"], markersize=8,
                     label=f"{name}: {peak:.1f} MiB")
    for ax, title in zip(axes, ("bytes down + up (MB)", "compute (10⁹ MAC for one image)",
                                "peak memory of a step (MiB)")):
        ax.axhline(raw, **{**look("raw pixels"), "marker": ""})
        ax.set(xlabel=title, xlim=(0, None))
    axes[2].margins(x=0.2)
    axes[2].set_xlim(0)
    axes[0].set_ylabel("k-NN on moved images (%)")
    axes[2].legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return done(figure)

def knob(panels, ylabel):
    """panels: title -> {value of the knob: one number a seed}: dots, means, standard deviations."""
    figure, axes = plt.subplots(1, len(panels), figsize=(3.8 * len(panels), 3), sharey=True,
                                squeeze=False, layout="constrained")
    for ax, (title, values) in zip(axes[0], panels.items()):
        for x, numbers in enumerate(values.values()):
            error = np.std(numbers, ddof=1) if len(numbers) > 1 else 0
            ax.errorbar(x, np.mean(numbers), error, color=FDD[0], marker="o", markersize=9,
                        capsize=6)
            ax.scatter(np.full(len(numbers), x + 0.15), numbers, color="#555555", s=12)
        ax.set(xlabel=title, xticks=range(len(values)), xticklabels=list(map(str, values)))
        ax.margins(x=0.2)
    axes[0, 0].set_ylabel(ylabel)
    return done(figure)

# ---------------------------------------------------------------------- the README's pictures

PHONE = fllw.Config(dim=192, depth=12, heads=3, patch_size=4, head_hidden=512, head_dim=256,
                    clients=10, rounds=180, local_epochs=3, batch_size=128, augment="natural")
COLOUR = (3, 32, 32)  # the images of that phone

def frame(figure, depth, rounds, i, whole):
    """One round of the GIF: the blocks on a client, its memory, and what it has sent so far."""
    figure.clear()
    left, right = figure.subplots(1, 2, width_ratios=[1, 2.4])
    stage, kept, cost = rounds[i]
    squares(left, column(depth, stage, kept)[:, None], legend=False)
    left.set(xticks=[], title=f"round {i + 1} of {len(rounds)}")
    sent = sum(c["down"] + c["up"] for _, _, c in rounds[:i + 1]) / 1e6
    by_now = whole["sent"] * (i + 1) / len(rounds) / 1e6
    rows = {"memory\n(MiB)": (cost["peak"] / MIB, whole["peak"] / MIB, whole["peak"] / MIB),
            "down + up\nso far (MB)": (sent, by_now, whole["sent"] / 1e6)}
    for y, (mine, other, most) in enumerate(rows.values()):
        for offset, value, who in ((-0.18, mine, "FLL + FDD"), (0.18, other, "end-to-end")):
            right.barh(y + offset, value / most, 0.34, color=look(who)["color"])
            right.text(value / most + 0.02, y + offset, f"{value:,.0f}", va="center", fontsize=9)
    right.set(yticks=range(len(rows)), yticklabels=list(rows), xticks=[], xlim=(0, 1.2))
    right.invert_yaxis()
    right.grid(False)
    for who, x in (("FLL + FDD", 0.0), ("end-to-end", 0.45)):
        right.text(x, 1.03, f"■ {who}", color=look(who)["color"], transform=right.transAxes)
    figure.legend(handles=patches(), ncol=4, frameon=False, fontsize=9, loc="outside lower center")

def stages_gif(path, config, shape, step):
    """The stages as an animated GIF, one frame every `step` rounds; the last one stays."""
    rounds = list(replay(config, shape))
    end = fllw.cost(replace(config, method="e2e"), shape)
    whole = {"peak": end["peak_memory_bytes"], "sent": end["download_bytes"] + end["upload_bytes"]}
    figure = plt.figure(figsize=(6, 3.6), dpi=80, layout="constrained")
    shown = [*range(step - 1, len(rounds), step)] + 6 * [len(rounds) - 1]

    def draw(i):
        frame(figure, config.depth, rounds, i, whole)

    FuncAnimation(figure, draw, shown).save(path, PillowWriter(fps=3))
    plt.close(figure)

def readme(out):
    """Draw the pictures of the README into the folder `out`."""
    plain = replace(PHONE, depth_dropout=0.0)
    lives = {"end-to-end": live_bytes(replace(plain, method="e2e"), COLOUR),
             "FLL": live_bytes(plain, COLOUR),
             "FLL, micro-batches of 16": live_bytes(replace(plain, micro_batch=16), COLOUR)}
    memory_over_time(lives).savefig(out / "memory.png", dpi=100)
    stages_gif(out / "stages.gif", PHONE, COLOUR, step=5)
    for name in ("memory.png", "stages.gif"):
        print(f"{name}: {(out / name).stat().st_size / 1e3:.0f} kB")

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("assets"),
                        help="folder for stages.gif and memory.png (default: %(default)s)")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    readme(out)

if __name__ == "__main__":
    fllw.command(main)
