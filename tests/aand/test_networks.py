import pytest
import torch

from anomalib_raad.aand.networks import ResNetStudent, Student, build_student

CHANNELS = (24, 40, 112)


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (100, 130)])
def test_each_level_has_the_backbones_shape(size: tuple[int, int]) -> None:
    levels = [torch.randn(2, c, -(-size[0] // s), -(-size[1] // s)) for c, s in zip(CHANNELS, (4, 8, 16), strict=True)]
    found = Student(CHANNELS).eval()(levels)
    assert [tuple(level.shape) for level in found] == [tuple(level.shape) for level in levels]


def test_levels_may_have_either_sign() -> None:
    torch.manual_seed(0)
    levels = [torch.randn(2, c, 64 // s, 64 // s) for c, s in zip(CHANNELS, (4, 8, 16), strict=True)]
    for level in Student(CHANNELS)(levels):
        assert (level < 0).any()
        assert (level > 0).any()


def test_the_students_of_resnets_are_anomalibs() -> None:
    assert isinstance(build_student("wide_resnet50_2.tv_in1k", (256, 512, 1024), (1, 2, 3)), ResNetStudent)
    assert isinstance(build_student("resnet18", (64, 128), (1, 2)), Student)
    assert isinstance(build_student("tf_efficientnet_lite0", CHANNELS, (1, 2, 3)), Student)


def test_the_bottleneck_of_wide_resnets_is_the_authors() -> None:
    student = ResNetStudent("wide_resnet50_2")
    assert sum(p.numel() for p in student.bottleneck.parameters()) == pytest.approx(58.9e6, rel=0.01)


@pytest.mark.parametrize("size", [64, 100])
def test_the_resnet_student_has_the_backbones_shape(size: int) -> None:
    levels = [torch.rand(1, c, -(-size // s), -(-size // s)) for c, s in ((64, 4), (128, 8), (256, 16))]
    found = ResNetStudent("resnet18").eval()(levels)
    assert [tuple(level.shape) for level in found] == [tuple(level.shape) for level in levels]
