"""What is on disk, and how it is found again. Knows nothing of the method."""
