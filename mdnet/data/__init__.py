"""Images with ratings: SCUT-FBP5500, and drawn faces in its layout."""
