"""The pictures of the notebook, one function each, and those of the README.

    python -m experiments.figures

draws those of the README into assets/. Colours are those of Okabe and Ito (2008) for colour-blind
readers; markers, dashes and hatches are for grey print."""
if not __package__:  # as a script, it would not find fllw.py
    raise SystemExit("run this from the repository's folder: python -m experiments.figures")

import argparse
import contextlib
import functools
import io
import itertools
import json
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
from IPython import display
from PIL import Image
from torch.optim import optimizer
from torch.utils._python_dispatch import _get_current_dispatch_mode

import fllw
from experiments import RESULTS
from ssl_loss import contrastive_loss

MIB = 2**20
ASSETS = RESULTS.parent.parent / "assets"
ORANGE, BLUE, GREEN = "#D55E00", "#56B4E9", "#009E73"
METHODS = {"top + FDD": (GREEN, "o", "-"), "FDD": (ORANGE, "o", "-"), "raw": ("k", "x", ":"),
           "untrained": ("#555555", "v", ":"), "equal bytes": ("#332288", "P", ":"),
           "FLL": ("#E69F00", "o", "-"), "one block": ("#CC79A7", "^", "-."),
           "blocks": (BLUE, "s", "-."), "lasting": (GREEN, "D", "-"),
           "progressive": ("#999999", "D", "-"), "end-to-end": ("#0072B2", "s", "--")}
STATES = {"dropped": ("white", ""), "frozen": (BLUE, "//"), "active": (GREEN, "")}
COSTS = {"peak_mib": "peak memory (MiB)", "megabytes": "down + up (MB)",
         "gigamacs": "compute (10⁹ MAC for one image)"}
plt.rcParams.update({"figure.constrained_layout.use": True, "grid.alpha": 0.3, "axes.ymargin": 0.15,
                     "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
                     "axes.titlelocation": "left", "axes.titlesize": 10, "legend.frameon": False})

def show(figure, alt, see):
    """Display a figure with its alternative text, and below it a sentence: what to see there."""
    figure.savefig(buffer := io.BytesIO(), dpi=100)
    display.display(display.Image(buffer.getvalue(), format="png", alt=alt), display.Markdown(see))

def look(name):
    """A method's style for plot(), by the first of METHODS in its name; FDD's if there is none."""
    colour, marker, dashes = METHODS[next((part for part in METHODS if part in name), "FDD")]
    marker, dashes = ("*", ":") if "micro" in name else (marker, dashes)
    return {"color": colour, "marker": marker, "label": name, "linestyle": dashes}

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

def squares(ax, depth, columns):
    """States of blocks; columns: which are present, kept and active; each hides those before."""
    for x, parts in enumerate(columns, 1):
        for (name, (colour, hatch)), blocks in zip(STATES.items(), parts):
            ax.bar(x, 1, 1, np.array(blocks) - 0.5, color=colour, hatch=hatch, ec="grey",
                   label=name if x == 1 else None)
    ax.set(ylabel="block", yticks=range(depth), ylim=(-0.5, depth - 0.5))
    ax.figure.legend(*ax.get_legend_handles_labels(), ncol=3, loc="outside upper right")

def live_bytes(config, shape):
    """Live bytes of a local step of the last stage, three lists: forward, backward, optimizer.
    It is the second of fllw.metered_step(), when the optimizer has its state."""
    ticks = []  # how many allocations and releases there were when a phase ended
    def tick(*_):
        ticks.append(len(_get_current_dispatch_mode().live_bytes))

    def criterion(config, z, chunks):
        tick()
        return contrastive_loss(config, z, chunks)
    client, last = functools.partial(fllw.local_train, criterion=criterion), fllw.stages(config)[-1]
    with contextlib.ExitStack() as stack:
        stack.callback(optimizer.register_optimizer_step_pre_hook(tick).remove)
        stack.callback(optimizer.register_optimizer_step_post_hook(tick).remove)
        live = fllw.metered_step(config, last, tuple(shape), client).live_bytes
    return [live[start - 1:end] + live[end - 1:end]
            for start, end in zip(ticks[2:5], ticks[3:6])]  # of the second step

