import pytest
import torch
from anomalib.models.image.efficient_ad.torch_model import EfficientAdModel, EfficientAdModelSize
from torch.nn.functional import interpolate, pad

from anomalib_raad import RaadModel
from anomalib_raad.quantization.allocation import Allocation
from anomalib_raad.quantization.layers import quantizable_layers, quantizable_poolings
from anomalib_raad.quantization.recipe import quantize_
from anomalib_raad.teacher.statistics import channel_mean_std

pytestmark = pytest.mark.usefixtures("_seed")


@pytest.fixture
def _seed() -> None:
    torch.manual_seed(0)


def twin_of_efficientad(padding: bool, size: str = "small") -> tuple[RaadModel, EfficientAdModel]:
    """RaadModel, as far as it is EfficientAD, and anomalib's EfficientAdModel with the same weights and statistics."""
    raad = RaadModel(size, padding)
    raad.teacher.margin = raad.student.margin = raad.student.unseen = raad.ae.unseen = 0
    raad.recalibration = torch.nn.Identity()
    twin = EfficientAdModel(384, EfficientAdModelSize(size), padding=padding, pad_maps=False)
    for name in ("teacher", "student", "ae"):
        network = getattr(raad, name)
        state = {key: value for key, value in network.state_dict().items() if key.endswith(("weight", "bias"))}
        getattr(twin, name).load_state_dict(state)
    raad.set_teacher_statistics_([raad.teacher(torch.rand(1, 3, 256, 256))])
    twin.mean_std["mean"].data.copy_(raad.teacher_mean)
    twin.mean_std["std"].data.copy_(raad.teacher_std)
    return raad, twin


@pytest.mark.parametrize(("padding", "size"), [(False, "small"), (True, "small"), (False, "medium")])
def test_maps_at_256_are_efficientads(padding: bool, size: str) -> None:
    raad, twin = twin_of_efficientad(padding, size)
    image = torch.rand(1, 3, 256, 256)
    raad.eval()
    twin.eval()
    with torch.no_grad():
        ours = interpolate(raad.maps(image), size=(256, 256), mode="bilinear")
        torch.testing.assert_close(ours, torch.cat(twin.get_maps(image), dim=1), rtol=1e-4, atol=1e-5)
        raad.map_quantiles.copy_(torch.tensor([[0.1, 0.5], [0.2, 0.7]]))
        for key, value in zip(("qa_st", "qb_st", "qa_ae", "qb_ae"), (0.1, 0.5, 0.2, 0.7), strict=True):
            twin.quantiles[key].data.fill_(value)
        ours, theirs = raad(image), twin(image)
    torch.testing.assert_close(ours.anomaly_map, theirs.anomaly_map, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.pred_score, theirs.pred_score, rtol=1e-4, atol=1e-5)


def test_losses_and_gradients_are_efficientads(monkeypatch: pytest.MonkeyPatch) -> None:
    raad, twin = twin_of_efficientad(padding=False)
    for model in (raad, twin):  # the two draw augmentation and dropout in another order: leave both out
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    monkeypatch.setattr("anomalib_raad.raad.torch_model.augment", lambda image: image)
    monkeypatch.setattr(twin, "choose_random_aug_image", lambda image: image)
    image, photo = torch.rand(2, 1, 3, 256, 256)
    ours, theirs = raad(image, photo), twin(image, photo)
    assert (ours.st + ours.penalty).item() == pytest.approx(theirs[0].item(), rel=1e-4)
    assert ours.ae.item() == pytest.approx(theirs[1].item(), rel=1e-4)
    assert ours.stae.item() == pytest.approx(theirs[2].item(), rel=1e-4)
    sum(ours).backward()
    sum(theirs).backward()
    for network in ("student", "ae"):
        expected = dict(getattr(twin, network).named_parameters())
        for name, parameter in getattr(raad, network).named_parameters():
            error = (parameter.grad - expected[name].grad).norm() / expected[name].grad.norm()
            assert error < 1e-3, (network, name, error)


def test_known_teacher_features_change_nothing() -> None:
    model, image = RaadModel().train(), torch.rand(2, 3, 64, 64)
    model.set_teacher_statistics_([model.teacher(image)])
    losses = []
    for features in (None, model.teacher(image)):
        torch.manual_seed(0)
        losses.append(model(image, None, features))
    assert losses[0] == losses[1]


