"""What ONNX Runtime itself makes of a layer in 8 bits: the dense form that needs no pruning."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ir import SparsecError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from .exporter.files import SessionSource

    Feeds = Mapping[str, NDArray[Any]]


def statically_quantized(source: SessionSource, runs: Sequence[Feeds], folder: Path) -> str:
    """The path of the model in QDQ form: int8 weights by output, uint8 activations.

    Args:
        source: bytes of a float model, or its path.
        runs: inputs by name, to calibrate on.
        folder: scratch space.

    Raises:
        SparsecError: ONNX Runtime's tool cannot quantise it.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Once(CalibrationDataReader):  # type: ignore[misc]
        """The runs, one time."""

        def __init__(self) -> None:
            self._left = iter(runs)

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            feeds = next(self._left, None)
            return None if feeds is None else dict(feeds)

    place = Path(tempfile.mkdtemp(dir=folder))
    if isinstance(source, bytes):
        (place / "float.onnx").write_bytes(source)
        source = str(place / "float.onnx")
    target = place / "int8.onnx"
    # It recommends preprocessing on the root logger, which is nobody's business here.
    before = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        quantize_static(
            source,
            target,
            Once(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    except Exception as error:  # whatever a model provokes in it
        words = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise SparsecError(f"ONNX Runtime's static quantisation failed: {words}") from error
    finally:
        logging.root.setLevel(before)
    return str(target)