def linear_and_log(curves, **labels):
    """curves: name -> (x, bytes)."""
    axes = panels(8.5, 3.6, ("linear scale", "the same, log scale"))
    for (name, (x, y)), ax in itertools.product(curves.items(), axes):
        ax.plot(x, np.array(y) / MIB, **{**look(name), "marker": "." if len(x) < 9 else ""})
    axes[0].set(ylim=(0, None), **labels)
    axes[1].set(yscale="log", **labels)
    return axes

def memory_over_time(lives):
    """Memory during one local step; lives: name -> live_bytes()."""
    curves = {}
    for name, phases in lives.items():
        x = np.concatenate([i + np.linspace(0, 1, len(part)) for i, part in enumerate(phases)])
        curves[f"{name}: {max(map(max, phases)) / MIB:,.0f} MiB"] = x, np.concatenate(phases)
    axes = linear_and_log(curves, ylabel="live memory (MiB)", xlim=(0, 3), xticks=(0.5, 1.5, 2.5),
                          xlabel="operations, in order (phases not to scale)",
                          xticklabels=("forward", "backward", "optimizer"))
    for ax, end in itertools.product(axes, (1, 2)):
        ax.axvline(end, color="grey", lw=0.8)
    return legend_below(ax.figure, 2)

def label_counts(counts):
    """How many images of each class each client has; counts: title -> int [clients, classes]."""
    most, height = max(t.max() for t in counts.values()), 0.9 + 0.2 * len([*counts.values()][0])
    for ax, table in zip(panels(8.5, height, counts), counts.values()):
        ax.imshow(table, cmap="Blues", aspect="auto", vmin=0, vmax=2 * most)
        for (client, label), n in np.ndenumerate(table if table.size <= 100 else table[:0]):
            ax.text(label, client, n, ha="center", va="center", fontsize=6)
        ax.set(xlabel="class", ylabel="client", yticks=range(len(table)))
    return ax.figure

def pictures(rows, names, titles=(), wrong=()):
    """Rows of images [C, H, W]; names: one a row; titles: (column, text); wrong: framed ones."""
    tall, wide = len(rows), len(rows[0])
    heads, size = [dict(titles).get(x, "") for x in range(wide)], min(0.75, 7.4 / wide)
    axes = panels(size * wide + 1.1, size * tall + 0.3, heads, tall, layout="none",
                  width_ratios=[image.shape[-1] for image in rows[0]]).reshape(tall, wide)
    for row, images, name in zip(axes, rows, names):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        for ax, image in zip(row, images):
            if image.is_floating_point():
                image = (127.5 * image + 127.5).clamp(0, 255).byte()
            ax.imshow(image.permute(1, 2, 0), cmap="gray", vmin=0, vmax=255)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
    for y, x in wrong:
        axes[y, x].spines[:].set(visible=True, color="red", linewidth=3)
    return ax.figure

