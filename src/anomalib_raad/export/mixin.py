"""Export to OpenVINO of models in floating point, quantized afterwards where a user wants it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from anomalib.data import AnomalibDataModule
from anomalib.deploy import CompressionType, ExportType
from anomalib.models.components.base.export_mixin.utils import create_export_root

from anomalib_raad.post_processing import check_thresholds

from .installed import check_installed

CONVOLUTIONS = ("Convolution", "ConvolutionBackpropData", "GroupConvolution", "GroupConvolutionBackpropData")
LINEAR = ("MatMul",)

if TYPE_CHECKING:
    from anomalib.models.components import AnomalibModule as Base
else:
    Base = object  # the model derives from AnomalibModule itself as well


class PostTrainingExport(Base):
    """Writes the graph of a model as it is, or in 8 bits with ranges from normal training images.

    Attributes:
        INTEGER: OpenVINO's types of the layers that ``INT8_PTQ`` quantizes.
    """

    INTEGER: ClassVar[tuple[str, ...]] = CONVOLUTIONS

    def to_openvino(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Path:
        """Export to OpenVINO IR, in floating point or quantized to 8 bits on normal training images.

        Args:
            export_root: The IR goes into ``weights/openvino`` in this folder.
            model_file_name: Name of the files.
            input_size: Height and width of the images; ``None``: any.
            compression_type: ``None``, ``FP16`` for weights in float16, or ``INT8_PTQ`` for layers in integers.
                With the others, and with options for anomalib's conversion, anomalib exports.
            datamodule: For ``INT8_PTQ``, whose ranges come from its training images; anomalib would take those of its
                validation, which may be test images.
            args: The other arguments of anomalib's method.
            kwargs: Like ``args``.

        Returns:
            Path of the ``.xml`` file.

        Raises:
            ValueError: If the model is not finished, or there is no datamodule.
            ModuleNotFoundError: If OpenVINO or NNCF is not installed.
        """
        check_thresholds(self.post_processor)
        plain = args or kwargs.get("ov_kwargs") or kwargs.get("onnx_kwargs")
        if plain or compression_type in {CompressionType.INT8, CompressionType.INT8_ACQ}:
            return super().to_openvino(
                export_root, model_file_name, input_size, compression_type, datamodule, *args, **kwargs
            )
        check_installed("openvino", *(["nncf"] if compression_type == CompressionType.INT8_PTQ else []))
        from .openvino import convert, save_ir  # noqa: PLC0415  # optional parts of anomalib
        from .post_training import quantize  # noqa: PLC0415

        path = create_export_root(export_root, ExportType.OPENVINO) / f"{model_file_name}.xml"
        graph = convert(self, input_size)
        if compression_type == CompressionType.INT8_PTQ:
            graph = quantize(graph, datamodule, self.INTEGER)
        save_ir(graph, path, half=compression_type == CompressionType.FP16)
        return path
