"""
The miniature's bookkeeping: its plan and commands, the paired tests computed a second way, its
pages in step with its results, and the network whose features it uses.
"""
import json
import math
import pathlib
import re
import subprocess
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import evaluate
import train_ae
import train_diffusion
from conftest import ROOT
from experiments import miniature, protocol, report
from repa import load_encoder


def plant(folder, **runs):
    """Result files {name: [FD of seed 0, of seed 1, ...]}; its other numbers follow from FD."""
    for name, distances in runs.items():
        for seed, distance in enumerate(distances):
            numbers = {key: distance for key in report.PREDICTORS.keys() | report.COLUMNS.keys()}
            numbers |= dict(psnr=30.0 - distance, FD=distance)
            result = dict(name=name, ae_seed=seed, sit_seed=seed, numbers=numbers)
            (folder / f"{name}-s{seed}.json").write_text(json.dumps(result))


# --------------------------------------------------------------------------------------------------
# The paired tests, a second way

@pytest.mark.parametrize("d", [[-1.0, -1.2, -0.9], [0.1, -0.1, 0.2]])
def test_the_paired_test(d):
    """Student's t with two degrees of freedom, in closed form; the interval is [mean -+ error]."""
    mean, (low, high), p = report.paired_test(np.array(d))
    half = 4.3026527 * np.std(d, ddof=1) / math.sqrt(3)    # t of the 97.5th percentile
    assert (mean, low, high) == pytest.approx((np.mean(d), mean - half, mean + half))
    t = 4.3026527 * abs(mean) / half
    assert p == pytest.approx(1 - t / math.sqrt(2 + t * t))


def test_holm_by_hand():
    """The smallest of five p-values times 5, the next times 4, ...; monotone, at most 1."""
    assert report.holm([0.011, 0.2, 0.012, 0.0005, 0.03]) == pytest.approx(
        [0.044, 0.2, 0.044, 0.0025, 0.06])
    assert report.holm([0.7, 0.6]) == [1, 1]


@pytest.mark.parametrize("esm, kl, word", [
    ([1, 2, 3, 4, 5, 6], [3, 4.1, 5, 6, 7, 8.2], "agreement"),
    ([3, 4.1, 5, 6, 7, 8.2], [1, 2, 3, 4, 5, 6], "**contradiction**"),
    ([1, 2, 3, 4, 5, 6], [2, 1, 4, 3, 6, 4], "undecided"),
    ([1, 2, 3, 4, 5], [3, 4, 5, 6, 7.1], "no verdict")])
def test_the_verdict_follows_the_protocol(esm, kl, word, tmp_path, monkeypatch):
    """By pairs of the same seed, none with fewer than six; above is below the other way round."""
    monkeypatch.setattr(protocol, "RESULTS", tmp_path)
    plant(tmp_path, kl=kl, esm=esm)
    rows = report.claims_table([protocol.PRIMARY], report.load_results())
    row, = [row for row in rows if "`esm` below `kl`" in row]
    assert row.endswith(f"| {len(kl)} | {row.split(' | ')[-2]} | {word} |")
    assert sum("not run" in row for row in rows) == 4
    results = report.load_results()                        # PSNR is 30 - FD
    both = [report.differences(results, *how, "esm", "kl")
            for how in (("FD", "below"), ("psnr", "above"))]
    np.testing.assert_allclose(*both)


def test_where_the_spread_comes_from():
    """By hand: autoencoder x = 0, .., 5 has FD x + 0.1 and x - 0.1 of its two diffusion models."""
    results = {("kl", x, x + more): dict(numbers=dict(FD=x + change)) for x in protocol.SEEDS
               for more, change in ((0, 0.1), (protocol.SECOND, -0.1))}
    within = (0.1 - -0.1) ** 2 / 2                         # variance of a pair
    between = 3.5 - within / 2                             # 3.5 is that of 0, .., 5
    assert report.spread(results)[2] == f"| `kl` | 6 | {within ** 0.5:.3f} | {between ** 0.5:.3f} |"


# --------------------------------------------------------------------------------------------------
# Claims, plan, pages

CLAIMS = [(where, key, order, *claim) for where, key, order, claims
          in (protocol.PRIMARY, *protocol.EXPLORATORY) for claim in claims]


