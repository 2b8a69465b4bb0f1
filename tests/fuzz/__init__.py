"""Damaged and hostile device images: `images` makes pools, `mutations` spoils them."""
