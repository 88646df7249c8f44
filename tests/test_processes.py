"""Processes and micro-batches change nothing: vf and dog (two networks); all methods if --long."""
import functools
import json

import numpy as np
import pytest

from conftest import LONG, long_but, pngs, read_lines, run_ranks

TINY = ("--preset quick --batch_size 8 --device cpu --log_every 1 --eval_every 100 "
        "--warmup_steps 2 --steps 3 --encoder_source random").split()
TINY_AE = [*TINY, *"--model f2d4-tiny --image_size 32 --val_images 5".split()]
TINY_SIT = [*TINY, *"--model SiT-tiny/4 --sample_steps 2 --encode_batch 8 --repa_depth 1".split()]


def assert_same_log(a, b, rel=2e-3):
    """The same lines and names; values to float tolerance, which three steps of AdamW magnify."""
    a, b = read_lines(a / "log.jsonl"), read_lines(b / "log.jsonl")
    assert len(a) >= 3 and [line["step"] for line in a] == [line["step"] for line in b]
    for first, second in zip(a, b):
        assert first == pytest.approx(second, rel=rel, abs=1e-4)


def compare(folder, module, flags, long, rel=2e-3):
    """The log of one process, and of two; --long: of four, of two with two parts of the batch."""
    runs = {"one": (1, []), "two": (2, [])}
    runs |= {"two_parts": (2, ["--grad_accum", 2]), "four": (4, [])} if long else {}
    for name, (world, more) in runs.items():
        (folder / name).mkdir()
        run_ranks(world, module, *flags, *more, "--out", "run", cwd=folder / name,
                  output=folder / name / "output")
        assert_same_log(folder / "one" / "run", folder / name / "run", rel if more else 2e-3)


@pytest.mark.parametrize("reg", long_but(
    ["none", "kl", "esm", "dsm", "se", "eq", "vf", "uae", "esm dsm"], "vf"))
def test_processes_and_accumulation_change_nothing(reg, tmp_path, request):
    """train_ae.py: 1 x 8, 2 x (2 + 2), 2 x 4 and 4 x 2 images: losses, gradients, validation."""
    # the adaptive weight of vf and uae is a ratio of gradients, part by part: equal in the mean
    rel = 0.1 if reg in ("vf", "uae") else 2e-3
    long = request.config.getoption("--long")
    compare(tmp_path, "train_ae", [*TINY_AE, "--reg", *reg.split()], long, rel)


@pytest.fixture(scope="module")
def diffusion(material, tmp_path_factory, request):
    """diffusion(repa): the folder of `compare` with train_diffusion.py, encoding included."""
    @functools.cache
    def get(repa):
        folder = tmp_path_factory.mktemp(repa)
        flags = [*TINY_SIT, "--repa", repa, "--ae", material / "ae" / "ckpt.pt",
                 "--data", material / "images", "--cache", "cache"]
        compare(folder, "train_diffusion", flags, repa == "dog" or
                request.config.getoption("--long"))
        return folder
    return get


@pytest.mark.parametrize("repa", long_but(["none", "repa", "dog"], "dog"))
def test_diffusion_on_any_number_of_processes(repa, diffusion):
    moments = [np.load(path / "cache" / "moments.npy") for path in diffusion(repa).iterdir()]
    for other in moments[1:]:
        np.testing.assert_allclose(moments[0], other, rtol=2e-2, atol=2e-3)           # float16


def test_evaluation_counts_every_image_once(material, diffusion, tmp_path):
    """5 held-out images and 3 samples on 1 and 2 processes: the same scores, samples, distances."""
    results = []
    for world in (1, 2):
        common = ["--batch_size", 2, "--device", "cpu", "--workers", 0,
                  "--results", tmp_path / f"{world}.jsonl"]
        for command in (["recon", "--ae", material / "ae" / "ckpt.pt", "--data",
                         material / "images", "--val_images", 5],
                        ["gen", "--ckpt", diffusion("dog") / "one" / "run" / "ckpt.pt",
                         "--num_samples", 3, "--steps", 2, "--out", f"samples{world}"]):
            run_ranks(world, "evaluate", *command, *common, cwd=tmp_path, output=tmp_path / "out")
        results.append(read_lines(tmp_path / f"{world}.jsonl"))
    for one, two in zip(*results):
        numbers = {name: value for name, value in one.items()
                   if isinstance(value, float) and name not in ("seconds", "time")}
        assert numbers and one["n"] == two["n"]
        assert {name: two[name] for name in numbers} == pytest.approx(numbers, rel=2e-3)
    a, b = (np.load(tmp_path / f"samples{world}" / "samples.npz")["arr_0"] for world in (1, 2))
    assert a.shape == (3, 16, 16, 3) and np.abs(a.astype(int) - b).max() <= 1


@LONG
def test_less_data_than_processes(tmp_path):
    """Three images, one of them held out, three processes: the numbers of one process."""
    pngs(tmp_path / "three", ["0.png", "1.png", "2.png"], 40, 33)
    for world in (1, 3):
        places = dict(cwd=tmp_path, output=tmp_path / "output")
        run_ranks(world, "train_ae", *TINY_AE, "--reg", "esm", "--batch_size", 6, "--data", "three",
                  "--out", f"ae{world}", **places)
        run_ranks(world, "train_diffusion", *TINY_SIT, "--ae", "ae1/ckpt.pt", "--batch_size", 6,
                  "--encode_batch", 6, "--out", f"sit{world}", "--cache", f"cache{world}", **places)
    for stage in ("ae", "sit"):
        assert_same_log(tmp_path / f"{stage}1", tmp_path / f"{stage}3")
    one, three = (json.loads((tmp_path / cache / "cache.json").read_text())
                  for cache in ("cache1", "cache3"))
    assert one["count"] == three["count"] == 2
    assert one["mean"] == pytest.approx(three["mean"], abs=1e-4)
