"""The commands of evaluate.py on small material: once with random Inception, else 8 features."""
import contextlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import dit
import evaluate
import spectral
import train_diffusion
from analysis import fid, figures
from common import metrics, run
from common.data import open_data
from common.metrics import Moments, jpeg_round_trip, ssim, to_uint8
from common.weights import load_autoencoder, load_diffusion
from conftest import args_of, noise, plant_vgg, pngs, run_main, table
from losses import PerceptualLoss
from test_train_diffusion import flags_of

pytestmark = pytest.mark.filterwarnings("ignore:.*UNTRAINED")


@pytest.fixture
def inception(main, monkeypatch):
    """The first 8 pixels in the place of Inception's 2048 features and of its logits."""
    first = lambda images: (images.flatten(1)[:, :8].float(), images.flatten(1)[:, :8].float())
    monkeypatch.setattr(metrics, "load_inception", lambda device: first)
    for module in (metrics, fid):
        monkeypatch.setattr(module, "Moments", lambda D, device: Moments(8, device))


@pytest.fixture
def ae(material):
    return ["--ae", material / "ae" / "ckpt.pt"]


# ---- the command line
def test_a_command_takes_its_flags_and_no_others(main, capsys):
    """--help lists those of the command; test_bad_input.py has flags of other commands."""
    with pytest.raises(SystemExit):
        main("gen", "--help")
    text = capsys.readouterr().out
    assert "--cfg_interval" in text and "(default: 50000)" in text and "--token" not in text
    # a preset does not set what a command has a default of its own for
    for line, name, count in (
            ("recon", "val_images", None), ("recon --preset quick", "val_images", 128),
            ("latents --preset quick", "val_images", 8),
            ("trajectory --preset one-gpu", "num_samples", 64)):
        assert getattr(args_of(evaluate, *line.split()), name) == count


# ---- figures
def test_figures_are_drawn(material, ae, main):
    """bands reports a PSNR per mask, similarity an RMSC per target, spectrum draws features."""
    random = ["--encoder_source", "random", "--encoder", "dinov2_vitb14"]
    image = sorted((material / "images").glob("*/*.png"))[0]
    bands, = main("bands", *ae, "--val_images", 1)
    assert (bands["size"], bands["processes"]) == (16, 1) and "images" in bands["data"]
    assert {"psnr_n0", "psnr_n8", "psnr_n10", "psnr_n12"} <= bands.keys()
    similarity, = main("similarity", *random, "--image_size", 70, "--image", image)
    assert similarity["token"] == 12                       # the centre of 5 x 5
    assert {"rmsc_none", "rmsc_spnorm", "rmsc_dog"} <= similarity.keys() and similarity["n"] == 1
    main("spectrum", *random, "--data", material / "images", "--image_size", 64, "--val_images", 1)
    assert Path("out/spectrum.csv").read_text().count("random encoder") == 16
    assert all(path.stat().st_size > 3000 for path in Path("out").glob("*.png"))
    Path("out/ae/quick-kl").mkdir(parents=True)            # of the quick preset, say
    Path("out/ae/quick-kl/ckpt.pt").touch()
    for command in ("spectrum", "bands", "recon"):
        with pytest.raises(FileNotFoundError, match="--ae out/ae/quick-kl/ckpt.pt"):
            main(command)


def test_names_in_legends_are_unique(tmp_path):
    """As much of the path as is needed; v1.5 is no file with an ending; _x would be hidden."""
    for paths, names in {
            "A/c_4.pt B/c_4.pt C/D/ckpt.pt": "A/c_4 B/c_4 C/D", "v1.0 v1.5": "v1.0 v1.5",
            "x/A/ckpt.pt y/A/ckpt.pt": "x/A y/A", "A/image.pt": "A/image", "A/_x": "A/_x"}.items():
        assert figures.unique_names([tmp_path / path for path in paths.split()]) == names.split()


