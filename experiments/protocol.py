"""
The protocol of the miniature: which runs there are, with which flags, and what is claimed of them.
README.md beside this file says why. miniature.py makes the runs, report.py compares them.
"""
import pathlib

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "results"
SEEDS, AE_STEPS, SIT_STEPS, LONG_STEPS = (0, 1, 2), 1200, 2000, 8000
REFERENCE, HELD_OUT = 5_000, 2_000                         # training images in FD, rFD, dFD; others
AE = (f"--model f2d2-tiny --steps {AE_STEPS} --batch_size 16 --lr 2e-3 "
      f"--eval_every {AE_STEPS} --val_images 1000")
SIT = (f"--model SiT-tiny/2 --steps {SIT_STEPS} --batch_size 32 --lr 1e-3 --ema 0.998 "
       "--eval_every 1000")
GEN = "--num_samples 2000 --steps 30 --batch_size 100 --reference_images 0"
REPA = ("--repa_depth 1 --dog_sigma1 0.5 --dog_sigma2 1.25 "
        "--encoder labelnet --encoder_source experiments")
AUTOENCODERS = {                                           # flags of train_ae.py
    "kl": "--reg kl --kl_weight 3e-5",
    "se": "--reg se",
    "esm": "--reg esm",
    "dsm": "--reg dsm",
    "esm-gamma0.6": "--reg esm --gamma 0.6",
    "esm-gamma1.4": "--reg esm --gamma 1.4",
    "esm-w0.1": "--reg esm --esm_weight 0.1",
    "esm-w0.001": "--reg esm --esm_weight 0.001",
    "dsm-0-8-12": "--reg dsm --dsm_masks 0 8 12",
    "dsm-0-6-8-10-12": "--reg dsm --dsm_masks 0 6 8 10 12",
    "dsm-0-8-10-12-13": "--reg dsm --dsm_masks 0 8 10 12 13",
    # not in the paper
    "kl-1e-6": "--reg kl --kl_weight 1e-6",
    "esm-w1": "--reg esm --esm_weight 1",
    "eq": "--reg eq",
}
FIRST = ["kl", "dsm", "esm", "se"]         # Table 2; in figures/samples.png
LONG = [f"{name}-long" for name in FIRST]  # the same with more steps
VARIANTS = {                               # run: its autoencoder, flags of train_diffusion.py
    **{long: (name, f"--steps {LONG_STEPS}") for long, name in zip(LONG, FIRST)},
    "kl-repa": ("kl", f"--repa repa {REPA}"),
    "dsm-repa": ("dsm", f"--repa repa {REPA}"),
    "kl-irepa": ("kl", f"--repa irepa {REPA}"),
    "kl-dog": ("kl", f"--repa dog {REPA}"),
}
TABLES = {                                 # in the order in which they are run
    "Table 2": FIRST,
    "Table 2, four times the steps of diffusion": LONG,
    "Table 7": ["esm-gamma0.6", "esm", "esm-gamma1.4", "esm-w0.1", "esm-w0.001"],
    "Table 8": ["dsm-0-8-12", "dsm", "dsm-0-6-8-10-12", "dsm-0-8-10-12-13"],
    "Table 4": ["kl-repa", "kl-irepa", "kl-dog"],
    "Ours": ["kl", "kl-1e-6", "esm", "esm-w1", "eq", "dsm"],
    "Table 3": ["kl", "dsm", "kl-repa", "dsm-repa"],
}
GFID = ["FD_cifar", "dFD_cifar"]                           # what stands here for the paper's gFID
TABLE_2 = [                                                # claims: words, run, run
    ("DSM below Scale Equivariance, 4.44 < 5.87 (f8d4), 4.49 < 5.46 (f16d16)", "dsm", "se"),
    ("Scale Equivariance below SD-VAE, 5.87 < 6.63 (f8d4), 5.46 < 6.88 (f16d16)", "se", "kl"),
    ("DSM below SD-VAE, 4.44 < 6.63 (f8d4), 4.49 < 6.88 (f16d16)", "dsm", "kl"),
    ("ESM below SD-VAE, 5.91 < 6.63 (f8d4), 5.84 < 6.88 (f16d16)", "esm", "kl"),
    ("DSM below ESM, 4.44 < 5.91 (f8d4), 4.49 < 5.84 (f16d16)", "dsm", "esm"),
]
# Where it is claimed, the numbers here, the order of the runs, and the claims.
PAPER_CLAIMS = [
    ("Table 2, gFID", GFID, "below", TABLE_2),
    (f"Table 2, gFID, here with {LONG_STEPS:,} steps", GFID, "below",
     [(words, f"{a}-long", f"{b}-long") for words, a, b in TABLE_2]),
    ("Table 2, PSNR", ["psnr"], "above", [
        ("ESM above SD-VAE, 31.63 > 31.23 (f8d4), 31.30 > 30.08 (f16d16)", "esm", "kl")]),
    ("Table 3, gFID at 400k", GFID, "below", [
        ("DSM below SD-VAE without REPA, 12.20 < 14.58", "dsm", "kl"),
        ("DSM below SD-VAE with REPA, 6.48 < 7.60", "dsm-repa", "kl-repa"),
        ("SD-VAE with REPA below without, 7.60 < 14.58", "kl-repa", "kl")]),
    ("Table 4, gFID at 400k", GFID, "below", [
        ("REPA-DoG below iREPA, 4.98 < 5.07 (cfg 1.8; from 300k on only), 20.37 < 21.40 "
         "(no guidance, Sec. 4.2)", "kl-dog", "kl-irepa"),
        ("iREPA below REPA, 5.07 < 5.68 (cfg 1.8), 21.40 < 22.75 (no guidance, Sec. 4.2)",
         "kl-irepa", "kl-repa")]),
    ("Table 7, gFID", GFID, "below", [
        ("gamma 1.0 below 0.6 at weight 0.01, 5.84 < 5.90", "esm", "esm-gamma0.6"),
        ("gamma 1.0 below 1.4 at weight 0.01, 5.84 < 6.57", "esm", "esm-gamma1.4"),
        ("weight 0.01 below 0.1 at gamma 1, 5.84 < 6.82", "esm", "esm-w0.1"),
        ("weight 0.01 below 0.001 at gamma 1, 5.84 < 6.00", "esm", "esm-w0.001")]),
    ("Table 8, gFID", GFID, "below", [
        ("{0, 8, 10, 12} below {0, 6, 8, 10, 12}, 4.49 < 4.61", "dsm", "dsm-0-6-8-10-12"),
        ("{0, 8, 10, 12} below {0, 8, 12}, 4.49 < 5.02", "dsm", "dsm-0-8-12"),
        ("{0, 8, 10, 12} below {0, 8, 10, 12, 13}, 4.49 < 5.33", "dsm", "dsm-0-8-10-12-13")]),
    ("Fig. 3, smoothness of the latents", ["alpha"], "above", [
        ("DSM above SD-VAE", "dsm", "kl"),
        ("ESM above SD-VAE", "esm", "kl")]),
    ("Figs. 4 and 5, KL of the published curves from the flattened target", ["kl_from_target"],
     "below", [
        ("Scale Equivariance below SD-VAE, .020 < .038", "se", "kl"),
        ("DSM below SD-VAE, .0054 < .038", "dsm", "kl"),
        ("ESM below SD-VAE, .0044 < .038", "esm", "kl"),
        ("DSM below Scale Equivariance, .0054 < .020", "dsm", "se"),
        ("ESM below DSM, .0044 < .0054", "esm", "dsm")]),
]
OUR_CLAIMS = [
    ("KL's weight, generation", GFID, "below", [
        ("DSM below KL with weight 1e-6", "dsm", "kl-1e-6"),
        ("ESM below KL with weight 1e-6", "esm", "kl-1e-6")]),
    ("ESM's weight 1, generation", GFID, "below", [
        ("ESM with weight 1 below SD-VAE", "esm-w1", "kl"),
        ("ESM with weight 1 below ESM", "esm-w1", "esm")]),
    ("EQ-VAE's place, generation", GFID, "below", [
        ("DSM below EQ-VAE", "dsm", "eq"),
        ("EQ-VAE below SD-VAE", "eq", "kl")]),
    ("Downsampling makes latents smoother", ["alpha"], "above", [
        ("Scale Equivariance above SD-VAE", "se", "kl"),
        ("EQ-VAE above SD-VAE", "eq", "kl")]),
]


def plan():
    """The runs in order of importance, (name, seed): Table 2 with all seeds, the rest with two."""
    runs = [(name, seed) for names in (FIRST, LONG) for seed in SEEDS for name in names]
    every = [name for names in TABLES.values() for name in names]
    runs += [(name, seed) for seed in SEEDS[:2] for name in every]
    return list(dict.fromkeys(runs))


def sit_steps(name):
    """Steps of diffusion in a run of this name."""
    return LONG_STEPS if name in LONG else SIT_STEPS
