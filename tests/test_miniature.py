"""
The miniature's bookkeeping: tables and verdicts from result files, its page in step with them, and
the network whose features it uses.
"""
import json
import math
import pathlib

import pytest
import torch
import torch.nn.functional as F

import evaluate
import repa
import train_ae
import train_diffusion
from experiments import miniature
from vae import AEConfig, AutoencoderKL


def plant(folder, **values):
    """Result files {name: [FD-cifar of seed 0, of seed 1, ...]}."""
    for name, distances in values.items():
        for seed, distance in enumerate(distances):
            numbers = dict(psnr=30.0 + seed, rFD_cifar=3.0, esm=0.05, esm_shape=0.04, alpha=1.5,
                           FD_cifar=distance, SWD_32px=40.0, spectral_KL=0.002)
            result = dict(name=name, seed=seed, samples=2000, labelnet_accuracy=0.75,
                          FD_cifar_of_held_out_images=0.5, hardware="a laptop", numbers=numbers)
            (folder / f"{name}-s{seed}.json").write_text(json.dumps(result))


def test_the_table_shows_every_run_and_says_what_is_missing(tmp_path, monkeypatch):
    """One row a run with both seeds side by side; runs without results are named as not run."""
    monkeypatch.setattr(miniature, "RESULTS", tmp_path)
    plant(tmp_path, kl=[10.0, 11.0], esm=[8.0, 8.5])
    text = miniature.table()
    assert "| `kl` | 30.00 / 31.00 | 3.00 / 3.00 |" in text and "| 10.00 / 11.00 |" in text
    assert "| `se` | not run |" in text
    words = " ".join(text.split())                         # prose is wrapped
    assert "75.0% accuracy" in words and "a laptop" in words


@pytest.mark.parametrize("esm, kl, word", [
    ([8.0, 8.5], [10.0, 11.0], "agreement"), ([10.0, 11.0], [8.0, 8.5], "contradiction"),
    ([9.0, 11.0], [10.0, 11.5], "undecided"), ([8.0], [10.0], "one seed, as the paper"),
    ([], [1.0], "not run")])
def test_the_verdict_follows_the_protocol(esm, kl, word, tmp_path, monkeypatch):
    """The gap of the means must exceed the larger spread between two seeds."""
    monkeypatch.setattr(miniature, "RESULTS", tmp_path)
    plant(tmp_path, kl=kl, esm=esm)
    row, = [line for line in miniature.table().splitlines()
            if line.startswith("| FD-cifar: `esm` below `kl` |")]
    assert word in row


def test_the_page_shows_the_committed_results():
    """The tables in experiments/README.md are what the command `table` writes from its results."""
    if not list(miniature.RESULTS.glob("*.json")):
        pytest.skip("no results yet")
    page = (miniature.HERE / "README.md").read_text()
    begin, end = miniature.MARKS
    assert page.split(begin)[1].split(end)[0].strip() == miniature.table().strip()


def test_the_tables_go_between_their_marks(tmp_path, monkeypatch):
    """What stands before and after them stays; a second time changes nothing."""
    begin, end = miniature.MARKS
    monkeypatch.setattr(miniature, "HERE", tmp_path)
    page = tmp_path / "README.md"
    page.write_text(f"before\n\n{begin}\nold\n{end}\n\nafter\n")
    for _ in range(2):
        miniature.write_readme("new")
        assert page.read_text() == f"before\n\n{begin}\nnew\n{end}\n\nafter\n"


def test_every_run_of_the_plan_appears_in_a_table():
    """No run without a table, no row and no claim without a run; each run with each seed, once."""
    names = {name for rows in miniature.TABLES.values() for name in rows}
    every = [(name, seed) for name in names for seed in miniature.SEEDS]
    assert sorted(miniature.plan()) == sorted(every)
    assert {name for _, *claim in miniature.CLAIMS for name in claim} <= names
    assert {key for key, *_ in miniature.CLAIMS} <= miniature.COLUMNS.keys()


@pytest.mark.parametrize("name", sorted({name for name, _ in miniature.plan()}))
def test_the_commands_are_understood(name, monkeypatch):
    """Each script takes its flags, and finds what the command before it leaves."""
    parsed = []
    commands = miniature.commands(name, 1, "cifar10", pathlib.Path("out/m"))
    for command, module in zip(commands, (train_ae, train_diffusion, evaluate)):
        monkeypatch.setattr("sys.argv", command)
        parsed.append(module.get_args())
    ae, sit, gen = parsed
    assert sit.ae == f"{ae.out}/ckpt.pt" and gen.ckpt == f"{sit.out}/ckpt.pt"
    assert (ae.seed, sit.seed) == (1, 1)
    assert (ae.steps, sit.steps) == (miniature.AE_STEPS, miniature.SIT_STEPS)


@pytest.fixture
def called(monkeypatch):
    """The commands of miniature.run_one, which are not run; called.code: how each one ends."""
    class Calls(list):
        code = 0

    def run(command, **options):
        calls.append(command)
        return miniature.subprocess.CompletedProcess(command, calls.code)
    calls = Calls()
    monkeypatch.setattr(miniature.subprocess, "run", run)
    return calls


