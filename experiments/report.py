"""
Turn the result files in experiments/results/, its only input, into tables, statistical tests and
figures; called by `python -m experiments.miniature table` and `scatter`.
"""
import json
import math

import numpy as np
from scipy import stats

from analysis.figures import run_colors, save_figure, subplots
from common import run
from experiments import protocol
from experiments.protocol import ALPHA, AUTOENCODERS, EXPLORATORY, PRIMARY, SEEDS, SPREAD, TABLES

COLUMNS = {                                                # key: (column heading, decimals)
    "psnr": ("PSNR, dB", 2), "alpha": ("exponent of the PSD", 2),
    "kl_from_target": ("KL from target, with DC", 4), "FD": ("FD", 2), "rFD": ("rFD", 2),
    "dFD": ("dFD", 2), "iFD": ("iFD", 2), "SWD_32px": ("SWD 32 px", 0),
    "spectral_KL": ("spectral KL", 4),
}
PREDICTORS = {                                             # key: label; need no diffusion model
    "iFD": "iFD", "kl_from_target": "KL from target, with DC", "esm": "ESM divergence",
    "esm_shape": "ESM divergence, normalised", "alpha": "exponent of the PSD",
    "neighbours": "correlation of neighbouring cells", "high_band": "dB in the latent's high band",
    "dsm": "DSM consistency, dB", "psnr": "PSNR, dB", "rFD": "rFD",
}
SHOWN = ("iFD", "kl_from_target")                          # in scatter.png
MARKS = "<!-- miniature.py table -->", "<!-- end of miniature.py table -->"


def load_results():
    """{(name, autoencoder seed, diffusion seed): contents of the run's result file}."""
    found = [json.loads(path.read_text()) for path in sorted(protocol.RESULTS.glob("*.json"))]
    run.need(found, f"{protocol.RESULTS}: no results; `python -m experiments.miniature run` makes "
             "them")
    return {(result["name"], result["ae_seed"], result["sit_seed"]): result for result in found}


def values(results, name, key, seeds=SEEDS):
    """{seed: value of key} for the runs called name whose two seeds are equal."""
    return {seed: results[name, seed, seed]["numbers"][key] for seed in seeds
            if (name, seed, seed) in results}


# --------------------------------------------------------------------------------------------------
# The paired test

def differences(results, key, order, a, b):
    """Paired differences (n,) over common seeds; positive: supports "a below (or above) b"."""
    of_a, of_b = values(results, a, key), values(results, b, key)
    sign = {"below": 1, "above": -1}[order]
    return np.array([sign * (of_b[seed] - of_a[seed]) for seed in of_a if seed in of_b])


def paired_test(d):
    """Mean of differences (n,), n >= 2, its 95% interval, and the p-value of Student's t-test."""
    test = stats.ttest_1samp(d, 0.0)
    low, high = test.confidence_interval(1 - ALPHA)
    return float(d.mean()), (float(low), float(high)), float(test.pvalue)


def holm(pvalues):
    """Holm-corrected p-values: smallest of m times m, next times m - 1, ..., made monotone."""
    corrected, largest = [0.0] * len(pvalues), 0.0
    for rank, k in enumerate(np.argsort(pvalues, kind="stable")):
        largest = max(largest, min(1.0, (len(pvalues) - rank) * pvalues[k]))
        corrected[k] = largest
    return corrected


def verdict(d, p):
    """The verdict in words, from differences (n,) and their p-value (corrected if in a family)."""
    if len(d) < len(SEEDS):
        return "no verdict"
    if p >= ALPHA:
        return "undecided"
    return "agreement" if d.mean() > 0 else "**contradiction**"