def test_published_curves(material, ae, main):
    """They sum to 1 up to the printed digits; one's own by the same descriptor, DC kept."""
    printed = [curve for curves in figures.CURVES.values() for curve in curves.values()]
    assert [len(curve) for curve in printed] == 10 * [16]
    assert all(abs(sum(curve) - 1) <= 16 * 0.5e-4 for curve in printed)
    assert not main("spectrum", "--published", "celeba")
    assert len(table("out/spectrum.csv")) == 6 * 16
    lines = main("spectrum", *ae, "--val_images", 1, "--published", "imagenet", "--out", "s.png",
                 "--encoder", "dinov2_vitb14", "--encoder_source", "random", "--seed", 2)
    assert [line["curve"] for line in lines] == ["random encoder", "ae"]
    curves = {}
    for row in table("s.csv"):
        curves.setdefault(row["curve"], []).append(float(row["descriptor"]))
    _, val_set = open_data(material / "images", 16, val_images=1)
    small = spectral.match_resolution(val_set[0][0][None].float() / 127.5 - 1, (8, 8))
    with_dc = spectral.spectrum_distribution(small, remove_dc=False)[0].tolist()
    assert curves["images"] == pytest.approx(with_dc, rel=1e-5)
    for line in lines:
        kl = figures.divergence(curves["target, gamma 1"], curves[line["curve"]])
        assert line["kl_from_target"] == pytest.approx(kl, rel=1e-6)


# ---- recon
def test_recon_counts_every_image(material, ae, main, inception, tmp_path, capsys):
    """7 images in batches of 2; LPIPS needs VGG weights, and says so."""
    (tmp_path / "set").mkdir()
    for name in ("train", "val"):
        (tmp_path / "set" / name).symlink_to(material / "images")
    result, = main("recon", *ae, "--workers", 0, "--batch_size", 2, "--data", "set",
                   "--val_images", 7)
    assert {"psnr", "ssim", "l1", "rFID@7"} <= result.keys() and "lpips" not in result
    assert result["n"] == 7 and result["rFID@7"] > 0 and 5 < result["psnr"] < 40
    assert (result["posterior"], result["jpeg"]) == ("mode", "none")
    printed = capsys.readouterr().out
    assert "LPIPS needs" in printed and "--lpips_weight" not in printed


def test_recon_as_the_authors_measure(material, ae, main, inception, tmp_path, monkeypatch):
    """Training images, a posterior sample of (seed, index), JPEG: whatever the batch."""
    plant_vgg(tmp_path / "home", monkeypatch)
    lpips = PerceptualLoss()
    common = ["recon", *ae, "--protocol", "authors", "--seed", 3, "--workers", 0]
    a, = main(*common, "--batch_size", 4)
    b, = main(*common, "--batch_size", 5, "--networks", "off")
    assert "rFID@11" in a and (a["split"], a["posterior"], a["seed"]) == ("train", "sample", 3)
    assert a["psnr"] == pytest.approx(b["psnr"], rel=1e-5)
    model = load_autoencoder(ae[1]).requires_grad_(False)
    train_set, _ = open_data(material / "images", 16)
    scores, pixels = [], []                                # pixels: 8 features of both sides
    for i in range(len(train_set)):
        image = train_set[i][0][None].float() / 127.5 - 1
        posterior = model.encode(image)
        recon = model.decode(posterior.sample(dit.NoiseStream(3, [i])(posterior.mean.shape)))
        files = []
        for x in (recon, image):
            Image.fromarray(to_uint8(x)[0].permute(1, 2, 0).numpy()).save("x.jpg")
            files.append(np.asarray(Image.open("x.jpg")).astype(float))
        psnr = 10 * np.log10(255 ** 2 / np.square(files[0] - files[1]).mean())
        clamped = recon.clamp(-1, 1)
        scores.append([psnr, *map(float, (
            lpips(clamped, image), ssim(clamped, image), ssim(recon, image)))])
        pixels.append([file[0, :8, 0] for file in files])
    psnr, perceptual, clamped, unclamped = np.mean(scores, 0)
    assert a["psnr"] == pytest.approx(psnr, rel=1e-4)
    assert a["lpips"] == pytest.approx(perceptual, rel=1e-3)
    of_both = [(x.mean(0), np.cov(x, rowvar=False)) for x in np.moveaxis(np.array(pixels), 1, 0)]
    assert a["rFID@11"] == pytest.approx(metrics.frechet_distance(*of_both[0], *of_both[1]))
    assert a["ssim"] == pytest.approx(clamped, rel=1e-4) != pytest.approx(unclamped, rel=1e-4)


# ---- fid
def write_images(folder, count, side=24):
    """`count` random images of side x side in a folder of PNGs and in folder.npz."""
    pngs(folder, [f"{i}.png" for i in range(count)], side, side)
    np.savez(f"{folder}.npz", arr_0=[noise(i, side, side) for i in range(count)])