@pytest.mark.parametrize("code", [0, 2])
def test_a_run_that_was_stopped_is_no_result(code, called, tmp_path):
    """A signal ends a training script early with code 0: no next stage, whatever the code."""
    called.code = code
    with pytest.raises(ValueError, match="train_ae.py did not reach its end"):
        miniature.run_one("kl", 0, "cifar10", tmp_path)
    assert len(called) == 1


def test_a_run_of_other_commands_is_refused(called, tmp_path):
    """What lies in the folder of another protocol is not taken for a result of this one."""
    note = tmp_path / "diffusion" / "kl-s0" / "commands.txt"
    note.parent.mkdir(parents=True)
    note.write_text("python train_ae.py --steps 1\n")
    with pytest.raises(ValueError, match="made by other commands"):
        miniature.run_one("kl", 0, "cifar10", tmp_path)
    assert not called


def test_the_project_is_found_from_any_folder(called, tmp_path, monkeypatch):
    """Scripts and LabelNet by their full paths; the recorded commands name them from the root."""
    steps = dict(ae=miniature.AE_STEPS, diffusion=miniature.SIT_STEPS)
    reached = lambda folder, stage: steps[stage] * any(str(folder) in words for words in called)
    monkeypatch.setattr(miniature, "trained", reached)
    monkeypatch.chdir(tmp_path)
    miniature.run_one("kl-dog", 0, "cifar10", pathlib.Path("out"))
    assert [pathlib.Path(words[1]).name for words in called] == [
        "train_ae.py", "train_diffusion.py", "evaluate.py"]
    train_diffusion_words = called[1]
    source = train_diffusion_words[train_diffusion_words.index("--encoder_source") + 1]
    for path in [source, *(words[1] for words in called)]:
        assert pathlib.Path(path).is_absolute() and pathlib.Path(path).is_file()
    recorded = pathlib.Path("out/diffusion/kl-dog-s0/commands.txt").read_text()
    assert "--encoder_source experiments/labelnet.pt" in recorded
    assert recorded.startswith("python train_ae.py ") and str(miniature.ROOT) not in recorded


def test_divergence_without_the_scale():
    """
    Latents three times as large have another ESM divergence, and the same one at their best scale:
    diffusion sees no scale.
    """
    ae = AutoencoderKL(AEConfig(ch=8, ch_mult=(1, 2), latent_channels=2, num_res_blocks=1,
                                norm_groups=2))
    images = F.interpolate(torch.randn(4, 3, 8, 12), scale_factor=2, mode="bilinear")
    latents = miniature.encode_all(ae, images, 4, seed=0).transpose(0, 1).flatten(1)  # (C, B*h*w)
    mean, std = latents.mean(1), latents.std(1)
    ae.set_latent_stats(mean, std)
    before = miniature.divergences(ae, images)
    with torch.no_grad():
        ae.quant_conv.weight[:2] *= 3
        ae.quant_conv.bias[:2] *= 3
        ae.quant_conv.bias[2:] += 2 * math.log(3)          # the posterior's noise, too
    ae.set_latent_stats(3 * mean, 3 * std)
    after = miniature.divergences(ae, images)
    assert abs(after[0] - before[0]) > 1e-3 and after[1] == pytest.approx(before[1], rel=1e-4)


def test_the_network_of_fd_cifar_is_part_of_the_project():
    """experiments/labelnet.pt loads as a target encoder and knows its accuracy."""
    assert torch.load(miniature.LABELNET, weights_only=True)["accuracy"] > 0.8
    encoder = repa.load_encoder(source=str(miniature.LABELNET))
    assert encoder(torch.zeros(1, 3, 32, 32), (8, 8)).shape == (1, 64, 96)


def test_labelnet_is_a_target_encoder(tmp_path):
    """
    The file that miniature.py writes loads as --encoder_source; its tokens are the second stage of
    the network on the image as it is.
    """
    net = repa.LabelNet(num_classes=3).eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
    torch.save(dict(model=net.state_dict(), num_classes=3), tmp_path / "labelnet.pt")
    encoder = repa.load_encoder(source=str(tmp_path / "labelnet.pt"))
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = net.stage(images, net.stages[:2]).flatten(2).transpose(1, 2)  # (B, 64, 96)
    expected = F.layer_norm(expected, (96,))
    torch.testing.assert_close(encoder(images, (8, 8)), expected, rtol=1e-3, atol=1e-4)
    assert net(images).shape == (2, 3) and net.pooled(images).shape == (2, 192)


def test_a_file_that_is_no_labelnet_is_refused(tmp_path):
    """Missing and foreign files are named."""
    with pytest.raises(FileNotFoundError, match="none.pt"):
        repa.load_encoder(source=str(tmp_path / "none.pt"))
    torch.save(dict(model={}), tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt: not a LabelNet"):
        repa.load_encoder(source=str(tmp_path / "other.pt"))
