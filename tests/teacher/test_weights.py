import pickle
from pathlib import Path

import pytest
import torch
from anomalib.models.image.efficient_ad.torch_model import SmallPatchDescriptionNetwork
from safetensors.torch import save_file

from anomalib_raad.teacher import weights
from anomalib_raad.teacher.weights import load_teacher_, save_teacher


@pytest.fixture
def network() -> SmallPatchDescriptionNetwork:
    torch.manual_seed(0)
    return SmallPatchDescriptionNetwork(out_channels=384)


def test_bundled_teacher_is_intact_and_small(network) -> None:
    load_teacher_(network, "bundled", "small")
    assert all(parameter.isfinite().all() for parameter in network.parameters())
    path = Path(weights.__file__).with_name("teacher_small.safetensors")
    assert path.stat().st_size < 5.5e6


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_file_of_ones_own(network, tmp_path, suffix: str) -> None:
    path = tmp_path / f"teacher.{suffix}"
    state = network.state_dict()
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    other = SmallPatchDescriptionNetwork(out_channels=384)
    load_teacher_(other, path, "small")
    assert torch.equal(other.conv4.weight, network.conv4.weight)


def test_saved_teacher_loads_in_float16_precision(network, tmp_path) -> None:
    save_teacher(network, tmp_path / "t.safetensors")
    other = SmallPatchDescriptionNetwork(out_channels=384)
    load_teacher_(other, tmp_path / "t.safetensors", "small")
    assert torch.equal(other.conv1.weight, network.conv1.weight.half().float())


def test_official_weights_come_through_anomalibs_download(network, tmp_path, monkeypatch) -> None:
    def download(root: Path, info) -> None:
        assert info.name == "efficientad_pretrained_weights.zip"
        (root / "efficientad_pretrained_weights").mkdir()
        torch.save(network.state_dict(), root / "efficientad_pretrained_weights" / "pretrained_teacher_small.pth")

    monkeypatch.setattr(weights, "get_pretrained_weights_dir", lambda: tmp_path)
    monkeypatch.setattr(weights, "download_and_extract", download)
    other = SmallPatchDescriptionNetwork(out_channels=384)
    load_teacher_(other, "efficientad", "small")
    assert torch.equal(other.conv2.weight, network.conv2.weight)


def test_wrong_shape__error(network, tmp_path) -> None:
    save_file({**network.state_dict(), "conv4.weight": torch.zeros(128, 256, 4, 4)}, tmp_path / "t.safetensors")
    message = r"does not hold a small teacher: conv4.weight has shape \(128, 256, 4, 4\), needed is \(384, 256, 4, 4\)"
    with pytest.raises(ValueError, match=message):
        load_teacher_(network, tmp_path / "t.safetensors", "small")


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("content", [b"", b"not a teacher, but some text"])
def test_no_teacher__error(network, tmp_path, suffix: str, content: bytes) -> None:
    (tmp_path / f"t.{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=rf"t\.{suffix} (is no file of safetensors|was not written by torch)"):
        load_teacher_(network, tmp_path / f"t.{suffix}", "small")


def test_one_wrong_bit__error(network, tmp_path) -> None:
    torch.save(network.state_dict(), tmp_path / "t.pth")
    content = bytearray((tmp_path / "t.pth").read_bytes())
    content[len(content) // 2] ^= 64
    (tmp_path / "t.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"t\.pth is damaged"):
        load_teacher_(network, tmp_path / "t.pth", "small")


@pytest.mark.parametrize("content", [[1, 2], {"conv1.weight": 3}])
def test_no_state_dict__error(network, tmp_path, content) -> None:
    torch.save(content, tmp_path / "t.pth")
    with pytest.raises(ValueError, match="does not hold a state dict"):
        load_teacher_(network, tmp_path / "t.pth", "small")


def test_values_that_are_not_finite__error(network, tmp_path) -> None:
    network.conv2.bias.data[3] = torch.nan
    save_file(network.state_dict(), tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match=r"values of conv2\.bias are not finite"):
        load_teacher_(network, tmp_path / "t.safetensors", "small")


def test_changed_bundled_file__error(network, tmp_path, monkeypatch) -> None:
    original = Path(weights.__file__).with_name("teacher_small.safetensors")
    content = bytearray(original.read_bytes())
    content[-1] ^= 1
    (tmp_path / original.name).write_bytes(content)
    monkeypatch.setattr(weights, "files", lambda _: tmp_path)
    with pytest.raises(ValueError, match="is damaged: its SHA-256 is not"):
        load_teacher_(network, "bundled", "small")


def test_no_bundled_medium_teacher__error(network) -> None:
    with pytest.raises(ValueError, match="no bundled medium teacher"):
        load_teacher_(network, "bundled", "medium")


def test_nothing_is_unpickled(network, tmp_path) -> None:
    class Payload:
        def __reduce__(self):
            return print, ("unpickled",)

    torch.save({"conv1.weight": Payload()}, tmp_path / "t.pth")
    with pytest.raises(pickle.UnpicklingError):
        load_teacher_(network, tmp_path / "t.pth", "small")
