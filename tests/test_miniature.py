"""The miniature's bookkeeping: tables and verdicts from result files, the README in step with them, and the network whose features it uses."""
import json

import pytest
import torch
import torch.nn.functional as F

import miniature
import repa


def plant(folder, **values):
    """Result files {name: [FD-cifar of seed 0, of seed 1, ...]}."""
    for name, distances in values.items():
        for seed, distance in enumerate(distances):
            numbers = dict(psnr=30.0 + seed, rFD_cifar=3.0, esm=0.05, esm_shape=0.04, alpha=1.5, FD_cifar=distance, SWD_32px=40.0, spectral_KL=0.002)
            (folder / f"{name}-s{seed}.json").write_text(json.dumps(dict(name=name, seed=seed, samples=2000, labelnet_accuracy=0.75,
                                                                         FD_cifar_of_held_out_images=0.5, hardware="a laptop", numbers=numbers)))


def test_the_table_shows_every_run_and_says_what_is_missing(tmp_path, monkeypatch):
    """One row a run with both seeds side by side; runs without results are named as not run."""
    monkeypatch.setattr(miniature, "RESULTS", tmp_path)
    plant(tmp_path, kl=[10.0, 11.0], esm=[8.0, 8.5])
    text = miniature.table()
    assert "| `kl` | 2 | 30.00 / 31.00 | 3.00 / 3.00 |" in text and "| 10.00 / 11.00 |" in text and "| `se` | not run |" in text
    assert "75.0% accuracy" in text and "a laptop" in text


@pytest.mark.parametrize("esm, kl, word", [([8.0, 8.5], [10.0, 11.0], "agreement"), ([10.0, 11.0], [8.0, 8.5], "contradiction"),
                                           ([9.0, 11.0], [10.0, 11.5], "undecided"), ([8.0], [10.0], "one seed, as the paper"), ([], [1.0], "not run")])
def test_the_verdict_follows_the_protocol(esm, kl, word, tmp_path, monkeypatch):
    """The gap of the means must exceed the larger spread between two seeds."""
    monkeypatch.setattr(miniature, "RESULTS", tmp_path)
    plant(tmp_path, kl=kl, esm=esm)
    row = next(line for line in miniature.table().splitlines() if line.startswith("| `esm` better than `kl`"))
    assert word in row


def test_the_readme_shows_the_committed_results():
    """The tables in README.md are what `python miniature.py table` writes from assets/results."""
    if not list(miniature.RESULTS.glob("*.json")):
        pytest.skip("no results yet")
    readme = (miniature.RESULTS.parent.parent / "README.md").read_text()
    begin, end = miniature.MARKS
    assert readme.split(begin)[1].split(end)[0].strip() == miniature.table().strip()


def test_every_run_of_the_plan_appears_in_a_table():
    """No run without a table, no row and no claim without a run."""
    runs = {name for name, _ in miniature.plan()}
    assert sorted(miniature.plan()) == sorted((name, seed) for name in runs for seed in (0, 1))
    assert runs == {name for names in miniature.TABLES.values() for name in names}
    assert {name for claim in miniature.CLAIMS for name in claim} <= runs


def test_labelnet_is_a_target_encoder(tmp_path):
    """The file that miniature.py writes loads as --encoder_source; its tokens are the second stage of the network on the image as it is."""
    net = repa.LabelNet(num_classes=3).eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
    torch.save(dict(model=net.state_dict(), num_classes=3), tmp_path / "labelnet.pt")
    encoder = repa.load_encoder(source=str(tmp_path / "labelnet.pt"))
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = net.stage(images, net.stages[:2]).flatten(2).transpose(1, 2)            # (B, 64, 96)
    torch.testing.assert_close(encoder(images, (8, 8)), F.layer_norm(expected, (96,)), rtol=1e-3, atol=1e-4)
    assert net(images).shape == (2, 3) and net.pooled(images).shape == (2, 192)


def test_a_file_that_is_no_labelnet_is_refused(tmp_path):
    """Missing and foreign files are named."""
    with pytest.raises(FileNotFoundError, match="none.pt"):
        repa.load_encoder(source=str(tmp_path / "none.pt"))
    torch.save(dict(model={}), tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt: not a LabelNet"):
        repa.load_encoder(source=str(tmp_path / "other.pt"))
