"""The shelf of parts: every model in this package is put together from these modules.

Shapes are written with the letters B batch, T length (S for keys), H query heads,
K key/value heads, D `d_model`, Dh `head_dim`, V vocabulary.

Book: attention
"""
