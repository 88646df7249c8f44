"""
The miniature's bookkeeping: its plan and commands, the paired tests computed a second way, its
pages in step with its results, and the network whose features it uses.
"""
import json
import math
import pathlib
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import evaluate
import train_ae
import train_diffusion
from analysis import theory
from analysis.figures import encode_all
from conftest import ROOT
from experiments import miniature, protocol, report
from experiments.labelnet import LabelNet
from repa import Encoder, load_encoder
from spectral import dct2, match_resolution, radial_profile
from vae import AEConfig, AutoencoderKL


def plant(folder, **runs):
    """Result files {name: [FD of seed 0, of seed 1, ...]}; its other numbers follow from FD."""
    for name, distances in runs.items():
        for seed, distance in enumerate(distances):
            numbers = {key: distance for key in report.PREDICTORS.keys() | report.COLUMNS.keys()}
            result = dict(name=name, ae_seed=seed, sit_seed=seed, samples=1000, reference=4000,
                          FD_of_held_out_images=0.5, hardware="a laptop",
                          numbers=numbers | dict(psnr=30.0 - distance, FD=distance))
            (folder / f"{name}-s{seed}.json").write_text(json.dumps(result))


# --------------------------------------------------------------------------------------------------
# The paired tests, a second way

def t_density(x, n):
    """Of Student's t with n degrees of freedom."""
    c = math.gamma((n + 1) / 2) / math.gamma(n / 2) / math.sqrt(n * math.pi)
    return c * (1 + x * x / n) ** (-(n + 1) / 2)


def integrated_p(d):
    """The two-sided p-value of differences d by integrating the density, without scipy."""
    n = len(d)
    mean = sum(d) / n
    error = math.sqrt(sum((x - mean) ** 2 for x in d) / (n - 1) / n)
    x = np.linspace(0, abs(mean) / error, 200_001)
    return 1 - 2 * np.trapezoid(t_density(x, n - 1), x)


@pytest.mark.parametrize("d", [[0.3, 0.1, 0.25, -0.02, 0.4, 0.2], [-1.0, -1.2, -0.9, -1.1, -2, -1],
                               [0.1, -0.1, 0.2, -0.3, 0.05, 0.0]])
def test_the_paired_test(d):
    """Its p-value, and an interval that leaves out 0 exactly if p < .05."""
    mean, (low, high), p = report.paired_test(np.array(d))
    assert mean == pytest.approx(sum(d) / len(d)) and (low + high) / 2 == pytest.approx(mean)
    assert p == pytest.approx(integrated_p(d), abs=1e-5)
    assert (p < 0.05) == (low > 0 or high < 0)


def test_holm_by_its_definition():
    """
    Reject, from the smallest p-value on, while p <= alpha / (number left): the same hypotheses as
    those whose corrected p is at most alpha.
    """
    pvalues = [0.011, 0.2, 0.012, 0.0005, 0.03]
    corrected = report.holm(pvalues)
    for alpha in (0.001, 0.01, 0.04, 0.05, 0.06, 0.1, 0.5):
        rejected = set()
        for k, p in enumerate(sorted(pvalues)):
            if p > alpha / (len(pvalues) - k):
                break
            rejected.add(p)
        assert {p for p, c in zip(pvalues, corrected) if c <= alpha} == rejected


@pytest.mark.parametrize("esm, kl, word", [
    ([1, 2, 3, 4, 5, 6], [3, 4.1, 5, 6, 7, 8.2], "agreement"),
    ([3, 4.1, 5, 6, 7, 8.2], [1, 2, 3, 4, 5, 6], "**contradiction**"),
    ([1, 2, 3, 4, 5, 6], [2, 1, 4, 3, 6, 4], "undecided"),
    ([1, 2, 3, 4, 5], [3, 4, 5, 6, 7.1], "no verdict")])
def test_the_verdict_follows_the_protocol(esm, kl, word, tmp_path, monkeypatch):
    """By pairs of the same seed, however far seeds are apart; none with fewer than six of them."""
    monkeypatch.setattr(protocol, "RESULTS", tmp_path)
    plant(tmp_path, kl=kl, esm=esm)
    rows = report.claims_table([protocol.PRIMARY], report.load_results())
    row, = [row for row in rows if "`esm` below `kl`" in row]
    assert row.endswith(f"| {len(kl)} | {row.split(' | ')[-2]} | {word} |")
    assert sum("not run" in row for row in rows) == 4


