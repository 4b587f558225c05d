"""The notebook's figures, one function each, and the README's: python -m experiments.figures

Colours are Okabe and Ito's (2008) for colour-blind readers, markers and hatches for grey print."""
import io
import json
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import fllw

MIB = 2**20
ORANGE, BLUE, GREEN = "#D55E00", "#56B4E9", "#009E73"
METHODS = {"FDD": (ORANGE, "o", "-"), "raw": ("k", "x", ":"), "random": ("#555555", "v", ":"),
           "first": ("#CC79A7", "^", "-."), "micro": ("k", "", "-"), "FLL": ("#E69F00", "o", "-"),
           "one block": ("#CC79A7", "^", "-."), "two blocks": (BLUE, "s", "-."),
           "lasting": (GREEN, "D", "-"), "progressive": ("#999999", "D", "-"),
           "end-to-end": ("#0072B2", "s", "--")}
STATES = {"dropped": ("#F0E442", ""), "frozen": (BLUE, "//"), "active": (GREEN, "")}
COSTS = {"peak_mib": "peak memory of a step (MiB)", "megabytes": "down + up (MB)",
         "gigamacs": "compute (10⁹ MAC for one image)"}
plt.rcParams.update({"figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3,
                     "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
                     "axes.ymargin": 0.15, "axes.titlelocation": "left", "axes.titlesize": 11,
                     "legend.frameon": False, "legend.loc": (1.02, 0.25)})  # beside its axes

def look(name):
    """A method's style for plot(), by the first of METHODS in its name; FDD's if there is none."""
    kind = METHODS[next((part for part in METHODS if part in name), "FDD")]
    return {"color": kind[0], "marker": kind[1], "linestyle": kind[2], "label": name}

def panels(width, height, titles=("",), rows=1, **more):
    """Axes, a column for each title, in a figure (inches); closed, or a notebook shows it twice."""
    figure, axes = plt.subplots(rows, len(titles), figsize=(width, height), squeeze=False, **more)
    plt.close(figure)
    for ax, title in zip(axes[0], titles):
        ax.set_title(title)
    return axes.ravel()

def bar(ax, x, height, colour=None, **more):
    """A bar with its height on it; x: a place or, with the colour from look(), a method."""
    ax.bar_label(ax.bar(x, height, color=colour or look(x)["color"], **more), fmt="{:,.1f}")

def band(ax, name, x, seeds, **more):
    """The mean over seeds and, shaded, from the lowest to the highest; seeds: [seeds, points]."""
    kind = {**look(name), **more}
    ax.plot(x, np.mean(seeds, 0), **kind)
    ax.fill_between(x, np.min(seeds, 0), np.max(seeds, 0), color=kind["color"], alpha=0.2, lw=0)

def track(ax, runs, x, y, **more):
    """Bands of key y against key x; runs: method -> for every seed its points, which are dicts."""
    pick = np.vectorize(dict.get, otypes=[float])  # dicts [seeds, points] and a key -> numbers
    for name, seeds in runs.items():
        band(ax, name, pick(seeds, x).mean(0), pick(seeds, y), **more)

def lines(methods, x, **labels):
    """A line for each method; methods: name -> [seeds, points], perhaps fewer points than x."""
    (ax,) = panels(7.5, 3.4)
    for name, seeds in methods.items():
        band(ax, name, x[:len(seeds[0])], seeds)
    ax.set(xticks=x, **labels)
    ax.legend()
    return ax.figure

def squares(ax, depth, columns, legend=tuple(STATES)):
    """States of blocks; columns: which are present, kept and active; each hides those before."""
    for x, parts in enumerate(columns, 1):
        for (name, (colour, hatch)), blocks in zip(STATES.items(), parts):
            ax.bar(x, 1, 1, np.array(blocks) + 0.5, color=colour, hatch=hatch, ec="white",
                   label=name if x == 1 and name in legend else None)
    ax.set(ylabel="block", yticks=range(1, depth + 1), ylim=(0.5, depth + 0.5))
    ax.figure.legend(*ax.get_legend_handles_labels(), ncol=3, loc="outside upper right")

