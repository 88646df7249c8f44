"""tests/benchmark.py runs, and its last line is JSON. What it measures is asserted nowhere."""
import json

import benchmark

from conftest import run_main


def test_the_last_line_is_json(capsys):
    """One autoencoder's steps with the GAN, one cheap section: rows with numbers above 0."""
    flags = "--quick --device cpu --section ae peers --model f2d4-tiny --reg esm --repeats 1"
    run_main(benchmark, *flags.split())
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row.pop("name"): row for row in result["rows"]}
    assert result["device"] == "cpu" and len(rows) == 6
    step, disc = (rows[f"f2d4-tiny --reg none, LPIPS, GAN{end}"] for end in ("", ": discriminator"))
    assert step.keys() == {"ms", "images_per_s", "peak_mb", "gflop_per_image", "mfu"}
    assert all(value > 0 for row in rows.values() for value in row.values())
    # f2d4-tiny at 32 px: forward 0.13, LPIPS 1.9 with its backward pass, no backward for disc
    assert 2 < step["gflop_per_image"] < 3 and disc["gflop_per_image"] < 1
