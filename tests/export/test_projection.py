import torch

from anomalib_raad import RaadModel
from anomalib_raad.export.projection import project_
from anomalib_raad.quantization.layers import quantizable_layers
from anomalib_raad.quantization.recipe import Allocation, quantize_


@torch.no_grad()
def test_as_many_directions_as_channels_change_nothing(untrained) -> None:
    model, images = untrained
    before = model.maps(images[0])
    project_(model, 384)
    torch.testing.assert_close(model.maps(images[0]), before, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_fewer_directions_keep_the_maps_on_average(untrained) -> None:
    model, images = untrained
    before = [float(a_map.mean()) for a_map in model.maps(images[0])]
    quantize_(model, images, images, Allocation(bits=8))
    project_(model, 96)
    after = [float(a_map.mean()) for a_map in model.maps(images[0])]
    torch.testing.assert_close(after, before, rtol=0.15, atol=0)
    lasts = [list(quantizable_layers(network).values())[-1] for network in (model.teacher, model.student, model.ae)]
    assert [len(last.weight) for last in lasts] == [96, 192, 96]
    assert all(last.bits == 8 and last.weight_quantizer.scale.shape == (len(last.weight), 1, 1, 1) for last in lasts)


def test_the_projected_state_is_plain(untrained) -> None:
    """Parameters and buffers have the names they had."""
    model, _ = untrained
    names = set(model.state_dict())
    project_(model, 16)
    assert set(model.state_dict()) == names == set(RaadModel().state_dict())
