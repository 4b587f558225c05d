"""The plumbing of the notebook: tables, pictures, a film of the rounds, and runs to watch. Nothing
here belongs to the method, which is in fllw.py."""
import base64
import inspect
import io
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from IPython import display

import data
import fllw
import ssl_loss
from experiments.figures import BLUE, GREEN, MIB, ORANGE, legend_below, panels, style_of

STATES = {"trains": (GREEN, ""), "frozen": (BLUE, "//"), "dropped": ("white", "")}

def show(figure, alt, **where):
    """Show a figure as an HTML image: its alternative text survives an export, a PNG's does not."""
    figure.savefig(buffer := io.BytesIO(), dpi=100)
    png = base64.b64encode(buffer.getvalue()).decode()
    display.display(display.HTML(f'<img alt="{alt}" src="data:image/png;base64,{png}">'), **where)

def source(function):
    """Show a function's source, coloured."""
    display.display(display.Markdown(f"```python\n{inspect.getsource(function)}```"))

def table(rows, columns=(), best=False):
    """Show rows {name: {column: value}}; best: the highest number of a column in bold."""
    columns = columns or list(next(iter(rows.values())))
    lines = [["", *(ssl_loss.COLUMNS.get(column, [column])[0] for column in columns)]]
    for name, row in rows.items():
        lines.append([name])
        for column in columns:
            text = value = row.get(column, "-")
            if column in ssl_loss.COLUMNS:
                text = ssl_loss.cell(value, *ssl_loss.COLUMNS[column][1:])
            highest = best and value == max(other[column] for other in rows.values())
            lines[-1].append(f"<b>{text}</b>" if highest else f"{text}")
    body = "".join("<tr><td>" + "</td><td>".join(line) + "</td></tr>" for line in lines)
    display.display(display.HTML(f"<table>{body}</table>"))

def memory(live):
    """Show {name: MiB [n] in use during two local steps, operation by operation}, and the peaks."""
    (ax,) = panels(8.5, 3.8)
    for name, mib in live.items():  # they differ in n, and all get one width
        ax.plot(np.linspace(0, 2, len(mib)), mib, label=name, **style_of(name))
    ax.set(xlabel="two local steps, operation by operation", xticks=[], ylabel="memory (MiB)")
    show(legend_below(ax.figure), "Memory of two local steps: high peaks end to end, low in FLL")
    table({name: {"peak MiB": f"{mib.max():.1f}"} for name, mib in live.items()})

def pictures(rows, names, alt, heads=(), framed=()):
    """Show rows of images [C, H, W]; names: one a row; heads: (column, text); framed: (row, column)
    of those in a red frame."""
    wide = len(rows[0])
    axes = panels(0.6 * wide + 1.2, 0.6 * len(rows) + 0.3, [""] * wide, len(rows), layout="none")
    for (y, x), ax in np.ndenumerate(axes.reshape(len(rows), wide)):
        picture = rows[y][x].float()
        picture = (picture - picture.min()) / (picture.max() - picture.min()).clamp(min=1)
        ax.imshow(picture.permute(1, 2, 0), cmap="gray")
        ax.set(xticks=[], yticks=[], title="" if y else dict(heads).get(x, ""))
        ax.spines[:].set(visible=(y, x) in framed, color="red", linewidth=3)
        ax.set_ylabel("" if x else names[y], rotation=0, ha="right", va="center")
    show(ax.figure, alt)

