# Shapes: N out_features, K in_features, G groups along K.
"""What vLLM 0.33 makes of a W4A8-FP8 checkpoint when it loads it, emulated in numpy (FORMATS.md section 1.4).

Per row r of the BF16 group scales S: c = max(max|S_r| / 448, 1 / (448 * 512)); a = e4m3(S / c); a = e4m3(a / 8);
channel scale 8 c; FP8 weight e4m3(q * a). Python and CUDA paths differ in dividing or multiplying by a reciprocal.
"""

import ml_dtypes
import numpy as np

_SMALLEST = np.float32(1.0 / (448.0 * 512.0))


def e4m3fn(x: np.ndarray) -> np.ndarray:
    """Saturating round to the E4M3FN grid; float32."""
    return np.clip(np.asarray(x, dtype=np.float32), -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


def load_split(scale_NG: np.ndarray, reciprocal: bool) -> tuple[np.ndarray, np.ndarray]:
    """FP8 group scales [N, G] and FP32 channel scales [N] from the BF16 scales of the file (given as float32)."""
    scale_NG = np.asarray(scale_NG, dtype=np.float32)
    peak_N = np.abs(scale_NG).max(axis=-1)
    if reciprocal:
        chunk_N = np.maximum(peak_N * np.float32(1 / 448), _SMALLEST)
        ratio_NG = scale_NG * (np.float32(1) / chunk_N)[:, None]
    else:
        chunk_N = np.maximum(peak_N / np.float32(448), _SMALLEST)
        ratio_NG = scale_NG / chunk_N[:, None]
    return e4m3fn(e4m3fn(ratio_NG) / np.float32(8)), chunk_N * np.float32(8)


def fp8_weights(level_NK: np.ndarray, group_NG: np.ndarray, group_size: int) -> np.ndarray:
    """e4m3(q * a) for signed levels; float32 [N, K]."""
    columns = level_NK.shape[1]
    a_NK = np.repeat(group_NG, group_size, axis=1)[:, :columns]
    return e4m3fn(level_NK.astype(np.float32) * a_NK)
