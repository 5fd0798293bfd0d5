"""Stage 2 of RAAD in plain torch: quantizers, scores, the recipe."""
