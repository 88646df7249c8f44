"""
What the GPU path rests on, shown on the CPU: resume in another memory layout, several nodes,
compiled training. That each network runs backward once is in test_train_ae.py.
"""
import json
import os
import socket
import sys

import pytest
import torch

import train_ae
from common import run
from conftest import run_main, start


@pytest.mark.parametrize("before, after", [
    (torch.channels_last, torch.contiguous_format), (torch.contiguous_format, torch.channels_last)])
def test_moments_follow_their_parameters_layout(before, after, tmp_path):
    """A checkpoint of one memory layout goes on in the other: AdamW's steps, bit for bit."""
    def trained(layout, start=None):
        torch.manual_seed(0)
        network = torch.nn.Conv2d(8, 16, 3).to(memory_format=layout)   # whole vectors
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, fused=True)
        parts, steps = dict(model=network, optimizer=optimizer), range(3)
        if start:
            run.restore(tmp_path, torch.load(start, weights_only=True), parts)
            steps = range(3, 6)
        for step in steps:
            for p in network.parameters():
                generator = torch.Generator().manual_seed(step)
                p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
            optimizer.step()
        return parts
    file = tmp_path / "ckpt.pt"
    run.save_checkpoint(file, {k: v.state_dict() for k, v in trained(before).items()})
    switched, straight = trained(after, file), trained(before, file)
    for a, b in zip(switched["model"].parameters(), straight["model"].parameters()):
        assert torch.equal(a, b)
    for p, state in switched["optimizer"].state.items():
        assert state["exp_avg"].stride() == p.stride()


# ---- several nodes

def two_nodes(module):
    """In a child process: as if each process were a node of its own."""
    os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"] = "0", "1"
    run.time.sleep = lambda seconds: None          # a later rank waits before it complains


def run_two(tmp_path, module, *flags, **options):
    """Two processes, each in a folder of its own; returns their exit codes and what they said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(2):
        (tmp_path / f"node{rank}").mkdir(exist_ok=True)
        processes.append(start(module, *flags, cwd=tmp_path / f"node{rank}", rank=rank, world=2,
                               output=tmp_path / f"{rank}.txt", port=port, **options))
    for process in processes:
        process.join(90)
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    return [process.exitcode for process in processes], said


QUICK = ("--preset quick --image_size 16 --batch_size 4 --val_images 4 --device cpu --log_every 1 "
         "--eval_every 10 --reg esm --out run").split()


def test_a_node_without_the_checkpoint_ends_the_resume(tmp_path, monkeypatch):
    """--resume on two nodes, one of which has no checkpoint: one line with both steps, exit 2."""
    (tmp_path / "node0").mkdir()
    monkeypatch.chdir(tmp_path / "node0")
    run_main(train_ae, *QUICK, "--steps", 1, monkeypatch=monkeypatch)
    codes, said = run_two(tmp_path, "train_ae", *QUICK, "--steps", 2, "--resume", patch=two_nodes)
    assert codes == [2, 2] and "find run at steps [1, 0]" in said[0], said
    assert "Traceback" not in said[0] + said[1]


def test_several_nodes_do_not_write_one_cache(material, tmp_path):
    """Encoding on two nodes is refused with the way out: one node first."""
    flags = ["--preset", "quick", "--model", "SiT-tiny/4", "--batch_size", 4, "--device", "cpu",
             "--ae", material / "ae" / "ckpt.pt", "--data", material / "images", "--steps", 1,
             "--encode_batch", 8, "--cache", "cache", "--out", "run"]
    codes, said = run_two(tmp_path, "train_diffusion", *flags, patch=two_nodes)
    assert codes == [2, 2] and "--cache cache: " in said[0] and "--nnodes=1" in said[0], said
    assert not list(tmp_path.rglob("cache"))


# ---- torch.compile on the CPU

@pytest.mark.parametrize("reg", ["kl", "uae"])
def test_compiled_training_is_eager_training(reg, tmp_path, monkeypatch, request):
    """GAN from step 2, LPIPS, alignment; from a cold and a warm Inductor cache: eager's losses."""
    if not request.config.getoption("--long"):
        pytest.skip("--long compiles (about two minutes a method)")
    from torchvision.models import VGG16_Weights, vgg16
    place = tmp_path / "hub" / "checkpoints" / os.path.basename(VGG16_Weights.IMAGENET1K_V1.url)
    place.parent.mkdir(parents=True)
    torch.save(vgg16().state_dict(), place)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    flags = ("--preset quick --steps 6 --log_every 1 --eval_every 3 --val_images 5 --lr 1e-6 "
             "--gan_weight 0.5 --gan_start 2 --lpips_weight 0.5 --batch_size 4 --device cpu "
             f"--image_size 32 --encoder_source random --reg {reg}").split()
    logs = {}
    for name, compile in (("eager", "off"), ("cold", "on"), ("warm", "on")):
        torch.compiler.reset()
        run_main(train_ae, *flags, "--compile", compile, "--out", tmp_path / name,
            monkeypatch=monkeypatch)
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        logs[name] = [json.loads(line) for line in lines]
    assert logs["cold"] == logs["warm"]
    for eager, cold in zip(logs["eager"], logs["cold"], strict=True):
        assert eager == pytest.approx(cold, rel=5e-4, abs=1e-5)    # of the ratios, too


@pytest.mark.parametrize("reg, flags, compiled", [
    ("esm", [], None), ("eq", [], "off"), ("se", [], "off"), ("vf", [], "off"),
    ("eq", ["--compile", "on"], "on")])
def test_methods_that_would_compile_again_and_again_are_not_compiled_by_default(
        reg, flags, compiled, monkeypatch):
    """eq and se use many sizes, vf runs backward twice; --compile on wins."""
    monkeypatch.setattr(sys, "argv", ["train_ae.py", "--reg", reg, *flags])
    assert train_ae.get_args().compile == compiled


def test_vf_refuses_to_be_compiled(tmp_path, monkeypatch):
    """Its second pass through a compiled graph could be silently wrong."""
    with pytest.raises(ValueError, match="--reg vf --compile on"):
        run_main(train_ae, *QUICK, "--reg", "vf", "--compile", "on", "--out", tmp_path / "run",
                 monkeypatch=monkeypatch)