def test_above_is_below_the_other_way_round(tmp_path, monkeypatch):
    """PSNR: more is better. A positive difference is as claimed."""
    monkeypatch.setattr(protocol, "RESULTS", tmp_path)
    plant(tmp_path, kl=[3, 4], esm=[1, 1.5])               # PSNR 27, 26 and 29, 28.5
    results = report.load_results()
    assert report.differences(results, "psnr", "above", "esm", "kl").tolist() == [2, 2.5]
    assert report.differences(results, "psnr", "below", "kl", "esm").tolist() == [2, 2.5]


def test_where_the_spread_comes_from(tmp_path, monkeypatch):
    """Standard deviations of planted effects of the two seeds are found again."""
    rng, results = np.random.default_rng(0), {}
    monkeypatch.setattr(report, "SEEDS", range(4000))
    for seed, effect in enumerate(rng.normal(0, 0.2, 4000)):
        for other in (seed, seed + protocol.SECOND):
            number = 1 + effect + rng.normal(0, 0.1)
            results["kl", seed, other] = dict(numbers=dict(FD=number))
    cells = report.spread(results)[2].split(" | ")
    assert float(cells[2]) == pytest.approx(0.1, abs=0.005)
    assert float(cells[3].removesuffix(" |")) == pytest.approx(0.2, abs=0.01)


# --------------------------------------------------------------------------------------------------
# Claims, plan, pages

# Tables 2 (f8d4 and f16d16), 3, 4 (cfg 1.8 and none), 7 and 8, and the divergences of Figs. 4 and 5
SCORES = {
    "Table 2, gFID": {"kl": "6.63 6.88", "se": "5.87 5.46", "esm": "5.91 5.84",
                      "dsm": "4.44 4.49", "kl-1e-6": "6.63 6.88"},
    "Table 2, PSNR": dict(kl="31.23 30.08", esm="31.63 31.30"),
    "Table 3, gFID at 400k": {"kl": "14.58", "dsm": "12.20", "kl-repa": "7.60", "dsm-repa": "6.48"},
    "Table 4, gFID at 400k": {"kl-repa": "5.68 22.75", "kl-irepa": "5.07 21.40",
                              "kl-dog": "4.98 20.37"},
    "Table 7, gFID": {"esm-gamma0.6": "5.90", "esm": "5.84", "esm-gamma1.4": "6.57",
                      "esm-w0.1": "6.82", "esm-w0.001": "6.00"},
    "Table 8, gFID": {"dsm-0-8-12": "5.02", "dsm": "4.49", "dsm-0-6-8-10-12": "4.61",
                      "dsm-0-8-10-12-13": "5.33"},
    "Figs. 4 and 5, KL of the published curves from the flattened target": dict(
        kl=".038", se=".020", dsm=".0054", esm=".0044"),
}
CLAIMS = [(where, key, order, *claim) for where, key, order, claims
          in (protocol.PRIMARY, *protocol.EXPLORATORY) for claim in claims]


def test_what_the_paper_says_is_in_its_tables():
    """Each number of a claim belongs to its run in the paper, and they are in the claimed order."""
    for where, _, order, words, a, b in CLAIMS:
        if where.startswith("Fig. 3"):                     # an image, no numbers
            continue
        of_a, of_b = (SCORES[where.partition(", KL at")[0]][name].split() for name in (a, b))
        pairs = re.findall(r"(\d*\.\d+) ([<>]) (\d*\.\d+)", words)
        assert pairs == [(x, "<" if order == "below" else ">", y) for x, y in zip(of_a, of_b)]
        assert all(float(x) < float(y) if sign == "<" else float(x) > float(y)
                   for x, sign, y in pairs)


def test_every_number_of_the_papers_tables_is_in_a_claim():
    """Table 7 on both axes, Table 8's four sets, Table 3 with and without REPA: all is there."""
    table = lambda where: where.partition(", KL at")[0]
    for where, scores in SCORES.items():
        assert set(scores) == {name for at, *_, a, b in CLAIMS if table(at) == where
                               for name in (a, b)}