def claims_table(groups, results):
    """Groups of claims as markdown table lines; p-values in PRIMARY are Holm-corrected."""
    lines = [table_row("the paper says", "here", "mean paired difference, 95% interval", "n", "p",
                       "verdict"), "|---|---|---|---|---|---|"]
    for group in groups:
        where, key, order, claims = group
        ds = [differences(results, key, order, a, b) for _, a, b in claims]
        tests = [paired_test(d) if len(d) > 1 else (float(d.mean()) if len(d) else math.nan,
                 None, 1.0) for d in ds]
        pvalues = [p for _, _, p in tests]
        pvalues = holm(pvalues) if group is PRIMARY else pvalues
        heading, digits = COLUMNS[key]
        for (words, a, b), d, (mean, interval, _), p in zip(claims, ds, tests, pvalues):
            shown = f"{mean:+.{digits}f}" if len(d) else "not run"
            if interval:
                shown += f" ({interval[0]:+.{digits}f} to {interval[1]:+.{digits}f})"
            shown_p = f"{p:.3f}" if p >= 0.0005 else "< 0.001"
            lines.append(table_row(f"{where}: {words}", f"{heading}: `{a}` {order} `{b}`", shown,
                                   str(len(d)), shown_p if interval else "", verdict(d, p)))
    return lines


def spread(results, key="FD"):
    """S.d. between autoencoders and between diffusion seeds: one-way analysis of variance."""
    lines = [table_row("run", "autoencoders", "s.d. by diffusion's seed",
                       "s.d. by the autoencoder's seed"), "|---|---|---|---|"]
    for name in SPREAD:
        pairs = [[results[name, seed, other]["numbers"][key] for other in
                  (seed, seed + protocol.SECOND)] for seed in SEEDS
                 if {(name, seed, seed), (name, seed, seed + protocol.SECOND)} <= results.keys()]
        cells = "not run", ""
        if len(pairs) > 1:
            pairs = np.array(pairs)                                         # (n, 2)
            within = pairs.var(1, ddof=1).mean()
            between = max(0.0, pairs.mean(1).var(ddof=1) - within / 2)
            cells = f"{within ** 0.5:.3f}", f"{between ** 0.5:.3f}"
        lines.append(table_row(f"`{name}`", str(len(pairs)), *cells))
    return lines


# --------------------------------------------------------------------------------------------------
# The pages

def table_row(*cells):
    """One row of a markdown table."""
    return f"| {' | '.join(cells)} |"


def run_row(name, results):
    """A run's table row: number of seeds, then mean and s.d. over seeds for each column."""
    cells = []
    for key, (_, digits) in COLUMNS.items():
        found = list(values(results, name, key).values())
        cells.append(f"{np.mean(found):.{digits}f}" if found else "")
        if len(found) > 1:
            cells[-1] += f" ± {np.std(found, ddof=1):.{digits}f}"
    return table_row(f"`{name}`", str(len(values(results, name, "FD")) or "not run"), *cells)


def run_tables(results):
    """The results of all runs as markdown lines, one table after another."""
    lines = []
    for title, names in TABLES.items():
        lines += ["", f"**{title}**", "", table_row("run", "seeds", *[
            heading for heading, _ in COLUMNS.values()]), "|---" * (len(COLUMNS) + 2) + "|"]
        lines += [run_row(name, results) for name in names]
    return lines


def write_pages():
    """Write the short table between the marks in README.md, and the long ones to TABLES.md."""
    results = load_results()
    groups = [PRIMARY, *(group for group in EXPLORATORY if group[0] in protocol.HEADLINE)]
    path = protocol.HERE / "README.md"
    before, rest = path.read_text().split(MARKS[0])
    _, after = rest.split(MARKS[1])
    short = "\n".join(claims_table(groups, results))
    page = f"{before}{MARKS[0]}\n{short}\n{MARKS[1]}{after}"
    run.write_atomic(path, lambda file: file.write(page.encode()))
    one = next(iter(results.values()))
    hardware = ", ".join(sorted({result["hardware"] for result in results.values()}))
    lines = ["# Every number of the miniature", "",
             "Written by `python -m experiments.miniature table` from `experiments/results/`; "
             "[README.md](README.md) says",
             "what the numbers are. Mean ± standard deviation over the seeds, each of "
             f"{one['samples']:,} samples.",
             f"{protocol.HELD_OUT:,} held-out images have an FD of "
             f"{one['FD_of_held_out_images']:.2f}. Hardware: {hardware}.", *run_tables(results),
             "", "## The claims", "", "The primary family; p by Holm's method.", "",
             *claims_table([PRIMARY], results), "",
             "Exploratory; p of each test alone, so that one in twenty is below .05 by chance.", "",
             *claims_table(EXPLORATORY, results), "",
             "## Where the spread of FD comes from", "", *spread(results), "",
             "## Which number of an autoencoder predicts FD", "", *correlations(results)]
    text = "\n".join(lines) + "\n"
    run.write_atomic(protocol.HERE / "TABLES.md", lambda file: file.write(text.encode()))
    print(short)


