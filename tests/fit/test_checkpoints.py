import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from anomalib.metrics import AUPRO, Evaluator
from anomalib.models import Raad
from lightning.pytorch import Trainer

from anomalib_raad.fit.checkpoints import AtomicCheckpointIO


def test_an_interrupted_save_leaves_the_last_checkpoint(tmp_path, monkeypatch) -> None:
    path, writer = tmp_path / "new folder" / "model.ckpt", AtomicCheckpointIO()
    writer.save_checkpoint({"step": torch.tensor(1)}, path)

    def cut_off(checkpoint, file) -> None:
        file.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(torch, "save", cut_off)
        with pytest.raises(OSError, match="No space left"):
            writer.save_checkpoint({"step": torch.tensor(2)}, path)
    assert writer.load_checkpoint(path) == {"step": torch.tensor(1)}
    writer.save_checkpoint({"step": torch.tensor(3)}, path)
    assert writer.load_checkpoint(path) == {"step": torch.tensor(3)}
    assert list(path.parent.iterdir()) == [path]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A checkpoint of an untrained model."""
    folder = tmp_path_factory.mktemp("checkpoint")
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=folder)
    trainer.strategy.connect(Raad(visualizer=False))
    trainer.save_checkpoint(folder / "model.ckpt")
    return folder / "model.ckpt"


class Payload:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_other_metrics_than_those_of_the_training(small_raad, tmp_path) -> None:
    """anomalib's AUPRO has its limit in the state dict."""
    regions = Evaluator(test_metrics=[AUPRO(fields=["anomaly_map", "gt_mask"])])
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    trainer.strategy.connect(small_raad(evaluator=regions))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    assert "evaluator.test_metrics.0.fpr_limit" in torch.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"]
    without = Raad.load_from_checkpoint(tmp_path / "model.ckpt", evaluator=False)
    trainer.strategy.connect(without)
    trainer.save_checkpoint(tmp_path / "without.ckpt")
    for path in (tmp_path / "model.ckpt", tmp_path / "without.ckpt"):
        Raad.load_from_checkpoint(path)
        Raad.load_from_checkpoint(path, evaluator=regions)


@pytest.fixture(params=["load_from_checkpoint", "trainer"])
def load(request, small_raad, engine, cells) -> Callable:
    """Loads a checkpoint in either of anomalib's ways."""
    if request.param == "load_from_checkpoint":
        return Raad.load_from_checkpoint
    return lambda path: engine(logger=False).predict(small_raad(), data_path=cells / "bad", ckpt_path=path)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_one_wrong_bit__error(checkpoint: Path, tmp_path, load: Callable, share: float) -> None:
    content = bytearray(checkpoint.read_bytes())
    content[int(share * len(content))] ^= 64
    (tmp_path / "model.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.ckpt is damaged: the checksum of .* is wrong"):
        load(tmp_path / "model.ckpt")


@pytest.mark.parametrize("length", [0, 1000, -1000])
def test_cut_off__error(checkpoint: Path, tmp_path, load: Callable, length: int) -> None:
    (tmp_path / "model.ckpt").write_bytes(checkpoint.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"model\.ckpt was not written by torch.save, or is cut off"):
        load(tmp_path / "model.ckpt")


def test_nothing_is_unpickled(checkpoint: Path, tmp_path, load: Callable) -> None:
    content = torch.load(checkpoint, weights_only=True)
    torch.save(content | {"callbacks": Payload(tmp_path / "trace")}, tmp_path / "model.ckpt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        load(tmp_path / "model.ckpt")
    (tmp_path / "model.ckpt").write_bytes(pickle.dumps(Payload(tmp_path / "trace")))
    with pytest.raises(ValueError, match=r"was not written by torch\.save"):
        load(tmp_path / "model.ckpt")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("other", [0, None])
def test_another_format__error(checkpoint: Path, tmp_path, load: Callable, other: int | None) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["Raad"]["format"] = other
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=f"the checkpoint's format is {other}, this version reads 4; install"):
        load(tmp_path / "model.ckpt")


def test_weights_that_are_not_finite_are_not_saved(tmp_path) -> None:
    model = Raad(visualizer=False)
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    trainer.strategy.connect(model)
    model.model.student.conv2.weight.data[0, 0, 0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match=r"values of student\.conv2\.weight are not finite"):
        trainer.save_checkpoint(tmp_path / "model.ckpt")
    assert not (tmp_path / "model.ckpt").exists()
