"""Images for federated self-supervised learning: loading, splitting among clients, two views.
Images stay uint8 [N, C, H, W] until a batch is on its device; `two_views` turns it into floats.
The recipe for photographs follows SimCLR (Chen et al. 2020, appendix A); digits get small warps."""
import contextlib
import hashlib
import math
import tarfile
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

class InputError(Exception):
    """The user asked for what cannot be done; the message is one sentence that says what can."""

@contextlib.contextmanager
def friendly_errors(what, advice):
    """Turn any error in the block into an InputError, "what (reason): advice"."""
    try:
        yield
    except Exception as error:  # torch.load and numpy.load raise many kinds
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or getattr(error, "reason", None)
        raise InputError(f"{what} ({reason or type(error).__name__}): {advice}") from None

@contextlib.contextmanager
def sentences(parser):
    """Errors of a command become one sentence; the exit status is 2 if the input was wrong."""
    try:
        yield
    except (InputError, FloatingPointError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "interrupted: rerun the same command\n")
    except (MemoryError, OSError, RuntimeError) as error:
        short = isinstance(error, MemoryError) or "allocate" in str(error)  # the words of torch
        if isinstance(error, RuntimeError) and not short:
            raise
        reason = "memory is short" if short else error
        parser.exit(1, f"{reason}: saved files are intact; rerun the same command\n")

class Dataset(NamedTuple):
    train_images: torch.Tensor  # uint8 [N, C, H, W]
    train_labels: torch.Tensor  # int64 [N], -1: none; clients never see them
    test_images: torch.Tensor   # uint8 [M, C, H, W]
    test_labels: torch.Tensor   # int64 [M]
    train_clients: torch.Tensor = None  # int64 [N], owner of each image; None: not in the file

    @property
    def shape(self):
        """(channels, height, width) of an image."""
        return tuple(self.train_images.shape[1:])

    def digest(self):
        """SHA-256 over the contents of all arrays, as hexadecimal text."""
        arrays = [tensor.numpy() for tensor in self if tensor is not None]
        return hashlib.sha256(b"".join(arrays)).hexdigest()

# ------------------------------------------------------------------------------------------ loading
MNIST5K = Path(__file__).resolve().parent / "assets" / "mnist5k.npz"
CIFAR = {  # name: (URL, SHA-256, members for training, for testing, bytes of labels in a record)
    "cifar10": ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
                [f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)],
                ["cifar-10-batches-bin/test_batch.bin"], 1),
    "cifar100": ("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
                 "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
                 ["cifar-100-binary/train.bin"], ["cifar-100-binary/test.bin"], 2)}

def load(name, cache="~/.cache/fllw", images=0):
    """Load `mnist5k` (included), `cifar10` or `cifar100` (downloaded once), or a FILE.npz. images:
    keep at most this many training images, the same ones each time; 0: all. Raises InputError."""
    known = str(name).lower()
    if known in CIFAR:
        dataset = load_cifar(*CIFAR[known], Path(cache))
    elif known == "mnist5k" or known.endswith(".npz"):
        dataset = load_npz(MNIST5K if known == "mnist5k" else Path(name))
    else:
        raise InputError(f"unknown data set {name!r}: use mnist5k, cifar10, cifar100 or a FILE.npz")
    if images:
        kept = np.sort(np.random.default_rng(0).permutation(len(dataset.train_images))[:images])
        dataset = dataset._replace(**{key: array[kept] for key, array in dataset._asdict().items()
                                      if key.startswith("train") and array is not None})
    return dataset

