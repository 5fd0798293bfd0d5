"""Several products in one fit, for a model that serves them all."""

import pandas as pd
from anomalib.data import AnomalibDataModule, AnomalibDataset
from anomalib.data.utils import TestSplitMode, ValSplitMode
from torchvision.transforms.v2 import Transform

_PARTS = ("train_data", "val_data", "test_data")
_SEE_TEST_IMAGES = (ValSplitMode.SAME_AS_TEST, ValSplitMode.FROM_TEST)


class ProductsDataset(AnomalibDataset):
    """The images of several products, of which the column ``product`` of the samples names each one's.

    Args:
        datasets: By product.
    """

    def __init__(self, datasets: dict[str, AnomalibDataset]) -> None:
        super().__init__()
        samples = pd.concat([dataset.samples.assign(product=name) for name, dataset in datasets.items()])
        # Images of a product without masks would lack in the pixel metrics of all.
        tasks = {dataset.samples.attrs["task"] for dataset in datasets.values()}
        samples.attrs["task"] = tasks.pop() if len(tasks) == 1 else "classification"
        self.samples = samples.reset_index(drop=True)


class Products(AnomalibDataModule):
    """A datamodule of several products, each described by a datamodule of its own.

    Each product is split into images for training, validation and test as its datamodule says. After a test, this
    package's models report the metrics of each product and their means. Masks are used if all products have some.

    Args:
        products: The datamodules, by the names of the products.
        train_batch_size: Images of a training step.
        eval_batch_size: Images of a step of validation, test or prediction.
        num_workers: Processes that read images.
        train_augmentations: Augmentations in training.
        val_augmentations: Augmentations in validation.
        test_augmentations: Augmentations in tests.

    Raises:
        ValueError: If there are fewer than two products, or a dataset reads its images in a way of its own.

    Example:
        >>> from anomalib.data import MVTecAD
        >>> data = Products({name: MVTecAD(category=name) for name in ("bottle", "cable")}, train_batch_size=16)
    """

    def __init__(
        self,
        products: dict[str, AnomalibDataModule],
        train_batch_size: int = 32,
        eval_batch_size: int = 32,
        num_workers: int = 8,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
    ) -> None:
        if len(products) < 2:
            msg = f"products are {list(products)}; two at least are needed, of one take its own datamodule"
            raise ValueError(msg)
        modes = [product.val_split_mode for product in products.values()]
        super().__init__(
            train_batch_size,
            eval_batch_size,
            num_workers,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            test_split_mode=TestSplitMode.FROM_DIR,
            # What one of them does decides whether thresholds see test images.
            val_split_mode=next((mode for mode in modes if mode in _SEE_TEST_IMAGES), modes[0]),
        )
        self.products = products

    def _setup(self, _stage: str | None = None) -> None:
        for name, product in self.products.items():
            product.setup(_stage)
            if type(product.train_data).__getitem__ is not AnomalibDataset.__getitem__:
                msg = f"the images of {name}, {type(product).__name__}, are read in a way that Products does not know"
                raise ValueError(msg)
        for part in _PARTS:
            datasets = {name: getattr(product, part, None) for name, product in self.products.items()}
            found = {name: dataset for name, dataset in datasets.items() if dataset is not None and len(dataset)}
            if found:
                setattr(self, part, ProductsDataset(found))

    def _create_test_split(self) -> None:
        """The products have split their images."""

    def _create_val_split(self) -> None:
        """The products have split their images."""
