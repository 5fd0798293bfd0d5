import json
import math
from copy import deepcopy

import pytest
import torch

from anomalib_raad.quantization.recipe import recorded_inputs
from anomalib_raad.quantization.uniform import BITS, fake_quantize, search_weight_scale, weight_range
from anomalib_raad.report.diagnostics import _Alignment, diagnose, write_diagnostics


@pytest.fixture(scope="module")
def found(untrained_model):
    model, images = untrained_model
    return diagnose(model, images[:2], images[:1], activation_bits=None)


def test_misalignment_ignores_rotations_and_equals_the_definition() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 3, 5, 4, 4)
    teacher, student = teacher + 0.5 * student, student + 3

    def misalignment(*batches: tuple[torch.Tensor, torch.Tensor]) -> float:
        alignment = _Alignment()
        for batch in batches:
            alignment.update(*batch)
        return 1 - alignment.cka()

    rows = [x.movedim(1, -1).flatten(0, -2).double() for x in (teacher, student)]
    x, y = (row - row.mean(0) for row in rows)
    expected = 1 - (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    assert misalignment((teacher, student)) == pytest.approx(float(expected), rel=1e-4)
    rotation = torch.linalg.qr(torch.randn(5, 5))[0]
    rotated = torch.einsum("dc,nchw->ndhw", rotation, student)
    one_by_one = zip(teacher.split(1), rotated.split(1), strict=True)
    assert misalignment(*one_by_one) == pytest.approx(float(expected), rel=1e-4)
    assert misalignment((student, rotated)) == pytest.approx(0, abs=1e-5)


def test_sensitivity_is_the_change_of_the_map_by_one_layer_alone(untrained_model, found) -> None:
    model, images = untrained_model
    trial = deepcopy(model)
    with torch.no_grad():
        for network in (trial.teacher, trial.student):
            with recorded_inputs({"conv3": network.conv3}) as inputs:
                network(images[0])
            network.conv3.quantize_weight_(3)
            network.conv3.quantize_input_(inputs["conv3"][0], 3)
        changes, means = [], []
        for image in images[:2]:
            before, after = (
                (t - s).square().mean(1) for t, s in (m.aligned_features(image)[-1] for m in (model, trial))
            )
            changes.append((after - before).abs().mean())
            means.append(before.mean())
    assert found.sensitivity["conv3"][3] == pytest.approx((sum(changes) / sum(means)).item(), rel=1e-4)
    assert list(found.sensitivity) == ["conv1", "conv2", "conv3", "conv4"]


def test_signal_to_noise_of_the_weights(untrained_model, found) -> None:
    model, _ = untrained_model
    weight = model.ae.decoder.deconv8.weight.detach()
    for bits in BITS:
        noise = weight - fake_quantize(weight, search_weight_scale(weight, bits), 0, *weight_range(bits))
        expected = 10 * math.log10(float(weight.square().sum() / noise.square().sum()))
        assert found.sqnr_db["autoencoder.decoder.deconv8"][bits] == pytest.approx(expected, rel=1e-5)
    assert len(found.sqnr_db) == 22


def test_files(found, tmp_path) -> None:
    picture = write_diagnostics(tmp_path, found)
    assert picture.stat().st_size > 10_000
    written = json.loads((tmp_path / "diagnostics.json").read_text())
    assert written["misalignment"] == found.misalignment
    assert written["sensitivity"]["conv2"] == {str(bits): move for bits, move in found.sensitivity["conv2"].items()}
