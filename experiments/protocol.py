"""
The protocol of the miniature: which runs there are, with which flags, what is claimed of them, and
by which test. It is committed before its runs; README.md beside this file says why it is so.
miniature.py makes the runs, report.py compares them.
"""
import pathlib

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "results"
SEEDS = range(6)                           # pairs of a comparison: the least for a verdict
AE_STEPS, SIT_STEPS = 4800, 4000
HELD_OUT = 1000                            # images that no network was trained on, of 5,000
AE = (f"--model f4d4-tiny --data discs --steps {AE_STEPS} --eval_every 1200 "
      f"--val_images {HELD_OUT} --log_every 100")
SIT = f"--model SiT-mini/1 --steps {SIT_STEPS} --eval_every {SIT_STEPS} --log_every 100"
GEN = "--num_samples 1000 --steps 50 --batch_size 100 --reference_images 0"
REPA = ("--repa_depth 1 --dog_sigma1 0.5 --dog_sigma2 1.25 "
        "--encoder labelnet --encoder_source experiments")

# The loss is L1, a mean over pixels, + weight * KL, a sum over the latent. The paper's latents have
# 4,096 numbers (f16d16 at 256 px) and ours 256, so 16 * 1e-6 weighs as much per number: "kl".
AUTOENCODERS = {                           # flags of train_ae.py
    "kl": "--reg kl --kl_weight 1.6e-5",
    "kl-1e-6": "--reg kl --kl_weight 1e-6",
    "se": "--reg se",
    "esm": "--reg esm",
    "dsm": "--reg dsm",
    "dsm-0-8-12": "--reg dsm --dsm_masks 0 8 12",
    "dsm-0-6-8-10-12": "--reg dsm --dsm_masks 0 6 8 10 12",
    "dsm-0-8-10-12-13": "--reg dsm --dsm_masks 0 8 10 12 13",
    "esm-gamma0.6": "--reg esm --gamma 0.6",
    "esm-gamma1.4": "--reg esm --gamma 1.4",
    "esm-w0.1": "--reg esm --esm_weight 0.1",
    "esm-w0.001": "--reg esm --esm_weight 0.001",
}
VARIANTS = {                               # run: its autoencoder, flags of train_diffusion.py
    "kl-repa": ("kl", f"--repa repa {REPA}"),
    "kl-irepa": ("kl", f"--repa irepa {REPA}"),
    "kl-dog": ("kl", f"--repa dog {REPA}"),
    "dsm-repa": ("dsm", f"--repa repa {REPA}"),
}
TABLES = {                                 # in the order in which they are run, seed by seed
    "Table 2": ["kl", "dsm", "esm", "se", "kl-1e-6"],
    "Table 4": ["kl-repa", "kl-irepa", "kl-dog"],
    "Table 3": ["kl", "dsm", "kl-repa", "dsm-repa"],
    "Table 8": ["dsm-0-8-12", "dsm", "dsm-0-6-8-10-12", "dsm-0-8-10-12-13"],
    "Table 7": ["esm-gamma0.6", "esm", "esm-gamma1.4", "esm-w0.1", "esm-w0.001"],
}
SPREAD = ["kl", "dsm"]                     # each autoencoder also with a second diffusion seed
SECOND = 100                               # which is its own seed plus this

