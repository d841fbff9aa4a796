"""What the method is compared with, on the same data and metrics."""
