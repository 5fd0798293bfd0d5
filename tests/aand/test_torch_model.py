from copy import deepcopy

import pytest
import torch
from anomalib.models.image.reverse_distillation.loss import ReverseDistillationLoss
from anomalib.models.image.reverse_distillation.torch_model import ReverseDistillationModel
from torch.nn import functional as F  # noqa: N812

from anomalib_raad import AandModel
from anomalib_raad.aand.blur import Blur
from anomalib_raad.aand.torch_model import cell_labels, gate_figures
from anomalib_raad.teacher.backbones import OFFLINE_BACKBONE, create_backbone

LAYERS = (1, 2, 3)


@pytest.fixture(scope="module")
def loaded() -> AandModel:
    """On the offline backbone with its weights. Leave it as it is."""
    torch.manual_seed(0)
    model = AandModel(amplify=True)
    model.load_backbone_(create_backbone(OFFLINE_BACKBONE, LAYERS))
    return model.eval()


def gradients(model: AandModel, loss: torch.Tensor) -> set[str]:
    """Parts of the model that a loss moves."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    return {".".join(part for part in name.split(".")[:3] if not part.isdigit()) for name in moved}


def test_gradients_reach_what_a_stage_trains() -> None:
    torch.manual_seed(0)
    model = AandModel(amplify=True)
    image, mask = torch.rand(2, 3, 64, 64), torch.zeros(2, 1, 64, 64)
    mask[..., :32] = 1
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    losses = model.amplification_losses(model.features(image), mask, torch.ones_like(mask))
    assert gradients(model, losses.focal) == {
        "amplifiers.query", "amplifiers.normal_items", "amplifiers.anomalous_items",
    }  # fmt: skip
    losses = model.amplification_losses(model.features(image), mask, torch.ones_like(mask))
    assert gradients(model, losses.amplification) == {"amplifiers.scaling"}
    # Stage 1 runs neither the student nor the backbone's batch norm.
    torch.testing.assert_close(dict(model.named_buffers()), statistics, rtol=0, atol=0, equal_nan=True)
    with torch.no_grad():
        targets = model.targets(model.features(image))
    moved = gradients(model, sum(model.distillation_losses(targets)))
    assert moved
    assert all(name.startswith("student") for name in moved)


def test_reverse_distillation_is_anomalibs() -> None:
    """Without amplifiers and hard cells: levels, loss and map, on anomalib's weights."""
    torch.manual_seed(0)
    theirs = ReverseDistillationModel("resnet18", (64, 64), ["layer1", "layer2", "layer3"], "add", pre_trained=False)
    ours = AandModel("resnet18", LAYERS, amplify=False, hard_cells=0)
    ours.backbone.load_state_dict(theirs.encoder.feature_extractor.state_dict())
    bottleneck = {k: v for k, v in theirs.bottleneck.state_dict().items() if "conv4" not in k and "bn4" not in k}
    ours.student.bottleneck.load_state_dict(bottleneck)
    ours.student.decoder.load_state_dict(theirs.decoder.state_dict())
    image = torch.rand(2, 3, 64, 64)
    normalised = ours.norm(image)

    expected = ReverseDistillationLoss()(*theirs.train()(normalised))
    found = ours.train().distillation_losses(ours.targets(ours.features(image)))
    torch.testing.assert_close(found.kd, expected)
    assert not found.hkd

    with torch.no_grad():
        expected, found = theirs.eval()(normalised), ours.eval()(image)
    torch.testing.assert_close(found.anomaly_map[..., 16:-16, 16:-16], expected.anomaly_map[..., 16:-16, 16:-16])


def test_normalised_as_the_backbone_wants_it() -> None:
    image = torch.rand(1, 3, 64, 64)
    model = AandModel("resnet18", LAYERS)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(model.norm(image), (image - mean) / std)
    lite = AandModel()
    torch.testing.assert_close(lite.norm(image), (255 * image - 127) / 128)


