"""What touches the disk: pictures, videos, weights, and the folders that a run writes."""
