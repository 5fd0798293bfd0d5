import pytest

from anomalib_raad import Elpv
from anomalib_raad.data.elpv import make_elpv_samples


def test_counts_are_those_of_the_published_data() -> None:
    """Deitsch et al. 2021: of 1,074 monocrystalline cells 588 are functional, of 1,550 polycrystalline ones 920."""
    counts = {}
    for category in ("mono", "poly"):
        for uncertain in (False, True):
            samples = make_elpv_samples(category, uncertain=uncertain, test_ratio=0.2, seed=0)
            counts[category, uncertain] = (int((samples.label_index == 0).sum()), int((samples.label_index == 1).sum()))
    assert counts["mono", True] == (588, 1074 - 588)
    assert counts["poly", True] == (920, 1550 - 920)
    assert counts["mono", False][0] == 588
    assert counts["mono", False][1] < 1074 - 588


@pytest.mark.parametrize("category", ["mono", "poly"])
def test_no_cell_is_in_two_splits(category: str) -> None:
    datamodule = Elpv(category, num_workers=0)
    datamodule.setup()
    splits = [datamodule.train_data, datamodule.val_data, datamodule.test_data]
    paths = [set(split.samples.image_path) for split in splits]
    assert sum(map(len, paths)) == len(set.union(*paths))
    assert not datamodule.train_data.has_anomalous
    assert not datamodule.val_data.has_anomalous
    assert datamodule.test_data.has_anomalous
    assert datamodule.test_data.has_normal


def test_the_seed_decides_the_split() -> None:
    tests = [
        set(samples[samples.split == "test"].image_path)
        for samples in (make_elpv_samples("mono", uncertain=False, test_ratio=0.2, seed=s) for s in (1, 1, 2))
    ]
    assert tests[0] == tests[1] != tests[2]


def test_unknown_category__error() -> None:
    with pytest.raises(ValueError, match="category is 'amorphous'; ELPV has mono and poly"):
        make_elpv_samples("amorphous", uncertain=False, test_ratio=0.2, seed=0)


def test_missing_package__error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anomalib_raad.data.elpv.find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match="pip install elpv-dataset"):
        make_elpv_samples("mono", uncertain=False, test_ratio=0.2, seed=0)
