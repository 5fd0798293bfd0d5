import pytest
import torch
from anomalib.pre_processing import PreProcessor
from torchvision.transforms.v2 import CenterCrop, Compose, Resize

from anomalib_raad.pre_processing import AntialiasedResize, RaadPreProcessor, exportable


@pytest.mark.parametrize("size", [(200, 130), (64, 48), (40, 50), (65, 777)])
def test_resize_equals_torchvisions(size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = Resize((64, 48), antialias=True)(images)
    torch.testing.assert_close(AntialiasedResize((64, 48))(images), expected, rtol=0, atol=1e-5)


def test_beyond_256_pixels_in_bfloat16() -> None:
    """OpenVINO's default on CPUs that have it; its numbers cannot tell pixel 257 from 258."""
    openvino = pytest.importorskip("openvino")
    images = torch.rand(1, 3, 300, 310, generator=torch.Generator().manual_seed(0))
    resize = AntialiasedResize((256, 256))
    sizes = {2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    program = torch.export.export(resize, (torch.rand(1, 3, 99, 98),), dynamic_shapes=(sizes,))
    model = openvino.Core().compile_model(openvino.convert_model(program), "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    torch.testing.assert_close(torch.from_numpy(model(images.numpy())[0]), resize(images), rtol=0, atol=0.02)


def test_forward_is_the_transform_of_training() -> None:
    images = torch.rand(1, 3, 200, 300, generator=torch.Generator().manual_seed(0))
    transform = Compose([Resize((64, 64), antialias=True), CenterCrop(32)])
    ours, theirs = (kind(transform=transform)(images) for kind in (RaadPreProcessor, PreProcessor))
    torch.testing.assert_close(ours, transform(images), rtol=0, atol=1e-5)
    assert (theirs - transform(images)).abs().max() > 0.1


def test_other_transforms_stay() -> None:
    for transform in (Resize((64, 64), antialias=False), Resize(64), CenterCrop(32)):
        assert exportable(transform) is transform
    assert RaadPreProcessor(transform=None)(torch.ones(1)) == 1