def load_npz(path):
    """Dataset from an .npz in MedMNIST's layout: images uint8 [N, H, W] or [N, H, W, C], labels
    integers [N] or [N, 1], renumbered from 0. A training image whose label is missing or below 0
    has none. train_clients, if given, names the owner of each. Raises InputError."""
    needed = ("train_images", "test_images", "test_labels")
    with friendly_errors(f"{path} cannot be read", "it must be an .npz of plain arrays"):
        with np.load(path.expanduser(), allow_pickle=False) as file:
            arrays = {key: file[key] for key in (*needed, "train_labels", "train_clients")
                      if key in file}
    for key in needed:
        if key not in arrays:
            raise InputError(f"{path} has no {key!r}: it needs {', '.join(needed)}")
    train, test = (read_images(path, key, arrays[key]) for key in needed[:2])
    if train.shape[1:] != test.shape[1:]:
        raise InputError(f"{path}: test_images must be {[*train.shape[1:]]}, as train_images are")
    arrays.setdefault("train_labels", np.full(len(train), -1))
    arrays = {key: read_numbers(path, key, array, len(test if key == "test_labels" else train))
              for key, array in arrays.items() if not key.endswith("images")}
    labels, truth = arrays["train_labels"].clamp(min=-1), arrays["test_labels"]
    if truth.min() < 0:
        raise InputError(f"{path}: test_labels must be 0 or more, not {truth.min()}")
    if labels.min() < 0:
        print(f"note: {(labels >= 0).sum():,} of {len(labels):,} training images have a label")
    classes = torch.cat([labels[labels >= 0], truth]).unique()
    labels = torch.where(labels < 0, -1, torch.searchsorted(classes, labels))
    truth = torch.searchsorted(classes, truth)
    return Dataset(train, labels, test, truth, arrays.get("train_clients"))

def read_images(path, key, images):
    """An array of a file -> uint8 tensor [N, C, H, W], or InputError."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.size == 0:
        raise InputError(f"{path}: {key} must be uint8 [N, H, W] or [N, H, W, C] and not empty, "
                         f"they are {images.dtype} {list(images.shape)}")
    images = torch.from_numpy(images.reshape(*images.shape[:3], -1))  # [N, H, W, C]
    return images.permute(0, 3, 1, 2).contiguous()

def read_numbers(path, key, numbers, count):
    """An array of a file -> int64 tensor [count], or InputError."""
    if numbers.dtype.kind not in "iu" or numbers.size != count or numbers.max() >= 2**63:
        raise InputError(f"{path}: {key} must be {count} whole numbers below 2^63, one per image; "
                         f"they are {numbers.dtype} {list(numbers.shape)}")
    return torch.from_numpy(numbers.reshape(count).astype(np.int64))

def load_cifar(url, sha256, train, test, label_bytes, cache):
    """Dataset from an official archive. It is downloaded once, under a temporary name, is used only
    if its SHA-256 matches, and is read without unpacking or unpickling. Raises InputError."""
    name = url.rsplit("/", 1)[1]
    with friendly_errors(f"could not download {url}",
                         f"rerun the command, or put the file at {cache / name} yourself"):
        path = source = cache.expanduser() / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            source = path.with_name(path.name + ".tmp")
            print(f"downloading {url}, about 170 MB", flush=True)
            with urllib.request.urlopen(url, timeout=60) as reply:
                source.write_bytes(reply.read())
        if hashlib.sha256(source.read_bytes()).hexdigest() != sha256:
            raise InputError(f"{source} has the wrong SHA-256: delete it and rerun the command")
        if source != path:
            source.replace(path)

    def read(members):
        with tarfile.open(path) as tar:
            raw = b"".join(tar.extractfile(member).read() for member in members)
        records = np.frombuffer(raw, np.uint8).reshape(-1, label_bytes + 3 * 32 * 32)
        labels = records[:, label_bytes - 1].astype(np.int64)  # of CIFAR-100 the second, fine one
        pixels = records[:, label_bytes:].reshape(-1, 3, 32, 32).copy()
        return torch.from_numpy(pixels), torch.from_numpy(labels)
    return Dataset(*read(train), *read(test))

# ------------------------------------------------------------------------ splitting among clients
def own_split(dataset, given):
    """Settings that follow from train_clients: {} or {"clients": N}. given: the user's flags."""
    if dataset.train_clients is None:
        return {}
    for name in sorted({"clients", "alpha", "images"} & set(given)):
        raise InputError(f"--{name} cannot be given: train_clients in the file splits the images")
    names, counts = dataset.train_clients.unique(return_counts=True)
    if counts.min() < 2:
        raise InputError(f"client {names[counts.argmin()]} has only 1 image: each needs at least 2")
    return {"clients": len(names)}

def split(dataset, clients, alpha=0.0, seed=0):
    """A list of each client's images, uint8 [n, C, H, W]: by train_clients, else by partition()."""
    owners = dataset.train_clients
    parts = (partition(dataset.train_labels, clients, alpha, seed) if owners is None else
             [owners == name for name in owners.unique()])
    return [dataset.train_images[part] for part in parts]

