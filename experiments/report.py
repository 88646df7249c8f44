"""
Result files into tables, verdicts and a scatter; `python -m experiments.miniature table` and
`scatter` call it. Everything comes from experiments/results/ alone.
"""
import json
import textwrap

import numpy as np
from scipy.stats import spearmanr

from analysis.figures import save_figure, subplots
from common import run
from experiments import protocol
from experiments.protocol import (
    AUTOENCODERS,
    HELD_OUT,
    LONG,
    LONG_STEPS,
    OUR_CLAIMS,
    PAPER_CLAIMS,
    SEEDS,
    SIT_STEPS,
    TABLES,
)

COLUMNS = {                                                # number: its heading, its digits
    "psnr": ("PSNR, dB", 2), "alpha": ("exponent of the PSD", 2), "esm": ("ESM divergence", 3),
    "esm_shape": ("normalised, best scale", 3), "kl_from_target": ("KL from target, with DC", 4),
    "FD_cifar": ("FD", 2), "rFD_cifar": ("rFD", 2), "dFD_cifar": ("dFD", 2),
    "SWD_32px": ("SWD 32 px", 1), "spectral_KL": ("spectral KL", 4),
}
PREDICTORS = {                                             # known before diffusion, and in words
    "kl_from_target": "KL from target, with DC", "esm": "ESM divergence, as it is",
    "esm_shape": "ESM divergence, normalised", "alpha": "exponent of the PSD",
    "neighbours": "correlation of neighbouring cells", "high_band": "dB in the latent's high band",
    "dsm": "DSM consistency, dB", "psnr": "PSNR, dB",
}
MARKS = "<!-- miniature.py table -->", "<!-- end of miniature.py table -->"


def load_results():
    """{(name, seed): what is in its file}, from experiments/results/."""
    found = [json.loads(path.read_text()) for path in sorted(protocol.RESULTS.glob("*-s?.json"))]
    return {(result["name"], result["seed"]): result for result in found}


def verdict(results, key, a, order, b):
    """
    The protocol's rule, over the seeds that both runs have, for the claim that run `a` is "below"
    or "above" run `b` in the number `key`. A positive gap is as claimed; the spread is the largest
    minus the smallest of the seeds.
    """
    seeds = [seed for seed in SEEDS if (a, seed) in results and (b, seed) in results]
    if not seeds:
        return "not run"
    of_a, of_b = ([results[name, seed]["numbers"][key] for seed in seeds] for name in (a, b))
    sign = {"below": 1, "above": -1}[order]
    gap = sign * (np.mean(of_b) - np.mean(of_a))
    between_seeds = max(np.ptp(of_a), np.ptp(of_b))
    _, digits = COLUMNS[key]
    if len(seeds) < 2:
        return f"undecided: gap {gap:+.{digits}f}, one seed"
    word = "undecided"
    if gap > between_seeds:
        word = "agreement"
    elif gap < -between_seeds:
        word = "**contradiction**"
    return (f"{word}: gap {gap:+.{digits}f}, spread {between_seeds:.{digits}f}, "
            f"{len(seeds)} seeds")


def table_row(*cells):
    """One row of a markdown table."""
    return f"| {' | '.join(cells)} |"


def run_row(name, results):
    """The row of a run: the numbers of its seeds side by side."""
    found = [results[name, seed]["numbers"] for seed in SEEDS if (name, seed) in results]
    if not found:
        return table_row(f"`{name}`", "not run", *[""] * (len(COLUMNS) - 1))
    cells = []
    for key, (_, digits) in COLUMNS.items():
        cells.append(" / ".join(f"{numbers[key]:.{digits}f}" for numbers in found))
    return table_row(f"`{name}`", *cells)


def claims_table(heading, claims, results):
    """PAPER_CLAIMS or OUR_CLAIMS as lines of a markdown table, with a verdict for each number."""
    lines = [table_row(heading, "here", "measured by"), "|---|---|---|"]
    for where, keys, order, group in claims:
        for words, a, b in group:
            cells = []
            for key in keys:
                name = f"{COLUMNS[key][0]}: " if len(keys) > 1 else ""
                cells.append(name + verdict(results, key, a, order, b))
            columns = " and ".join(COLUMNS[key][0] for key in keys)
            lines.append(table_row(f"{where}: {words}", "<br>".join(cells),
                                   f"{columns}: `{a}` {order} `{b}`"))
    return lines


