"""What users bring to the scripts: weights to start from, a cluster's environment, one GPU."""
import json
import os
import pathlib

import pytest
import torch

import train_ae
import train_diffusion
from common import run
from common.data import open_data
from common.weights import autoencoder_hash, load_autoencoder
from conftest import run_main, same
from vae import CONFIGS

TINY = ("--preset quick --image_size 32 --batch_size 4 --val_images 4 --workers 0 --device cpu "
        "--log_every 1 --eval_every 100 --warmup_steps 2 --lpips_weight 0").split()


def test_init_is_known_by_its_weights(tmp_path, monkeypatch):
    """Step 0 validates them, a moved copy resumes; others under the old path are refused."""
    file, out = tmp_path / "first" / "ckpt.pt", tmp_path / "tuned"
    flags = [*TINY, "--reg", "dsm", "--out", out]
    run_main(train_ae, *TINY, "--steps", 2, "--out", file.parent, monkeypatch=monkeypatch)
    run_main(train_ae, *flags, "--steps", 1, "--init", file, monkeypatch=monkeypatch)
    last, first = [json.loads((folder / "log.jsonl").read_text().splitlines()[i])
                   for folder, i in ((file.parent, -1), (out, 0))]
    assert last["val_psnr"] == first["val_psnr"]
    before, after = (torch.load(path, weights_only=True) for path in (file, out / "ckpt.pt"))
    assert after["args"]["init"] == autoencoder_hash(load_autoencoder(file))
    assert not same(before["model"], after["model"])
    copy = tmp_path / "elsewhere.pt"
    copy.write_bytes(file.read_bytes())
    flags.append("--resume")
    run_main(train_ae, *flags, "--steps", 2, "--init", copy, monkeypatch=monkeypatch)
    before["model"]["encoder.conv_in.weight"] += 1
    torch.save(before, file)
    with pytest.raises(ValueError, match="other flags: --init|--init .* other flags"):
        run_main(train_ae, *flags, "--steps", 3, "--init", file, monkeypatch=monkeypatch)


def test_the_model_follows_from_the_file(tmp_path, monkeypatch, capsys):
    """Released weights know their architecture."""
    def train(out, *flags):
        run_main(train_ae, *TINY, "--steps", 0, "--out", tmp_path / out, *flags,
            monkeypatch=monkeypatch)
        return tmp_path / out / "ckpt.pt"
    file = train("f2", "--model", "f2d4-tiny")
    assert load_autoencoder(train("run", "--init", file)).config == CONFIGS["f2d4-tiny"]
    assert "f2d4-tiny: 167,959 parameters" in capsys.readouterr().out


def test_slurms_local_rank_will_do(tmp_path, monkeypatch):
    """srun with RANK, WORLD_SIZE and the master given: SLURM_LOCALID is the local rank."""
    for name, value in dict(RANK=0, WORLD_SIZE=1, SLURM_LOCALID=0, MASTER_ADDR="127.0.0.1",
                            MASTER_PORT=29563).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert run.init_distributed("cpu")[:2] == (0, 1)
    run.dist.destroy_process_group()
    assert os.environ["LOCAL_RANK"] == "0"


@pytest.mark.filterwarnings("ignore:.*untrained")
def test_one_gpu_preset_runs(tmp_path, monkeypatch, request):
    """--preset one-gpu in both training scripts, GAN included: two steps on the CPU."""
    if not request.config.getoption("--long"):
        pytest.skip("--long runs it")
    small = ["--batch_size", 2, "--device", "cpu", "--workers", 0, "--log_every", 1]
    run_main(train_ae, "--preset", "one-gpu", "--reg", "dsm", *small, "--steps", 2,
        "--gan_start", 0, "--val_images", 2, "--lpips_weight", 0,
        "--out", tmp_path / "ae", monkeypatch=monkeypatch)
    monkeypatch.setattr(train_diffusion, "open_data",
                        lambda *args, **options: open_data(*args, builtin_images=8, **options))
    run_main(train_diffusion, "--preset", "one-gpu", "--ae", tmp_path / "ae" / "ckpt.pt", *small,
        "--steps", 1, "--sample_steps", 2, "--cache", tmp_path / "cache", "--encode_batch", 8,
        "--out", tmp_path / "sit", monkeypatch=monkeypatch)
    assert (tmp_path / "sit" / "samples.png").exists()
    steps = [json.loads(line) for line in pathlib.Path(tmp_path / "ae/log.jsonl").open()]
    assert "gan" in steps[1] and "disc" in steps[2]


def test_a_runs_folder_stands_for_its_checkpoint(material, tmp_path, monkeypatch):
    """--ae FOLDER: images, size and seed are those of the run in it; its name keeps its dots."""
    folder = tmp_path / "run-0.5"
    folder.symlink_to(material / "ae")
    assert run.checkpoint_args(folder) == run.checkpoint_args(folder / "ckpt.pt") != {}
    names = ("v1.0", "v1.5", "a.safetensors")
    assert [run.run_name(tmp_path / name) for name in names] == ["v1.0", "v1.5", "a"]
    monkeypatch.chdir(tmp_path)
    flags = "--model SiT-tiny/4 --steps 1 --batch_size 4 --device cpu --sample_steps 2".split()
    run_main(train_diffusion, "--preset", "quick", *flags, "--encode_batch", 8, "--ae", folder,
        "--out", "sit", monkeypatch=monkeypatch)
    checkpoint = run.load_checkpoint("sit/ckpt.pt", "diffusion")
    assert checkpoint["image_size"] == 16 and checkpoint["model_args"]["num_classes"] == 2