def partition(labels, clients, alpha=0.0, seed=0):
    """Labels int64 [N] -> each client's image indices, a list of int64 [n >= 2]. alpha = 0: equal
    shares at random (IID). alpha > 0: each class is divided by a draw from Dirichlet(alpha), as in
    Yurochkin et al. 2019 (arXiv 1905.12022). Raises InputError for too few images or no labels."""
    if len(labels) < 2 * clients:
        raise InputError(f"{clients} clients need {2 * clients} images or more, not {len(labels)}")
    rng = np.random.default_rng([seed, 0])
    order = rng.permutation(len(labels))
    if alpha and labels.max() < 0:
        raise InputError("--alpha needs training labels, and there are none: leave --alpha out")
    if alpha == 0:
        return [torch.from_numpy(part) for part in np.array_split(order, clients)]
    owner = np.empty(len(labels), dtype=np.int64)  # image -> client
    labels = np.asarray(labels)
    for label in np.unique(labels):
        images = order[labels[order] == label]
        cuts = np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * len(images)
        for client, part in enumerate(np.split(images, cuts.round().astype(int))):
            owner[part] = client
    while (sizes := np.bincount(owner, minlength=clients)).min() < 2:
        poor = np.argmax(sizes < 2)  # the first with fewer than 2: one image has no negatives
        owner[np.argmax(owner == sizes.argmax())] = poor  # the largest client's first image
    return [torch.from_numpy(np.flatnonzero(owner == client)) for client in range(clients)]

# ---------------------------------------------------------------------- two views
@dataclass(frozen=True)
class Recipe:
    """What a random view does to an image. Ranges are uniform; 0 switches a part off."""
    area: tuple          # share of the image's area that the view shows; above 1 it zooms out
    aspect: float        # the crop's aspect ratio is log-uniform in [1 / aspect, aspect]
    shift: float = 0.0   # +- share of the image's size, on top of the crop's random place
    rotate: float = 0.0  # +- degrees
    shear: float = 0.0   # +- degrees
    elastic: float = 0.0   # +- share of its size by which a 4 x 4 grid bends it (Simard 2003)
    flip: float = 0.0      # probability of a horizontal flip
    jitter: float = 0.0    # probability of changing the colours, by the next two settings
    colours: float = 0.0   # brightness, contrast and saturation change by factors in 1 +- this
    hue: float = 0.0       # the hue turns by +- this share of the colour circle
    grey: float = 0.0      # probability of dropping all colour
    blur: float = 0.0      # probability of a Gaussian blur, sigma in [0.1, 2] pixels

RECIPES = {
    "digits": Recipe((0.8, 1.2), aspect=1.3, shift=0.05, rotate=15, shear=15, elastic=0.05),
    "natural": Recipe((0.2, 1.0), aspect=4 / 3, flip=0.5, jitter=0.8, colours=0.4, hue=0.1,
                      grey=0.2, blur=0.5)}

def recipe_name(config):
    """Which of RECIPES makes the views; digits are not flipped, photographs are."""
    auto = "digits" if config.data.lower() == "mnist5k" else "natural"
    return auto if config.augment == "auto" else config.augment

def normalise(images):
    """uint8 [B, C, H, W] in 0..255 -> float32 in -1..1, what the encoder reads."""
    return images.float() / 127.5 - 1

def two_views(images, recipe, generator):
    """Two views of image i, rows i and B + i: uint8 [B, C, H, W] -> float32 [2B, C, H, W]."""
    return view(images.repeat(2, 1, 1, 1), recipe, generator)

def moved(images, name, generator):
    """One random view of each image, by RECIPES[name] without grey and blur, on the CPU: uint8
    [B, C, H, W] -> the same."""
    views = view(images.cpu(), replace(RECIPES[name], grey=0.0, blur=0.0), generator)
    return ((views + 1) * 127.5).round().byte()

def view(images, recipe, generator):
    """One random view of every image: uint8 [B, C, H, W] -> float32 [B, C, H, W] in -1..1."""
    x = images.float() / 255  # one draw for all randomness; of 48 numbers RECIPES use 41
    numbers = iter(torch.rand(48, len(x), device=x.device, generator=generator))

    def uniform(low, high, count=1):
        drawn = torch.stack([next(numbers) for _ in range(count)])
        return low + (high - low) * drawn.squeeze(0)

    x = warp(x, recipe, uniform)
    if recipe.jitter or recipe.grey:
        x = colour(x, recipe, uniform)
    if recipe.blur:
        x = blur(x, recipe, uniform)
    return x.mul(2).sub(1)