def test_fid_of_images_and_of_statistics(main, inception, tmp_path, monkeypatch):
    """A folder and an npz of the same images: exactly 0; statistics without a network: by hand."""
    write_images(tmp_path / "images", 6)
    result, = main("fid", "images", "images.npz", "--batch_size", 5)
    assert result["FID@6"] == 0.0 and result["size"] == 24
    assert result["n_a"] == result["n_b"] == 6
    monkeypatch.setattr(metrics, "load_inception", lambda device: pytest.fail("no network"))
    for name, mean in (("a", 0.0), ("b", 2.0)):
        np.savez(f"{name}.npz", mu=np.full(3, mean), sigma=np.eye(3))
    result, = main("fid", "a.npz", "b.npz")
    assert result["FID"] == pytest.approx(12.0) and result["size"] is None


def test_the_common_resolution_of_two_sets(main, inception, tmp_path):
    """As asked, else the npz's, else that of all images, in either order; no guess."""
    for name, side in (("a", 24), ("b", 40), ("c", 24)):
        write_images(tmp_path / name, 3, side)
    Image.new("RGB", (33, 24)).save(tmp_path / "a" / "0.png")
    kept = dict(mu=np.zeros(8), sigma=np.eye(8), how=json.dumps(dict(size=64)))
    np.savez(tmp_path / "kept.npz", **kept)            # as gen keeps them
    for a, b, size, *flags in (("a", "c", 24), ("a", "b.npz", 40), ("kept.npz", "b", 64),
                               ("a", "b.npz", 32, "--image_size", 32)):
        assert main("fid", a, b, *flags)[0]["size"] == size
    for pair in (("a", "b"), ("b", "a")):
        with pytest.raises(ValueError, match="images of several sizes; --image_size"):
            main("fid", *pair)
    with pytest.raises(ValueError, match="kept.npz: statistics of images of 64 px, not 40"):
        main("fid", "kept.npz", "b", "--image_size", 40)


# ---- gen
@pytest.fixture(scope="module")
def diffusion(material, tmp_path_factory):
    """A run of 4 steps that kept ckpt_0.pt, ckpt_2.pt and ckpt_4.pt."""
    out = tmp_path_factory.mktemp("diffusion") / "run"
    kept = ["--steps", 4, "--eval_every", 2, "--keep_every", 2]
    run_main(train_diffusion, *flags_of(material, out, *kept))
    return out


GEN = "--num_samples 3 --steps 2 --batch_size 2 --workers 0 --out out".split()


@pytest.fixture
def gen(diffusion, main):
    """gen(*flags) samples into out/, without Inception weights; returns its results."""
    return lambda *flags, count=3: main(
        "gen", "--ckpt", diffusion / "ckpt.pt", *GEN, "--num_samples", count, *flags)


@pytest.fixture
def changed(diffusion, ae):
    """changed(name, of, args, **fields): the flag with a copy of a run that has other fields."""
    def changed(name, of=diffusion / "ckpt.pt", args=(), **fields):
        trained = torch.load(of, weights_only=True)
        torch.save(trained | fields | dict(args=trained["args"] | dict(args)), name)
        return "--ae" if of == ae[1] else "--ckpt", name
    return changed


def saved(folder="out"):
    return np.load(f"{folder}/samples.npz")["arr_0"]


def test_gen_with_inception_weights(gen, inception_home, tmp_path, monkeypatch):
    """All metrics by the real path; the reference statistics are reused, or refused if changed."""
    monkeypatch.setenv("TORCH_HOME", str(inception_home))
    first, = gen(count=4)
    names = {"FID@4", "IS", "KID_x1e3_subset4", "precision", "recall"}
    assert names <= first.keys() and first["FID@4"] > 0 and first["weights"] == "torch-fidelity"
    reference, = (tmp_path / "out" / "reference").iterdir()
    stored = dict(np.load(reference))
    monkeypatch.setattr(fid, "set_statistics", lambda *args: pytest.fail("made again"))
    second, = gen(count=4)
    assert all(first[name] == second[name] for name in names)
    how = dict(json.loads(str(stored["how"])), size=99)
    np.savez(reference, **dict(stored, how=json.dumps(how)))
    with pytest.raises(ValueError, match="remove the file"):
        gen()


