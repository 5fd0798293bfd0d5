import pytest
import torch

from anomalib_raad.checkpoints import AtomicCheckpointIO


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
