"""Electroluminescence images of solar cells, from the PyPI package ``elpv-dataset``.

2,624 cells, 300x300 pixels, 8-bit grey, from 44 modules, each with a probability of being defective (0, 1/3, 2/3, 1)
and a type (mono- or polycrystalline). Published by Buerhop-Lutz et al. (2018) and Deitsch et al. (2019) under CC
BY-NC-SA 4.0; see https://github.com/zae-bayern/elpv-dataset.
"""

from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import torch
from anomalib.data import AnomalibDataModule, AnomalibDataset
from anomalib.data.utils import LabelName, Split, TestSplitMode, ValSplitMode
from torchvision.transforms.v2 import Transform

CATEGORIES = ("mono", "poly")


class ElpvDataset(AnomalibDataset):
    """One category and split of the ELPV data.

    Args:
        category: ``mono`` or ``poly``.
        split: ``train`` (normal cells), ``test`` (normal and defective cells) or ``None`` for both.
        uncertain: Add the cells of probability 1/3 and 2/3 to the test split, as defective.
        test_ratio: Share of the normal cells in the test split.
        seed: Seed of the split.
        augmentations: Applied to every image.
    """

    def __init__(
        self,
        category: str = "mono",
        split: str | Split | None = None,
        uncertain: bool = False,
        test_ratio: float = 0.2,
        seed: int = 0,
        augmentations: Transform | None = None,
    ) -> None:
        super().__init__(augmentations=augmentations)
        samples = make_elpv_samples(category, uncertain=uncertain, test_ratio=test_ratio, seed=seed)
        self.category = category
        self.samples = samples if split is None else samples[samples.split == Split(split).value]


def make_elpv_samples(category: str, *, uncertain: bool, test_ratio: float, seed: int) -> pd.DataFrame:
    """List the cells of a category as anomalib's datasets want them; no cell is in both splits.

    Raises:
        ValueError: If the category is unknown.
        ModuleNotFoundError: If the package with the images is not installed.
    """
    if category not in CATEGORIES:
        msg = f"category is {category!r}; ELPV has {' and '.join(CATEGORIES)}"
        raise ValueError(msg)
    spec = find_spec("elpv_dataset")
    if spec is None or spec.origin is None:
        msg = "the ELPV images come in a package of their own: pip install elpv-dataset"
        raise ModuleNotFoundError(msg)
    root = Path(spec.origin).parent / "data"
    columns = ["image_path", "probability", "type"]
    cells = pd.read_csv(root / "labels.csv", sep=r"\s+", names=columns, dtype={"probability": float})
    cells = cells[cells.type == category].reset_index(drop=True)
    normal, defective = cells.probability == 0, cells.probability == 1
    if uncertain:
        defective = ~normal
    order = torch.randperm(int(normal.sum()), generator=torch.Generator().manual_seed(seed)).numpy()
    test_normals = cells.index[normal][order[: round(test_ratio * len(order))]]
    samples = pd.DataFrame(
        {
            "image_path": [str(root / path) for path in cells.image_path],
            "mask_path": "",
            "label_index": [int(LabelName.ABNORMAL if bad else LabelName.NORMAL) for bad in defective],
            "split": Split.TRAIN.value,
        }
    )
    samples.loc[defective | samples.index.isin(test_normals), "split"] = Split.TEST.value
    samples = samples[normal | defective].reset_index(drop=True)
    samples.attrs["task"] = "classification"
    return samples


class Elpv(AnomalibDataModule):
    """Datamodule over the ELPV data.

    The validation set, from which anomalib takes thresholds, is split off the normal training cells, so that no test
    image decides about a threshold.

    Args:
        category: ``mono`` or ``poly``.
        uncertain: Add the cells of probability 1/3 and 2/3 to the test split, as defective.
        train_batch_size: Training batch size.
        eval_batch_size: Validation and test batch size.
        num_workers: Processes that load images.
        train_augmentations: Applied to training images.
        val_augmentations: Applied to validation images.
        test_augmentations: Applied to test images.
        augmentations: Applied to images of the splits without augmentations of their own.
        test_split_mode: See ``AnomalibDataModule``.
        test_split_ratio: Share of the normal cells in the test split.
        val_split_mode: See ``AnomalibDataModule``.
        val_split_ratio: Share of the training cells in the validation split.
        seed: Seed of the splits.
    """

    def __init__(
        self,
        category: str = "mono",
        uncertain: bool = False,
        train_batch_size: int = 1,
        eval_batch_size: int = 16,
        num_workers: int = 2,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        test_split_mode: TestSplitMode | str = TestSplitMode.FROM_DIR,
        test_split_ratio: float = 0.2,
        val_split_mode: ValSplitMode | str = ValSplitMode.FROM_TRAIN,
        val_split_ratio: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            test_split_mode=test_split_mode,
            test_split_ratio=test_split_ratio,
            val_split_mode=val_split_mode,
            val_split_ratio=val_split_ratio,
            seed=seed,
        )
        self.category = category
        self.uncertain = uncertain
        self.split_seed = seed

    def _setup(self, _stage: str | None = None) -> None:
        self.train_data, self.test_data = (
            ElpvDataset(self.category, split, self.uncertain, self.test_split_ratio, self.split_seed)
            for split in (Split.TRAIN, Split.TEST)
        )
