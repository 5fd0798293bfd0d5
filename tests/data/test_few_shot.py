import torch

from anomalib_raad.data.few_shot import VERSIONS, version


def test_there_are_as_many_versions_as_the_paper_has() -> None:
    torch.manual_seed(0)
    image = torch.rand(1, 3, 40, 60)
    versions = torch.cat([version(image, number) for number in range(VERSIONS)])
    assert versions.shape == (32, 3, 40, 60)
    assert len(versions.unique(dim=0)) == 32
    assert versions[0].equal(image[0])
    assert 0 <= versions.min() <= versions.max() <= 1


def test_a_version_is_always_the_same() -> None:
    image = torch.rand(1, 3, 40, 40)
    first = version(image, 5)
    before = torch.random.get_rng_state()
    torch.testing.assert_close(version(image, 5), first)
    assert torch.random.get_rng_state().equal(before)


def test_a_flat_image_has_no_black_corners() -> None:
    versions = [version(torch.full((1, 3, 40, 40), 0.7), number) for number in range(VERSIONS)]
    torch.testing.assert_close(torch.cat(versions), torch.full((32, 3, 40, 40), 0.7))