def cosines(matrices, row, alt):
    """Show {title: cosines [2B, 2B]}; a row is framed, and the twins are outlined."""
    axes = panels(0.4 + 4 * len(matrices), 3.8, matrices)
    for ax, matrix in zip(axes, matrices.values()):
        views = np.arange(len(matrix))
        others = np.where(np.eye(len(matrix)), np.nan, matrix)  # no view is its own rival
        colours = ax.imshow(others, "PuOr_r", vmin=-1, vmax=1)
        ax.axhspan(row - 0.5, row + 0.5, fc="none", ec="black", lw=1.5)
        ax.scatter(views, np.roll(views, len(views) // 2), 60, "none", "s", edgecolors="black")
        ax.set(xlabel="view k", ylabel="view i", xticks=views[::5], yticks=views[::5],
               facecolor="grey")
    ax.figure.colorbar(colours, ax=axes, label="cosine", shrink=0.8)
    show(ax.figure, alt)

def draw_models(ax, config, models):
    """Draw {x: (stage, blocks kept)}, each client's model as a column."""
    for x, (stage, kept) in models.items():
        parts = {-1: "frozen" if stage.first else "trains", config.depth: "trains"}
        for b in range(stage.stop):
            parts[b] = "dropped" if b not in kept else "trains" if b >= stage.first else "frozen"
        for part, state in parts.items():
            colour, hatch = STATES[state]
            ax.bar(x, 1, 1, part - 0.5, color=colour, hatch=hatch, ec="grey", label=state)
    ax.set(ylim=(-1.5, config.depth + 0.5), yticks=range(-1, config.depth + 1),
           yticklabels=["embedding", *(f"block {b}" for b in range(config.depth)), "norm, head"])

def diagram():
    """Show a round of stage 3: what the server and three clients hold, and what travels."""
    config, (ax,) = fllw.Config(depth=3), panels(8.5, 3.6)
    stage = fllw.stages(config)[2]
    draw_models(ax, config, {0: (stage, [0, 1, 2]), 6: (stage, [1, 2]), 10: (stage, [0, 1, 2])})
    for x, y, text in ((0, 3.7, "server\n4. averages"), (8, 1, "client 1\nis not asked"),
                       (6, 3.7, "client 0\n2. trains"), (10, 3.7, "client 2\n2. trains"),
                       (3, 0.2, "1. down: what a client lacks,\nless what it drops"),
                       (3, 2.7, "3. up: what it trained")):
        ax.text(x, y, text, ha="center")
    for y, arrow in ((0, "-|>"), (2.5, "<|-")):
        ax.annotate("", (5.4, y), (0.6, y), arrowprops={"arrowstyle": arrow, "lw": 2})
    ax.set(xticks=[])
    show(legend_below(ax.figure), "A round of stage 3. The server sends what clients 0 and 2 lack; "
         "client 0 drops block 0; client 1 is not asked. Block 2, norm and head come back.")

def columns_of(config, image_shape, history):
    """{"round 1, client 0": what this client held, lost and paid in this round}, in order."""
    plan, columns = fllw.stages(config), {}
    for client in range(config.clients):
        parts = [{**row, "kept": {c: b for c, b in row["kept"].items() if (c == client) == own}}
                 for row in history for own in (True, False)]  # the others change the server, too
        for row, paid in zip(history, list(fllw.replay(config, image_shape, parts))[::2]):
            if paid:
                stage = plan[row["stage"] - 1]
                columns[row["round"], client] = {
                    "stage": stage, "kept": row["kept"][client],
                    "loss": f"{row['losses'][client]:.2f}",
                    "kB down": f"{paid['download_bytes'] / 1e3:.1f}",
                    "kB up": f"{paid['upload_bytes'] / 1e3:.1f}",
                    "peak MiB": f"{fllw.peak_memory(config, stage, image_shape) / MIB:.1f}"}
    return {f"round {r}, client {c}": columns[r, c] for r, c in sorted(columns)}

class Film:
    """Draws a column a client and round while fllw.federate(..., on_round=film.draw) trains."""
    def __init__(self, config, clients, alt, step=False):
        """Trains end to end first, for the lines. step: wait for Enter before each round."""
        self.config, self.shape, self.alt, self.step = config, clients[0].shape[1:], alt, step
        whole = replace(config, method="e2e")
        self.whole = columns_of(whole, self.shape, fllw.federate(whole, clients).history)
        self.draw(fllw.State())

    def draw(self, state):
        """Draw all rounds so far, in place of the last picture."""
        columns = self.columns = columns_of(self.config, self.shape, state.history)
        x = np.arange(len(self.whole))
        axes = panels(max(9, 0.55 * len(x)), 8, [""], 5, sharex=True, height_ratios=(2, 1, 1, 1, 1))
        draw_models(axes[0], self.config,
                    {i: (c["stage"], c["kept"]) for i, c in enumerate(columns.values())})
        for ax, key in zip(axes[1:], ("loss", "kB down", "kB up", "peak MiB")):
            mine, ends = [c[key] for c in columns.values()], [c[key] for c in self.whole.values()]
            bars = ax.bar(x[:len(mine)], np.array(mine, float), color=ORANGE, alpha=0.6)
            ax.bar_label(bars, mine, fontsize=7)
            ax.hlines(np.array(ends, float), x - 0.5, x + 0.5, "black", label="end-to-end")
            ax.set(ylabel=key, ylim=(0, 1.2 * max(map(float, ends))))
        ax.set_xticks(x, [name.replace(", ", "\n") for name in self.whole], fontsize=7)
        show(legend_below(ax.figure), self.alt, display_id="film", update=bool(columns))
        if self.step and len(state.history) < self.config.rounds:
            input("The next round: what will change, who sends what, how many kB? Then Enter. ")

def watch(name, config, dataset, images):
    """Train, with a line a round, and after each quarter k-NN of `images`, the moved test images.
    Returns the learner: encoder and head."""
    def on_round(state):
        row = state.history[-1]
        loss = np.mean(list(row["losses"].values()))
        line = f"{name:26} round {row['round']:2}  stage {row['stage']}  loss {loss:.3f}"
        if 4 * row["round"] % config.rounds < 4:
            encoder = fllw.encoder_of(config, state.server, dataset.shape)
            accuracy = 100 * is_right(encoder, dataset, images).double().mean()
            line += f"  moved k-NN {accuracy:.1f} %"
        print(line)

    clients = data.split(dataset, config.clients, config.alpha, config.seed)
    state = fllw.federate(config, clients, on_round=on_round)
    return fllw.learner_of(config, state.server, dataset.shape)

def nearest(encoder, dataset, images, k=20):
    """Cosines and indices [M, k] of the training images nearest to each image; None: by pixels."""
    train, mine = (F.normalize(ssl_loss.features(encoder, part), dim=1)
                   for part in (dataset.train_images, images))
    return (mine @ train.T).topk(k)

def is_right(encoder, dataset, images):
    """Whether the vote of ssl_loss.knn() is right for each of the moved test images: bool [M]."""
    cosine, near = nearest(encoder, dataset, images)
    votes = torch.zeros(len(near), int(dataset.train_labels.max()) + 1)
    votes.scatter_add_(1, dataset.train_labels[near], torch.exp(cosine / 0.07))
    return votes.argmax(1) == dataset.test_labels

def disagreements(encoder, dataset, images, alt):
    """Show moved test images, each with its five nearest training images by pixels and by encoder:
    three classes where the encoder is furthest ahead, then three where pixels are."""
    near = torch.cat([nearest(judge, dataset, images, 5).indices for judge in (None, encoder)], 1)
    right = dataset.train_labels[near] == dataset.test_labels[:, None]  # [M, 10]
    lead, chosen = right[:, 5:].sum(1) - right[:, :5].sum(1), []
    for ahead in (lead, -lead):
        order = ahead.argsort(descending=True, stable=True)
        best = ssl_loss.first_of_each_class(dataset.test_labels, order, 1)
        chosen += best[ahead[best].argsort(descending=True, stable=True)][:3]
    names = ["encoder\nahead" if lead[i] > 0 else "pixels\nahead" for i in chosen]
    rows = [[images[i], *dataset.train_images[near[i]]] for i in chosen]
    framed = [(y, x + 1) for y, i in enumerate(chosen) for x in range(10) if not right[i, x]]
    pictures(rows, names, alt, [(0, "moved"), (1, "by pixels"), (6, "by encoder")], framed)