def table():
    """The tables of the README beside this file as markdown, from experiments/results/ alone."""
    results = load_results()
    if not results:
        raise FileNotFoundError(f"{protocol.RESULTS}: no results yet; "
                                "`python -m experiments.miniature run` makes them")
    one = next(iter(results.values()))
    hardware = sorted({result["hardware"] for result in results.values()})
    lines = textwrap.wrap(
        f"Each run has {one['samples']:,} samples, and the numbers of its seeds stand side by "
        f"side. FD, rFD and dFD are of {one['reference']:,} training images, in the features of a "
        f"network with {100 * one['labelnet_accuracy']:.1f}% accuracy on held-out images. "
        f"{HELD_OUT:,} held-out images themselves have an FD of "
        f"{one['FD_cifar_of_held_out_images']:.2f}. "
        f"Hardware: {', '.join(hardware)}. Commands, logs and versions are in "
        "`experiments/results/`.",
        110, break_on_hyphens=False)
    for title, names in sorted(TABLES.items(), key=lambda table: table[0].replace("Ours", "Z")):
        lines += ["", f"**{title}**", ""]
        lines.append(table_row("run", *[heading for heading, _ in COLUMNS.values()]))
        lines.append("|---" * (len(COLUMNS) + 1) + "|")
        lines += [run_row(name, results) for name in names]
    lines += ["", *claims_table("the paper says", PAPER_CLAIMS, results)]
    lines += ["", *claims_table("ours", OUR_CLAIMS, results)]
    return "\n".join(lines)


def write_readme(text):
    """Put the tables between their two marks in the README beside this file."""
    path = protocol.HERE / "README.md"
    before, rest = path.read_text().split(MARKS[0])
    _, after = rest.split(MARKS[1])
    page = f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}"
    run.write_atomic(path, lambda file: file.write(page.encode()))


def scatter():
    """
    figures/scatter.png: dFD of every run without alignment against each number that is known of
    its autoencoder beforehand. Spearman's rank correlations, one a length, are printed.
    """
    every = load_results().values()
    lengths = {SIT_STEPS: [result for result in every if result["name"] in AUTOENCODERS],
               LONG_STEPS: [result for result in every if result["name"] in LONG]}
    lengths = {steps: found for steps, found in lengths.items() if len(found) >= 3}
    if not lengths:
        raise FileNotFoundError(f"{protocol.RESULTS}: a correlation needs three runs or more; "
                                "`python -m experiments.miniature run` makes them")
    figure, axes = subplots(2, 4, (15, 7), sharey=True)
    for ax, (key, words) in zip(axes.flat, PREDICTORS.items()):
        correlations = []
        for steps, found in lengths.items():
            x, y = ([result["numbers"][k] for result in found] for k in (key, "dFD_cifar"))
            rho = spearmanr(x, y).statistic
            print(f"{key}: rank correlation {rho:+.2f} with dFD, {len(found)} runs of {steps:,} "
                  "steps")
            correlations.append(f"{rho:+.2f} ({steps:,} steps)")
            for i, name in enumerate(AUTOENCODERS):
                rows = [k for k, result in enumerate(found)
                        if result["name"].removesuffix("-long") == name]
                if rows:
                    ax.plot([x[k] for k in rows], [y[k] for k in rows], "o^"[i // 10], ms=6,
                            color=f"C{i % 10}", mfc=None if steps == SIT_STEPS else "none",
                            label=name if steps == SIT_STEPS else f"{name}, {steps:,} steps")
        ax.set(xlabel=words, title=", ".join(correlations))
    for ax in axes[:, 0]:
        ax.set_ylabel("dFD: what diffusion adds")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center",
                  ncols=9, fontsize=8)
    figure.suptitle("Rank correlation of dFD with a number of the autoencoder")
    save_figure(figure, protocol.HERE / "figures" / "scatter.png", dpi=80)
