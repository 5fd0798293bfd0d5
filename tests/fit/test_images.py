from itertools import chain

import pytest
import torch

from anomalib_raad.fit.images import NormalImages, ResumableBatches


def run(batches: ResumableBatches, epochs: int, limit: int | None = None) -> list[list[int]]:
    """Use batches as Lightning does: a new iteration each epoch, cut off at the epoch's length."""
    used = []
    batches.position = lambda: len(used)
    for _ in range(epochs):
        for number, batch in enumerate(batches):
            if number == limit:
                break
            used.append(batch)
    return used


def test_each_round_holds_every_image_once() -> None:
    rounds = run(ResumableBatches(range(7), 3, 0, lambda: 0), epochs=2)
    assert [len(batch) for batch in rounds] == [3, 3, 1, 3, 3, 1]
    first, second = (list(chain.from_iterable(batches)) for batches in (rounds[:3], rounds[3:]))
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second


@pytest.mark.parametrize("position", range(8))
def test_iteration_continues_where_the_run_was_interrupted(position: int) -> None:
    whole = run(ResumableBatches(range(7), 2, 5, lambda: 0), epochs=3)
    resumed = ResumableBatches(range(7), 2, 5, lambda: position)
    assert list(resumed) == whole[position : position + 4]


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_out_the_batches(world_size: int) -> None:
    whole = run(ResumableBatches(range(7), 2, 5, lambda: 0), epochs=6)
    shares = [
        run(ResumableBatches(range(7), 2, 5, lambda: 0, rank, world_size), epochs=3) for rank in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1
    together = list(chain.from_iterable(zip(*shares, strict=True)))
    assert together == whole[: len(together)]


def test_the_seed_decides_the_order() -> None:
    orders = [list(ResumableBatches(range(20), 1, seed, lambda: 0)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


@pytest.fixture
def datamodule(cell_data):
    datamodule = cell_data()
    datamodule.setup()
    return datamodule


@pytest.mark.parametrize(("share", "number"), [(0.01, 1), (0.4, 2), (0.99, 4)])
def test_held_out_images_do_not_train(datamodule, share: float, number: int) -> None:
    images = NormalImages(datamodule, share, seed=3)
    assert len(images.held_out) == number
    assert sorted(images.held_out + images.kept) == list(range(5))
    images.take_over_training(lambda: 0, rank=0, world_size=1)
    names = [path for batch in datamodule.train_dataloader() for path in batch.image_path]
    held_out = set(datamodule.train_data.samples.image_path.iloc[images.held_out])
    assert len(names) == len(images.kept)
    assert not held_out & set(names)
    images.release()
    assert len(datamodule.train_dataloader()) == 5


def test_plain_images_have_no_augmentation(datamodule) -> None:
    plain = next(NormalImages(datamodule, 0.2, 0).plain([2]))
    datamodule.train_data.augmentations = lambda image: image * 0
    again = next(NormalImages(datamodule, 0.2, 0).plain([2]))
    assert torch.equal(plain, again)
    assert plain.shape == (1, 3, 300, 300)
    assert datamodule.train_data[2].image.max() == 0


def test_shots_come_in_every_version_in_a_round(datamodule) -> None:
    images = NormalImages(datamodule, 0.2, seed=3, shots=2)
    assert images.held_out == images.kept == images.calibration
    assert len(images.kept) == 2
    images.take_over_training(lambda: 0, rank=0, world_size=1)
    names = [path for batch in datamodule.train_dataloader() for path in batch.image_path]
    images.release()
    assert {names.count(path) for path in images.paths(images.kept)} == {32}
    assert len(names) == 64


def test_more_shots_than_images__error(datamodule) -> None:
    with pytest.raises(ValueError, match="shots is 6, and the training set has 5 image"):
        NormalImages(datamodule, 0.2, seed=3, shots=6)
