"""An image file → pixels: decoding, colour, face crop, the one preprocessing."""
