import json
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
import torch
from anomalib.data import ImageBatch, MVTecLOCO
from anomalib.metrics import AUPRO
from torchvision.transforms.v2.functional import to_pil_image

from anomalib_raad.metrics import AUsPRO, loco_regions

DEFECTS = [
    {"defect_name": "dent", "pixel_value": 255, "saturation_threshold": 1.0, "relative_saturation": True},
    {"defect_name": "missing", "pixel_value": 254, "saturation_threshold": 2, "relative_saturation": False},
    {"defect_name": "half", "pixel_value": 253, "saturation_threshold": 0.5, "relative_saturation": True},
]


@pytest.fixture
def loco(tmp_path: Path):
    """Writes images of a category in MVTec LOCO's layout: a kind, a name, and for each channel a value and a mask."""
    (tmp_path / "defects_config.json").write_text(json.dumps(DEFECTS))

    def write(kind: str, name: str, size: tuple[int, int], **channels: torch.Tensor) -> Path:
        path = tmp_path / "test" / kind / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(torch.zeros(3, *size)).save(path)
        folder = tmp_path / "ground_truth" / kind / name
        for number, (value, mask) in enumerate(channels.items()):
            folder.mkdir(parents=True, exist_ok=True)
            to_pil_image((mask * int(value.strip("_"))).to(torch.uint8)).save(folder / f"{number:03}.png")
        return path

    return write


def measure(kind: str, limit: float, images: dict[Path, torch.Tensor]) -> float:
    metric = AUsPRO(kind=kind, fpr_limit=limit)
    maps = torch.stack(list(images.values()))
    batch = ImageBatch(image=torch.zeros(len(maps), 3, 8, 8), anomaly_map=maps, image_path=[str(p) for p in images])
    metric.update(batch)
    return float(metric.compute())


def test_regions_and_their_saturation_areas(loco) -> None:
    mask = torch.zeros(4, 6)
    mask[1, 1:6] = 1
    path = loco("logical_anomalies", "000", (4, 6), _255=mask, _254=mask, _253=mask)
    regions, saturations = loco_regions(path)
    torch.testing.assert_close(regions, mask.bool().expand(3, 4, 6))
    assert saturations.tolist() == [5, 2, 2]  # all, two pixels, half of five pixels in whole ones
    small = torch.zeros(4, 6)
    small[0, 0] = 1
    assert loco_regions(loco("logical_anomalies", "001", (4, 6), _254=small))[1].tolist() == [1]
    assert loco_regions(loco("good", "000", (4, 6)))[0].shape == (0, 4, 6)


def test_values_computed_by_hand(loco) -> None:
    """Ten normal pixels, a region of four pixels that is full with two, one of two pixels that needs both."""
    wide, narrow = torch.zeros(2, 8), torch.zeros(2, 8)
    wide[0, :4], narrow[1, :2] = 1, 1
    path = loco("logical_anomalies", "000", (2, 8), _254=wide, _255=narrow)
    scores = torch.tensor([[9.0, 7, 3, 3, 8, 2, 2, 2], [7.0, 1, 2, 2, 2, 1, 1, 1]])
    # from the top: rate 0: sPRO (1/2 + 0)/2; at 8 rate .1: the same; at 7: (1 + 1/2)/2; at 3 the same; at 2 rate .7;
    # at 1: all, (1 + 1)/2
    curve = [(0, 0), (0, 0.25), (0.1, 0.25), (0.1, 0.75), (0.7, 0.75), (1.0, 1.0)]
    assert measure("logical_anomalies", 0.1, {path: scores}) == pytest.approx(0.25)
    assert measure("logical_anomalies", 0.4, {path: scores}) == pytest.approx((0.1 * 0.25 + 0.3 * 0.75) / 0.4)
    everything = sum((x2 - x1) * (y1 + y2) / 2 for (x1, y1), (x2, y2) in pairwise(curve))
    assert measure("logical_anomalies", 1.0, {path: scores}) == pytest.approx(everything)


def test_other_kinds_take_no_part_but_good_images_do(loco) -> None:
    mask = torch.zeros(2, 4)
    mask[0] = 1
    path = loco("structural_anomalies", "000", (2, 4), _255=mask)
    other = loco("logical_anomalies", "000", (2, 4), _255=mask)
    good = loco("good", "000", (2, 6))
    scores = torch.tensor([[5.0, 5, 5, 5], [1, 1, 1, 1]])
    images = {path: scores, other: 10 - scores}
    assert measure("structural_anomalies", 0.5, images) == pytest.approx(1)
    # 12 of 16 normal pixels lie higher than the region: up to a rate of 3/4 nothing is found
    assert measure("structural_anomalies", 0.5, images | {good: torch.full((2, 4), 9.0)}) == 0
    with pytest.raises(ValueError, match="no image of logical_anomalies"):
        measure("logical_anomalies", 0.5, {good: scores})


@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_full_saturation_is_aupro(loco, limit) -> None:
    torch.manual_seed(0)
    masks = torch.zeros(3, 2, 16, 16)
    masks[0, 0, 2:5, 3:9] = masks[1, 0, :4, :4] = masks[1, 1, 8:15, 6:16] = 1
    paths = [
        loco("structural_anomalies", "000", (16, 16), _255=masks[0, 0]),
        loco("structural_anomalies", "001", (16, 16), _255=masks[1, 0], _255_=masks[1, 1]),
        loco("good", "000", (16, 16)),
    ]
    maps = torch.rand(3, 16, 16) + 0.7 * masks.sum(dim=1)
    expected = AUPRO(fields=["anomaly_map", "gt_mask"], fpr_limit=limit)
    expected.update(ImageBatch(image=torch.zeros(3, 3, 16, 16), anomaly_map=maps, gt_mask=masks.sum(dim=1).bool()))
    assert measure("structural_anomalies", limit, dict(zip(paths, maps, strict=True))) == pytest.approx(
        float(expected.compute()), abs=1e-5
    )


def test_maps_are_resized_to_the_ground_truth(loco) -> None:
    mask = torch.zeros(32, 48)
    mask[:16, :24] = 1
    path = loco("structural_anomalies", "000", (32, 48), _255=mask)
    scores = torch.zeros(8, 8)
    scores[:4, :4] = 1
    # 14 of the region's 16 rows and 21 of its 24 columns stay at 1, nothing else does; then comes everything at once
    found = 14 * 21 / (16 * 24)
    assert measure("structural_anomalies", 0.3, {path: scores}) == pytest.approx(found + 0.15 * (1 - found))


def test_it_reads_what_anomalibs_datamodule_gives(loco, tmp_path) -> None:
    mask = torch.zeros(8, 8)
    mask[2:4, 2:4] = 1
    loco("structural_anomalies", "000", (8, 8), _255=mask)
    loco("good", "000", (8, 8))
    for split in ("train", "validation"):
        (tmp_path / split / "good").mkdir(parents=True)
        to_pil_image(torch.zeros(3, 8, 8)).save(tmp_path / split / "good" / "000.png")
    data = MVTecLOCO(root=tmp_path.parent, category=tmp_path.name, num_workers=0)
    with pd.option_context("future.infer_string", False):  # anomalib 2.7 stumbles over pandas 3
        data.setup()
    metric = AUsPRO(kind="structural_anomalies")
    for batch in data.test_dataloader():
        batch.anomaly_map = batch.gt_mask.float()
        metric.update(batch)
    assert float(metric.compute()) == pytest.approx(1)
