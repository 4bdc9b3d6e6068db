"""What our GPU-only code uses of pinned packages, checked against their sources without importing them."""
