"""
Figures and commands of evaluate.py, on small material and with random Inception weights in place of
the real ones.
"""
import csv
import json
import shutil
import urllib.error
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import dit
import evaluate
import spectral
import train_diffusion
from analysis import fid, figures, published, samples
from analysis.figures import pca_rgb, unique_names
from common import run
from common.data import ImageSet, open_data, open_source
from common.metrics import jpeg_round_trip, ssim, to_uint8
from common.weights import load_autoencoder, load_diffusion
from conftest import run_main
from test_train_diffusion import flags_of


def results(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("channels", [1, 2, 4, 16])
def test_pca_rgb_shows_the_strongest_direction_first(channels):
    """Red carries the direction of largest variance, whatever the channel count; H != W."""
    u, v = torch.arange(6.0), torch.arange(9.0)
    pattern = (u[:, None] * 0.7 + v).sin()
    latents = 0.01 * torch.randn(2, channels, 6, 9)
    latents[:, -1] += pattern
    rgb = pca_rgb(latents)
    assert rgb.shape == (2, 3, 6, 9) and rgb.min() >= 0 and rgb.max() <= 1
    correlation = torch.corrcoef(torch.stack([rgb[0, 0].flatten(), pattern.flatten()]))[0, 1]
    assert correlation.abs() > 0.99


def flags(material, tmp_path, *more):
    return ["--ae", material / "ae" / "ckpt.pt", "--val_images", 1, "--batch_size", 2,
            "--device", "cpu", "--results", tmp_path / "results.jsonl", *more]


def test_spectrum_writes_figure_and_csv(material, tmp_path, monkeypatch):
    """16 rings for images, target and each of two autoencoders; shares sum to 1."""
    ae = material / "ae" / "ckpt.pt"
    more = ["--ae", ae, ae, "--out", tmp_path / "s.png"]
    run_main(evaluate, "spectrum", *flags(material, tmp_path, *more), monkeypatch=monkeypatch)
    with open(tmp_path / "s.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["curve"] for row in rows} == {"images", "target, gamma 1", "ae"}
    assert len(rows) == 4 * 16
    assert sum(float(row["share"]) for row in rows) == pytest.approx(4, rel=1e-4)
    assert len(results(tmp_path)) == 2 and (tmp_path / "s.png").stat().st_size > 5000


def test_bands_and_latents_draw(material, tmp_path, monkeypatch):
    """Both commands write their figure; bands reports a PSNR per mask."""
    for command in ("bands", "latents"):
        out = tmp_path / f"{command}.png"
        run_main(evaluate, command, *flags(material, tmp_path, "--out", out), monkeypatch=monkeypatch)
        assert out.stat().st_size > 3000
    assert {"psnr_n0", "psnr_n8", "psnr_n10", "psnr_n12"} <= results(tmp_path)[0].keys()


@pytest.mark.filterwarnings("ignore:.*untrained")
def test_similarity_and_feature_spectrum(material, tmp_path, monkeypatch):
    """Figs. 6 and 7 with the untrained encoder: figures, RMSC per target, the features' curve."""
    common = ["--encoder_source", "random", "--device", "cpu", "--val_images", 1,
              "--results", tmp_path / "results.jsonl"]
    run_main(evaluate, "similarity", *common, "--image_size", 56, "--data", material / "images",
        "--out", tmp_path / "f.png", monkeypatch=monkeypatch)
    result, = results(tmp_path)
    assert {"rmsc_none", "rmsc_spnorm", "rmsc_dog"} <= result.keys()
    assert (tmp_path / "f.png").stat().st_size > 3000
    run_main(evaluate, "spectrum", *common, "--ae", material / "ae" / "ckpt.pt",
        "--encoder", "dinov2_vitb14", "--out", tmp_path / "s.png", monkeypatch=monkeypatch)
    lines = (tmp_path / "s.csv").read_text().splitlines()
    assert any(line.startswith("random encoder,") for line in lines)


@pytest.mark.filterwarnings("ignore:.*untrained")
def test_similarity_of_one_file_and_features_without_an_autoencoder(
        material, tmp_path, monkeypatch):
    """--image takes one file; spectrum --encoder needs no autoencoder."""
    monkeypatch.chdir(tmp_path)                        # no out/ae here
    common = ["--encoder_source", "random", "--device", "cpu"]
    image = sorted((material / "images").glob("*/*.png"))[0]
    run_main(evaluate, "similarity", *common, "--image_size", 56, "--image", image,
        monkeypatch=monkeypatch)
    assert results(tmp_path)[0]["n"] == 1
    run_main(evaluate, "spectrum", *common, "--encoder", "dinov2_vitb14", "--data", material / "images",
        "--image_size", 64, "--val_images", 1, monkeypatch=monkeypatch)
    assert (tmp_path / "out" / "spectrum.csv").read_text().count("random encoder") == 16
    with pytest.raises(ValueError, match="--image nowhere.png: No such file"):
        run_main(evaluate, "similarity", *common, "--image", "nowhere.png", monkeypatch=monkeypatch)


def test_recon_counts_every_image(material, tmp_path, monkeypatch, inception_home, capsys):
    """
    PSNR, SSIM, L1 and rFID of 7 images in batches of 2; without VGG weights no LPIPS, and no advice
    to take a flag of train_ae.py.
    """
    monkeypatch.setenv("TORCH_HOME", str(inception_home))
    monkeypatch.setattr(torch.hub, "urlopen", offline)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train").symlink_to(material / "images")
    (tmp_path / "set" / "val").symlink_to(material / "images")
    more = ["--data", tmp_path / "set", "--val_images", 7, "--workers", 0]
    run_main(evaluate, "recon", *flags(material, tmp_path, *more), monkeypatch=monkeypatch)
    result, = results(tmp_path)
    assert {"psnr", "ssim", "l1", "rFID@7"} <= result.keys() and "lpips" not in result
    assert result["n"] == 7
    said = capsys.readouterr().out
    assert "recon goes on without LPIPS" in said and "--lpips_weight" not in said
    assert result["rFID@7"] > 0 and 5 < result["psnr"] < 40


def offline(*args, **kwargs):
    raise urllib.error.URLError("no network")


def test_fid_of_folder_npz_and_statistics(material, tmp_path, monkeypatch, inception_home):
    """
    The same pictures as a folder and as an npz of images: 0. Statistics files need no network at
    all: the closed form.
    """
    monkeypatch.setenv("TORCH_HOME", str(inception_home))
    pictures = []
    for i, name in enumerate(sorted((material / "images").glob("*/*.png"))):
        folder = tmp_path / f"{i}"
        folder.mkdir()
        (folder / name.name).symlink_to(name)
        source = open_source(str(folder))
        one = ImageSet("", source, np.arange(1), np.zeros(1), [], 16)
        pictures.append(np.asarray(one[0][0]).transpose(1, 2, 0))
    np.savez(tmp_path / "images.npz", arr_0=np.stack(pictures))
    common = ["--image_size", 16, "--batch_size", 5, "--device", "cpu",
              "--results", tmp_path / "results.jsonl"]
    run_main(evaluate, "fid", material / "images", tmp_path / "images.npz", *common,
        monkeypatch=monkeypatch)
    assert results(tmp_path)[0]["FID@12"] == pytest.approx(0, abs=1e-3)
    monkeypatch.setattr(evaluate, "load_inception", lambda device: pytest.fail("no network"))
    for name, mean in (("a", 0.0), ("b", 2.0)):
        np.savez(tmp_path / f"{name}.npz", mu=np.full(3, mean), sigma=np.eye(3))
    run_main(evaluate, "fid", tmp_path / "a.npz", tmp_path / "b.npz", *common,
        monkeypatch=monkeypatch)
    assert results(tmp_path)[1]["FID"] == pytest.approx(12.0)


def test_gen_with_inception_weights(material, tmp_path, monkeypatch, inception_home):
    """
    FID, IS, KID, precision and recall come out of the real path; the reference statistics are
    reused, and refused when changed.
    """
    monkeypatch.chdir(tmp_path)                        # out/reference belongs to this test
    monkeypatch.setenv("TORCH_HOME", str(inception_home))
    run_main(train_diffusion, *flags_of(material, tmp_path / "run", "--steps", 1),
        monkeypatch=monkeypatch)
    gen = ["gen", "--ckpt", tmp_path / "run" / "ckpt.pt", "--num_samples", 6, "--steps", 2,
           "--batch_size", 4, "--workers", 0, "--device", "cpu"]
    run_main(evaluate, *gen, monkeypatch=monkeypatch)
    run_main(evaluate, *gen, monkeypatch=monkeypatch)
    first, second = results(tmp_path)
    assert {"FID@6", "IS", "KID_x1e3_subset6", "precision", "recall"} <= first.keys()
    assert first["FID@6"] > 0
    assert first["FID@6"] == second["FID@6"] and first["weights"] == "torch-fidelity"
    reference, = (tmp_path / "out" / "reference").iterdir()
    stored = dict(np.load(reference))
    how = dict(json.loads(str(stored["how"])), size=99)
    np.savez(reference, **dict(stored, how=json.dumps(how)))
    with pytest.raises(ValueError, match="remove the file"):
        run_main(evaluate, *gen, monkeypatch=monkeypatch)


@pytest.mark.parametrize("command, culprit", [
    (["fid", "nowhere", "nowhere"], "nowhere: no such folder"),
    (["recon", "--ae", "nowhere.pt"], "nowhere.pt"),
    (["gen", "--ckpt", "nowhere.pt"], "nowhere.pt"),
    (["gen", "--num_samples", "0"], "--num_samples 0"),
    (["spectrum"], "--ae"),
    (["fid", __file__, "cifar10"], "neither a folder nor a .zip")])
def test_bad_flags_end_with_one_line(command, culprit, tmp_path, monkeypatch, capsys):
    """Exit code 2 and one line with the culprit."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit, run.one_line_errors():
        run_main(evaluate, *command, "--device", "cpu", monkeypatch=monkeypatch)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and culprit in error and error.count("\n") == 1


# ---- what people bring to fid

def pictures(folder, count, side=24, seed=0):
    """`count` random pictures of side x side in a folder of PNGs and in folder.npz."""
    images = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:02}.png")
    np.savez(f"{folder}.npz", arr_0=images)
    return images


def test_fid_meets_at_the_size_of_the_npz(tmp_path, monkeypatch, inception_home):
    """A folder and an npz of the same pictures, no --image_size: exactly 0, at their own size."""
    monkeypatch.setenv("TORCH_HOME", str(inception_home))
    pictures(tmp_path / "a", 6)
    run_main(evaluate, "fid", tmp_path / "a", tmp_path / "a.npz", "--device", "cpu", "--results",
        tmp_path / "results.jsonl", monkeypatch=monkeypatch)
    result, = results(tmp_path)
    assert result["FID@6"] == 0.0 and result["size"] == 24
    assert result["n_a"] == result["n_b"] == 6


def test_where_two_sets_meet(tmp_path, capsys):
    """--image_size, else the npz's, else the pictures' common shorter side, else 256 and a line."""
    for name, side in (("a", 24), ("b", 24), ("c", 40)):
        pictures(tmp_path / name, 3, side)
    Image.new("RGB", (33, 24)).save(tmp_path / "b" / "wide.png")
    np.savez(tmp_path / "plain.npz", mu=np.zeros(3), sigma=np.eye(3))
    how = json.dumps(dict(size=64))
    np.savez(tmp_path / "kept.npz", mu=np.zeros(3), sigma=np.eye(3), how=how)
    side = lambda *names, asked=None: fid.meeting_side(
        [fid.open_set(str(tmp_path / name)) for name in names], asked)
    assert side("a", "b") == side("a", "plain.npz") == 24
    assert side("a", "c.npz") == 40 and side("kept.npz", "c") == 64
    assert side("a", "c.npz", asked=32) == 32 and side("plain.npz", "plain.npz") is None
    assert "no common size" not in capsys.readouterr().out
    assert side("a", "c") == side("a.npz", "c.npz") == 256
    assert capsys.readouterr().out.count("no common size and are compared at 256 px") == 2
    with pytest.raises(ValueError, match="kept.npz: statistics of images of 64 px, not of 40"):
        side("kept.npz", "c", asked=40)


@pytest.mark.parametrize("name, content, words", [
    ("x.npy", b"", "x.npy: neither a folder nor a .zip nor an .npz; give a folder or .zip of"),
    ("x.zip", b"", "x.zip: not a readable zip"),
    ("x", None, "x: no images in it")])
def test_fid_names_its_argument(name, content, words, tmp_path, monkeypatch):
    """No line blames a flag that nobody gave."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        run_main(evaluate, "fid", name, name, "--device", "cpu", monkeypatch=monkeypatch)
    assert str(error.value).startswith(words) and "--data" not in str(error.value)


# ---- labels

def test_names_in_legends_are_unique(tmp_path):
    """As much of the path as is needed; v1.5 is no file with an ending."""
    names = lambda *paths: unique_names([tmp_path / path for path in paths], taken=("image",))
    assert names("A/ckpt_4.pt", "B/ckpt_4.pt", "C/ckpt.pt") == ["A/ckpt_4", "B/ckpt_4", "C"]
    assert names("A/vae", "B/vae", "v1.0", "v1.5") == ["A/vae", "B/vae", "v1.0", "v1.5"]
    assert names("x/A/ckpt.pt", "y/A/ckpt.pt", "y/A/ckpt.pt") == ["x/A", "y/A", "y/A"]
    assert names("x.pt", "x.ckpt") == ["x.pt", "x.ckpt"]
    assert names("A/image.pt") == ["A/image"]


def test_two_autoencoders_of_one_file_name(material, tmp_path, monkeypatch):
    """A row each in latents, a name each in the CSV of spectrum."""
    for name in "AB":
        (tmp_path / name).mkdir()
        shutil.copy(material / "ae" / "ckpt.pt", tmp_path / name / "ckpt_4.pt")
    drawn = []
    monkeypatch.setattr(figures, "figure_rows", lambda rows, path: drawn.extend(rows))
    more = ["--ae", tmp_path / "A" / "ckpt_4.pt", tmp_path / "B" / "ckpt_4.pt", "--out",
            tmp_path / "x.png"]
    for command in ("latents", "spectrum"):
        run_main(evaluate, command, *flags(material, tmp_path, *more), monkeypatch=monkeypatch)
    assert drawn == ["image", "A/ckpt_4", "B/ckpt_4"]
    with open(tmp_path / "x.csv") as file:
        curves = Counter(row["curve"] for row in csv.DictReader(file))
    assert curves == dict.fromkeys(["images", "target, gamma 1", "A/ckpt_4", "B/ckpt_4"], 16)


# ---- gen

@pytest.fixture(scope="module")
def diffusion(material, tmp_path_factory):
    """A run of 4 steps that kept ckpt_0.pt, ckpt_2.pt and ckpt_4.pt."""
    out = tmp_path_factory.mktemp("diffusion") / "run"
    kept = ["--steps", 4, "--eval_every", 2, "--keep_every", 2]
    with pytest.MonkeyPatch.context() as patch:
        run_main(train_diffusion, *flags_of(material, out, *kept), monkeypatch=patch)
    return out


@pytest.fixture
def gen(diffusion, tmp_path, monkeypatch):
    """gen(*flags) samples into tmp_path/out, without Inception weights; returns its results."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", offline)

    def gen(*flags, count=3):
        (tmp_path / "results.jsonl").unlink(missing_ok=True)
        run_main(evaluate, "gen", "--ckpt", diffusion / "ckpt.pt", "--num_samples", count, "--steps", 2,
            "--batch_size", 2, "--workers", 0, "--device", "cpu", "--out", tmp_path / "out",
            "--results", tmp_path / "results.jsonl", *flags, monkeypatch=monkeypatch)
        return results(tmp_path)
    return gen


def saved(folder):
    return np.load(folder / "samples.npz")["arr_0"]


def test_a_folder_holds_one_sampling(gen, tmp_path, monkeypatch):
    """5 pictures, then 2: 2 are left, and what else lay there; a sampling that fails takes none."""
    names = lambda: sorted(path.name for path in (tmp_path / "out" / "images").glob("*"))
    gen("--folder", count=5)
    for name in ("7.png", "notes.txt"):
        (tmp_path / "out" / "images" / name).write_text("mine")
    assert len(names()) == 7
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "sample_images", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            gen("--folder", count=2)
    assert len(names()) == 7 and len(saved(tmp_path / "out")) == 5
    gen("--folder", count=2)
    assert names() == ["000000.png", "000001.png", "7.png", "notes.txt"]
    first = np.asarray(Image.open(tmp_path / "out" / "images" / "000001.png"))
    assert np.array_equal(first, saved(tmp_path / "out")[1])
    gen(count=3)
    assert names() == ["7.png", "notes.txt"]
    assert not (tmp_path / "out" / ".images").exists()


def test_gen_without_the_training_images(gen, diffusion, tmp_path, capsys):
    """Samples, and a line instead of metrics; but a --data that is given must be there."""
    checkpoint = torch.load(diffusion / "ckpt.pt", weights_only=True)
    torch.save(dict(checkpoint, data="gone"), tmp_path / "moved.pt")
    result, = gen("--ckpt", tmp_path / "moved.pt")
    assert len(saved(tmp_path / "out")) == 3 and result["reference"] == "none"
    assert not any(name.startswith(("SWD", "spectral", "FID")) for name in result)
    lines = [line for line in capsys.readouterr().out.splitlines() if "gone" in line]
    assert len(lines) == 1 and "compared with nothing; --data names them" in lines[0]
    with pytest.raises(FileNotFoundError, match="--data gone"):
        gen("--ckpt", tmp_path / "moved.pt", "--data", "gone")
    torch.save(dict(checkpoint, ae="lost.pt"), tmp_path / "moved.pt")
    with pytest.raises(FileNotFoundError, match="its autoencoder, lost.pt, is not here; --ae"):
        gen("--ckpt", tmp_path / "moved.pt")
    gen("--ckpt", tmp_path / "moved.pt", "--ae", checkpoint["ae"])


def test_a_single_training_image_is_refused_before_sampling(gen, tmp_path, monkeypatch):
    """Two pictures, of which one is held out."""
    pictures(tmp_path / "two", 2)
    monkeypatch.setattr(evaluate, "write_samples", lambda *args: pytest.fail("sampled"))
    with pytest.raises(ValueError, match="--data .*two: has a single training image"):
        gen("--data", tmp_path / "two")


def test_labels_in_turn_or_at_random():
    """At random: a function of (seed, index), whatever the batch; all classes come."""
    def labels(seed, indices, how="random"):
        return samples.sample_labels(np.array(indices), 5, SimpleNamespace(seed=seed, labels=how))
    assert labels(0, [0, 6, 7], "turn").tolist() == [0, 1, 2]
    whole = labels(3, range(40))
    assert whole.dtype == torch.int64 and set(whole.tolist()) == set(range(5))
    assert torch.equal(whole[10:13], labels(3, [10, 11, 12]))
    assert not torch.equal(whole, labels(4, range(40)))


def test_gen_stores_jpeg_and_random_labels(gen, tmp_path):
    """--jpeg changes the stored samples and nothing before; both are in the settings."""
    plain, = gen("--labels", "random")
    before = saved(tmp_path / "out")
    jpeg, = gen("--labels", "random", "--jpeg")
    through = jpeg_round_trip(torch.from_numpy(before).movedim(-1, 1)).movedim(1, -1).numpy()
    assert np.array_equal(saved(tmp_path / "out"), through) and (through != before).any()
    assert (plain["jpeg"], jpeg["jpeg"], jpeg["labels"]) == ("none", "quality 75", "random")


def test_every_kept_checkpoint_is_scored(gen, diffusion, tmp_path, capsys):
    """In the order of steps, a result and a folder each; the best is printed."""
    lines = gen("--ckpt", diffusion, "--every")
    assert [line["step"] for line in lines] == [2, 4]     # not the untrained network
    best = min(lines, key=lambda line: line["SWD_16px"])
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == (f"no FID to compare; best of 2: SWD_16px {best['SWD_16px']:.4g} at step "
                        f"{best['step']}, {best['ckpt']}")
    assert sum("no FID: the Inception weights" in line for line in said) == 1
    for step in (2, 4):
        assert len(saved(tmp_path / "out" / f"ckpt_{step}")) == 3
    named = gen("--ckpt", diffusion / "ckpt_2.pt", diffusion / "ckpt_0.pt")
    assert [line["step"] for line in named] == [2, 0]
    assert named[0]["SWD_16px"] == lines[0]["SWD_16px"]
    with pytest.raises(FileNotFoundError, match="no ckpt_<step>.pt there; .*--keep_every"):
        gen("--ckpt", tmp_path, "--every")


def test_the_best_is_that_of_the_smallest_fid():
    """SWD decides only where there is no FID."""
    scores = [("a", 1, {"FID@9": 3.0, "SWD_8px": 1.0}), ("b", 2, {"FID@9": 2.0, "SWD_8px": 4.0})]
    assert evaluate.best_line(scores) == "best of 2: FID@9 2 at step 2, b"
    assert evaluate.best_line([("a", 1, {}), ("b", 2, {})]) == "no FID or SWD to compare"


def test_gen_on_two_nodes_is_refused(gen, monkeypatch):
    """Their processes would write one memory map."""
    monkeypatch.setattr(evaluate.run, "nodes", lambda: 2)
    with pytest.raises(ValueError, match="gen: the file of samples: .*--nnodes=1"):
        gen()


def test_uvit_is_sampled_with_its_schedule(diffusion, material, tmp_path):
    """The noise levels that train_diffusion.py recorded; those of older runs are SD's."""
    checkpoint = torch.load(diffusion / "ckpt.pt", weights_only=True)
    model_args = checkpoint["model_args"]
    ema = dit.MODELS["UViT-tiny/4"](**model_args).state_dict()
    for args, end in ((dict(schedule="vp"), 4e-5), (dict(schedule="sd"), 0.0047), ({}, 0.0047)):
        torch.save(dict(checkpoint, model_name="UViT-tiny/4", ema=ema, args=args),
                   tmp_path / "uvit.pt")
        process = load_diffusion(tmp_path / "uvit.pt", None, torch.device("cpu"))[1]
        assert float(process.alpha_bar[-1]) == pytest.approx(end, rel=0.05)


def test_one_gpu_preset(monkeypatch):
    """10,000 samples; every other default stays."""
    monkeypatch.setattr("sys.argv", ["evaluate.py", "gen", "--preset", "one-gpu"])
    args = evaluate.get_args()
    assert args.num_samples == 10_000 and args.steps == 100


# ---- the paper's own numbers

def test_recon_as_the_authors_measure(material, tmp_path, monkeypatch, inception_home):
    """
    Training images, decoded from a posterior sample of (seed, index), both sides through JPEG:
    PSNR and SSIM worked out here, whatever the batch.
    """
    monkeypatch.setenv("TORCH_HOME", str(inception_home))
    monkeypatch.setattr(torch.hub, "urlopen", offline)
    for batch in (4, 5):
        if batch == 5:                                     # once is enough for rFID
            monkeypatch.setattr(evaluate, "load_everywhere", lambda *args: None)
        run_main(evaluate, "recon", "--ae", material / "ae" / "ckpt.pt", "--protocol", "authors",
            "--seed", 3, "--batch_size", batch, "--workers", 0, "--device", "cpu",
            "--results", tmp_path / "results.jsonl", monkeypatch=monkeypatch)
    a, b = results(tmp_path)
    assert {"rFID@11", "psnr", "ssim"} <= a.keys()         # 12 pictures, of which one is held out
    assert a["psnr"] == pytest.approx(b["psnr"], rel=1e-5)
    assert (a["protocol"], a["split"], a["posterior"], a["seed"]) == ("authors", "train", "sample",
                                                                      3)
    assert a["jpeg"].startswith("quality 75, both sides")

    ae = load_autoencoder(material / "ae" / "ckpt.pt")
    train_set, _ = open_data(material / "images", 16)
    scores = []
    with torch.no_grad():
        for i in range(len(train_set)):
            image = train_set[i][0][None].float() / 127.5 - 1
            posterior = ae.encode(image)
            recon = ae.decode(posterior.sample(dit.NoiseStream(3, [i])(posterior.mean.shape)))
            files = []
            for x in (recon, image):
                pixels = to_uint8(x)[0].permute(1, 2, 0).numpy()
                Image.fromarray(pixels).save(tmp_path / "x.jpg")
                files.append(np.asarray(Image.open(tmp_path / "x.jpg")).astype(float))
            psnr = 10 * np.log10(255 ** 2 / np.square(files[0] - files[1]).mean())
            scores.append((psnr, float(ssim(recon.clamp(-1, 1), image)), float(ssim(recon, image))))
    psnr, clamped, unclamped = np.mean(scores, 0)
    assert a["psnr"] == pytest.approx(psnr, rel=1e-4)
    assert a["ssim"] == pytest.approx(clamped, rel=1e-4) != pytest.approx(unclamped, rel=1e-4)


def test_recon_of_training_images_in_the_plain_protocol(material, tmp_path, monkeypatch):
    """--split train alone: the mode, no JPEG."""
    monkeypatch.setattr(evaluate, "load_everywhere", lambda *args: None)
    for more in ([], ["--split", "train"], ["--split", "train", "--val_images", 4]):
        run_main(evaluate, "recon", "--ae", material / "ae" / "ckpt.pt", "--workers", 0, "--device",
            "cpu", "--results", tmp_path / "results.jsonl", *more, monkeypatch=monkeypatch)
    found = [(line["split"], line["n"], line["posterior"], line["jpeg"])
             for line in results(tmp_path)]
    assert found == [("val", 1, "mode", "none"), ("train", 11, "mode", "none"),
                     ("train", 4, "mode", "none")]


@pytest.mark.parametrize("name, kl", [
    ("SD-VAE", "0.038"), ("Scale Equivariance", "0.020"), ("DSM", "0.0054"), ("ESM", "0.0044")])
def test_the_published_curves_diverge_as_published(name, kl):
    """KL(flattened target || latent) on CelebA, to the digits given."""
    curves = published.CURVES["celeba"]
    value = published.divergence(curves[published.TARGET], curves[name])
    assert f"{value:.{len(kl) - 2}f}" == kl


def test_the_published_curves_are_shares():
    """16 rings that sum to 1, up to the rounding of 16 printed numbers."""
    curves = [curve for printed in published.CURVES.values() for curve in printed.values()]
    assert len(curves) == 10 and {len(curve) for curve in curves} == {16}
    assert all(abs(sum(curve) - 1) <= 16 * 0.5e-4 for curve in curves)
    printed = published.CURVES["imagenet"]
    assert {"VA-VAE", "DINOv2-B features"} <= printed.keys()


def test_published_alone_needs_no_autoencoder(tmp_path, monkeypatch, capsys):
    """Figure, CSV, and the four numbers."""
    monkeypatch.chdir(tmp_path)
    run_main(evaluate, "spectrum", "--published", "celeba", "--device", "cpu", monkeypatch=monkeypatch)
    said = capsys.readouterr().out
    for line in ("SD-VAE: KL(target || curve) 0.0378", "ESM: KL(target || curve) 0.0044"):
        assert f"published, celeba, {line}" in said
    assert (tmp_path / "out" / "spectrum.png").stat().st_size > 5000
    with open(tmp_path / "out" / "spectrum.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 * 16 and not (tmp_path / "results.jsonl").exists()


@pytest.mark.filterwarnings("ignore:.*untrained")
def test_published_beside_ones_own(material, tmp_path, monkeypatch):
    """Ours by the same descriptor, DC kept; features of an encoder too."""
    more = ["--published", "imagenet", "--out", tmp_path / "s.png", "--encoder", "dinov2_vitb14",
            "--encoder_source", "random", "--seed", 2]
    run_main(evaluate, "spectrum", *flags(material, tmp_path, *more), monkeypatch=monkeypatch)
    features, latents = results(tmp_path)
    assert (features["curve"], latents["curve"]) == ("random encoder", "ae")
    with open(tmp_path / "s.csv") as file:
        rows = list(csv.DictReader(file))
    own = {name: [float(row["descriptor"]) for row in rows if row["curve"] == name]
           for name in ("images", "target, gamma 1", "ae", "random encoder")}
    _, val_set = open_data(material / "images", 16, val_images=1)
    image = val_set[0][0][None].float() / 127.5 - 1
    small = spectral.match_resolution(image, (8, 8))
    with_dc = spectral.spectrum_distribution(small, remove_dc=False)[0].tolist()
    assert own["images"] == pytest.approx(with_dc, rel=1e-5)
    for line in (features, latents):
        kl = published.divergence(own["target, gamma 1"], own[line["curve"]])
        assert line["kl_from_target"] == pytest.approx(kl, rel=1e-6)


# ---- curves

def write_log(folder, *lines, cut=""):
    folder.mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "log.jsonl").write_text(text + cut)


def test_curves_of_running_runs(tmp_path, monkeypatch, capsys):
    """Folders or log files; a half-written line is passed over; a colour and a name a run."""
    monkeypatch.chdir(tmp_path)
    write_log(tmp_path / "ae" / "x", {"step": 0, "val_psnr": 9.0, "val_esm": 0.5},
              {"step": 0, "loss": 3.0, "grad_norm": 1.0}, {"step": 1, "not_finite": ["l1"]},
              {"step": 2, "loss": float("nan"), "grad_norm": 2.0}, cut='{"step": 3, "lo')
    write_log(tmp_path / "sit" / "x", {"step": 5, "loss": 1.0})
    write_log(tmp_path / "new")
    shown, save = [], figures.save_figure

    def spy(figure, path, **options):
        for ax in figure.axes[:4]:                         # two stay empty
            lines = [(line.get_color(), *line.get_data()) for line in ax.lines]
            shown.append((ax.get_title(), lines))
        shown.append([text.get_text() for text in figure.legends[0].get_texts()])
        save(figure, path, **options)
    monkeypatch.setattr(figures, "save_figure", spy)
    run_main(evaluate, "curves", "ae/x", "sit/x/log.jsonl", "new", monkeypatch=monkeypatch)
    *panels, legend = shown
    assert legend == ["ae/x", "sit/x", "new"]
    assert "new: has nothing to draw yet" in capsys.readouterr().out
    lines = dict(panels)
    assert list(lines) == ["loss", "gradient norm", "validation PSNR, dB",
                           "validation ESM divergence"]
    assert len({str(colour) for colour, _, _ in lines["loss"]}) == 3
    assert list(lines["gradient norm"][0][1]) == [0, 2]
    assert list(lines["loss"][1][1]) == [5] and list(lines["loss"][1][2]) == [1.0]
    assert (tmp_path / "out" / "curves.png").stat().st_size > 5000
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize("name, content, words", [
    ("nowhere", None, "nowhere: no such log"), ("x.txt", "a\nb\n", "x.txt: not the log of a"),
    ("x.jsonl", "", "x.jsonl: no line of a log yet")])
def test_curves_of_no_run(name, content, words, tmp_path, monkeypatch):
    """One line that names it."""
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        run_main(evaluate, "curves", name, monkeypatch=monkeypatch)