def rank_correlation(x, y):
    """
    Spearman's rho of x and y (n,), n > 3, and its 95% confidence interval, from Fisher's z with the
    variance of Bonett and Wright (Psychometrika 2000).
    """
    rho = float(stats.spearmanr(x, y).statistic)
    half = 1.96 * math.sqrt((1 + rho ** 2 / 2) / (len(x) - 3))
    z = math.atanh(max(-0.9999, min(0.9999, rho)))
    return rho, math.tanh(z - half), math.tanh(z + half)


def predictions(results):
    """{predictor: (x, y = FD)} over runs without alignment whose two seeds are equal."""
    found = [result["numbers"] for (name, ae_seed, sit_seed), result in results.items()
             if name in AUTOENCODERS and ae_seed == sit_seed]
    return {key: ([numbers[key] for numbers in found], [numbers["FD"] for numbers in found])
            for key in PREDICTORS}


def correlations(results):
    """Rank correlations with FD as markdown table lines, largest first."""
    lines = [table_row("number", "rank correlation with FD, 95% interval", "runs"), "|---|---|---|"]
    pairs = predictions(results)
    found = {key: rank_correlation(*pair) for key, pair in pairs.items()}
    for key, (rho, low, high) in sorted(found.items(), key=lambda item: -abs(item[1][0])):
        lines.append(table_row(PREDICTORS[key], f"{rho:+.2f} ({low:+.2f} to {high:+.2f})",
                               str(len(pairs[key][0]))))
    return lines


def plot_pairs():
    """Draw figures/pairs.png: the paired runs of each primary claim, one line per seed."""
    results = load_results()
    _, key, order, claims = PRIMARY
    figure, (axes,) = subplots(1, len(claims), (2.3 * len(claims), 3.6), sharey=True)
    for ax, (_, a, b) in zip(axes, claims):
        of_a, of_b = values(results, a, key), values(results, b, key)
        for seed in sorted(of_a.keys() & of_b.keys()):
            as_claimed = of_a[seed] < of_b[seed]
            ax.plot((0, 1), (of_b[seed], of_a[seed]), "o-" if as_claimed else "s--",
                    color="C0" if as_claimed else "C3")
        ax.set(title=f"{a} {order} {b}?", xticks=(0, 1), xticklabels=(b, a),
               xlim=(-0.3, 1.3))
    axes[0].set(ylabel="FD of the samples", ylim=(0, None))
    figure.supxlabel("one line per seed; solid blue: as the paper says, dashed red: the opposite")
    save_figure(figure, protocol.HERE / "figures" / "pairs.png", dpi=100)


def scatter():
    """Draw figures/scatter.png: FD of runs without alignment against two of PREDICTORS."""
    results = load_results()
    pairs = predictions(results)
    names = [name for name in AUTOENCODERS if values(results, name, "FD")]
    figure, axes = subplots(1, 2, (10, 4.2), sharey=True)
    for ax, key in zip(axes[0], SHOWN):
        for name, color in zip(names, run_colors(names)):
            x, y = values(results, name, key), values(results, name, "FD")
            ax.plot(list(x.values()), list(y.values()), "o", color=color, label=name)
        rho, low, high = rank_correlation(*pairs[key])
        ax.set(xlabel=PREDICTORS[key],
               title=f"rank correlation {rho:+.2f} ({low:+.2f} to {high:+.2f})")
    axes[0, 0].set_ylabel("FD of the samples")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    save_figure(figure, protocol.HERE / "figures" / "scatter.png", dpi=90)