def test_the_plan():
    """
    Every run of every table with every seed, once, and no claim without its runs; stopped anywhere
    in a table, its runs have the same seeds up to one; --only and --seeds choose among them.
    """
    names = {name for rows in protocol.TABLES.values() for name in rows}
    plan = protocol.plan()
    pairs = [(name, seed, seed) for name in names for seed in protocol.SEEDS]
    seconds = [(name, seed, seed + 100) for name in ("kl", "dsm") for seed in protocol.SEEDS]
    assert sorted(plan) == sorted(pairs + seconds)
    for *_, a, b in CLAIMS:
        assert {a, b} <= names
    assert [name for name, *_ in plan[:5]] == protocol.TABLES["Table 2"] and plan[5][1] == 1
    assert protocol.plan(["esm"], [4]) == [("esm", 4, 4)]


def test_kl_counts_as_much_per_number_of_the_latent():
    """Its weight times the latent's numbers: 1e-6 * 16 * 16 * 16 at f16d16 and 256 px."""
    weight = float(protocol.AUTOENCODERS["kl"].split()[-1])
    assert weight * 8 * 8 * 4 == pytest.approx(1e-6 * 16 ** 3)


def test_the_pages_show_the_committed_results(tmp_path, monkeypatch):
    """README's table and TABLES.md are what the command `table` writes; the rest of it stays."""
    for name in ("README.md", "TABLES.md"):
        (tmp_path / name).write_text((protocol.HERE / name).read_text())
    monkeypatch.setattr(protocol, "HERE", tmp_path)
    report.write_pages()
    for name in ("README.md", "TABLES.md"):
        assert (tmp_path / name).read_text() == (ROOT / "experiments" / name).read_text()


@pytest.mark.parametrize("name", sorted({name for name, *_ in protocol.plan()}))
def test_the_commands_are_understood(name, monkeypatch):
    """Each script takes its flags, and finds what the command before it leaves."""
    parsed = []
    commands = miniature.commands(name, 1, 101, pathlib.Path("out/m"))
    for command, module in zip(commands, (train_ae, train_diffusion, evaluate)):
        monkeypatch.setattr("sys.argv", command)
        parsed.append(module.get_args())
    ae, sit, gen = parsed
    assert sit.ae == f"{ae.out}/ckpt.pt" and f"{sit.out}/ckpt.pt" in gen.ckpt
    assert (ae.seed, sit.seed) == (1, 101) and ae.data == "discs"
    assert (ae.steps, sit.steps) == (protocol.AE_STEPS, protocol.SIT_STEPS)


# --------------------------------------------------------------------------------------------------
# Runs

@pytest.fixture
def called(monkeypatch):
    """The commands of miniature.run_one, which are not run; called.code: how each one ends."""
    class Calls(list):
        code = 0

    def run_main(command, **options):
        calls.append(command)
        return miniature.subprocess.CompletedProcess(command, calls.code)
    calls = Calls()
    monkeypatch.setattr(miniature.subprocess, "run", run_main)
    return calls


@pytest.mark.parametrize("code", [0, 2])
def test_a_run_that_was_stopped_is_no_result(code, called, tmp_path):
    """
    A signal ends a training script early with code 0: no next stage, whatever the code. Folders
    with spaces are one word, also in the note, which goes back into a shell.
    """
    called.code = code
    with pytest.raises(ValueError, match="kl-s0-d3: train_ae.py did not reach its end"):
        miniature.run_one("kl", 0, 3, tmp_path / "my runs")
    assert len(called) == 1 and str(tmp_path / "my runs" / "ae" / "kl-s0") in called[0]
    note = tmp_path / "my runs" / "diffusion" / "kl-s0-d3" / "commands.txt"
    assert f"--out '{tmp_path / 'my runs' / 'ae' / 'kl-s0'}' " in note.read_text()


@pytest.mark.parametrize("folder, file", [
    ("diffusion/kl-s0", "commands.txt"), ("ae/kl-s0", "commands.txt"), ("ae/kl-s0", "ckpt.pt")])
def test_a_run_of_other_commands_is_refused(folder, file, called, tmp_path):
    """What lies in the folder of another protocol is not taken for a result of this one."""
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / file).write_text("python train_ae.py --steps 1\n")
    with pytest.raises(ValueError, match="kl-s0: was made by other commands"):
        miniature.run_one("kl", 0, 0, tmp_path)
    assert not called


