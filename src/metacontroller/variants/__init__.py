"""What the paper does not have and no preset needs; found by name, see docs/variants.md."""
