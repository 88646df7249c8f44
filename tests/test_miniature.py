"""
The miniature's bookkeeping: tables and verdicts from result files, its page in step with them, and
the network whose features it uses.
"""
import json
import pathlib
import re

import pytest
import torch
import torch.nn.functional as F

import evaluate
import train_ae
import train_diffusion
from experiments import miniature, protocol, report
from experiments.labelnet import LabelNet
from repa import Encoder, load_encoder
from spectral import dct2, match_resolution, radial_profile
from vae import AEConfig, AutoencoderKL


def plant(folder, **values):
    """Result files {name: [FD-cifar of seed 0, of seed 1, ...]}."""
    for name, distances in values.items():
        for seed, distance in enumerate(distances):
            numbers = dict(psnr=30.0 + seed, rFD_cifar=3.0, esm=0.05, esm_shape=0.04, alpha=1.5,
                           kl_from_target=0.03, FD_cifar=distance, dFD_cifar=distance / 2,
                           SWD_32px=40.0, spectral_KL=0.002, neighbours=0.1 * distance,
                           high_band=-distance, dsm=20.0 + seed)
            result = dict(name=name, seed=seed, samples=2000, reference=10_000,
                          labelnet_accuracy=0.75, FD_cifar_of_held_out_images=0.5,
                          hardware="a laptop", numbers=numbers)
            (folder / f"{name}-s{seed}.json").write_text(json.dumps(result))


def test_the_table_shows_every_run_and_says_what_is_missing(tmp_path, monkeypatch):
    """One row a run with both seeds side by side; runs without results are named as not run."""
    monkeypatch.setattr(protocol, "RESULTS", tmp_path)
    plant(tmp_path, kl=[10.0, 11.0], esm=[8.0, 8.5])
    text = report.table()
    assert "| `kl` | 30.00 / 31.00 | 1.50 / 1.50 |" in text and "| 10.00 / 11.00 |" in text
    assert "| `se` | not run |" in text
    words = " ".join(text.split())                         # prose is wrapped
    assert "75.0% accuracy" in words and "a laptop" in words


@pytest.mark.parametrize("esm, kl, word", [
    ([8.0, 8.5], [10.0, 11.0], "agreement"), ([10.0, 11.0], [8.0, 8.5], "contradiction"),
    ([9.0, 11.0], [10.0, 11.5], "undecided"), ([8.0], [10.0], ", one seed"),
    ([], [1.0], "not run")])
def test_the_verdict_follows_the_protocol(esm, kl, word, tmp_path, monkeypatch):
    """The gap of the means must exceed the larger spread between two seeds; by FD and by dFD."""
    monkeypatch.setattr(protocol, "RESULTS", tmp_path)
    plant(tmp_path, kl=kl, esm=esm)
    row, = [line for line in report.table().splitlines()
            if line.endswith("| FD and dFD: `esm` below `kl` |")]
    assert row.count(word) == 2 and "| FD: " in row and "<br>dFD: " in row


@pytest.mark.parametrize("a, b, word", [
    ([31.0, 31.3], [30.0, 30.1], "agreement: gap +1.10"),
    ([30.0, 30.1], [31.0, 31.3], "**contradiction**: gap -1.10"),
    ([30.0, 31.5], [31.0, 31.0], "undecided: gap -0.25"),
    ([31.0], [30.0], "undecided: gap +1.00, one seed"), ([], [30.0], "not run")])
def test_above_is_below_the_other_way_round(a, b, word):
    """PSNR: more is better. One rule for both orders, and the sign of the gap is the claim's."""
    results = {(name, seed): dict(numbers=dict(psnr=psnr))
               for name, values in dict(esm=a, kl=b).items() for seed, psnr in enumerate(values)}
    above = report.verdict(results, "psnr", "esm", "above", "kl")
    assert above.startswith(word)
    assert report.verdict(results, "psnr", "kl", "below", "esm") == above


@pytest.mark.parametrize("seeds, percent", [(2, 21), (3, 5)])
def test_how_often_the_rule_decides_by_chance(seeds, percent):
    """Two equal methods with normal seeds: the percentages of the page, by Monte Carlo."""
    torch.manual_seed(0)
    decided, trials = 0, 4000
    for a, b in torch.randn(trials, 2, seeds).tolist():
        results = {(name, seed): dict(numbers=dict(psnr=value)) for name, values in
                   (("esm", a), ("kl", b)) for seed, value in enumerate(values)}
        decided += not report.verdict(results, "psnr", "esm", "above", "kl").startswith("undecided")
    assert 100 * decided / trials == pytest.approx(percent, abs=1.5)
    assert re.search(rf"in {percent} (of 100 cases )?with {'two' if seeds == 2 else 'three'}",
                     " ".join((protocol.HERE / "README.md").read_text().split()))


def claims(lists):
    """[where, words, numbers here, run, order, run] of PAPER_CLAIMS or OUR_CLAIMS, flat."""
    return [(where, words, keys, a, order, b)
            for where, keys, order, group in lists for words, a, b in group]


