"""8-bit pixels to continuous values and back."""

from __future__ import annotations

import pytest
import torch

from hflow_fast.data import dequantize, from_uint8, to_uint8

ALL_VALUES = torch.arange(256, dtype=torch.uint8)


def many(values: torch.Tensor, count: int) -> torch.Tensor:
    return values.expand(count, 1, 1, len(values))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("bits", [1, 5, 8])
def test_every_value_is_uniform_in_its_bin(bits: int, generator: torch.Generator):
    count = 20_000
    x = dequantize(many(ALL_VALUES, count), bits=bits, generator=generator)
    assert x.dtype == torch.float32 and x.min() >= -0.5 and x.max() < 0.5
    place = (x.double() + 0.5) * 2**bits - (ALL_VALUES >> (8 - bits))  # in its bin, whatever the value: U[0, 1)
    assert place.min() >= 0 and place.max() < 1
    # Five standard errors of the mean, of the variance (kurtosis 9/5) and of the count of each tenth.
    assert (place.mean(0) - 0.5).abs().max() < 5 * (1 / 12 / count) ** 0.5
    assert (place.var(0) - 1 / 12).abs().max() < 5 * (1 / 180 / count) ** 0.5
    tenths = torch.histc(place, 10, 0, 1) / place.numel()
    assert (tenths - 0.1).abs().max() < 5 * (0.09 / place.numel()) ** 0.5


def test_to_uint8_gives_the_image_back_bit_for_bit(generator: torch.Generator):
    images = many(ALL_VALUES, 4000)
    assert torch.equal(to_uint8(dequantize(images, generator=generator)), images)


def test_fewer_bits_drop_the_low_ones(generator: torch.Generator):
    x = dequantize(many(ALL_VALUES, 100), bits=3, generator=generator)
    assert torch.equal(to_uint8(x) >> 5, many(ALL_VALUES >> 5, 100))


def test_gaussian_noise_is_added(generator: torch.Generator):
    images = many(ALL_VALUES[::16], 50_000)
    clean = dequantize(images, generator=torch.Generator().manual_seed(3))
    noise = dequantize(images, noise_std=0.2, generator=torch.Generator().manual_seed(3)) - clean
    assert abs(noise.mean()) < 5 * 0.2 / noise.numel() ** 0.5
    assert abs(noise.std() - 0.2) < 5 * 0.2 / (2 * noise.numel()) ** 0.5


def test_half_of_the_images_are_mirrored(generator: torch.Generator):
    image = torch.randint(256, (1, 3, 4, 4), dtype=torch.uint8, generator=generator)
    result = to_uint8(dequantize(image.expand(4000, -1, -1, -1), flip=True, generator=generator))
    plain, mirrored = ((result == wanted).all(3).all(2).all(1) for wanted in (image, image.flip(-1)))
    assert torch.equal(plain, ~mirrored)
    assert abs(mirrored.double().mean() - 0.5) < 5 * 0.5 / 4000**0.5


def test_the_generator_decides_everything():
    images = torch.randint(256, (8, 3, 4, 4), dtype=torch.uint8)
    options = {"bits": 6, "noise_std": 0.1, "flip": True}
    one, two, other = (dequantize(images, **options, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_shapes_and_limits():
    assert dequantize(torch.zeros(0, 3, 4, 4, dtype=torch.uint8), flip=True).shape == (0, 3, 4, 4)
    values = torch.tensor([-torch.inf, -9.0, -0.5, 0.0, 0.4999, 0.5, 9.0, torch.inf, torch.nan])
    assert to_uint8(values).tolist() == [0, 0, 0, 128, 255, 255, 255, 255, 0]
    assert to_uint8(torch.tensor([0.25], dtype=torch.float64)).tolist() == [192]


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (torch.zeros(1, 3, 2, 2), {}, "uint8"),
        (torch.zeros(1, 3, 2, 2, dtype=torch.uint8), {"bits": 0}, "bits"),
        (torch.zeros(1, 3, 2, 2, dtype=torch.uint8), {"bits": 9}, "bits"),
        (torch.zeros(1, 3, 2, 2, dtype=torch.uint8), {"noise_std": -1.0}, "noise_std"),
        (torch.zeros(1, 3, 2, 2, dtype=torch.uint8), {"noise_std": float("nan")}, "noise_std"),
        (torch.zeros(3, 2, 2, dtype=torch.uint8), {"flip": True}, "flip"),
    ],
)
def test_bad_arguments(images: torch.Tensor, options: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        dequantize(images, **options)


@pytest.mark.parametrize("bits", range(1, 9))
def test_pixels_of_fewer_bits(bits: int, generator: torch.Generator):
    """As Glow's: ⌊v / 2⁸⁻ⁿ⌋ on the way in, ⌊(x + ½)·2ⁿ⌋·2⁸⁻ⁿ, at most 2ⁿ − 1 steps, on the way out."""
    kept = (ALL_VALUES.double() / 2 ** (8 - bits)).floor()
    x = from_uint8(ALL_VALUES, bits)
    assert torch.equal(x.double(), (kept + 0.5) / 2**bits - 0.5)
    for values in (x, dequantize(many(ALL_VALUES, 50), bits=bits, generator=generator)):
        assert torch.equal(to_uint8(values, bits).double(), (kept * 2 ** (8 - bits)).expand(values.shape))
    outside = torch.tensor([-9.0, 0.5, 9.0, torch.nan])
    assert to_uint8(outside, bits).tolist() == [0, 256 - 2 ** (8 - bits), 256 - 2 ** (8 - bits), 0]


@pytest.mark.parametrize("function", [to_uint8, from_uint8])
@pytest.mark.parametrize("bits", [0, 9])
def test_bits_that_pixels_do_not_have(function, bits: int):
    with pytest.raises(ValueError, match=f"{function.__name__}: bits must be 1 to 8, got {bits}"):
        function(ALL_VALUES, bits)


def test_middle_of_each_value():
    x = from_uint8(ALL_VALUES)
    assert x.dtype == torch.float32 and x[0] == 0.5 / 256 - 0.5 and x[255] == 0.5 - 0.5 / 256
    for shift in (0, -0.49 / 256, 0.49 / 256):
        assert torch.equal(to_uint8(x + shift), ALL_VALUES)