def test_precision_is_of_the_samples_and_recall_of_the_images(inception):
    """Samples of one mode of many: precise, and few images are near any. FID by hand."""
    rng = np.random.default_rng(0)
    real = rng.integers(0, 256, (200, 2, 2, 3), dtype=np.uint8)
    fake = np.clip(real[:1] + rng.integers(-2, 3, (40, 2, 2, 3)), 0, 255).astype(np.uint8)
    f, r = (x.transpose(0, 3, 1, 2).reshape(len(x), -1)[:, :8].astype(np.float32)
            for x in (fake, real))
    moments = lambda x: (x.mean(0), np.cov(x, rowvar=False))
    reference = dict(zip(("mu", "sigma"), moments(r)), features=r)
    found = fid.inception_metrics(metrics.load_inception("cpu"), fake, reference,
                                  SimpleNamespace(batch_size=7), "cpu")
    assert found["precision"] > 0.9 and found["recall"] < 0.1
    by_hand = metrics.frechet_distance(*moments(f), *moments(r))
    assert found["FID@40"] == pytest.approx(by_hand, rel=1e-4)


@pytest.mark.parametrize("flags, options", [
    ("--steps 3", dict(steps=3)), ("--steps 4 --cfg 3", dict(steps=4, cfg=3.0)),
    ("--steps 4 --sampler ode --cfg 3 --cfg_interval 0.3 0.6",
     dict(steps=4, sampler="ode", cfg=3.0, cfg_interval=(0.3, 0.6)))])
def test_gen_is_the_sampler_it_names(flags, options, diffusion, main, changed):
    """On random weights, where guidance, steps and sampler change images, unlike on a new run."""
    ema = torch.load(diffusion / "ckpt.pt", weights_only=True)["ema"]
    wild = {name: weight if name == "pos_embed" else 0.1 * torch.randn(weight.shape)
            for name, weight in ema.items()}
    flag, file = changed("wild.pt", ema=wild)
    main("gen", flag, file, *GEN, "--seed", 7, *flags.split())
    model, process, ae, checkpoint = load_diffusion(file, None, torch.device("cpu"))
    z = process.sample(model, (3, 4, 8, 8), y=torch.tensor([0, 1, 0]),
                       noise=dit.NoiseStream(7, range(3)), **options)
    z = z * checkpoint["latent_std"][:, None, None] + checkpoint["latent_mean"][:, None, None]
    expected = to_uint8(ae.decode(z)).movedim(1, -1).numpy().astype(int)
    assert np.abs(saved() - expected).max() <= 1


def test_a_folder_holds_one_sampling(gen, tmp_path, monkeypatch):
    """5 images, then 2: 2 are left, and what a user put there; a sampling that fails takes none."""
    folder = tmp_path / "out" / "images"
    names, found, held = lambda: sorted(path.name for path in folder.glob("*")), [], run.file_lock

    @contextlib.contextmanager
    def lock(path):
        with held(path):
            yield
            found.append((str(path), len(names())))
    with monkeypatch.context() as patch:
        patch.setattr(run, "file_lock", lock)
        gen("--folder", count=5)
    assert found == [("out/.lock", 5)]                     # held until the last PNG
    for name in ("7.png", "notes.txt"):
        (folder / name).write_text("of a user")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(fid, "sample_images", lambda *args, **flags: 1 / 0)
        gen("--folder", count=2)
    assert len(names()) == 7 and len(saved()) == 5
    gen("--folder", count=2)
    assert names() == ["000000.png", "000001.png", "7.png", "notes.txt"]
    assert np.array_equal(np.asarray(Image.open(folder / "000001.png")), saved()[1])
    gen(count=3)
    assert names() == ["7.png", "notes.txt"]
    assert {path.name for path in folder.parent.iterdir()} == {"grid.png", "images", "samples.npz"}


def test_gen_without_the_training_images(gen, changed, capsys):
    """Samples, and a line instead of metrics; but a --data that is given must be there."""
    moved = changed("moved.pt", data="gone")
    result, = gen(*moved)
    assert len(saved()) == 3 and result["reference"] == "none"
    assert not any(name.startswith(("SWD", "spectral", "FID")) for name in result)
    assert capsys.readouterr().out.count("compared with nothing unless --data") == 1
    with pytest.raises((FileNotFoundError, ValueError), match="--data gone"):
        gen(*moved, "--data", "gone")
    with pytest.raises(FileNotFoundError, match="lost.pt.*--ae"):
        gen(*changed("moved.pt", ae="lost.pt"))