def test_the_three_commands_of_a_run(called, tmp_path, monkeypatch):
    """In their order; commands.txt has them as they are typed in the project's folder."""
    steps = dict(ae=protocol.AE_STEPS, diffusion=protocol.SIT_STEPS)
    reached = lambda folder, stage: steps[stage] * any(str(folder) in words for words in called)
    monkeypatch.setattr(miniature, "trained", reached)
    monkeypatch.chdir(tmp_path)
    miniature.run_one("kl-dog", 0, 0, pathlib.Path("out"))
    assert [words[1] for words in called] == ["train_ae.py", "train_diffusion.py", "evaluate.py"]
    recorded = pathlib.Path("out/diffusion/kl-dog-s0/commands.txt").read_text()
    assert "--encoder labelnet --encoder_source experiments" in recorded
    assert recorded.startswith("python train_ae.py ")


# --------------------------------------------------------------------------------------------------
# Numbers

def test_the_form_of_the_papers_figures():
    """KL from the target, DC kept: as `evaluate.py spectrum --published` prints it."""
    torch.manual_seed(0)
    ae = AutoencoderKL(AEConfig(ch=8, ch_mult=(1, 2), latent_channels=2, num_res_blocks=1,
                                norm_groups=2))
    images = F.interpolate(torch.randn(4, 3, 8, 12), scale_factor=4, mode="bilinear")
    latents = encode_all(ae, images, 100, seed=0)
    P = dct2(match_resolution(images, (16, 24))).square().mean(1)       # (4, 16, 24), with DC
    ring = torch.arange(1.0, 17)
    target = torch.log1p(radial_profile(P) * ring)
    target = (target / target.sum(1, keepdim=True)).mean(0)
    got = torch.log1p(radial_profile(dct2(latents).square().mean(1)))
    got = (got / got.sum(1, keepdim=True)).mean(0)
    expected = (target * (target / got).log()).sum()
    found = theory.diffusability(ae, images)["kl_from_target"]
    assert found == pytest.approx(float(expected), rel=1e-3)


def test_rank_correlation_and_its_interval():
    """Spearman's rho by ranks; the interval holds the truth in 95 of 100 draws."""
    rng, hits, trials, n = np.random.default_rng(0), 0, 400, 40
    r = 0.6                                                # Pearson's, of normal variables
    rho = 6 / math.pi * math.asin(r / 2)                   # Spearman's
    for _ in range(trials):
        x = rng.normal(size=n)
        y = r * x + math.sqrt(1 - r * r) * rng.normal(size=n)
        _, low, high = report.rank_correlation(x, y)
        hits += low < rho < high
    assert 0.92 < hits / trials < 0.98
    assert report.rank_correlation([1, 2, 3, 4, 5], [1, 4, 9, 16, 26])[0] == pytest.approx(1)


def test_the_scatter_ranks(tmp_path, monkeypatch):
    """All runs without alignment are in it, and a page with too few of them says so."""
    (tmp_path / "figures").mkdir()
    monkeypatch.setattr(protocol, "RESULTS", tmp_path)
    monkeypatch.setattr(protocol, "HERE", tmp_path)
    with pytest.raises(ValueError, match="no results"):
        report.scatter()
    plant(tmp_path, **{"kl": [10.0, 11.0], "esm": [8.0, 8.5], "kl-dog": [1.0]})
    report.scatter()
    assert (tmp_path / "figures" / "scatter.png").exists()
    rows = report.correlations(report.load_results())
    assert all("1.00 (" in row and row.endswith(" | 4 |") for row in rows[2:])
    assert next(row for row in rows if row.startswith("| PSNR")).count("-1.00") == 2


def test_the_network_of_fd_is_part_of_the_project():
    """experiments/labelnet.pt loads as a target encoder and knows its accuracy."""
    assert torch.load(miniature.LABELNET, weights_only=True)["accuracy"] > 0.8
    encoder = load_encoder("labelnet", source=str(protocol.HERE))
    assert encoder(torch.zeros(1, 3, 32, 32), (8, 8)).shape == (1, 64, 96)


def test_labelnet_is_a_target_encoder():
    """Its tokens are the second stage of the network on the image as it is."""
    net = LabelNet(num_classes=3).eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        tokens = net.features(images, net.stages[:2]).flatten(2).transpose(1, 2)    # (B, 96, 96)
    expected = F.layer_norm(tokens, (96,))
    torch.testing.assert_close(Encoder(net)(images, (8, 12)), expected, rtol=1e-3, atol=1e-4)
    assert net(images).shape == (2, 3) and net.pooled(images).shape == (2, 192)


def test_labelnets_file_is_not_overwritten():
    """Distances in the features of another network are other numbers."""
    with pytest.raises(ValueError, match="labelnet.pt: is there"):
        miniature.train_labelnet("leaves")