# Claims: where, the number here, its order, and [(words, run, run)]. In the primary family the five
# p-values are corrected by Holm's method; the others are exploratory, and not corrected.
PRIMARY = ("Table 2, gFID", "FD", "below", [
    ("DSM below Scale Equivariance, 4.44 < 5.87 (f8d4), 4.49 < 5.46 (f16d16)", "dsm", "se"),
    ("Scale Equivariance below SD-VAE, 5.87 < 6.63 (f8d4), 5.46 < 6.88 (f16d16)", "se", "kl"),
    ("DSM below SD-VAE, 4.44 < 6.63 (f8d4), 4.49 < 6.88 (f16d16)", "dsm", "kl"),
    ("ESM below SD-VAE, 5.91 < 6.63 (f8d4), 5.84 < 6.88 (f16d16)", "esm", "kl"),
    ("DSM below ESM, 4.44 < 5.91 (f8d4), 4.49 < 5.84 (f16d16)", "dsm", "esm"),
])
ALPHA = 0.05                               # of the family; also of each exploratory test
KL_AS_PRINTED = [(words, a, "kl-1e-6") for words, a, b in PRIMARY[3] if b == "kl"]
EXPLORATORY = [
    ("Table 2, gFID, KL at 1e-6", "FD", "below", KL_AS_PRINTED),
    ("Table 2, gFID", "dFD", "below", PRIMARY[3]),
    ("Table 2, gFID, KL at 1e-6, added after the runs", "dFD", "below", KL_AS_PRINTED),
    ("Table 2, PSNR", "psnr", "above", [
        ("ESM above SD-VAE, 31.63 > 31.23 (f8d4), 31.30 > 30.08 (f16d16)", "esm", "kl")]),
    ("Table 4, gFID at 400k", "FD", "below", [
        ("iREPA below REPA, 5.07 < 5.68 (cfg 1.8), 21.40 < 22.75 (no guidance, Sec. 4.2)",
         "kl-irepa", "kl-repa"),
        ("REPA-DoG below iREPA, 4.98 < 5.07 (cfg 1.8; from 300k on only), 20.37 < 21.40 "
         "(no guidance, Sec. 4.2)", "kl-dog", "kl-irepa")]),
    ("Table 3, gFID at 400k", "FD", "below", [
        ("DSM below SD-VAE without REPA, 12.20 < 14.58", "dsm", "kl"),
        ("DSM below SD-VAE with REPA, 6.48 < 7.60", "dsm-repa", "kl-repa"),
        ("SD-VAE with REPA below without, 7.60 < 14.58", "kl-repa", "kl")]),
    ("Table 8, gFID", "FD", "below", [
        ("{0, 8, 10, 12} below {0, 6, 8, 10, 12}, 4.49 < 4.61", "dsm", "dsm-0-6-8-10-12"),
        ("{0, 8, 10, 12} below {0, 8, 12}, 4.49 < 5.02", "dsm", "dsm-0-8-12"),
        ("{0, 8, 10, 12} below {0, 8, 10, 12, 13}, 4.49 < 5.33", "dsm", "dsm-0-8-10-12-13")]),
    ("Table 7, gFID", "FD", "below", [
        ("gamma 1.0 below 0.6 at weight 0.01, 5.84 < 5.90", "esm", "esm-gamma0.6"),
        ("gamma 1.0 below 1.4 at weight 0.01, 5.84 < 6.57", "esm", "esm-gamma1.4"),
        ("weight 0.01 below 0.1 at gamma 1, 5.84 < 6.82", "esm", "esm-w0.1"),
        ("weight 0.01 below 0.001 at gamma 1, 5.84 < 6.00", "esm", "esm-w0.001")]),
    ("Fig. 3, smoothness of the latents", "alpha", "above", [
        ("DSM above SD-VAE", "dsm", "kl"),
        ("ESM above SD-VAE", "esm", "kl")]),
    ("Figs. 4 and 5, KL of the published curves from the flattened target", "kl_from_target",
     "below", [
        ("Scale Equivariance below SD-VAE, .020 < .038", "se", "kl"),
        ("DSM below SD-VAE, .0054 < .038", "dsm", "kl"),
        ("ESM below SD-VAE, .0044 < .038", "esm", "kl"),
        ("DSM below Scale Equivariance, .0054 < .020", "dsm", "se"),
        ("ESM below DSM, .0044 < .0054", "esm", "dsm")]),
]
HEADLINE = ("Table 2, gFID, KL at 1e-6", "Table 2, PSNR", "Table 4, gFID at 400k")   # on the page


def plan(only=(), seeds=SEEDS):
    """
    The runs in the order in which they are made, [(name, seed of the autoencoder, seed of the
    diffusion)]: table by table, seed by seed, so that all runs of a comparison have the same seeds
    wherever it is stopped; then the second diffusion seeds.
    """
    runs = [(name, seed, seed) for names in TABLES.values() for seed in seeds for name in names]
    runs += [(name, seed, seed + SECOND) for seed in seeds for name in SPREAD]
    return [run for run in dict.fromkeys(runs) if not only or run[0] in only]