# Tables 2 (f8d4 and f16d16), 3, 4 (cfg 1.8 and none), 7 and 8, and the divergences of Figs. 4 and 5
SCORES = {
    "Table 2, gFID": dict(kl="6.63 6.88", se="5.87 5.46", esm="5.91 5.84", dsm="4.44 4.49"),
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


def test_what_the_paper_says_is_in_its_tables():
    """Each number of a claim belongs to its run in the paper, and they are in the claimed order."""
    for where, words, _, a, order, b in claims(protocol.PAPER_CLAIMS):
        if where.startswith("Fig. 3"):                     # an image, no numbers
            continue
        where, a, b = where.split(", here")[0], *(name.removesuffix("-long") for name in (a, b))
        pairs = re.findall(r"(\d*\.\d+) ([<>]) (\d*\.\d+)", words)
        of_a, of_b = (SCORES[where][name].split() for name in (a, b))
        assert pairs == [(x, "<" if order == "below" else ">", y) for x, y in zip(of_a, of_b)]
        for x, sign, y in pairs:
            assert float(x) < float(y) if sign == "<" else float(x) > float(y)


def test_every_number_of_the_papers_tables_is_in_a_claim():
    """Table 7 on both axes, Table 8's four sets, Table 3 with and without REPA: all is there."""
    for where, scores in SCORES.items():
        here = {name for at, _, _, a, _, b in claims(protocol.PAPER_CLAIMS) if at == where
                for name in (a, b)}
        assert here == set(scores)


def test_what_the_paper_does_not_have_is_ours():
    """EQ-VAE, KL at 1e-6 and ESM at weight 1 stand in no claim of the paper's."""
    extra = {"eq", "kl-1e-6", "esm-w1"}
    runs_of = lambda lists: {name for _, _, _, a, _, b in claims(lists) for name in (a, b)}
    assert not extra & runs_of(protocol.PAPER_CLAIMS) and extra <= runs_of(protocol.OUR_CLAIMS)
    paper, own = report.table().split("| the paper says |")[1].split("| ours |")
    assert "esm-w1" not in paper and "`esm-w1` below `kl`" in own


def test_the_page_counts_the_runs():
    """What `run` trains, and how much of it we have."""
    page = " ".join((protocol.HERE / "README.md").read_text().split())
    models, have = {name for name, _ in protocol.plan()}, list(protocol.RESULTS.glob("*.json"))
    assert (f"`run` trains {len(protocol.AUTOENCODERS)} autoencoders and {len(models)} diffusion "
            "models. Those of Table 2 have three seeds each, the others two: "
            f"{len(protocol.plan())} runs in all") in page
    assert f"Of these we have made {len(have)}." in page


def test_the_page_shows_the_committed_results():
    """The tables in experiments/README.md are what the command `table` writes from its results."""
    if not list(protocol.RESULTS.glob("*.json")):
        pytest.skip("no results yet")
    page = (protocol.HERE / "README.md").read_text()
    begin, end = report.MARKS
    assert page.split(begin)[1].split(end)[0].strip() == report.table().strip()


def test_the_tables_go_between_their_marks(tmp_path, monkeypatch):
    """What stands before and after them stays; a second time changes nothing."""
    begin, end = report.MARKS
    monkeypatch.setattr(protocol, "HERE", tmp_path)
    page = tmp_path / "README.md"
    page.write_text(f"before\n\n{begin}\nold\n{end}\n\nafter\n")
    for _ in range(2):
        report.write_readme("new")
        assert page.read_text() == f"before\n\n{begin}\nnew\n{end}\n\nafter\n"


def test_every_run_of_the_plan_appears_in_a_table():
    """
    No run without a table, no row and no claim without a run; each run with each of its seeds,
    once: three in Table 2 at both lengths, else two.
    """
    names = {name for rows in protocol.TABLES.values() for name in rows}
    every = [(name, seed) for name in names for seed in protocol.SEEDS[
        :3 if name.removesuffix("-long") in protocol.TABLES["Table 2"] else 2]]
    assert sorted(protocol.plan()) == sorted(every)
    for _, _, keys, a, order, b in claims(protocol.PAPER_CLAIMS + protocol.OUR_CLAIMS):
        assert {a, b} <= names and order in ("below", "above")
        assert keys and all(key in report.COLUMNS for key in keys)


@pytest.mark.parametrize("name", sorted({name for name, _ in protocol.plan()}))
def test_the_commands_are_understood(name, monkeypatch):
    """Each script takes its flags, and finds what the command before it leaves."""
    parsed = []
    commands = miniature.commands(name, 1, "cifar10", pathlib.Path("out/m"))
    for command, module in zip(commands, (train_ae, train_diffusion, evaluate)):
        monkeypatch.setattr("sys.argv", command)
        parsed.append(module.get_args())
    ae, sit, gen = parsed
    assert sit.ae == f"{ae.out}/ckpt.pt" and f"{sit.out}/ckpt.pt" in gen.ckpt
    assert (ae.seed, sit.seed) == (1, 1)
    assert (ae.steps, sit.steps) == (protocol.AE_STEPS, protocol.sit_steps(name))


def test_a_folders_name_may_hold_spaces(called, tmp_path, monkeypatch):
    """--data and --out reach the scripts as one word each; the note can go back into a shell."""
    out = tmp_path / "my runs"
    for command, module in zip(miniature.commands("kl", 0, "my folder", out),
                               (train_ae, train_diffusion, evaluate)):
        monkeypatch.setattr("sys.argv", command)
        args = module.get_args()
        if module is train_ae:
            assert args.data == "my folder" and args.out == str(out / "ae" / "kl-s0")
    with pytest.raises(ValueError, match="did not reach its end"):
        miniature.run_one("kl", 0, "my folder", out)
    assert "my folder" in called[0]
    assert "--data 'my folder' " in (out / "diffusion" / "kl-s0" / "commands.txt").read_text()


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
    """A signal ends a training script early with code 0: no next stage, whatever the code."""
    called.code = code
    with pytest.raises(ValueError, match="train_ae.py did not reach its end"):
        miniature.run_one("kl", 0, "cifar10", tmp_path)
    assert len(called) == 1


@pytest.mark.parametrize("folder, file", [
    ("diffusion/kl-s0", "commands.txt"), ("ae/kl-s0", "commands.txt"), ("ae/kl-s0", "ckpt.pt")])
def test_a_run_of_other_commands_is_refused(folder, file, called, tmp_path):
    """What lies in the folder of another protocol is not taken for a result of this one."""
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / file).write_text("python train_ae.py --steps 1\n")
    with pytest.raises(ValueError, match="kl-s0: was made by other commands"):
        miniature.run_one("kl", 0, "cifar10", tmp_path)
    assert not called


