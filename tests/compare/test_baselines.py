import pytest
import torch
from anomalib.data.utils import read_image

from anomalib_raad import RaadModel
from anomalib_raad.compare.baselines import PHOTOS, OfflineEfficientad, OfflinePatchcore
from anomalib_raad.teacher.backbones import OFFLINE_BACKBONE
from anomalib_raad.teacher.features import PatchFeatures
from anomalib_raad.teacher.weights import load_teacher_


def test_offline_patchcore_has_the_backbones_features(cells) -> None:
    image = read_image(next(cells.glob("bad/*")), as_tensor=True)[None, :, :256, :256]
    model = OfflinePatchcore(visualizer=False)
    with torch.no_grad():
        ours = model.model.feature_extractor(model.pre_processor.transform(image))
        features = PatchFeatures(OFFLINE_BACKBONE, (2, 3), out_channels=512)
        expected = features.backbone((image - features.mean) / features.std)
    for actual, wanted in zip(ours.values(), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize(("patches", "bank"), [(1000, 7), (20, 7), (5, 5)])
def test_the_bank_has_the_same_size_whatever_the_number_of_patches(patches: int, bank: int) -> None:
    torch.manual_seed(0)
    model = OfflinePatchcore(bank_size=7, visualizer=False)
    store = [torch.randn(patches // 5, 16) for _ in range(5)]
    model.model.embedding_store = list(store)
    model.fit()
    chosen = model.model.memory_bank
    assert len(chosen) == bank
    assert all((torch.vstack(store) == patch).all(dim=1).any() for patch in chosen)


def test_offline_efficientad_has_the_bundled_teacher_and_photos() -> None:
    model = OfflineEfficientad(visualizer=False)
    model.prepare_pretrained_model()
    expected = RaadModel().teacher
    load_teacher_(expected, "bundled", "small")
    for name, parameter in model.model.teacher.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name
    model.prepare_imagenette_data((64, 96))
    photos = [photo for photo, _ in model.imagenet_loader]
    assert len(photos) == len(PHOTOS) == 16
    assert {tuple(photo.shape) for photo in photos} == {(1, 3, 64, 96)}
    assert all(0 <= photo.min() < photo.max() <= 1 for photo in photos)
