import pytest
import torch

from anomalib_raad import RaadModel
from benchmarks.training_step import Variant, _multiply_adds, _step

# Multiply-adds of PDN-S on a 256x256 image, without padding, with 384 outputs.
CONV1, CONV2, CONV3, CONV4 = 253**2 * 128 * 48, 123**2 * 256 * 2048, 59**2 * 256 * 2304, 56**2 * 384 * 4096
PDN = CONV1 + CONV2 + CONV3 + CONV4
STUDENT_PASS = 3 * PDN - CONV1  # forward, by the weights, and by the input except the image


@pytest.fixture(scope="module")
def autoencoder_pass() -> int:
    """Forward and backward of the autoencoder, measured alone."""
    model = RaadModel().train()
    return _multiply_adds(lambda: model.ae(torch.rand(1, 3, 256, 256), (56, 56)).sum().backward())


def test_efficientads_step_is_two_teachers_and_three_whole_students(autoencoder_pass: int) -> None:
    counted = _multiply_adds(_step(Variant("EfficientAd", penalty=True)))
    assert counted == 2 * PDN + 3 * (STUDENT_PASS + 3 * CONV4) + autoencoder_pass


@pytest.mark.parametrize("penalty", [True, False])
def test_raads_step_is_one_teacher_and_only_the_halves_of_the_student_it_needs(
    autoencoder_pass: int,
    penalty: bool,
) -> None:
    counted = _multiply_adds(_step(Variant("Raad", penalty=penalty)))
    assert counted == PDN + (3 if penalty else 2) * STUDENT_PASS + autoencoder_pass
