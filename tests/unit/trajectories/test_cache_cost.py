"""What ``benchmarks/cache_cost.py`` says of bytes, in small."""

import cache_cost


def test_sizes_are_those_of_the_files_that_are_written():
    """SDXL at 128 px, by hand: 4 x 16 x 16 numbers of a latent, text 2 x (77 x 2048 + 1280).

    Before, two images of x_0, four states and four predictions in float32: 73,728 bytes. Now x_0 in
    float32, and predictions 0 to 4 in bfloat16: 28,672.
    """
    lines = [line.strip("| ").split(" | ") for line in cache_cost.sizes(128, 4)]
    networks = ("SDXL", "Stable Diffusion 3.5", "FLUX.1")
    first = [row for row in lines if row[0] in networks][:6]
    assert [row[:2] for row in first] == [[n, s] for n in networks for s in ("all", "`keep=4`")]
    text = 2 * (77 * 2048 + 1280)
    assert first[0][2] == f"{(73_728 + text) / 1e6:.2f}"
    assert first[0][3] == f"{(28_672 + text) / 1e6:.2f}"
    for row in first:
        assert abs(float(row[3]) - float(row[5])) <= 0.01, row  # beside the file's header