def warp(x, recipe, uniform):
    """Crop, shift, turn, shear and flip by one affine map; then bend. x, result: [B, C, H, W]."""
    H, W = x.shape[2:]
    area, ratio = uniform(*recipe.area), torch.exp(uniform(-1, 1) * math.log(recipe.aspect))
    w, h = (area * ratio).sqrt(), (area / ratio).sqrt()  # size of the crop; 1 is the image's own
    if recipe.area[1] <= 1:
        w, h = w.clamp(max=1), h.clamp(max=1)
    dx = uniform(-1, 1) * (1 - w).clamp(min=0) + uniform(-2, 2) * recipe.shift
    dy = uniform(-1, 1) * (1 - h).clamp(min=0) + uniform(-2, 2) * recipe.shift
    turn = torch.deg2rad(uniform(-1, 1) * recipe.rotate)
    shear = torch.deg2rad(uniform(-1, 1) * recipe.shear).tan()
    mirror = 1 - 2 * (uniform(0, 1) < recipe.flip).float()
    cos, sin = turn.cos(), turn.sin()
    across, down = H / W, W / H  # a turn is a turn in pixels, whatever the image's shape
    theta = torch.stack([
        torch.stack([mirror * w * cos, across * h * (shear * cos - sin), dx], 1),
        torch.stack([down * mirror * w * sin, h * (shear * sin + cos), dy], 1)], 1)  # [B, 2, 3]
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)  # [B, H, W, 2]
    if recipe.elastic:
        net = uniform(-2, 2, 2 * 4 * 4).T.reshape(-1, 2, 4, 4)
        bend = F.interpolate(net * recipe.elastic, (H, W), mode="bicubic", align_corners=False)
        grid = grid + bend.permute(0, 2, 3, 1)
    outside = "zeros" if recipe.area[1] > 1 else "reflection"
    return F.grid_sample(x, grid, padding_mode=outside, align_corners=False)

def colour(x, recipe, uniform):
    """Change brightness and contrast; if C = 3 also saturation, hue, grey. x: [B, C, H, W] in 0..1.
    All are affine in the colour, so each image needs one matrix and one offset."""
    B, C = x.shape[:2]
    apply = (uniform(0, 1) < recipe.jitter).float()
    bright, contrast, saturate = 1 + apply * uniform(-1, 1, 3) * recipe.colours
    turn = 2 * math.pi * apply * uniform(-1, 1) * recipe.hue
    saturate = (saturate * (uniform(0, 1) >= recipe.grey))[:, None, None]
    weights = (0.299, 0.587, 0.114) if C == 3 else [1 / C] * C
    luma = torch.cat([torch.full((1,), weight, device=x.device) for weight in weights])
    eye = torch.eye(C, device=x.device)
    matrix = eye.expand(B, C, C)
    if C == 3:
        cos, sin = turn.cos()[:, None, None], turn.sin()[:, None, None]
        k = (eye.roll(1, 0) - eye.roll(-1, 0)) / math.sqrt(3)
        hue = cos * eye + sin * k + (1 - cos) / 3  # rotation about the grey axis (Rodrigues)
        matrix = (saturate * eye + (1 - saturate) * luma.expand(3, 3)) @ hue
    mean = torch.einsum("bchw,c->b", x, luma) / x[0, 0].numel()  # the fixed point of contrast
    y = ((bright * contrast)[:, None, None] * matrix) @ x.flatten(2)
    y = y + (bright * (1 - contrast) * mean)[:, None, None]
    return y.clamp(0, 1).view_as(x)

def blur(x, recipe, uniform):
    """Separable Gaussian blur, kernel a tenth of the image's width across. x: [B, C, H, W]."""
    radius = min(max(1, x.shape[-1] // 20), min(x.shape[-2:]) - 1)
    sigma = torch.where(uniform(0, 1) < recipe.blur, uniform(0.1, 2.0), 1e-3)  # 1e-3: no blur
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.softmax(-0.5 * (offsets / sigma[:, None]) ** 2, 1)  # [B, 2 * radius + 1]
    for _ in range(2):  # along the width, transpose, along the height, transpose back
        padded = F.pad(x, (radius, radius, 0, 0), mode="reflect")
        x = sum(kernel[:, i, None, None, None] * padded[..., i:i + x.shape[-1]]
                for i in range(2 * radius + 1))
        x = x.transpose(2, 3)
    return x
