"""
Built-in images, generated in milliseconds from a seed, so that no experiment needs a download.

    leaves   dead leaves: opaque discs occlude each other, radii with density r^-3. The images
             are approximately scale-invariant, with a power spectrum that falls like f^-2, as in
             photographs (Lee, Mumford & Huang, IJCV 2001)
    discs    one or two discs on a plain background, same light direction in all images: simple
             enough for a small diffusion model to learn in minutes. The spectrum is steeper, as
             there are edges but no small discs
"""
import numpy as np
import torch

f32 = np.float32


def _covered(centre, half, size):
    """For each k, the pixels of a line with centres within half[k] of centre[k]: (k, pixel)."""
    first = np.maximum(np.ceil(centre - half - f32(0.5)), 0).astype(np.int32)
    end = np.minimum(np.ceil(centre + half - f32(0.5)), size).astype(np.int32)
    count = np.maximum(end - first, 0)
    k = np.repeat(np.arange(len(count), dtype=np.int32), count)
    before = np.cumsum(count, dtype=np.int32) - count - first
    return k, np.arange(len(k), dtype=np.int32) - np.repeat(before, count)


def _colours(n, rng):
    """(3, n) float32 RGB from a random palette of five: four similar hues and their complement."""
    k = 5
    hue = rng.random() + np.array([0, 0.05, -0.07, 0.12, 0.5]) + 0.03 * rng.standard_normal(k)
    saturation = 0.9 * rng.beta(2, 2.5, k)
    value = rng.permutation(np.linspace(0.2, 0.95, k))
    pick = rng.choice(k, n, p=rng.dirichlet(np.full(k, 2.0)))
    jitter = rng.standard_normal((3, n), dtype=f32)
    h = hue[pick] + 0.015 * jitter[0]
    s = np.clip(saturation[pick] + 0.08 * jitter[1], 0, 1)
    v = np.clip(value[pick] + 0.08 * jitter[2], 0.05, 1)
    return _rgb(h, s, v)


def _rgb(h, s, v):
    """Hue (1 is a full turn), saturation and value, (n,) each, to (3, n) float32 RGB."""
    ramp = np.abs((6 * h + np.array([[0], [4], [2]])) % 6 - 3) - 1
    return (v * (1 - s + s * np.clip(ramp, 0, 1))).astype(f32)


def dead_leaves(size, rng):
    """One dead-leaves image of shaded discs, (3, size, size) uint8, from a numpy Generator."""
    r_min, r_max = 1.3, 0.4 * size                 # radii in pixels, of density r^-3
    cover = 1.4                # mean number of discs over a pixel: exp(-cover) show the background
    ratio = (r_min / r_max) ** 2
    area = 2 * np.pi * r_min ** 2 * np.log(r_max / r_min) / (1 - ratio)  # mean area of a disc
    side = size + 2 * r_max                        # centres also fall outside the frame
    x, y, r = rng.random((3, int(cover * side ** 2 / area) + 1), dtype=f32)
    x, y = x * side - r_max, y * side - r_max
    r = r_min / np.sqrt(1 - r * (1 - ratio))       # (N,), by the inverse CDF
    x[0], y[0], r[0] = size / 2, size / 2, 4 * size  # the background is a disc too
    seen = (np.abs(x - size / 2) < size / 2 + r) & (np.abs(y - size / 2) < size / 2 + r)
    x, y, r = x[seen], y[seen], r[seen]
    return _paint(size, rng, x, y, r, _colours(len(r), rng))


def few_discs(size, rng):
    """One image of one or two vivid shaded discs on a pale background, (3, size, size) uint8."""
    n = int(rng.integers(2, 4))                    # the background is the first disc
    x, y, r, hue, light = rng.random((5, n), dtype=f32)
    x, y, r = size * (0.15 + 0.7 * x), size * (0.15 + 0.7 * y), size * (0.18 + 0.14 * r)
    x[0], y[0], r[0] = size / 2, size / 2, 4 * size
    saturation, value = np.full(n, 0.75), 0.5 + 0.4 * light
    saturation[0], value[0] = 0.2, 0.85 + 0.15 * light[0]
    return _paint(size, rng, x, y, r, _rgb(hue, saturation, value), ripples=0, lamp=0.62)


def _paint(size, rng, x, y, r, rgb, ripples=0.18, lamp=None):
    """
    Render discs with centres x, y and radii r (n,) in pixels and colours rgb (3, n), the last on
    top, to (3, size, size) uint8.
    ripples  maximum strength of the stripes on a disc
    lamp     light direction as a fraction of a turn; None: random, the same for all discs
    """
    angle, waves, ripple = rng.random((3, len(r)), dtype=f32)
    wave_x = (2 + 6 * waves) * np.cos(2 * np.pi * angle)
    wave_y = (2 + 6 * waves) * np.sin(2 * np.pi * angle)
    ripple = ripples * ripple ** 2                 # most discs are nearly plain
    light = 2 * np.pi * (rng.random() if lamp is None else lamp)
    light_x, light_y = f32(0.22 * np.cos(light)), f32(0.22 * np.sin(light))

    disc, rows = _covered(y, r + f32(0.5), size)   # rows of each disc, plus half a pixel of edge
    grid = np.arange(size, dtype=f32) + f32(0.5)   # pixel centres
    half = np.sqrt(np.maximum((r[disc] + f32(0.5)) ** 2 - (grid[rows] - y[disc]) ** 2, 0))
    run, columns = _covered(x[disc], half, size)   # pixels of each row
    disc, pixel = disc[run], rows[run] * size + columns  # (M,), lowest disc first

    image = np.zeros((3, size * size), f32)
    open_ = np.ones(size * size, f32)              # remaining transparency
    grid_x, grid_y = np.tile(grid, size), np.repeat(grid, size)
    todo = np.arange(size * size)
    for layer in range(3):                         # from the top; soft edges show the disc below
        owner = np.zeros(size * size, np.int32)
        owner[pixel] = disc                        # duplicate pixels: the last, topmost disc wins
        o = owner[todo]
        radius = r[o]
        # (T,), offset from the disc's centre in radii
        dx, dy = (grid_x[todo] - x[o]) / radius, (grid_y[todo] - y[o]) / radius
        d2 = dx * dx + dy * dy
        alpha = np.clip((1 - np.sqrt(d2)) * radius + f32(0.5), 0, 1) if layer < 2 else f32(1)
        wave = ripple[o] * np.cos(dx * wave_x[o] + dy * wave_y[o])
        shade = 1 + dx * light_x + dy * light_y - f32(0.2) * d2 * d2 + wave
        image[:, todo] += np.minimum(rgb[:, o] * shade, 1) * (alpha * open_[todo])
        open_[todo] *= 1 - alpha
        todo = np.flatnonzero(open_)
        below = disc < owner[pixel]
        disc, pixel = disc[below], pixel[below]
    return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8).reshape(3, size, size)


SETS = {"leaves": dead_leaves, "discs": few_discs}


class BuiltInImages:
    """
    A set of `count` built-in images; image i depends only on (seed, first + i).
    kind   a key of SETS;  items  (uint8 (3, size, size), label 0, i, ""), "" as there are no faults
    """
    classes, unreadable = [], frozenset()

    def __init__(self, size, count, seed=0, first=0, kind="leaves"):
        self.size, self.count, self.seed, self.first, self.kind = size, count, seed, first, kind

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        rng = np.random.default_rng((self.seed, self.first + i))
        return torch.from_numpy(SETS[self.kind](self.size, rng)), 0, i, ""
