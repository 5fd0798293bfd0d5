from lightning.pytorch.trainer.states import TrainerFn

from benchmarks.testing import set_up_


def test_part_of_the_test_images__stays_when_a_trainer_sets_the_data_up(cell_data) -> None:
    data, whole = cell_data(), cell_data()
    whole.setup()
    assert set_up_(data, every=2) == "cells"
    for stage in (TrainerFn.FITTING, TrainerFn.TESTING):
        data.setup(stage)
    assert list(data.test_data.samples.image_path) == list(whole.test_data.samples.image_path)[::2]
