import json

from anomalib_raad.quantization.allocation import Allocation
from anomalib_raad.quantization.recipe import quantize_
from anomalib_raad.report.quantization import write_report


def test_report(untrained, tmp_path) -> None:
    model, images = untrained
    outcome = quantize_(model, images[:1], images[:1], Allocation(bits=4))
    stages = [{"stage": "trained", "attention_bias_st": 1.2}, {"stage": "quantized"}]
    write_report(tmp_path, model, outcome, stages)
    report = json.loads((tmp_path / "quantization.json").read_text())
    layers = {layer["layer"]: layer for layer in report["layers"]}
    conv2 = layers["teacher.conv2"]
    assert (conv2["bits"], conv2["bytes"]) == (4, 128 * 256 * 16 // 2)
    assert conv2["score"] == outcome.scores["conv2"]
    assert conv2["input_scale"] == float(model.teacher.conv2.input_quantizer.scale)
    assert layers["autoencoder.encoder.enconv1"]["score"] is None
    sizes = [layer["weights"] for layer in layers.values()]
    expected = sum(layer["weights"] * layer["bits"] for layer in layers.values()) / sum(sizes)
    assert report["average_bits"] == expected
    assert report["stages"] == stages
    assert (tmp_path / "quantization.png").stat().st_size > 10_000