def replay(config, shape):
    """Yield the stage, kept blocks and bytes of every round of a client, without training."""
    state, number = fllw.start(config, shape, device="meta"), 0
    for stage in fllw.stages(config):
        fllw.grow(config, state, stage)
        for number in range(number + 1, number + 1 + stage.rounds):
            kept = fllw.draw_blocks(config, stage, number, 0)
            cost = fllw.round_cost(config, state, stage, {0: kept})
            yield stage, kept, {"down": cost["download_bytes"], "up": int(cost["upload_bytes"]),
                                "peak": fllw.step_memory(config, stage, state.server, kept, shape)}
            state.update({n: t for n, t in state.server.items() if stage.trains(n)})

def live_bytes(config, shape):
    """Live bytes at every allocation and release of two local steps in the last stage."""
    form = tuple((n, tuple(t.shape)) for n, t in fllw.initial(config, shape, "meta").items())
    return fllw.metered_step(config, fllw.stages(config)[-1], form, shape).live_bytes

def bill(rows):
    """Bars of what a client pays; rows: method -> fllw.cost()."""
    memory, traffic, compute = panels(12, 3.2, COSTS.values())
    for name, cost in rows.items():
        bar(memory, name, cost["peak_memory_bytes"] / MIB)
        bar(traffic, name, (cost["download_bytes"] + cost["upload_bytes"]) / 1e6)
        bar(compute, name, cost["macs"] / 1e9)
    return memory.figure