def similarities(matrices, row):
    """Cosines [2B, 2B] of the views of B images; positives are outlined, and a row framed."""
    axes = panels(0.4 + 4 * len(matrices), 3.8, matrices)
    for ax, matrix in zip(axes, matrices.values()):
        views, shown = np.arange(len(matrix)), np.array(matrix)
        shown[views, views] = np.nan  # not in the loss
        image = ax.imshow(shown, cmap="PuOr_r", vmin=-1, vmax=1)
        ax.axhspan(row - 0.5, row + 0.5, fc="none", ec="black", lw=1.5)
        ax.scatter(views, np.roll(views, len(views) // 2), 60, "none", "s", edgecolors="black")
        ax.set(xlabel="view k", ylabel="view i", xticks=views[::5], yticks=views[::5],
               facecolor="grey")
    ax.figure.colorbar(image, ax=axes, label="cosine", shrink=0.8)
    return ax.figure

def dropout_strip(depth, stage, draws):
    """Depth dropout; draws: round -> a list of the blocks that clients keep."""
    (ax,) = panels(8.5, 0.3 * depth + 1.1)
    clients, rounds = len(next(iter(draws.values()))), np.arange(len(draws))
    squares(ax, depth, [(stage.present, kept, stage.active) for kept in sum(draws.values(), [])])
    ax.vlines(rounds[1:] * clients + 0.5, -0.5, depth - 0.5, "black")
    ax.set(xticks=(rounds + 0.5) * clients + 0.5, xticklabels=[f"round {r}" for r in draws])
    return ax.figure

def progress(runs, losses, chance, raw, ends=()):
    """Training loss (losses: method -> [seeds, rounds]; ends: last rounds of stages), and moved
    k-NN against what a client had paid (runs: method -> [seeds, looks] of dicts); mean, range."""
    axes = panels(8.5, 6, ("", ""), rows=2)
    for ax in (axes[1], axes[3]):
        ax.sharey(axes[2])
    def band(ax, name, x, seeds):
        ax.plot(x, np.mean(seeds, 0), **look(name))
        ax.fill_between(x, np.min(seeds, 0), np.max(seeds, 0), color=look(name)["color"], alpha=0.2)
    for name, seeds in losses.items():
        band(axes[0], name, np.arange(1, len(seeds[0]) + 1), seeds)
        for ax, key in zip(axes[1:], COSTS):
            points = [looks[-1:] for looks in runs[name]] if key == "peak_mib" else runs[name]
            pick = np.vectorize(dict.get, otypes=[float])  # dicts [seeds, looks], key -> numbers
            band(ax, name, pick(points, key).mean(0), pick(points, "moved_knn"))
    axes[0].axhline(chance, color="grey", label="chance level of the loss")
    for end in ends:
        axes[0].axvline(end + 0.5, color="grey", lw=0.6)
    axes[0].set(xlabel="round", ylabel="training loss (nats)")
    axes[0].xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    for ax, label in zip(axes[1:], COSTS.values()):
        ax.axhline(raw, color="black", linestyle=":", label="raw pixels")
        ax.set(xlim=(0, None), xlabel=label, ylabel="moved k-NN (%)")
    return legend_below(ax.figure, 3)

def bars(rows, columns, limits=None):
    """A panel a column; rows: method -> {key: numbers, one a seed, each with a dot}; columns:
    key -> title. Bars; with limits of the axes dots alone, since a bar has to begin at 0."""
    axes = panels(8.5, 0.3 * len(rows) + 0.8, columns.values(), sharey=True)
    for ax, key in zip(axes, columns):
        for name, row in reversed(rows.items()):
            values = np.atleast_1d(row[key])
            x, side = (values.min(), "right") if limits else (0, "left")
            if not limits:
                ax.barh(name, values.mean(), color=look(name)["color"], alpha=0.6)
            ax.plot(values, [name] * len(values), "ko" if limits or values[1:].size else "", ms=4)
            ax.annotate(f" {values.mean():,.1f} ", (x, name), va="center", ha=side, fontsize=9)
        ax.set(xlim=limits or (0, None))
    return ax.figure

def saved(*patterns):
    """Rows of those experiments/results/PATTERN.json that are there: (file, method) -> row."""
    paths = [path for pattern in patterns for path in sorted(RESULTS.glob(f"{pattern}.json"))]
    return {(path.stem, name): row for path in paths
            for name, row in json.loads(path.read_text()).get("rows", {}).items()}

def budget(results):
    """Accuracy against compute; results: (title, column) -> names of results/*.json. A point is a
    method with one budget. It has a bar, the standard deviation, if it has seeds."""
    axes = panels(9, 3.8, [title for title, _ in results])
    for ax, ((_, column), names) in zip(axes, results.items()):
        methods = {}  # name -> points (compute, mean, deviation)
        for (_, name), row in saved(*names).items():
            if "macs" in row and column in row:
                spread = np.std(row[column], ddof=1) if len(row[column]) > 1 else np.nan
                point = np.mean(row["macs"]) / 1e9, np.mean(row[column]), spread
                method = name.split(",")[0].split(" 0.")[0]  # FDD: one curve over its rates
                methods.setdefault(method + ", micro" * ("micro" in name), []).append(point)
        for method, points in methods.items():
            ax.errorbar(*np.transpose(sorted(points)), capsize=4, mfc="none", **look(method))
        ax.set(xlabel=COSTS["gigamacs"], ylabel=column.replace("knn", "k-NN (%)").replace("_", " "))
    return legend_below(ax.figure)

def conflicts():
    """Which layers conflict in experiments.personal: layer against round, mean over seeds."""
    tables = {}
    for (file, name), row in saved("personal-*").items():
        shares = [np.mean(row[column]) for column in row if column.startswith("round ")]
        if shares:
            start, layer = name.split(": ")
            tables.setdefault(f"{file.removeprefix('personal-')}: {start}", {})[layer] = shares
    axes = panels(7.5, 4, [""] * 3, rows=2, sharex=True, sharey=True)
    for ax, (title, table) in zip(axes, tables.items()):
        x, y = range(1, 1 + len(table["classifier"])), range(len(table))
        image = ax.pcolormesh(x, y, [*table.values()], cmap="PuOr_r", vmin=30, vmax=70)
        ax.set(title=title, xlabel="round", yticks=y, yticklabels=table)
    ax.figure.colorbar(image, ax=axes, label="pairs of clients in conflict (%)", extend="min")
    ax.figure.suptitle("The classifier conflicts least, upper blocks most, whatever the start")
    return ax.figure

SAVED = {("digits, 4 blocks", "moved_knn"): ("digits-48", "digits-half", "digits-192"),
         ("digits, 12 blocks", "moved_knn"): ("digits-12-blocks", "digits-12-half"),
         ("CIFAR-10, 10,000 images", "knn"): ("cifar10-48", "cifar10-192")}

PHONE = fllw.Config(dim=192, depth=12, heads=3, patch_size=4, head_hidden=512, head_dim=256,
                    clients=10, rounds=180, local_epochs=3, batch_size=128, augment="natural")
COLOUR = (3, 32, 32)  # the images of that phone

def four_ways(config):
    """End to end and layer by layer, with whole batches and with micro-batches of 16."""
    e2e = replace(config, method="e2e")
    return {"end-to-end": e2e, "end-to-end, micro-batches of 16": replace(e2e, micro_batch=16),
            "FLL": config, "FLL, micro-batches of 16": replace(config, micro_batch=16)}

def stages_gif(path, step=5):
    """PHONE's stages as an animated GIF, one frame every `step` rounds; the last one stays."""
    whole = fllw.cost(replace(PHONE, method="e2e"), COLOUR)
    total, sent, gif = (whole["download_bytes"] + whole["upload_bytes"]) / 1e6, 0, []
    ledger = fllw.Ledger(PHONE, COLOUR)
    for i, row in enumerate(fllw.planned_rows(PHONE), 1):
        stage, kept, cost = ledger.stages[row["stage"]], row["kept_blocks"][0], ledger.add(row)
        sent += (cost["download_bytes"] + cost["upload_bytes"]) / 1e6
        if i % step == 0:
            titles = "", "memory (MiB)", "down + up so far (MB)"
            left, middle, right = panels(6, 3.6, titles, dpi=80, width_ratios=[1, 2, 2])
            squares(left, PHONE.depth, [(stage.present, kept, stage.active)])
            left.set(xticks=[], title=f"round {i}")
            peak = fllw.peak_memory(PHONE, stage, COLOUR, tuple(kept))
            for ax, heights in ((middle, (peak / MIB, whole["peak_memory_bytes"] / MIB)),
                                (right, (sent, total * i / PHONE.rounds))):
                for name, height in zip(("FLL + FDD", "end-to-end"), heights):
                    ax.bar_label(ax.bar(name, height, color=look(name)["color"]), fmt="{:,.1f}")
            right.set(ylim=(0, 1.15 * total))
            left.figure.savefig(buffer := io.BytesIO())
            gif.append(Image.open(buffer))
    gif[0].save(path, save_all=True, append_images=gif[1:] + 6 * gif[-1:], duration=333, loop=0)

def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.error = functools.partial(fllw.Parser.error, parser)  # one sentence, not the usage
    parser.parse_args(arguments)
    lives = {name: live_bytes(config, COLOUR) for name, config in four_ways(PHONE).items()}
    memory_over_time(lives).savefig(ASSETS / "memory.png", dpi=100)
    stages_gif(ASSETS / "stages.gif")
    budget(SAVED).savefig(ASSETS / "budget.png", dpi=100)
    conflicts().savefig(ASSETS / "conflicts.png", dpi=100)

if __name__ == "__main__":
    fllw.command(main)
