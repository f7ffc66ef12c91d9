"""One module a quantizer: `load`, `quantize` (timed), `weights` (dequantized), `versions`."""