def test_what_the_paper_says_is_in_its_tables():
    """The numbers of a claim are in GUIDE.md's tables, and in the claimed order."""
    guide = (ROOT / "GUIDE.md").read_text()
    for where, _, order, words, *_ in CLAIMS:
        pairs = re.findall(r"(\d*\.\d+) ([<>]) (\d*\.\d+)", words)
        assert pairs or where.startswith("Fig. 3")         # an image, no numbers
        for x, sign, y in pairs:
            assert sign == ("<" if order == "below" else ">") and x in guide and y in guide
            assert (float(x) < float(y)) == (sign == "<")


def test_the_plan():
    """
    Every run of every table with every seed, once, and no claim without its runs; stopped anywhere
    in a table, its runs have the same seeds up to one; --only and --seeds choose among them. KL
    counts as much per number of the latent as 1e-6 at f16d16 and 256 px.
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
    """Takes the commands of miniature.run_one, which are not run and end with code 0."""
    called = Mock(return_value=subprocess.CompletedProcess((), 0))
    monkeypatch.setattr(subprocess, "run", called)
    return called


@pytest.mark.parametrize("code", [0, 2])
def test_a_run_that_was_stopped_is_no_result(code, called, tmp_path):
    """
    A signal ends a training script early with code 0: no next stage, whatever the code. Folders
    with spaces are one word, also in the note, which goes back into a shell.
    """
    called.return_value.returncode = code
    with pytest.raises(ValueError, match="kl-s0-d3: train_ae.py did not reach its end"):
        miniature.run_one("kl", 0, 3, tmp_path / "my runs")
    (words,), _ = called.call_args
    assert called.call_count == 1 and str(tmp_path / "my runs" / "ae" / "kl-s0") in words
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
    assert not called.called


def test_the_three_commands_of_a_run(called, tmp_path, monkeypatch):
    """In their order; commands.txt has them as they are typed in the project's folder."""
    steps = dict(ae=protocol.AE_STEPS, diffusion=protocol.SIT_STEPS)
    reached = lambda folder, stage: steps[stage] * any(
        str(folder) in words for (words,), _ in called.call_args_list)
    monkeypatch.setattr(miniature, "trained", reached)
    monkeypatch.chdir(tmp_path)
    miniature.run_one("kl-dog", 0, 0, pathlib.Path("out"))
    scripts = [words[1] for (words,), _ in called.call_args_list]
    assert scripts == ["train_ae.py", "train_diffusion.py", "evaluate.py"]
    recorded = pathlib.Path("out/diffusion/kl-dog-s0/commands.txt").read_text()
    assert "--encoder labelnet --encoder_source experiments" in recorded
    assert recorded.startswith("python train_ae.py ")


# --------------------------------------------------------------------------------------------------
# Numbers

def test_the_scatter_is_drawn(tmp_path, monkeypatch):
    """Of planted results; without any, a line says so. Its numbers are in TABLES.md."""
    (tmp_path / "figures").mkdir()
    monkeypatch.setattr(protocol, "RESULTS", tmp_path)
    monkeypatch.setattr(protocol, "HERE", tmp_path)
    with pytest.raises(ValueError, match="no results"):
        report.scatter()
    plant(tmp_path, **{"kl": [10.0, 11.0], "esm": [8.0, 8.5], "kl-dog": [1.0]})
    report.scatter()
    assert (tmp_path / "figures" / "scatter.png").exists()


def test_the_network_of_fd_is_a_target_encoder():
    """labelnet.pt, never overwritten: tokens of its second stage on the image as it is."""
    assert torch.load(miniature.LABELNET, weights_only=True)["accuracy"] > 0.8
    encoder = load_encoder("labelnet", source=str(protocol.HERE))
    net, images = encoder.network, torch.rand(2, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        tokens = net.features(images, net.stages[:2]).flatten(2).transpose(1, 2)    # (B, 96, 96)
        assert net.pooled(images).shape == (2, 192)
    expected = F.layer_norm(tokens, (96,))
    torch.testing.assert_close(encoder(images, (8, 12)), expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="labelnet.pt: is there"):
        miniature.train_labelnet("leaves")
