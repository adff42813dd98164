"""Benchmarks of flash_attn_ext against torch's scaled_dot_product_attention: `python -m benchmarks`."""