def test_teacher_stays_frozen_and_gradients_reach_student_and_autoencoder() -> None:
    model = RaadModel().train()
    assert not model.teacher.training
    assert model.student.training
    losses = model(torch.rand(1, 3, 64, 64))
    assert losses.penalty is None
    (losses.st + losses.stae + losses.ae).backward()
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())
    for network in (model.student, model.ae):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_gradient_of_each_term_reaches_the_networks_of_its_equation() -> None:
    """L_ts: student; L_aes: student and autoencoder; L_tae: autoencoder."""
    model = RaadModel().train()
    losses = model(torch.rand(1, 3, 64, 64), torch.rand(1, 3, 64, 64))
    parameters = [model.student.conv1.weight, model.ae.encoder.enconv1.weight]
    reached = {
        name: [g is not None for g in torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)]
        for name, term in losses._asdict().items()
    }
    assert reached == {"st": [True, False], "stae": [True, True], "ae": [False, True], "penalty": [True, False]}


def test_a_batch_has_the_mean_loss_of_its_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anomalib_raad.raad.torch_model.augment", lambda image: image)
    model = RaadModel()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    images = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        together = model.losses(images)
        apart = [model.losses(image.unsqueeze(0)) for image in images]
    for term in ("st", "stae", "ae"):
        mean = torch.stack([getattr(losses, term) for losses in apart]).mean()
        torch.testing.assert_close(getattr(together, term), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(64, 64), (100, 300), (333, 65), (512, 256)])
@pytest.mark.parametrize("padding", [False, True])
def test_any_size(size: tuple[int, int], padding: bool) -> None:
    model = RaadModel(padding=padding).eval()
    with torch.no_grad():
        predictions = model(torch.rand(2, 3, *size))
    assert predictions.anomaly_map.shape == (2, 1, *size)
    assert predictions.pred_score.shape == (2, 1)
    assert torch.equal(predictions.pred_score, predictions.anomaly_map.amax(dim=(-2, -1)))


@pytest.mark.parametrize("size", ["small", "medium"])
def test_quantized_state_loads_into_a_fresh_model(size: str) -> None:
    model = RaadModel(size).eval()
    images = [torch.rand(1, 3, 64, 64)]
    quantize_(model, images, images, Allocation(bits=3))
    fresh = RaadModel(size).eval()
    assert model.quantized
    assert not fresh.quantized
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(images[0]).anomaly_map, model(images[0]).anomaly_map)
    inner = [layer.bits for layer in quantizable_layers(fresh.student).values()]
    assert inner == [8, *[3] * (len(inner) - 2), 8]