def test_labels_and_jpeg(gen):
    """Classes in turn or a function of (seed, index); --jpeg changes the stored samples alone."""
    assert fid.sample_labels(range(5), [1, 4]).tolist() == [1, 4, 1, 4, 1]
    whole = fid.sample_labels(range(40), range(5), 3)
    assert set(whole.tolist()) == set(range(5))
    assert torch.equal(whole[10:13], fid.sample_labels(range(10, 13), range(5), 3))
    assert not torch.equal(whole, fid.sample_labels(range(40), range(5), 4))
    plain, = gen("--labels", "random")
    before = saved()
    jpeg, = gen("--labels", "random", "--jpeg")
    through = jpeg_round_trip(torch.from_numpy(before).movedim(-1, 1)).movedim(1, -1).numpy()
    assert np.array_equal(saved(), through) and (through != before).any()
    assert (plain["jpeg"], jpeg["labels"]) == ("none", "random") and "quality 75" in jpeg["jpeg"]


def test_every_kept_checkpoint_is_scored(gen, diffusion, capsys):
    """In the order of steps, a result and a folder each; the best is printed."""
    lines = gen("--ckpt", diffusion, "--every")
    assert [line["step"] for line in lines] == [2, 4]     # not the untrained network
    swd, step = min((line["SWD_16px"], line["step"]) for line in lines)
    printed = capsys.readouterr().out
    assert f"\nbest of 2: SWD_16px {swd:.4g} at step {step}, " in printed
    assert printed.count("no FID: the Inception weights") == 1
    assert len(saved("out/ckpt_2")) == len(saved("out/ckpt_4")) == 3
    named = gen("--ckpt", diffusion / "ckpt_2.pt", diffusion / "ckpt_0.pt")
    assert [line["step"] for line in named] == [2, 0]
    assert named[0]["SWD_16px"] == lines[0]["SWD_16px"]


# ---- nothing silently wrong
def test_a_set_that_changed_is_named(material, ae, main, changed, capsys):
    """One training image is gone: the commands say so, and measure; other --data is no change."""
    shutil.copytree(material / "images", "set")
    autoencoder = changed("ae.pt", ae[1], dict(data="set"))
    run, few = changed("run.pt", data="set"), ["--val_images", 1]
    commands = dict(recon=[*autoencoder, "--workers", 0], gen=[*run, *GEN], denoise=[*run, *few],
                    latents=[*autoencoder, *few])

    def said(command, *data):
        main(command, *commands[command], *data)
        return capsys.readouterr().out.count(f" has changed since {commands[command][1]} was ")
    assert said("latents") == said("gen") == 0
    Path("set", open_data("set", 16)[0].name(0)).unlink()
    assert [said(command) for command in commands] == [1, 1, 1, 1]
    assert said("latents", "--data", material / "images") == 0


def test_mixed_autoencoders_are_said_to_be(ae, main, changed, capsys):
    """Different images or sizes in one figure: a line each."""
    for name, images, size in (("A", "1", 16), ("B", "2", 32), ("C", "1", 16)):
        changed(f"{name}.pt", ae[1], dict(image_size=size), images=images)
    for other, count in (("B", 2), ("C", 0)):
        main("latents", "--data", "leaves", "--val_images", 1, "--ae", "A.pt", f"{other}.pt")
        assert capsys.readouterr().out.count("these runs differ in image") == count


def test_no_guidance_without_a_trained_null_label(main, changed):
    run = changed("run.pt", args=dict(label_dropout=0.0))
    with pytest.raises(ValueError, match="--cfg 1.8: run.pt .* --label_dropout 0"):
        main("gen", *run, *GEN, "--cfg", 1.8)


