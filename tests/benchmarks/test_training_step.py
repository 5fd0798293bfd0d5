import pytest
import torch

from anomalib_raad import RaadModel
from anomalib_raad.teacher.pdn import MARGIN
from benchmarks.training_step import Variant, _multiply_adds, _step


def convolutions(side: int) -> tuple[int, int, int, int]:
    """Multiply-adds of PDN-S on a square image, without padding, with 384 outputs."""
    first = side - 3
    second = first // 2 - 3
    third = second // 2 - 2
    return first**2 * 128 * 48, second**2 * 256 * 2048, third**2 * 256 * 2304, (third - 3) ** 2 * 384 * 4096


def student_pass(side: int) -> int:
    """Forward, by the weights, and by the input except the image."""
    return 3 * sum(convolutions(side)) - convolutions(side)[0]


PDN, CONV4, STUDENT_PASS = sum(convolutions(256)), convolutions(256)[-1], student_pass(256)
EXTENDED = 256 + 2 * MARGIN


@pytest.fixture(scope="module")
def autoencoder_pass() -> int:
    """Forward and backward of the autoencoder, measured alone."""
    model = RaadModel().train()
    return _multiply_adds(lambda: model.ae(torch.rand(1, 3, 256, 256), torch.Size([60, 60])).sum().backward())


def test_efficientads_step_is_two_teachers_and_three_whole_students(autoencoder_pass: int) -> None:
    counted = _multiply_adds(_step(Variant("EfficientAd", penalty=True)))
    assert counted == 2 * PDN + 3 * (STUDENT_PASS + 3 * CONV4) + autoencoder_pass


@pytest.mark.parametrize("penalty", [True, False])
def test_raads_step_is_one_teacher_and_only_the_halves_of_the_student_it_needs(
    autoencoder_pass: int,
    penalty: bool,
) -> None:
    counted = _multiply_adds(_step(Variant("Raad", penalty=penalty)))
    students = (3 if penalty else 2) * student_pass(EXTENDED)
    assert counted == sum(convolutions(EXTENDED)) + students + autoencoder_pass