def test_a_cell_is_anomalous_from_three_tenths_on() -> None:
    mask = torch.zeros(1, 1, 20, 20)
    for pixels, expected in ((29, False), (31, True)):
        cell = torch.zeros(100)
        cell[:pixels] = 1
        mask[0, 0, :10, :10] = cell.view(10, 10)
        assert bool(cell_labels(mask, torch.zeros(1, 8, 2, 2))[0, 0, 0, 0]) is expected
    assert not cell_labels(mask, torch.zeros(1, 8, 2, 2))[0, 0, 1:].any()


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (200, 130)])
def test_every_pixel_has_a_score(loaded, size: tuple[int, int]) -> None:
    with torch.no_grad():
        predictions = loaded(torch.rand(2, 3, *size))
    assert predictions.anomaly_map.shape == (2, 1, *size)
    assert predictions.pred_score.shape == (2, 1)
    assert torch.equal(predictions.pred_score, predictions.anomaly_map.amax((2, 3)))
    assert 0 < predictions.anomaly_map.min() < predictions.anomaly_map.max() < 6


def test_levels_count_relative_to_their_mean_on_normal_images(loaded) -> None:
    model, images = deepcopy(loaded), [torch.rand(1, 3, 64, 64) for _ in range(3)]
    model.blur = Blur(0)
    with torch.no_grad():
        levels = model.level_maps(images[0])
        plain = model(images[0]).anomaly_map
        model.set_level_means_(images)
        relative = model(images[0]).anomaly_map

    def laid_over(maps: list[torch.Tensor]) -> torch.Tensor:
        return sum(F.interpolate(m, size=(64, 64), mode="bilinear", align_corners=True) for m in maps)

    torch.testing.assert_close(plain, laid_over(levels))
    with torch.no_grad():
        means = [torch.cat(maps).mean() for maps in zip(*(model.level_maps(image) for image in images), strict=True)]
    torch.testing.assert_close(relative, laid_over([level / mean for level, mean in zip(levels, means, strict=True)]))
    model.normalize_levels = False
    with torch.no_grad():
        assert torch.equal(model(images[0]).anomaly_map, plain)


def test_batches_predict_as_single_images(loaded) -> None:
    images = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        together, alone = loaded(images), [loaded(image[None]) for image in images]
    torch.testing.assert_close(together.anomaly_map, torch.cat([p.anomaly_map for p in alone]))


def test_the_gate_is_the_mean_of_the_levels(loaded) -> None:
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        gate = loaded.gate(image)
        levels = [a.logits(level).sigmoid().mean() for a, level in loaded.amplified(loaded.features(image))]
    assert gate.shape == (1, 1, 64, 64)
    torch.testing.assert_close(gate.mean(), torch.stack(levels).mean(), rtol=0.05, atol=0)
    assert not AandModel().gate(image).any()


def test_figures_of_a_gate_that_knows(loaded, monkeypatch) -> None:
    clean, mask = torch.zeros(1, 3, 64, 64), torch.zeros(1, 1, 64, 64)
    mask[..., :32, :32] = 1
    changed = mask.expand(-1, 3, -1, -1)
    monkeypatch.setattr(loaded, "features", lambda x: [F.avg_pool2d(x, s) for s in (4, 8, 16)])
    for amplifier in loaded.amplifiers:
        monkeypatch.setattr(amplifier, "logits", lambda level: 200 * (level[:, :1] - 0.5))
    assert gate_figures(loaded, [clean], [(changed, mask)]) == {
        "gate_clean": 0.0,
        "gate_precision": 1.0,
        "gate_recall": 1.0,
    }
    nothing = gate_figures(loaded, [clean], [(clean, torch.zeros_like(mask))])
    assert nothing == {"gate_clean": 0.0, "gate_precision": 0.0, "gate_recall": 0.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet1"}, "timm has no backbone 'resnet1'"),
        ({"backbone": "resnet18", "layers": (2, 3, 5)}, r"has no feature maps \(2, 3, 5\)"),
        ({"backbone": "swin_tiny_patch4_window7_224", "layers": (0, 1, 2)}, "gives its maps as NHWC"),
        ({"layers": (1, 3)}, r"strides \[4, 16\]; each must be twice the one before"),
    ],
)
def test_a_backbone_without_the_levels__error(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AandModel(**options)


def test_a_bottleneck_of_a_single_cell__error() -> None:
    model = AandModel("resnet18", (2, 3, 4))
    model.check_size((64, 65))
    with pytest.raises(ValueError, match=r"one cell of an image of \(64, 64\).*a side above 64 is needed"):
        model.check_size((64, 64))
