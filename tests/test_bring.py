"""What users bring to the scripts: weights to start from, a cluster's environment, one GPU."""
import json
import os
import shutil
from functools import partial

import pytest
import torch
from torch.distributed.elastic.utils.distributed import get_free_port

import train_ae
import train_diffusion
from common import run, weights
from common.data import open_data
from common.weights import autoencoder_hash, load_autoencoder
from conftest import LONG, run_main, same
from vae import CONFIGS

TINY = ("--preset quick --image_size 32 --batch_size 4 --val_images 4 --workers 0 --device cpu "
        "--log_every 1 --eval_every 100 --warmup_steps 2 --lpips_weight 0")


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(script, flags), in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda script, flags: run_main(script, *flags.split())


def test_init_is_known_by_its_weights(train, capsys):
    """So is its model. Step 0 validates them, a moved copy resumes; others there are refused."""
    tune = f"{TINY} --reg dsm --out tuned --resume"
    train(train_ae, f"{TINY} --steps 2 --model f2d4-tiny --out first")
    train(train_ae, f"{tune} --steps 1 --init first/ckpt.pt")
    assert load_autoencoder("tuned").config == CONFIGS["f2d4-tiny"]
    assert capsys.readouterr().out.count("f2d4-tiny: 167,959 parameters") == 2
    last, first = (json.loads(open(f"{out}/log.jsonl").readlines()[i])
                   for out, i in (("first", -1), ("tuned", 0)))
    assert last["val_psnr"] == first["val_psnr"]
    before, after = (torch.load(f"{out}/ckpt.pt", weights_only=True) for out in ("first", "tuned"))
    assert after["args"]["init"] == autoencoder_hash(load_autoencoder("first"))
    assert not same(before["model"], after["model"])
    shutil.copy("first/ckpt.pt", "elsewhere.pt")
    train(train_ae, f"{tune} --steps 2 --init elsewhere.pt")
    before["model"]["encoder.conv_in.weight"] += 1
    torch.save(before, "first/ckpt.pt")
    with pytest.raises(ValueError, match="other flags: --init|--init .* other flags"):
        train(train_ae, f"{tune} --steps 3 --init first/ckpt.pt")


def test_slurms_local_rank_will_do(monkeypatch):
    """srun with RANK, WORLD_SIZE and the master given: SLURM_LOCALID is the local rank."""
    for name, value in dict(RANK=0, WORLD_SIZE=1, SLURM_LOCALID=0, MASTER_ADDR="127.0.0.1",
                            MASTER_PORT=get_free_port()).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("LOCAL_RANK", "")                   # which is removed afterwards
    monkeypatch.delenv("LOCAL_RANK")
    assert run.init_distributed("cpu")[:2] == (0, 1)
    run.dist.destroy_process_group()
    assert os.environ["LOCAL_RANK"] == "0"


@LONG
@pytest.mark.filterwarnings("ignore:.*untrained")
def test_one_gpu_preset_runs(train, monkeypatch):
    """--preset one-gpu in both training scripts, GAN included: two steps on the CPU."""
    small = "--preset one-gpu --batch_size 2 --device cpu --workers 0 --log_every 1"
    train(train_ae, f"{small} --reg dsm --steps 2 --gan_start 0 --val_images 2 --lpips_weight 0 "
          "--out ae")
    monkeypatch.setattr(weights, "open_data", partial(open_data, builtin_images=8))
    train(train_diffusion, f"{small} --ae ae/ckpt.pt --steps 1 --sample_steps 2 --encode_batch 8 "
          "--out sit")
    steps = [json.loads(line) for line in open("ae/log.jsonl")]
    assert "gan" in steps[1] and "disc" in steps[2] and os.path.exists("sit/samples.png")


def test_a_runs_folder_stands_for_its_checkpoint(material, train):
    """--ae FOLDER: images, size and seed are those of the run in it; its name keeps its dots."""
    os.symlink(material / "ae", "run-0.5")
    folder, file = map(load_autoencoder, ("run-0.5", "run-0.5/ckpt.pt"))
    assert folder.trained == file.trained != {}
    assert [run.run_name(name) for name in ("v1.0", "v1.5", "a.safetensors")] == [
        "v1.0", "v1.5", "a"]
    train(train_diffusion, "--preset quick --model SiT-tiny/4 --steps 1 --batch_size 4 "
          "--device cpu --sample_steps 2 --encode_batch 8 --ae run-0.5 --out sit")
    checkpoint = run.load_checkpoint("sit/ckpt.pt", "diffusion")
    assert checkpoint["image_size"] == 16 and checkpoint["model_args"]["num_classes"] == 2
