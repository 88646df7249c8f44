"""
The number of processes and of gradient-accumulation parts changes nothing: same global batch, same
losses, for every method; tiny data neither hangs nor counts an image twice. Always 1 process
against 2 with 2 parts each, for vf, which has a second network; `--long` takes every method, and
adds 2 and 4 processes.
"""
import json

import numpy as np
import pytest
from PIL import Image

from conftest import run_ranks

TINY = ("--preset quick --batch_size 8 --device cpu --log_every 1 --eval_every 100 "
        "--warmup_steps 2 --steps 3 --encoder_source random").split()
TINY_AE = [*TINY, *"--image_size 32 --val_images 5".split()]
TINY_SIT = [*TINY, *"--model SiT-tiny/4 --sample_steps 2 --encode_batch 8 --repa_depth 1".split()]


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same_log(a, b, rel=2e-3):
    """The same lines and names; values to float tolerance, which three steps of AdamW magnify."""
    a, b = read_lines(a / "log.jsonl"), read_lines(b / "log.jsonl")
    steps = [[(line["step"], set(line)) for line in log] for log in (a, b)]
    assert steps[0] == steps[1] and len(a) >= 3
    for first, second in zip(a, b):
        for name in first:
            expected = pytest.approx(second[name], rel=rel, abs=1e-4)
            assert first[name] == expected, (first["step"], name)


@pytest.mark.parametrize("reg", ["none", "kl", "esm", "dsm", "se", "eq", "vf", "uae", "esm dsm"])
def test_processes_and_accumulation_change_nothing(reg, tmp_path, request):
    """
    train_ae.py: 1 x 8, 2 x 4, 4 x 2 images, and 2 x (2 + 2): the losses, gradient norms and
    validation of one process.
    """
    if reg != "vf" and not request.config.getoption("--long"):
        pytest.skip("--long runs every method")
    flags = [*TINY_AE, "--reg", *reg.split()]
    if "dsm" in reg:
        flags += ["--image_size", "64"]
    runs = {"one": (1, []), "two_parts": (2, ["--grad_accum", 2])}
    if request.config.getoption("--long"):
        runs |= {"two": (2, []), "four": (4, [])}
    for name, (world, more) in runs.items():
        run_ranks(world, "train_ae", *flags, *more, "--out", tmp_path / name, cwd=tmp_path,
            output=tmp_path / f"{name}.txt")
        # the adaptive weight of vf and uae is a ratio of gradients, taken part by part: equal in
        # the mean, not to the last digit
        adaptive = more and reg in ("vf", "uae")
        assert_same_log(tmp_path / "one", tmp_path / name, rel=0.1 if adaptive else 2e-3)


@pytest.mark.parametrize("repa", ["none", "repa", "dog"])
def test_diffusion_on_any_number_of_processes(repa, material, tmp_path, request):
    """
    train_diffusion.py, encoding included: the losses of one process on 2 and 4, and with two parts
    of the batch.
    """
    if repa == "repa" and not request.config.getoption("--long"):
        pytest.skip("--long runs it")
    runs = {"one": (1, []), "two_parts": (2, ["--grad_accum", 2])}
    if request.config.getoption("--long"):
        runs |= {"four": (4, [])}
    for name, (world, more) in runs.items():
        run_ranks(world, "train_diffusion", *TINY_SIT, "--repa", repa,
            "--ae", material / "ae" / "ckpt.pt", "--data", material / "images", *more,
            "--cache", tmp_path / f"{name}_cache", "--out", tmp_path / name, cwd=tmp_path,
            output=tmp_path / f"{name}.txt")
    for name in set(runs) - {"one"}:
        assert_same_log(tmp_path / "one", tmp_path / name)
        one, other = (np.load(tmp_path / f"{run}_cache" / "moments.npy") for run in ("one", name))
        np.testing.assert_allclose(one, other, rtol=2e-2, atol=2e-3)                      # float16


@pytest.fixture()
def three_pictures(tmp_path):
    folder = tmp_path / "three"
    folder.mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 33, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def test_less_data_than_processes(three_pictures, tmp_path, request):
    """
    Three pictures, one of them held out, three processes: both stages end, and with the numbers of
    one process.
    """
    if not request.config.getoption("--long"):
        pytest.skip("--long runs it")
    for world in (1, 3):
        run_ranks(world, "train_ae", *TINY_AE, "--reg", "esm", "--batch_size", 6,
            "--data", three_pictures,
            "--out", tmp_path / f"ae{world}", cwd=tmp_path, output=tmp_path / f"ae{world}.txt")
        run_ranks(world, "train_diffusion", *TINY_SIT, "--ae", tmp_path / "ae1" / "ckpt.pt",
            "--batch_size", 6, "--encode_batch", 6,
            "--out", tmp_path / f"sit{world}", "--cache", tmp_path / f"cache{world}",
            cwd=tmp_path, output=tmp_path / f"sit{world}.txt")
    for stage in ("ae", "sit"):
        assert_same_log(tmp_path / f"{stage}1", tmp_path / f"{stage}3")
    one, three = (json.loads((tmp_path / cache / "cache.json").read_text())
        for cache in ("cache1", "cache3"))
    assert one["count"] == three["count"] == 2
    assert one["mean"] == pytest.approx(three["mean"], abs=1e-4)


def test_evaluation_counts_every_image_once(material, tmp_path):
    """
    5 held-out images and 7 samples on 1 and on 2 processes: the same PSNR, SSIM, samples and
    distances.
    """
    material_flags = ["--ae", material / "ae" / "ckpt.pt", "--data", material / "images"]
    run_ranks(1, "train_diffusion", *TINY_SIT, *material_flags, "--cache", tmp_path / "cache",
        "--out", tmp_path / "sit", cwd=tmp_path, output=tmp_path / "sit.txt")
    results = []
    for world in (1, 2):
        lines = tmp_path / f"{world}.jsonl"
        common = ["--batch_size", 2, "--device", "cpu", "--workers", 0, "--results", lines]
        run_ranks(world, "evaluate", "recon", *material_flags, "--val_images", 5, *common,
            cwd=tmp_path, output=tmp_path / "recon.txt")
        run_ranks(world, "evaluate", "gen", "--ckpt", tmp_path / "sit" / "ckpt.pt",
            "--num_samples", 7, "--steps", 3, *common, "--out", tmp_path / f"samples{world}",
            cwd=tmp_path, output=tmp_path / "gen.txt")
        results.append(read_lines(lines))
    for one, two in zip(*results):
        numbers = {name: value for name, value in one.items()
            if isinstance(value, float) and name not in ("seconds", "time")}
        assert numbers and one["n"] == two["n"]
        assert {name: two[name] for name in numbers} == pytest.approx(numbers, rel=2e-3)
    a, b = (np.load(tmp_path / f"samples{world}" / "samples.npz")["arr_0"] for world in (1, 2))
    assert a.shape == (7, 16, 16, 3) and np.abs(a.astype(int) - b).max() <= 1
