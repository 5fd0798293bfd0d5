import json

import torch

from anomalib_raad.report import reconstruction
from anomalib_raad.report.reconstruction import draw_masks, write_report


class Model:
    def masks(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"learned": image[:, :1, ::16, ::16], "mask": 1 - image[:, :1, ::16, ::16]}


def test_the_picture_shows_the_masks_of_each_image_at_its_size(tmp_path, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(
        reconstruction, "draw_rows", lambda path, rows, scales: drawn.append((path, rows, scales)) or path
    )
    images = [torch.rand(1, 3, 32, 48) for _ in range(2)]
    assert draw_masks(tmp_path / "masks.png", Model(), images) == tmp_path / "masks.png"
    ((_, rows, scales),) = drawn
    assert scales == [["learned"], ["mask"]]
    for (name, row), image, number in zip(rows, images, (1, 2), strict=True):
        assert name == f"image {number}"
        assert list(row) == ["image", "learned", "mask"]
        assert row["learned"].shape == (32, 48)
        assert torch.equal(row["learned"][:16, 16:32], image[0, 0, 0, 16].expand(16, 16))


def test_the_report(tmp_path) -> None:
    write_report(tmp_path / "run", {"reconstructed": {"stage": "reconstructed"}}, {"backbone": "net"})
    found = json.loads((tmp_path / "run" / "agpnet.json").read_text())
    assert found == {"backbone": "net", "stages": [{"stage": "reconstructed"}]}
