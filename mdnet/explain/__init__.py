"""Where a score comes from: occlusion, attention, and how far they agree."""