def test_classes_without_an_image_are_not_sampled(diffusion, main, changed, monkeypatch, capsys):
    """--num_classes 9 for two class folders; but not a model of 9 folders on other data."""
    model_args = torch.load(diffusion / "ckpt.pt", weights_only=True)["model_args"]
    model_args = dict(model_args, num_classes=9)
    nine = dict(model_args=model_args, ema=dit.MODELS["SiT-tiny/4"](**model_args).state_dict())
    run = changed("run.pt", args=dict(num_classes=9), **nine, classes_seen=[0, 7])
    drawn, sample = [], dit.Interpolant.sample

    def spy(self, model, shape, steps, y=None, **options):
        drawn.extend(y.tolist())
        return sample(self, model, shape, steps, y, **options)
    monkeypatch.setattr(dit.Interpolant, "sample", spy)
    for command, *flags in (["gen", *GEN], ["gen", *GEN, "--labels", "random"],
                            ["trajectory", "--num_samples", 3, "--steps", 3]):
        drawn.clear()
        main(command, *run, *flags)
        assert drawn == [0, 7, 0] or "random" in flags and len(drawn) == 3 and {*drawn} <= {0, 7}
        assert capsys.readouterr().out.count("run.pt: 7 of its 9 classes had no training") == 1
    assert main("denoise", *run, "--val_images", 1)
    run = changed("run.pt", args=dict(num_classes=-1), **nine)
    with pytest.raises(ValueError, match="has 0 classes, and run.pt was trained with 9"):
        main("denoise", *run, "--data", "discs")


def test_what_is_not_finite_is_no_number(diffusion, ae, main, changed, tmp_path):
    """Finite weights that overflow: a line that names the file, no samples, no result."""
    def wild(path, part):
        weights = torch.load(path, weights_only=True)[part]
        wilder = {name: 1e25 * tensor for name, tensor in weights.items()}
        return changed(f"{part}.pt", path, **{part: wilder})
    run = wild(diffusion / "ckpt.pt", "ema")
    for command, flags in (("denoise", run), ("recon", [*wild(ae[1], "model"), "--workers", 0]),
                           ("trajectory", [*run, "--num_samples", 2, "--steps", 2]),
                           ("gen", [*run, *GEN])):
        with pytest.raises(ValueError, match=f"^{flags[1]}: .* not finite"):
            main(command, *flags)
    assert not list(tmp_path.rglob("results.jsonl")) and not list(tmp_path.rglob("samples.npz"))


def test_escape_sequences_are_printed(capsys, tmp_path):
    """A name that a terminal would obey, in results and in errors."""
    evaluate.report({}, dict(ckpt="\x1b]0;x\a"), tmp_path / "results.jsonl", torch.device("cpu"))
    with pytest.raises(SystemExit), run.one_line_errors():
        run.need(False, "\x1b[2J: bad")
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err and r"\x1b[2J: bad" in printed.err


def test_uvit_is_sampled_with_its_schedule(diffusion, changed):
    """The noise levels that train_diffusion.py recorded."""
    model_args = torch.load(diffusion / "ckpt.pt", weights_only=True)["model_args"]
    uvit = dict(model_name="UViT-tiny/4", ema=dit.MODELS["UViT-tiny/4"](**model_args).state_dict())
    for schedule, end in (("vp", 4e-5), ("sd", 0.0047)):
        _, file = changed("uvit.pt", args=dict(schedule=schedule), **uvit)
        process = load_diffusion(file, None, torch.device("cpu"))[1]
        assert float(process.alpha_bar[-1]) == pytest.approx(end, rel=0.05)


# ---- curves
def write_log(folder, *lines, cut=""):
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + cut)


def test_curves_of_running_runs(main, tmp_path, monkeypatch):
    """Folders or log files; a half-written line is passed over; a colour and a name per run."""
    write_log(tmp_path / "ae" / "x", {"step": 0, "val_psnr": 9.0, "val_esm": 0.5},
              {"step": 0, "loss": 3.0, "grad_norm": 1.0}, {"step": 1, "not_finite": ["l1"]},
              {"step": 2, "loss": float("nan"), "grad_norm": 2.0}, cut='{"step": 3, "lo')
    write_log(tmp_path / "sit" / "x", {"step": 5, "loss": 1.0})
    write_log(tmp_path / "new" / "x")
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, *args: drawn.append(figure))
    assert not main("curves", "ae/x", "sit/x/log.jsonl", "new/x")
    names = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert names == ["ae/x", "sit/x", "new/x"]
    lines = {ax.get_title(): ax.lines for ax in drawn[0].axes[:4]}         # two stay empty
    assert list(lines) == ["loss", "grad_norm", "val_psnr", "val_esm"]
    assert len({line.get_color() for line in lines["loss"]}) == 3
    assert list(lines["grad_norm"][0].get_xdata()) == [0, 2]
    assert lines["loss"][1].get_xydata().tolist() == [[5, 1.0]]
    with pytest.raises(ValueError, match="new/x: no line"):
        main("curves", "new/x")