def test_poolings_are_quantized_outside_training_only() -> None:
    model, image = RaadModel(), torch.rand(1, 3, 64, 64)
    assert all(pooling.training for pooling in quantizable_poolings(model).values())  # as after train()
    quantize_(model.eval(), [image], [image], Allocation(bits=8))

    def features() -> list[torch.Tensor]:
        return [model.teacher(image), model.student(image)]

    with torch.no_grad():
        rounded, trained = features(), (model.train(), features())[1]
        for pooling in quantizable_poolings(model).values():
            pooling.input_quantizer.bits = 0
        for evaluated, expected, found in zip(rounded, features(), trained, strict=True):
            assert torch.equal(found, expected)
            assert not torch.equal(evaluated, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_size": "large"}, "model_size is 'large'; the sizes are medium, small"),
        ({"p_hard": 1.0}, "p_hard is 1.0"),
    ],
)
def test_options__error(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RaadModel(**options)


@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize("size", [(64, 96), (71, 93), (128, 128)])
def test_the_maps_cover_the_whole_image(padding: bool, size: tuple[int, int]) -> None:
    model, image = RaadModel(padding=padding).eval(), torch.rand(1, 3, *size)
    maps = model.maps(image)
    cells = [round(side / 4) for side in size]
    assert all(abs(found - expected) <= 1 for found, expected in zip(maps.shape[-2:], cells, strict=True))
    assert (maps > 0).all()
    assert model(image).anomaly_map.shape[-2:] == size


@pytest.mark.parametrize("edge", [(0, 0), (0, 127), (127, 0), (127, 127), (0, 60), (70, 127)])
def test_every_pixel_counts(edge: tuple[int, int]) -> None:
    """Whatever pixel changes, the map changes where the pixel is."""
    model, image = RaadModel().eval(), torch.rand(1, 3, 128, 128)
    row, column = edge
    with torch.no_grad():
        before = model(image).anomaly_map
        image[..., row, column] = 1 - image[..., row, column].round()
        changed = (model(image).anomaly_map - before).abs()[0, 0]
    assert changed[row, column] > 0
    assert changed[(row + 64) % 128, (column + 64) % 128] < 1e-6  # the autoencoder sees all, but faintly


def test_the_border_is_the_image_reflected() -> None:
    model, image = RaadModel().eval(), torch.rand(1, 3, 64, 72)
    whole = model.student(image)
    model.student.margin = 0
    torch.testing.assert_close(whole, model.student(pad(image, [8] * 4, mode="reflect")))
    torch.testing.assert_close(whole[..., 2:-2, 2:-2], model.student(image))


def test_the_autoencoder_says_what_is_at_the_students_cells() -> None:
    model, image = RaadModel().eval(), torch.rand(1, 3, 128, 128)
    inner = model.ae(image, model.student(image).shape[-2:])
    model.ae.unseen = 0
    torch.testing.assert_close(inner, model.ae(image, torch.Size([32, 32]))[..., 2:-2, 2:-2])


def test_float16__error() -> None:
    with pytest.raises(TypeError, match="exceed float16; use bfloat16"):
        RaadModel().eval().half()(torch.rand(1, 3, 64, 64).half())


def test_fewer_directions_keep_the_distances_on_average(untrained) -> None:
    """On real images, of features that differ as those of two images do."""
    whole, images = untrained
    few = RaadModel(out_channels=128).eval()
    with torch.no_grad():
        few.set_teacher_(whole.teacher, images)
        mean, std = channel_mean_std(map(whole.teacher, images))
        before, after = (
            (net(images[0]) - net(images[1])).square().mean()
            for net in (lambda x: (whole.teacher(x) - mean) / std, few.teacher)
        )
    assert after / before == pytest.approx(1, abs=0.1)
    directions = (
        few.teacher.head.weight.flatten(1) @ torch.linalg.pinv(whole.teacher.head.weight.flatten(1)) * std.view(-1)
    )
    torch.testing.assert_close(directions @ directions.T, torch.eye(128), rtol=1e-3, atol=1e-3)


def test_as_many_directions_as_channels_are_the_channels(untrained) -> None:
    model, images = untrained
    same = RaadModel().eval()
    same.set_teacher_(model.teacher, images)
    assert torch.equal(same.teacher.head.weight, model.teacher.head.weight)
    assert same.teacher_loaded


def test_what_is_explained_is_the_share_of_the_teachers_variance(untrained) -> None:
    model, (image, *_) = untrained
    with torch.no_grad():
        explained = model.explained_variance(image)
        teacher = ((model.teacher(image) - model.teacher_mean) / model.teacher_std).double()
        student, autoencoder = model.student(image)[:, :384], model.ae(image, teacher.shape[-2:])
    for share, prediction in zip(explained.tolist(), (student, autoencoder), strict=True):
        assert share == pytest.approx(
            1 - float((teacher - prediction).square().sum() / teacher.square().sum()), abs=1e-5
        )


@pytest.mark.parametrize(
    ("explained", "weights"),
    [((0.9, 0.3), (0.75, 0.25)), ((0.4, -0.1), (1.0, 0.0)), ((-0.2, -0.1), (0.5, 0.5))],
)
def test_a_map_counts_as_much_as_its_network_explains(explained: tuple, weights: tuple) -> None:
    model, image = RaadModel(out_channels=16).eval(), torch.rand(1, 3, 64, 64)
    model.weigh_maps_(torch.tensor(explained))
    assert model.map_weights.tolist() == pytest.approx(weights)
    with torch.no_grad():
        both = interpolate(model.recalibration(model.maps(image)), size=(64, 64), mode="bilinear")[0]
        expected = weights[0] * both[0] + weights[1] * both[1]
        torch.testing.assert_close(model(image).anomaly_map[0, 0], expected, rtol=1e-4, atol=1e-6)
    model.begin_anew_()
    assert model.map_weights.tolist() == [0.5, 0.5]


def test_parts_of_one_colour_weigh_both_maps_alike() -> None:
    model, image = RaadModel(out_channels=16).eval(), torch.full((1, 3, 64, 64), 0.5)
    with torch.no_grad():
        model.set_teacher_statistics_([model.teacher(image)])
        model.weigh_maps_(model.explained_variance(image))
    assert model.map_weights.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("value", [0.0, 1.0, 3000.0])
def test_constant_maps_are_normalised_to_finite_ones(value: float) -> None:
    model, image = RaadModel().eval(), torch.rand(1, 3, 64, 64)
    model.set_map_quantiles_([torch.full((1, 2, 16, 16), value)])
    low, high = model.map_quantiles.T
    assert (high > low).all()
    assert model(image).anomaly_map.isfinite().all()
