import torch

from anomalib_raad.teacher.statistics import channel_mean_std


def test_statistics_are_those_of_all_positions_of_all_images() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [3 + torch.randn(n, 5, 4, 6, generator=generator) for n in (1, 3, 2)]
    mean, std = channel_mean_std(batches)
    together = torch.cat(batches)
    torch.testing.assert_close(mean, together.mean((0, 2, 3), keepdim=True))
    torch.testing.assert_close(std, together.std((0, 2, 3), keepdim=True, correction=0))


def test_a_dead_channel_has_a_positive_deviation() -> None:
    _, std = channel_mean_std([torch.full((2, 1, 3, 3), 7.0)])
    assert std.item() > 0