def memory_over_time(lives):
    """Memory of the second local step, when the optimizer has its state; lives: live_bytes()."""
    (ax,) = panels(9, 3.6)
    for name, live in lives.items():
        second, colour = np.array(live[len(live) // 2:]) / MIB, look(name)["color"]
        ax.fill_between(np.linspace(0, 1, len(second)), second, facecolor=(colour, 0.3),
                        edgecolor=colour, label=f"{name}: peak {second.max():,.0f} MiB")
    ax.set(xlabel="progress of one local step (each curve on its own scale)", xticks=[],
           ylabel="live memory (MiB)", ylim=(0, None))
    ax.legend(loc="upper right")
    return ax.figure

def memory_against_depth(depths, peaks):
    """peaks: method -> peak bytes of a local step for every depth."""
    mib = {name: [np.array(values) / MIB] for name, values in peaks.items()}
    return lines(mib, depths, xlabel="blocks of the model", ylabel="peak (MiB)", ylim=(0, None))

def label_counts(counts):
    """How many images of each class each client has; counts: title -> int [clients, classes]."""
    most = max(table.max() for table in counts.values())
    for ax, table in zip(panels(4 * len(counts), 2.6, counts), counts.values()):
        ax.imshow(table, cmap="Blues", aspect="auto", vmin=0, vmax=2 * most, zorder=1)
        for (client, label), n in np.ndenumerate(table if table.size <= 80 else table[:0]):
            ax.text(label, client, n, ha="center", va="center", fontsize=8)
        ax.set(xlabel="class", ylabel="client", yticks=range(len(table)))
    return ax.figure

def pictures(rows, names, titles=(), wrong=()):
    """Rows of images [C, H, W]; names: one a row; titles: (column, text); wrong: framed ones."""
    tall, wide = len(rows), len(rows[0])
    heads = [dict(titles).get(x, "") for x in range(wide)]
    axes = panels(0.75 * wide + 1, 0.75 * tall, heads, tall, layout="none").reshape(tall, wide)
    for row, images, name in zip(axes, rows, names):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for ax, image in zip(row, images):
            if image.is_floating_point():
                image = (127.5 * image + 127.5).clamp(0, 255).byte()
            ax.imshow(image.permute(1, 2, 0), cmap="gray", vmin=0, vmax=255, zorder=1)
            ax.set(xticks=[], yticks=[])
    for y, x in wrong:
        axes[y, x].spines[:].set(visible=True, color="red", linewidth=3)
    return ax.figure

def similarities(matrix):
    """Cosines [2B, 2B] of the views of B images; positives are outlined."""
    (ax,) = panels(5.4, 4.4)
    views, shown = np.arange(len(matrix)), np.array(matrix)
    shown[views, views] = np.nan  # not in the loss
    ax.figure.colorbar(ax.imshow(shown, cmap="PuOr_r", vmin=-1, vmax=1, zorder=1), label="cosine")
    ax.scatter(views, np.roll(views, len(views) // 2), 120, "none", "s", edgecolors="black")
    ax.set(xlabel="view k", ylabel="view i", xticks=views[::5], yticks=views[::5])
    return ax.figure

def stage_strip(depth, rounds):
    """The stages and what travels in each of their rounds; rounds: those of replay()."""
    top, bottom = panels(8, 4, rows=2, sharex=True)
    columns = [(stage.present, kept, stage.active) for stage, kept, _ in rounds]
    squares(top, depth, columns, legend=("frozen", "active"))
    for key, style, colour in (("down", "s-", BLUE), ("up", ".:", "black")):
        sent = [cost[key] / 1e3 for _, _, cost in rounds]
        bottom.plot(range(1, len(rounds) + 1), sent, style, color=colour, label=key)
    starts = [i for i, (stage, _, _) in enumerate(rounds, 1) if stage != rounds[i - 2][0]]
    bottom.set(xlabel="round", ylabel="kB a client", xticks=starts, ylim=(0, 1.3 * max(sent)))
    bottom.legend()
    return top.figure

def moved(losses, changes):
    """Losses of a client's local steps; changes: part of the model -> relative change in %."""
    left, right = panels(10, 2.8, ["the loss of every local step", "what moved (%); 0 is frozen"])
    left.plot(range(1, len(losses) + 1), losses, ".-", color=look("FLL")["color"])
    left.set(xlabel="local step", ylabel="NT-Xent (nats)", xticks=[1, len(losses)])
    bar(right, list(changes), list(changes.values()), GREEN)
    return left.figure

def cosines(pairs):
    """Histograms; pairs: title -> (cosines of positives, cosines of all other pairs)."""
    for ax, both in zip(panels(10, 3, pairs, sharey=True), pairs.values()):
        ax.hist(both, np.linspace(-1, 1, 41), density=True, histtype="stepfilled", alpha=0.7,
                color=(ORANGE, BLUE), label=("positives", "other pairs"))
        ax.set(xlabel="cosine similarity", ylabel="density")
        ax.legend(loc="upper left")
    return ax.figure

def dropout_strip(depth, stage, draws):
    """Depth dropout; draws: a list of rounds, each a list of the blocks that clients keep."""
    (ax,) = panels(10, 0.4 * depth + 0.9)
    clients, rounds = len(draws[0]), np.arange(len(draws))
    squares(ax, depth, [(stage.present, kept, stage.active) for kept in sum(draws, [])])
    ax.vlines(rounds[1:] * clients + 0.5, 0.5, depth + 0.5, "black")
    ax.set(xticks=(rounds + 0.5) * clients + 0.5, xticklabels=[f"round {r + 1}" for r in rounds])
    return ax.figure

def curves(depth, history, runs, raw):
    """Blocks of a history, losses and moved k-NN of runs as in track(), k-NN of raw pixels."""
    top, middle, bottom = panels(10, 7, rows=3, sharex=True, height_ratios=[1, 1.3, 2])
    squares(top, depth, [(row["present_blocks"], row["kept_blocks"][0], row["active_blocks"])
                         for row in history])
    layerwise = {f"{name}, in training": run for name, run in runs.items() if name[:3] == "FLL"}
    track(middle, runs, "round", "full_loss")
    track(middle, layerwise, "round", "loss", linestyle=":", marker="")
    track(bottom, runs, "round", "moved_knn")
    bottom.axhline(raw, color="black", linestyle=":", label="raw pixels")
    bottom.set(ylabel="moved k-NN (%)", xlabel="round")
    middle.set(ylabel="NT-Xent (nats)")
    middle.legend()
    bottom.legend()
    return top.figure

def against_cost(runs, raw):
    """Moved k-NN against what a client had paid by then; runs: those of track()."""
    at_the_end = {name: [points[-1:] for points in seeds] for name, seeds in runs.items()}
    for ax, key in zip(panels(12, 3.6, COSTS.values()), COSTS):
        track(ax, at_the_end if key == "peak_mib" else runs, key, "moved_knn")
        ax.axhline(raw, color="black", linestyle=":", label="raw pixels")
        ax.set(xlim=(0, None), ylabel="k-NN on moved images (%)")
    ax.legend()
    return ax.figure

def after_each_block(depths, ylabel):
    """Accuracy of features cut after block n; depths: method -> [seeds, blocks]."""
    most = max(len(seeds[0]) for seeds in depths.values())
    return lines(depths, range(1, most + 1), xlabel="features cut after block", ylabel=ylabel)

def accuracies(rows, columns):
    """rows: method -> {key: one number a seed or draw}; columns: key -> title."""
    questions = {}
    for key, title in columns.items():
        questions[title] = {name: row[key] for name, row in rows.items()}
    return knob(questions, sharey=True, sharex=False)

def knob(knobs, label="", **more):
    """Runs as dots, their mean and standard deviation; knobs: title -> {value: runs}."""
    more = {"sharex": True, **more}
    for ax, rows in zip(panels(7 + len(knobs), 3, knobs, **more), knobs.values()):
        for value, runs in reversed(rows.items()):
            name, mean = str(value), np.mean(runs)
            ax.errorbar(mean, name, xerr=np.std(runs), capsize=4, **look(name))
            ax.plot(runs, [name] * len(runs), "k.", markersize=3)
            ax.annotate(f"{mean:.1f}", (mean, name), (-8, 6), textcoords="offset points")
        ax.set(xlabel=label)
        ax.margins(x=0.2)
    return ax.figure

PHONE = fllw.Config(dim=192, depth=12, heads=3, patch_size=4, head_hidden=512, head_dim=256,
                    clients=10, rounds=180, local_epochs=3, batch_size=128, augment="natural")
COLOUR = (3, 32, 32)  # the images of that phone

def stages_gif(path, step=5):
    """PHONE's stages as an animated GIF, one frame every `step` rounds; the last one stays."""
    whole = fllw.cost(replace(PHONE, method="e2e"), COLOUR)
    total, sent, gif = (whole["download_bytes"] + whole["upload_bytes"]) / 1e6, 0, []
    for i, (stage, kept, cost) in enumerate(replay(PHONE, COLOUR), 1):
        sent += (cost["down"] + cost["up"]) / 1e6
        if i % step == 0:
            titles = "", "memory (MiB)", "down + up so far (MB)"
            left, middle, right = panels(6, 3.6, titles, dpi=80, width_ratios=[1, 2, 2])
            squares(left, PHONE.depth, [(stage.present, kept, stage.active)])
            left.set(xticks=[], title=f"round {i}")
            bar(middle, "FLL + FDD", cost["peak"] / MIB)
            bar(middle, "end-to-end", whole["peak_memory_bytes"] / MIB)
            bar(right, "FLL + FDD", sent)
            bar(right, "end-to-end", total * i / PHONE.rounds)
            right.set(ylim=(0, 1.15 * total))
            left.figure.savefig(buffer := io.BytesIO())
            gif.append(Image.open(buffer))
    gif[0].save(path, save_all=True, append_images=gif[1:] + 6 * gif[-1:], duration=333, loop=0)

def budget(results):
    """Accuracy against compute; results: (title, column of the tables) -> names of results/*.json,
    whose rows are methods and controls at one budget each, over seeds."""
    axes, named = panels(10, 3.6, [title for title, _ in results]), {}
    for ax, ((_, column), names) in zip(axes, results.items()):
        methods = {}  # name -> points (compute, mean, deviation)
        for name in names:
            text = (Path(__file__).parent / "results" / f"{name}.json").read_text()
            for method, row in json.loads(text)["rows"].items():
                if "macs" in row:
                    spread = np.std(row[column], ddof=min(1, len(row[column]) - 1))
                    point = np.mean(row["macs"]) / 1e9, np.mean(row[column]), spread
                    methods.setdefault(method.split(",")[0], []).append(point)
        for method, points in methods.items():
            named[method] = ax.errorbar(*np.transpose(sorted(points)), capsize=4, **look(method))
        label = column.replace("knn", "k-NN (%)").replace("_", " ")
        ax.set(xlabel="compute (10⁹ MAC for one image)", ylabel=label)
    ax.legend(named.values(), named)
    return ax.figure

def readme(out):
    """Draw the pictures of the README into the folder `out`."""
    lives = {"end-to-end": live_bytes(replace(PHONE, method="e2e"), COLOUR),
             "FLL": live_bytes(PHONE, COLOUR),
             "FLL, micro-batches of 16": live_bytes(replace(PHONE, micro_batch=16), COLOUR)}
    memory_over_time(lives).savefig(out / "memory.png", dpi=100)
    stages_gif(out / "stages.gif")
    budget({
        ("digits", "moved_knn"): ("digits-48", "digits-96", "digits-one-active-block",
                                  "digits-two-active-blocks"),
        ("CIFAR-10, 10,000 images", "knn"): ("cifar10-24", "cifar10-48", "cifar10-192")
    }).savefig(out / "budget.png", dpi=100)

if __name__ == "__main__":
    readme(Path("assets"))
