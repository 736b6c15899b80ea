"""What the numbers are: specs, transforms, towers, losses, checkpoints. Pure torch: no ray, no lance, no duckdb.

Shape suffixes used in names here and in pipeline/metrics.py: B batch, N candidates, Q queries, D embedding,
W backbone width, L tokens, C H W image, S audio samples, F frames, M mel bins.
"""