def test_the_project_is_found_from_any_folder(called, tmp_path, monkeypatch):
    """Scripts and LabelNet by their full paths; the recorded commands name them from the root."""
    steps = dict(ae=protocol.AE_STEPS, diffusion=protocol.SIT_STEPS)
    reached = lambda folder, stage: steps[stage] * any(str(folder) in words for words in called)
    monkeypatch.setattr(miniature, "trained", reached)
    monkeypatch.chdir(tmp_path)
    miniature.run_one("kl-dog", 0, "cifar10", pathlib.Path("out"))
    assert [pathlib.Path(words[1]).name for words in called] == [
        "train_ae.py", "train_diffusion.py", "evaluate.py"]
    source = called[1][called[1].index("--encoder_source") + 1]
    for path in [f"{source}/hubconf.py", *(words[1] for words in called)]:
        assert pathlib.Path(path).is_absolute() and pathlib.Path(path).is_file()
    recorded = pathlib.Path("out/diffusion/kl-dog-s0/commands.txt").read_text()
    assert "--encoder labelnet --encoder_source experiments" in recorded
    assert recorded.startswith("python train_ae.py ") and str(miniature.ROOT) not in recorded


def test_the_form_of_the_papers_figures():
    """KL from the target, DC kept: as `evaluate.py spectrum --published` prints it."""
    torch.manual_seed(0)
    ae = AutoencoderKL(AEConfig(ch=8, ch_mult=(1, 2), latent_channels=2, num_res_blocks=1,
                                norm_groups=2))
    images = F.interpolate(torch.randn(4, 3, 8, 12), scale_factor=4, mode="bilinear")
    latents = miniature.encode_all(ae, images, 100, seed=0)
    P = dct2(match_resolution(images, (16, 24))).square().mean(1)       # (4, 16, 24), with DC
    ring = torch.arange(1.0, 17)
    target = torch.log1p(radial_profile(P) * ring)
    target = (target / target.sum(1, keepdim=True)).mean(0)
    got = torch.log1p(radial_profile(dct2(latents).square().mean(1)))
    got = (got / got.sum(1, keepdim=True)).mean(0)
    expected = (target * (target / got).log()).sum()
    assert miniature.kl_from_target(ae, images) == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_the_scatter_ranks(tmp_path, monkeypatch, capsys):
    """Rank correlation of each predictor with dFD, over the runs without alignment, by length."""
    (tmp_path / "figures").mkdir()
    monkeypatch.setattr(protocol, "RESULTS", tmp_path)
    monkeypatch.setattr(protocol, "HERE", tmp_path)
    with pytest.raises(FileNotFoundError, match="three runs"):
        report.scatter()
    plant(tmp_path, **{"kl": [10.0, 11.0], "esm": [8.0, 8.5], "kl-dog": [1.0],
                       "kl-long": [9.0, 1.0], "esm-long": [5.0]})
    report.scatter()
    printed = capsys.readouterr().out
    assert "neighbours: rank correlation +1.00 with dFD, 4 runs of 2,000 steps" in printed
    assert "high_band: rank correlation -1.00 with dFD, 4 runs of 2,000 steps" in printed
    assert "neighbours: rank correlation +1.00 with dFD, 3 runs of 8,000 steps" in printed
    assert (tmp_path / "figures" / "scatter.png").exists()


def test_the_network_of_fd_cifar_is_part_of_the_project():
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
